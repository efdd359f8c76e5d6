"""save_memory: the gradients of the same model without it, to the bit, and fewer bytes kept for backward."""

import copy
import gc
import pickle
import threading
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from test_functional import Collectives
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

import syncbn
from syncbn.memory import save
from syncbn.memory.boxes import Box

pytestmark = pytest.mark.skipif(
    not hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks"),
    reason="before torch 2.7 save_memory does nothing",
)
MODULES = {
    "relu": nn.ReLU, "relu6": nn.ReLU6, "leaky": lambda **where: nn.LeakyReLU(0.1, **where), "silu": nn.SiLU,
    "hardswish": nn.Hardswish, "gelu": lambda **_: nn.GELU(), "gelu_tanh": lambda **_: nn.GELU("tanh"),
}  # fmt: skip
FUNCTIONS = {
    "relu": F.relu, "relu_in_place": F.relu_, "torch_relu": torch.relu, "relu6": F.relu6, "silu": F.silu,
    "gelu": F.gelu, "leaky": F.leaky_relu, "hardswish": F.hardswish, "method": torch.Tensor.relu,
}  # fmt: skip


class Function(nn.Module):
    """A convolution, a norm and an activation as users write them, with no module around norm and activation."""

    def __init__(self, norm, activation):
        super().__init__()
        self.conv, self.norm, self.next = nn.Conv2d(3, 8, 3), norm, nn.Conv2d(8, 4, 3)
        self.activation = activation

    def forward(self, x):
        return self.next(self.activation(self.norm(self.conv(x))))


class Residual(nn.Module):
    """A chain of residual sums, as in ResNet; ``how`` is how the sum is written."""

    def __init__(self, how, length=7, activation=nn.ReLU):
        super().__init__()
        self.how, self.first = how, nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), activation())
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)) for _ in range(length)
        )
        self.activation, self.last = activation(), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            y = block(x)
            if self.how == "in place":
                y += x
            elif self.how == "twice":
                y = y + x + x
            else:
                y = x + y if self.how == "left" else torch.add(y, x)
            x = self.activation(y)
        return self.last(x)


