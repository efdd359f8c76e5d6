"""save_memory: the gradients of the same model without it, to the bit, and fewer bytes kept for backward."""

import copy
import gc
import pickle

import pytest
import torch
import torch.nn.functional as F
from memory_models import (
    Residual,
    Steps,
    activate,
    assert_equal,
    backward,
    check,
    images,
    kept_bytes,
    relu,
    reseeded,
    vary,
)
from torch import nn

import syncbn
from syncbn import private
from syncbn.memory import save
from syncbn.memory.boxes import Box

pytestmark = pytest.mark.skipif(not private.can_see_hooks, reason="before torch 2.7 save_memory does nothing")


MODULES = {
    "relu": nn.ReLU, "relu6": nn.ReLU6, "leaky": lambda **where: nn.LeakyReLU(0.1, **where), "silu": nn.SiLU,
    "hardswish": nn.Hardswish, "gelu": lambda **_: nn.GELU(), "gelu_tanh": lambda **_: nn.GELU("tanh"),
}  # fmt: skip
FUNCTIONS = {
    "relu": F.relu, "relu_in_place": F.relu_, "torch_relu": torch.relu, "relu6": F.relu6, "silu": F.silu,
    "gelu": F.gelu, "leaky": F.leaky_relu, "hardswish": F.hardswish, "method": torch.Tensor.relu,
}  # fmt: skip


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("name", MODULES)
def test_each_activation_as_a_module(name, in_place, train):
    net = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), MODULES[name](inplace=in_place), nn.Conv2d(8, 4, 3)]
    ours, theirs = check(vary(nn.Sequential(*net)).train(train), images())
    one_map, small = 4 * 4 * 8 * 10 * 10, 4 * 200
    num_maps = 2 if name in ("silu", "hardswish", "gelu", "gelu_tanh") else 1  # those save what goes in, too
    num_maps += name == "relu6" or (name == "leaky" and not in_place)  # and these, if that is still there
    assert num_maps * one_map - small <= theirs - ours <= num_maps * one_map


@pytest.mark.parametrize("name", FUNCTIONS)
def test_each_activation_as_a_function(name):
    check(vary(Steps(lambda model, y: FUNCTIONS[name](y))), images())


@pytest.mark.parametrize("how", ["in place", "left", "right", "twice"])
def test_residual_sums(how):
    model = vary(Residual(how))
    ours, theirs = check(model, images())
    one_map = 4 * 4 * 4 * 12 * 12
    assert theirs - ours > (8 - 2) * one_map  # all of 8 but one in five


def test_a_chain_of_sums_holds_few_maps_at_once():
    """Without an end, backward through a long stage would compute, and hold, all of its maps at its very beginning."""
    model = syncbn.save_memory(vary(Residual("right", length=20)))
    backward(model, images())
    y = model(images())
    boxes = [box for box in gc.get_objects() if type(box) is Box]
    depths = [box.depth for box in boxes]
    assert 0 < max(depths) <= 4
    y.square().mean().backward()
    assert all(box.ready is None for box in boxes)  # each was dropped after its last use


def test_bytes_of_torchvisions_models():
    """So much of a plain step's bytes is left, parameters left out."""
    torchvision = import_torchvision()
    for name, most in (("resnet18", 0.62), ("mobilenet_v3_small", 0.55)):
        torch.manual_seed(0)
        ours, theirs = check(getattr(torchvision.models, name)().requires_grad_(), images(4, 3, 64, 64), run=reseeded)
        fc = 4 * 1000 * 1024  # views of parameters are counted in both
        assert (ours - fc) / (theirs - fc) <= most


def import_torchvision():
    reason = "torchvision does not import beside this torch"
    return pytest.importorskip("torchvision", reason=reason, exc_type=ImportError)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "most"), [("resnet50", 0.62), ("densenet121", 0.56), ("efficientnet_b0", 0.5), ("vgg11_bn", 0.75)]
)
def test_bytes_of_larger_models(name, most):
    torchvision = import_torchvision()
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(num_classes=10)
    model.train(name != "efficientnet_b0")  # whose stochastic depth hides some sums
    ours, theirs = check(model, images(4, 3, 96, 96), run=reseeded)
    assert ours / theirs <= most


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_dtypes_and_memory_formats(dtype, channels_last):
    model, x = vary(Residual("in place", 2)).to(dtype), images(dtype=dtype)
    if channels_last:
        model, x = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    check(model, x)


def test_autocast():
    def run(model):
        def forward(x):
            with torch.autocast("cpu", torch.bfloat16):
                return model(x).float()

        return forward

    check(vary(Residual("right", 2)), images(), run=run)


OTHER_LAYERS = {
    "no affine": lambda: nn.BatchNorm2d(8, affine=False),
    "no running statistics": lambda: nn.BatchNorm2d(8, track_running_stats=False),
    "cumulative": lambda: nn.BatchNorm2d(8, momentum=None),
    "syncbn": lambda: syncbn.SyncBatchNorm(8),
    "frozen bias": lambda: with_frozen(nn.BatchNorm2d(8), "bias"),
    "frozen weight": lambda: with_frozen(nn.BatchNorm2d(8), "weight"),
    "frozen": lambda: with_frozen(nn.BatchNorm2d(8), "weight", "bias"),
    "parametrized bias": lambda: parametrized(nn.BatchNorm2d(8)),
}


def with_frozen(layer, *names):
    for name in names:
        getattr(layer, name).requires_grad_(False)
    return layer


def parametrized(layer):
    class Half(nn.Module):
        def forward(self, value):
            return value / 2

    torch.nn.utils.parametrize.register_parametrization(layer, "bias", Half(), unsafe=True)
    return layer


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", OTHER_LAYERS)
def test_other_layers(name, train):
    # a parametrized bias is another tensor each time it is read: nothing is known of the one that was used
    is_known = name != "parametrized bias"
    check(vary(Steps(relu, OTHER_LAYERS[name]())).train(train), images(), smaller=is_known)


@pytest.mark.parametrize("frozen", [True, False])
def test_a_bias_of_0_does_not_hide_another_bias(frozen):
    theirs, x = Steps(activate, Doubled(8)), images()
    theirs.norm.bias.requires_grad_(not frozen)
    ours = syncbn.save_memory(copy.deepcopy(theirs))
    for _ in range(3):
        assert_equal(backward(ours, x), backward(theirs, x))
        for each in (ours, theirs):
            each.norm.bias.data += 0.3


class Doubled(nn.BatchNorm2d):
    def forward(self, x):
        return F.batch_norm(x, None, None, self.weight, self.bias * 2, True)


def test_a_parametrization_is_not_run_again():
    class Noisy(nn.Module):
        def forward(self, value):
            return value + torch.randn_like(value)

    model = Steps(lambda model, y: F.dropout(model.act(y), 0.5))
    torch.nn.utils.parametrize.register_parametrization(model.norm, "bias", Noisy())
    theirs, ours = copy.deepcopy(model), syncbn.save_memory(model)
    assert_equal(backward(ours, images(), reseeded(ours)), backward(theirs, images(), reseeded(theirs)))


@pytest.mark.parametrize("dims", [1, 3])
def test_other_dimensions(dims):
    conv, norm = getattr(nn, f"Conv{dims}d"), getattr(nn, f"BatchNorm{dims}d")
    model = nn.Sequential(conv(3, 8, 3), norm(8), nn.ReLU(), conv(8, 2, 1))
    check(vary(model), images(4, 3, *[7] * dims))


def test_maps_of_two_dimensions_and_flat_views():
    model = nn.Sequential(nn.Linear(6, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 3))
    check(vary(model), images(50, 6))
    conv = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.SiLU(), nn.Flatten(), nn.Linear(400, 3))
    check(vary(conv), images())  # the view is kept, but not what SiLU saves


def test_a_layer_used_twice_and_a_model_called_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

        def forward(self, x):
            for _ in range(3):
                x = F.relu(self.norm(self.conv(x)))
            return self.conv(x)

    check(vary(Twice()), images())
    check(vary(Twice()), images(), run=lambda model: lambda x: model(x) + 2 * model(x * 3))


def test_timms_fused_layers_and_blocks():
    timm = pytest.importorskip("timm", reason="timm is not installed")
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=5)
    ours, theirs = check(model, images(4, 3, 64, 64))
    assert ours < 0.75 * theirs
    fused = nn.Sequential(nn.Conv2d(3, 8, 3), timm.layers.BatchNormAct2d(8), nn.Conv2d(8, 4, 3))
    check(vary(fused), images())
    check(vary(syncbn.convert(copy.deepcopy(fused))), images())


@pytest.mark.parametrize("activation", [nn.SiLU, nn.Hardswish, nn.ReLU6])
def test_timms_fused_layers_save_as_much_as_two_layers(activation):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    apart = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), activation(inplace=True), nn.Conv2d(8, 4, 3))
    fused = nn.Sequential(nn.Conv2d(3, 8, 3), timm.layers.BatchNormAct2d(8, act_layer=activation), nn.Conv2d(8, 4, 3))
    assert abs(check(vary(apart), images())[0] - check(vary(fused), images())[0]) < 1000


def test_keywords_and_normalized_maps_of_computed_ones():
    check(vary(Steps(relu)), images(), run=lambda model: lambda x: model(x=x))
    two = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)
    )
    ours, theirs = check(vary(two), images())
    assert theirs - ours > 1.9 * 4 * 4 * 8 * 10 * 10


def test_running_statistics_change_between_two_forward_passes():
    model = vary(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 3))).eval()
    theirs, ours = copy.deepcopy(model), syncbn.save_memory(model)
    gradients = []
    for each in (ours, theirs):
        y = each(images())
        each.train()(images(seed=3))
        y.square().sum().backward()
        gradients.append([p.grad for p in each.parameters()])
    assert_equal(*gradients)


def test_revert_copies_and_pickles(tmp_path):
    model = vary(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)))
    before = [sorted(module.__dict__) for module in model.modules()]
    keys, x = list(model.state_dict()), images()
    plain = kept_bytes(model, x)
    assert syncbn.save_memory(syncbn.save_memory(model)) is model
    kept_bytes(model, x)
    assert list(model.state_dict()) == keys
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), syncbn.convert(copy.deepcopy(model))]
    for each in [model, *copies]:
        assert kept_bytes(each, x) < plain
        assert syncbn.revert(each) is each
        assert kept_bytes(each, x) == plain
        assert [sorted(module.__dict__) for module in each.modules()] == before
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in each.modules())
    assert kept_bytes(syncbn.save_memory(syncbn.convert(model)), x) < plain


def test_a_model_without_batchnorm_is_told():
    with pytest.warns(UserWarning, match="found no BatchNorm layer in this Linear"):
        syncbn.save_memory(nn.Linear(2, 2))


def test_only_a_model_is_taken():
    with pytest.raises(TypeError, match="expected a model"):
        syncbn.save_memory([nn.BatchNorm2d(3)])


def test_without_the_private_name_it_does_nothing_and_says_so(monkeypatch):
    monkeypatch.setattr(save.private, "can_see_hooks", False)
    monkeypatch.setattr(save, "_told", set())
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())
    with pytest.warns(UserWarning, match="does nothing here: it needs torch 2.7"):
        assert syncbn.save_memory(model) is model
    assert not model._forward_hooks