def vary(model, seed=1):
    """Weights, biases and running statistics other than 1 and 0, with which a rounding may not show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                for name, value in [*layer.named_parameters(), *layer.named_buffers()]:
                    if value.is_floating_point():
                        shift = 1.0 if "bias" in name else 0.1
                        value.copy_(torch.rand(value.shape, generator=generator) + shift)
    return model


def images(*shape, seed=2, dtype=None):
    return torch.randn(*(shape or (4, 3, 12, 12)), generator=torch.Generator().manual_seed(seed)).to(dtype)


def kept_bytes(model, x):
    """Bytes of new storages that the graph holds after a forward pass, parameters left out: not by hooks."""
    refs = {}

    class Mode(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, torch.Tensor):
                    storage = tensor.untyped_storage()
                    refs[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
            return out

    known = {t.untyped_storage()._cdata for t in [x, *model.parameters(), *model.buffers()]}
    with Mode():
        y = model(x)
    alive = sum(size for cdata, (ref, size) in refs.items() if cdata not in known and not ref.expired())
    del y
    return alive


def backward(model, x, run=None):
    """Output and gradients of a step whose loss depends on every output differently."""
    model.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_(x.is_floating_point())
    y = (model if run is None else run)(x)
    (y * torch.linspace(-1, 2, y.numel()).view_as(y).to(y.dtype)).sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters()), *(b.clone() for b in model.buffers())]


def assert_equal(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        assert a is None or (a.dtype == b.dtype and torch.equal(a, b))


def check(model, x, smaller=True, run=None, steps=2):
    """Compare some steps with those of a copy that keeps all; return both numbers of bytes."""
    theirs, ours = copy.deepcopy(model), syncbn.save_memory(model)
    save.stop_saving(theirs)
    for _ in range(steps):  # the first one finds out which formulas hold
        assert_equal(backward(ours, x, run and run(ours)), backward(theirs, x, run and run(theirs)))
    sizes = kept_bytes(ours, x), kept_bytes(theirs, x)
    assert (sizes[0] < sizes[1]) == smaller
    return sizes


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
    check(vary(Function(nn.BatchNorm2d(8), FUNCTIONS[name])), images())


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
    y.sum().backward()
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


def reseeded(model):
    """For dropout."""

    def run(x):
        torch.manual_seed(0)
        return model(x)

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "most"), [("resnet50", 0.62), ("densenet121", 0.56), ("efficientnet_b0", 0.5), ("vgg11_bn", 0.75)]
)
def test_bytes_of_larger_models(name, most):
    torchvision = import_torchvision()
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(num_classes=10)
    model.eval() if name == "efficientnet_b0" else None  # stochastic depth hides some sums from it
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
    check(vary(Function(OTHER_LAYERS[name](), F.relu)).train(train), images(), smaller=is_known)


def test_a_layer_that_changes_its_bias_is_left_alone():
    class Doubled(nn.BatchNorm2d):
        def forward(self, x):
            return F.batch_norm(x, None, None, self.weight, self.bias * 2, True)

    check(vary(Function(Doubled(8), F.relu)), images(), smaller=False)


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


def double_backward(model, x):
    model.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    y = model(x)
    [gradient] = torch.autograd.grad((y**3).sum(), x, create_graph=True)
    (gradient**2).sum().backward()
    return [gradient.detach(), x.grad, *(p.grad for p in model.parameters())]


def several_passes(model, x):
    model.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    loss = (model(x) ** 3).sum()
    passes = [torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(3)]
    loss.backward()
    return [*passes, x.grad, *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("run", [double_backward, several_passes])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.SiLU])
def test_several_backward_passes(run, activation):
    model = vary(Residual("right", 3, activation).double())
    theirs, x = copy.deepcopy(model), images(dtype=torch.float64)
    syncbn.save_memory(model)
    assert_equal(run(model, x), run(theirs, x))
    assert_equal(run(model, x), run(theirs, x))


class Checkpointed(nn.Module):
    """Parts of a model, some of them checkpointed; an activation stands at the edge of each."""

    def __init__(self, use_reentrant):
        super().__init__()
        self.parts = nn.ModuleList(
            nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU()) for _ in range(4)
        )
        self.use_reentrant = use_reentrant

    def forward(self, x):
        for i, part in enumerate(self.parts):
            x = checkpoint(part, x, use_reentrant=self.use_reentrant) if i % 2 else part(x)
        return nn.functional.conv2d(x, self.parts[0][0].weight)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoints_within_and_around_a_model(use_reentrant):
    theirs, x = vary(Checkpointed(use_reentrant)), images()
    ours = syncbn.save_memory(copy.deepcopy(theirs))
    for _ in range(2):
        assert_equal(backward(ours, x), backward(theirs, x))

    theirs = vary(Residual("right", 3))
    ours = syncbn.save_memory(copy.deepcopy(theirs))

    def around(model):
        return lambda x: checkpoint(model, x, use_reentrant=use_reentrant)

    assert_equal(backward(ours, x, around(ours)), backward(theirs, x, around(theirs)))


def test_hooks_of_others():
    theirs, x = vary(Residual("right", 2)), images()
    ours = syncbn.save_memory(copy.deepcopy(theirs))
    backward(ours, x), backward(theirs, x)
    counted = {}
    for model in (ours, theirs):
        saved = counted[model] = []

        def pack(tensor, saved=saved):
            saved.append(tensor.nbytes)
            return tensor * 1

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = model(x)
        y.square().sum().backward()
    assert_equal([p.grad for p in ours.parameters()], [p.grad for p in theirs.parameters()])
    assert 0 < sum(counted[ours]) < sum(counted[theirs])
    with torch.autograd.graph.save_on_cpu():
        y = ours(x)
    y.sum().backward()
    with torch.autograd.graph.disable_saved_tensors_hooks("none here"):
        ours(x).sum().backward()


def changed(model, x, change):
    y = model(x)
    with torch.no_grad():
        change(model)
    y.square().sum().backward()


def test_what_is_changed_before_backward_is_refused_as_without():
    holder = {}

    class Holding(nn.Sequential):
        def forward(self, x):
            for module in self:
                x = module(x)
                holder[module] = x
            return x

    model = Holding(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 3))
    for change in (
        lambda model: model[1].weight.mul_(2),
        lambda model: holder[model[0]].add_(1),
        lambda model: model[3].weight.mul_(2),
    ):
        for each in (copy.deepcopy(model), syncbn.save_memory(copy.deepcopy(model))):
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                changed(each, images().requires_grad_(), change)
    theirs, ours = copy.deepcopy(model), syncbn.save_memory(copy.deepcopy(model))
    for each in (theirs, ours):  # of these autograd keeps no more than numbers of the forward pass
        changed(each, images(), lambda model: model[1].bias.mul_(2))
    assert_equal([p.grad for p in ours.parameters()], [p.grad for p in theirs.parameters()])


def test_a_map_that_is_changed_before_the_next_module_is_not_taken_for_another():
    class Changing(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.act, self.next = (
                nn.Conv2d(3, 8, 3),
                nn.BatchNorm2d(8),
                nn.SiLU(),
                nn.Conv2d(8, 2, 3),
            )

        def forward(self, x):
            y = self.act(self.norm(self.conv(x)))
            y *= 2
            y[:, 0] = 1
            return self.next(y) + self.next(y.flip(1))

    check(vary(Changing()), images())


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


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_forward_pass_that_fails_leaves_nothing_behind(error):
    class Failing(nn.Module):
        fails = True

        def forward(self, x):
            if self.fails:
                raise error
            return x

    failing = Failing()
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), failing, nn.ReLU(), nn.Conv2d(8, 2, 3))
    syncbn.save_memory(model)
    with pytest.raises(error):
        model(images())
    failing.fails = False
    check(model, images())
    assert not torch._C._autograd._top_saved_tensors_default_hooks(True)


def test_threads_have_forward_passes_of_their_own():
    model, x = syncbn.save_memory(vary(Residual("right", 3)).eval()), images()
    expected, found = model(x).detach(), []
    backward(model, x)

    def work():
        for _ in range(5):
            y = model(x)
            found.append((y.detach(), *torch.autograd.grad(y.square().sum(), list(model.parameters()))))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 15
    assert all(torch.equal(y, expected) for y, *_ in found)
    for each in found[1:]:
        assert_equal(each, found[0])


def test_nothing_is_done_where_nothing_is_saved():
    model = syncbn.save_memory(vary(Residual("right", 2)).eval())
    with torch.no_grad():
        assert model(images()).grad_fn is None
    with torch.inference_mode():
        model(images())
    plain = vary(Residual("right", 2)).eval()
    torch.func.vmap(lambda x: model(x[None]))(images())
    parameters = dict(model.named_parameters())
    gradient = torch.func.grad(lambda p: torch.func.functional_call(model, p, images()).square().sum())(parameters)
    expected = torch.func.grad(lambda p: torch.func.functional_call(plain, p, images()).square().sum())(parameters)
    assert_equal([*gradient.values()], [*expected.values()])


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


def test_compiled_it_does_nothing_and_says_so_once(monkeypatch):
    monkeypatch.setattr(save, "_told", set())
    theirs, x = vary(Residual("right", 2)), images()
    ours = syncbn.save_memory(copy.deepcopy(theirs))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
        found = backward(ours, x, compiled), backward(ours, x, compiled)
    told = [str(warning.message) for warning in caught if "save_memory" in str(warning.message)]
    assert told == ["syncbn.save_memory does nothing here: torch.compile recomputes by itself what costs little."]
    expected = backward(theirs, x)
    torch.testing.assert_close(found[0][:3], expected[:3])
    torch._dynamo.reset()


def of_ranks(rank, world_size, kind):
    torch.manual_seed(0)
    model = vary(Residual("in place", 6))
    xs = images(2 * world_size, 3, 8, 8).chunk(world_size)[rank]
    results = []
    for saves in (False, True):
        each = syncbn.convert(copy.deepcopy(model))
        if saves:
            syncbn.save_memory(each)
        run = torch.nn.parallel.DistributedDataParallel(each) if kind == "ddp" else each
        if kind == "fsdp2":
            fully_shard = pytest.importorskip("torch.distributed.fsdp").fully_shard
            for block in each.blocks:
                fully_shard(block)
            fully_shard(each)
        backward(each, xs, run)
        with Collectives() as seen:
            found = backward(each, xs, run)
        results.append((found, len(seen.seen), kept_bytes(each, xs)))
        del run
    (theirs, num_theirs, bytes_theirs), (ours, num_ours, bytes_ours) = results
    if kind == "fsdp2":
        ours, theirs = ([getattr(t, "_local_tensor", t) for t in found] for found in (ours, theirs))
    assert_equal(ours, theirs)
    assert num_ours == num_theirs
    assert bytes_ours < bytes_theirs
    return True


@pytest.mark.parametrize("kind", ["ddp", "bare", "fsdp2"])
def test_over_ranks_with_the_same_collectives(run, kind):
    assert run(of_ranks, 2, kind) == [True, True]


class Steps(nn.Module):
    """conv, norm, and what a function does with them."""

    def __init__(self, between, norm=None):
        super().__init__()
        self.conv, self.norm, self.next = nn.Conv2d(3, 8, 3), norm or nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3)
        self.act, self.between = nn.ReLU(), between

    def forward(self, x):
        return self.next(self.between(self, self.norm(self.conv(x))))


def clamp(model, y):
    with torch.no_grad():
        y.clamp_(max=0.5)
    return model.act(y)


def quantize(model, y):
    y.data = (y.data * 4).round() / 4
    return model.act(y)


@pytest.mark.parametrize("between", [clamp, quantize])
def test_a_change_that_autograd_did_not_record(between):
    check(vary(Steps(lambda model, y: model.act(y))), images())  # the kind is known
    theirs, x = vary(Steps(between)), images()
    ours = syncbn.save_memory(copy.deepcopy(theirs))
    assert_equal(backward(ours, x), backward(theirs, x))


class Doubled(nn.BatchNorm2d):
    def forward(self, x):
        return F.batch_norm(x, None, None, self.weight, self.bias * 2, True)


@pytest.mark.parametrize("frozen", [True, False])
def test_a_bias_of_0_does_not_hide_another_bias(frozen):
    theirs, x = Steps(lambda model, y: model.act(y), Doubled(8)), images()
    theirs.norm.bias.requires_grad_(not frozen)
    ours = syncbn.save_memory(copy.deepcopy(theirs))
    for _ in range(3):
        assert_equal(backward(ours, x), backward(theirs, x))
        for each in (ours, theirs):
            each.norm.bias.data += 0.3


def test_a_parametrization_is_not_run_again():
    class Noisy(nn.Module):
        def forward(self, value):
            return value + torch.randn_like(value)

    model = Steps(lambda model, y: F.dropout(model.act(y), 0.5))
    torch.nn.utils.parametrize.register_parametrization(model.norm, "bias", Noisy())
    theirs, ours = copy.deepcopy(model), syncbn.save_memory(model)
    assert_equal(backward(ours, images(), reseeded(ours)), backward(theirs, images(), reseeded(theirs)))


def no_hooks():
    return not torch._C._autograd._top_saved_tensors_default_hooks(True)


def test_recursion_through_a_checkpoint():
    class Recursive(Steps):
        def forward(self, x, depth=2):
            x = self.act(self.norm(F.pad(self.conv(x), (1, 1, 1, 1))[:, :3]))
            return x if depth == 0 else checkpoint(self, x, depth - 1, use_reentrant=False)

    theirs = Recursive(None, nn.BatchNorm2d(3))
    ours = syncbn.save_memory(copy.deepcopy(theirs))
    for _ in range(3):
        assert_equal(backward(ours, images())[:3], backward(theirs, images())[:3])
        assert no_hooks()


def test_after_an_interrupt_another_model_is_watched():
    def interrupt(model, y):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        syncbn.save_memory(Steps(interrupt))(images())
    check(vary(Steps(lambda model, y: model.act(y))), images())
    assert no_hooks()


def test_a_model_is_freed_without_the_garbage_collector():
    model = syncbn.save_memory(Residual("right", 2))
    backward(model, images())
    model = weakref.ref(model)
    assert model() is None


def test_forward_mode():
    theirs, x = vary(Residual("right", 2)).eval(), images()
    ours = syncbn.save_memory(copy.deepcopy(theirs))
    tangents = []
    for model in (ours, theirs):
        with torch.autograd.forward_ad.dual_level():
            y = model(torch.autograd.forward_ad.make_dual(x.clone().requires_grad_(), torch.ones_like(x)))
            tangents.append(torch.autograd.forward_ad.unpack_dual(y).tangent.detach())
    assert_equal(*[[tangent] for tangent in tangents])


def test_layers_that_checkpoint_themselves():
    class Norm(nn.BatchNorm2d):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=False)

    class Act(nn.SiLU):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=False)

    theirs, x = Steps(lambda model, y: model.act(y), Norm(8)), images()
    theirs.act = Act()
    ours = syncbn.save_memory(copy.deepcopy(theirs))
    assert_equal(backward(ours, x)[:8], backward(theirs, x)[:8])


def test_keywords_and_normalized_maps_of_computed_ones():
    check(vary(Steps(lambda model, y: F.relu(y))), images(), run=lambda model: lambda x: model(x=x))
    two = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)
    )
    ours, theirs = check(vary(two), images())
    assert theirs - ours > 1.9 * 4 * 4 * 8 * 10 * 10


@pytest.mark.parametrize("activation", [nn.SiLU, nn.Hardswish, nn.ReLU6])
def test_timms_fused_layers_save_as_much_as_two_layers(activation):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    apart = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), activation(inplace=True), nn.Conv2d(8, 4, 3))
    fused = nn.Sequential(nn.Conv2d(3, 8, 3), timm.layers.BatchNormAct2d(8, act_layer=activation), nn.Conv2d(8, 4, 3))
    assert abs(check(vary(apart), images())[0] - check(vary(fused), images())[0]) < 1000
