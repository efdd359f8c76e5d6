"""Folding: the formulas in float64, what stays and why, what is refused, and a copy that is plain torch."""

import copy
import dataclasses
import io
import re
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

import syncbn

NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 1.5 + 0.5


def trained(model, dtype=torch.float64):
    """Give ``model`` statistics, weights and biases that are not 0 and 1, and put it into eval mode."""
    generator = torch.Generator().manual_seed(1)
    for norm in model.modules():
        if getattr(norm, "running_mean", None) is not None:
            norm.running_mean.normal_(0.3, 0.5, generator=generator)
            norm.running_var.uniform_(0.3, 3, generator=generator)
            for name, mean in (("weight", 1), ("bias", 0)):
                if getattr(norm, name, None) is not None:
                    getattr(norm, name).data.normal_(mean, 0.5, generator=generator)
    return model.to(dtype).eval()


def equal(model, folded, *args, tolerance=1e-13):
    with torch.no_grad():
        expected, actual = model(*copy.deepcopy(args)), folded(*copy.deepcopy(args))
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


def layers(dims):
    """Yield layers of 4 to 6 channels: groups, depthwise, with and without bias, strides and paddings."""
    conv, transposed = getattr(nn, f"Conv{dims}d"), getattr(nn, f"ConvTranspose{dims}d")
    for cls in (conv, transposed):
        for groups, channels in ((1, 6), (2, 6), (4, 4), (4, 8)):
            for bias in (True, False):
                yield cls(4, channels, 3, stride=2, padding=1, groups=groups, bias=bias)
    yield conv(4, 6, 3, padding="same", dilation=2, padding_mode="circular")
    yield transposed(4, 6, 2, stride=2, output_padding=1, dilation=2, groups=2)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_convolutions_in_float64(dims):
    x, seen = normal(2, 4, *[6] * dims), 0
    for number, layer in enumerate(layers(dims)):
        channels = layer.out_channels
        made = NORMS[dims](channels, eps=0.1, affine=number % 3 > 0)
        if number % 3 == 2:
            made.register_parameter("bias", None)
        model = trained(nn.Sequential(layer, made))
        folded = syncbn.fold(model, x)
        assert type(folded[1]) is nn.Identity
        assert type(folded[0]) is type(layer)
        equal(model, folded, x)
        seen += 1
    assert seen == 18


@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers_in_float64(bias):
    for affine in (True, False):
        model = trained(nn.Sequential(nn.Linear(5, 7, bias=bias), nn.BatchNorm1d(7, affine=affine), nn.Tanh()))
        folded = syncbn.fold(model, normal(3, 5))
        assert type(folded[1]) is nn.Identity
        equal(model, folded, normal(3, 5))


def test_the_folded_layer_is_the_one_multiply_add():
    """In eval mode a norm is ``y * scale + shift`` per channel: one multiply-add, which the layer's own is then."""
    conv, norm = trained(nn.Sequential(nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5)))
    scale = norm.weight / (norm.running_var + norm.eps) ** 0.5
    shift = norm.bias - norm.running_mean * scale
    x = normal(2, 3, 6, 6)
    y = conv(x)
    expected = torch.addcmul(shift.view(-1, 1, 1), y, scale.view(-1, 1, 1))
    torch.testing.assert_close(norm(y), expected, rtol=1e-13, atol=1e-13)
    folded = syncbn.fold(nn.Sequential(conv, norm).eval(), x)
    assert len(list(folded.parameters())) == 2
    assert not list(folded.buffers())
    torch.testing.assert_close(folded[0].weight, conv.weight * scale.view(-1, 1, 1, 1), rtol=1e-15, atol=0)
    torch.testing.assert_close(folded[0].bias, shift, rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(folded(x), expected, rtol=1e-12, atol=1e-13)


class Doubled(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


class Registered(nn.BatchNorm2d):
    pass


class UserFrozen(nn.Module):
    """Four buffers, and an eps that is written into the forward."""

    def __init__(self, channels):
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(channels))

    def forward(self, x):
        per_channel = (1, -1, 1, 1)
        scale = self.weight.view(per_channel) * (self.running_var.view(per_channel) + 1e-3).rsqrt()
        return (x - self.running_mean.view(per_channel)) * scale + self.bias.view(per_channel)


syncbn.register(Registered)


def frozen_of_torchvision(channels):
    return pytest.importorskip(
        "torchvision.ops", reason="torchvision does not import beside this torch"
    ).misc.FrozenBatchNorm2d(channels)


@pytest.mark.parametrize(
    "make",
    [
        nn.SyncBatchNorm,
        syncbn.SyncBatchNorm,
        partial(syncbn.SyncBatchNorm, process_group=2),
        partial(syncbn.GhostBatchNorm, num_splits=3),
        lambda channels: syncbn.convert(nn.BatchNorm2d(channels)),
        lambda channels: syncbn.convert(nn.SyncBatchNorm(channels), process_group=1),
        lambda channels: syncbn.convert(nn.BatchNorm2d(channels), "frozen"),
        lambda channels: syncbn.convert(syncbn.SyncBatchNorm(channels), "bn"),
        lambda channels: syncbn.convert(nn.BatchNorm2d(channels), "brn"),
        lambda channels: syncbn.revert(syncbn.convert(nn.BatchNorm2d(channels))),
        lambda channels: syncbn.freeze(nn.BatchNorm2d(channels)),
        lambda channels: syncbn.convert(UserFrozen(channels), include_frozen=True),
        UserFrozen,
        Registered,
        lambda channels: syncbn.convert(Registered(channels)),
        frozen_of_torchvision,
    ],
)  # fmt: skip
def test_every_kind_of_norm(make):
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), make(4), nn.ReLU()), normal(2, 3, 5, 5)
    trained(model)
    kinds = [type(module) for module in model]
    folded = syncbn.fold(model, x)
    assert [type(module) for module in folded] == [nn.Conv2d, nn.Identity, nn.ReLU]
    assert [type(module) for module in model] == kinds
    assert vars(folded[1]).keys() == vars(nn.Identity()).keys()
    equal(model, folded, x)


@pytest.mark.parametrize("kind", ["BatchNormAct2d", "FrozenBatchNormAct2d", "converted", "frozen"])
def test_fused_layers_of_timm_go_on_to_drop_and_activate(kind):
    norm_act = pytest.importorskip("timm.layers.norm_act", reason="timm is not installed")
    cls = getattr(norm_act, kind, norm_act.BatchNormAct2d)
    layer = cls(4, act_layer=nn.SiLU, **({} if cls is norm_act.FrozenBatchNormAct2d else {"drop_layer": nn.Dropout}))
    if kind in ("converted", "frozen"):
        syncbn.convert(layer, "syncbn" if kind == "converted" else "frozen")
    model, x = trained(nn.Sequential(nn.Conv2d(3, 4, 3), layer)), normal(2, 3, 5, 5)
    folded = syncbn.fold(model, x)
    assert type(folded[1]) is nn.Sequential
    assert dict(folded[1].named_children()).keys() <= {"drop", "act"}
    assert isinstance(folded[1].act, nn.SiLU)
    assert not list(folded[1].parameters()) + list(folded[1].buffers())
    equal(model, folded, x)


class Net(nn.Module):
    """A pair that can be folded, and behind it what a test is about: a layer, a norm, and how they are called."""

    def __init__(self, call, conv=None, norm=None, **more):
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv, self.norm = conv or nn.Conv2d(4, 4, 3, padding=1), norm or nn.BatchNorm2d(4)
        self.call, self.kept = call, None
        for name, module in more.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.call(self, self.stem_norm(self.stem(x)))


def plainly(net, x):
    return net.norm(net.conv(x))


def keep(net, x):
    net.kept = net.conv(x)
    return net.norm(net.kept) + net.kept


def only_keep(net, x):
    net.kept = net.conv(x)
    return net.norm(net.kept)


def masked(net, x):
    return net.norm(net.conv(x), torch.ones_like(x[:, :1], dtype=torch.bool))


def read_twice(net, x):
    y = net.conv(x)
    return net.norm(y) + y.mean()


def hooked(kind, of):
    net = Net(plainly)
    getattr(getattr(net, of), f"register_{kind}_hook")(lambda module, *_: None)
    return net


def two_names_of_one_weight():
    net = Net(lambda net, x: net.norm(net.conv(x)) + net.other(x), other=nn.Conv2d(4, 4, 3, padding=1))
    net.other.weight = net.conv.weight
    return net


def parametrized(how):
    net = Net(plainly)
    how(net.conv)
    return net


class Standardized(nn.Conv2d):
    """Its output is not linear in the weight."""

    def forward(self, x):
        return F.conv2d(x, self.weight / self.weight.std(), self.bias, padding=1)


class Padded(nn.Conv2d):
    """Pads by itself, as timm's Conv2dSame does."""

    def forward(self, x):
        return F.conv2d(F.pad(x, (1, 1, 1, 1)), self.weight, self.bias)


class Activated(nn.Conv2d):
    def forward(self, x):
        return super().forward(x).relu()


class Clamped(nn.Conv2d):
    """Is linear where its output is small."""

    def forward(self, x):
        return super().forward(x).clamp(-1e3, 1e3)


class Signed(nn.Conv2d):
    """Is linear on positive inputs."""

    def forward(self, x):
        y = super().forward(x)
        return y if x.mean() > 0 else 2 * y


def computed():
    """A weight that is no parameter."""
    net = Net(plainly)
    weight = net.conv.weight.detach().double() * 2
    del net.conv.weight
    net.conv.weight = weight
    return net


def patched():
    net = Net(plainly)
    net.conv.forward = lambda x: 2 * F.conv2d(x, net.conv.weight, padding=1)
    return net


def clamps():
    net = Net(plainly)
    net.conv._conv_forward = lambda x, weight, bias: F.conv2d(x, weight, bias, padding=1).clamp(-1e3, 1e3)
    return net


TWO = {"second": nn.BatchNorm2d(4)}
STAYS = {
    "called twice": (Net(lambda n, x: n.norm(n.conv(x)) + n.conv(x)), "conv is called 2 times"),
    "norm called twice": (Net(lambda n, x: n.norm(n.conv(x)) + n.norm(x)), "it is called 2 times"),
    "shared by two": (Net(lambda n, x: n.norm(n.conv(x)) + n.second(n.conv(x)), **TWO), "conv is called 2 times"),
    "read by two norms": (
        Net(lambda n, x: n.norm(y := n.conv(x)) + n.second(y), **TWO),
        "the output of conv is used elsewhere too",
    ),
    "kept": (Net(keep), "the output of conv is used elsewhere too"),
    "kept unread": (Net(only_keep), "the output of conv is used elsewhere too"),
    "returned": (Net(lambda n, x: torch.stack([y := n.conv(x), n.norm(y)])), "used elsewhere too"),
    "read twice": (Net(read_twice), "used elsewhere too"),
    "changed in place": (Net(lambda n, x: n.norm(n.conv(x).relu_())), "used elsewhere too"),
    "activated between": (Net(lambda n, x: n.norm(n.conv(x).relu())), "not the very output of a convolution"),
    "a view": (Net(lambda n, x: n.norm(n.conv(x)[:1])), "not the very output of a convolution"),
    "before": (Net(lambda n, x: n.conv(n.norm(x))), "its input is not the very output of a convolution or linear"),
    "masked": (Net(masked, norm=syncbn.SyncBatchNorm(4)), "not the very output of a convolution"),
    "unreached": (Net(lambda n, x: n.conv(x)), "the example did not reach it"),
    "in the last dimension": (
        Net(lambda n, x: n.norm(n.conv(x[0, :, :4])), nn.Linear(5, 4), nn.BatchNorm1d(4)),
        "dimension 1 of the output of conv, whose channels are in another",
    ),
    "hook": (hooked("forward", "conv"), "conv has hooks"),
    "pre-hook": (hooked("forward_pre", "conv"), "conv has hooks"),
    "hook of the norm": (hooked("forward", "norm"), "it has hooks"),
    "backward hook": (hooked("full_backward", "norm"), "it has hooks"),
    "shared weight": (two_names_of_one_weight(), "conv shares its weight or bias with another layer"),
    "weight read": (Net(lambda n, x: n.norm(n.conv(x)) * n.conv.weight.mean()), "conv is read elsewhere too"),
    "statistics read": (Net(lambda n, x: n.norm(n.conv(x)) * n.norm.running_var.mean()), "it is read elsewhere too"),
    "forward twice": (Net(lambda n, x: n.norm(n.conv(x)) + n.conv.forward(x)), "conv is read elsewhere too"),
    "no statistics": (Net(plainly, norm=nn.BatchNorm2d(4, track_running_stats=False)), "no running statistics"),
    "another norm": (Net(plainly, norm=Doubled(4)), re.escape("call syncbn.register(Doubled)")),
    "instance norm": (Net(plainly, norm=nn.InstanceNorm2d(4, track_running_stats=True)), "is an instance norm; only"),
    "switchable norm": (Net(plainly, norm=syncbn.convert(nn.BatchNorm2d(4), "sn")), "SwitchableNorm is not folded"),
    "another convolution": (Net(plainly, Standardized(4, 4, 3)), "conv is read elsewhere too"),
    "activates inside": (Net(plainly, Activated(4, 4, 3, padding=1)), r"conv \(Activated\) is not linear"),
    "linear if small": (Net(plainly, Clamped(4, 4, 3, padding=1)), r"conv \(Clamped\) is not linear"),
    "linear if positive": (Net(lambda n, x: n.norm(n.conv(x * x)), Signed(4, 4, 3)), r"conv \(Signed\) is not linear"),
    "set on the instance": (clamps(), r"conv \(Conv2d\) is not linear"),
    "told by a bool": (
        Net(lambda n, x: n.norm(y := n.conv(x)) * torch.allclose(y, x.new_zeros(()), atol=99)),
        "the output of conv is used elsewhere too",
    ),
    "compared": (Net(lambda n, x: n.norm(y := n.conv(x)) + torch.equal(y, x.new_zeros(()))), "used elsewhere too"),
    "contains": (Net(lambda n, x: n.norm(y := n.conv(x)) * (1 + (7.0 in y))), "used elsewhere too"),
    "printed": (Net(lambda n, x: n.norm(y := n.conv(x)) * len(str(y)[:2])), "used elsewhere too"),
    "weight compared": (
        Net(lambda n, x: n.norm(n.conv(x)) * (1 + torch.allclose(n.conv.weight, x.new_zeros(())))),
        "conv is read elsewhere too",
    ),
    "parametrized": (parametrized(parametrizations.weight_norm), "conv is parametrized: call remove_param"),
    "pruned": (parametrized(partial(prune.l1_unstructured, name="weight", amount=0.5)), "conv has hooks"),
    "computed": (computed(), "conv has no weight of its own"),
    "patched": (patched(), "the forward of conv was set on the instance"),
}  # fmt: skip


@pytest.mark.parametrize("case", STAYS)
def test_what_stays_is_reported_with_the_reason(case):
    net, reason = STAYS[case]
    x = normal(2, 3, 5, 5)
    trained(net)
    with pytest.warns(UserWarning, match=f"(?s)folded 1 of [23] norms; these stayed:\n.*norm.*: .*{reason}") as caught:
        folded = syncbn.fold(net, x)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert type(folded.stem_norm) is nn.Identity
    assert type(folded.norm) is type(net.norm)
    assert torch.equal(folded.conv.weight, net.conv.weight)
    equal(net, folded, x)


@pytest.mark.parametrize(
    "net",
    [
        Net(plainly, Padded(4, 4, 3)),
        Net(lambda n, x: n.norm(n.conv(x).contiguous())),
        Net(lambda n, x: n.norm(y := n.conv(x)) + torch.zeros_like(y) + y.new_ones(y.shape)),
        Net(lambda n, x: n.norm(F.dropout(n.conv(x), training=n.training))),
        Net(lambda n, x: n.norm(input=n.conv(x))),
        Net(lambda n, x: n.norm(n.conv(x)).relu_().add_(x.mean())),
        Net(lambda n, x: n.norm(n.conv(x)) if n.conv.weight.shape[0] == 4 and x.dim() == 4 else x),
        Net(lambda n, x: n.alias(n.conv(x)), norm=(norm := nn.BatchNorm2d(4)), alias=norm),
    ],
)  # fmt: skip
def test_what_is_folded_all_the_same(net):
    x = normal(2, 3, 5, 5)
    trained(net)
    folded = syncbn.fold(net, x)
    assert type(folded.norm) is nn.Identity
    equal(net, folded, x)


class Several(nn.Module):
    """Several arguments, and outputs in a dict; it writes into its input, draws, and counts."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.calls = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), 0
        self.scale = nn.Parameter(torch.ones(())) * 2  # a computed tensor, which deepcopy refuses

    def forward(self, x, images):
        self.calls += 1
        x += torch.rand(())
        return {"a": [self.norm(self.conv(x)) * self.scale], "b": (images[0].sum(), None)}


def test_the_model_its_example_and_the_random_state_stay_as_they_are():
    model, x = trained(Several()), normal(1, 3, 5, 5)
    model.conv.weight.requires_grad_(False)
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    folded = syncbn.fold(model, (x, [x]))
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(x, normal(1, 3, 5, 5))
    assert model.calls == folded.calls == 0
    assert not any(
        module._forward_hooks or module._forward_pre_hooks for module in (*model.modules(), *folded.modules())
    )
    assert [p.requires_grad for p in folded.parameters()] == [False, True]
    assert [*folded.state_dict()] == ["conv.weight", "conv.bias"]
    assert type(model.norm) is nn.BatchNorm2d


class Precision(Net):
    """Note how convolutions are computed on CUDA."""

    def forward(self, x):
        seen.append(precision())
        return super().forward(x)


seen = []


def precision():
    conv = getattr(torch.backends.cudnn, "conv", None)
    return torch.backends.cudnn.allow_tf32 if conv is None else conv.fp32_precision


def test_outputs_are_compared_in_full_float32():
    before = precision()
    seen.clear()
    syncbn.fold(trained(Precision(plainly)), normal(2, 3, 5, 5))
    assert before not in seen
    assert len(seen) == 2
    assert precision() == before


def test_in_inference_mode():
    with torch.inference_mode():
        net, x = trained(Net(lambda n, x: n.norm(n.conv(x).relu_()))), normal(2, 3, 5, 5)
        with pytest.warns(UserWarning, match="the output of conv is used elsewhere too"):
            equal(net, syncbn.fold(net, x), x)


def on_rank_0(rank, world_size):
    model, x = Net(plainly, norm=nn.SyncBatchNorm(4)), normal(2, 3, 5, 5)
    syncbn.convert(trained(model), process_group=2)
    group = dist.new_group([0, 1])  # which cannot be copied; and a convolution whose class has to be tried
    model.call = lambda net, x: net.last(net.padded(plainly(net, x)))
    model.padded, model.last = Padded(4, 4, 3), nn.SyncBatchNorm(4, process_group=group)
    trained(model)
    error = 0.0
    if rank == 0:
        folded = syncbn.fold(model, x)
        assert type(folded.last) is nn.Identity
        with torch.no_grad():
            error = (folded(x) - model(x)).abs().max().item()
    dist.barrier()
    return error


def test_one_rank_alone_may_fold(run):
    assert max(run(on_rank_0, 2, timeout=40)) < 1e-12


def test_the_copy_is_plain_torch_and_learns():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Tanh(), nn.BatchNorm2d(4), nn.GroupNorm(2, 4)
    )
    trained(syncbn.convert(model), torch.float32).to(memory_format=torch.channels_last)
    x = normal(2, 3, 6, 6).float()
    with pytest.warns(UserWarning, match="3: its input is not the very output"):
        folded = syncbn.fold(model, x)
    assert {type(module) for module in folded.modules()} == {
        nn.Sequential, nn.Conv2d, nn.Identity, nn.Tanh, nn.BatchNorm2d, nn.GroupNorm,
    }  # fmt: skip
    assert not any("syncbn" in name for module in folded.modules() for name in vars(module))
    assert folded[0].weight.is_contiguous(memory_format=torch.channels_last)
    stored = io.BytesIO()
    torch.save(folded, stored)
    assert b"syncbn" not in stored.getvalue()
    stored.seek(0)
    for other in (torch.load(stored, weights_only=False), torch.export.export(folded, (x,)).module()):
        equal(folded, other, x, tolerance=1e-6)
    equal(folded, torch.jit.script(folded), x, tolerance=1e-6)
    (folded(x) * normal(2, 4, 4, 4, seed=1)).sum().backward()
    assert folded[0].weight.grad.abs().min() > 0
    assert folded[0].bias.grad.abs().min() > 0


def test_a_frozen_norm_that_stays_is_frozen_in_the_copy():
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4)), normal(2, 3, 5, 5)
    syncbn.convert(trained(model), "frozen")
    with pytest.warns(UserWarning, match="folded 1 of 2 norms"):
        folded = syncbn.fold(model.eval(), x).train()
    assert type(folded[1]) is nn.Identity
    before = copy.deepcopy(folded[3].state_dict())
    equal(model, folded, x)
    assert torch.equal(folded[3].running_mean, before["running_mean"])
    assert torch.equal(folded[3].running_var, before["running_var"])


def test_a_layer_converted_to_another_norm_is_kept_without_its_past():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    syncbn.convert(model, "gn", include=["3"], num_groups=2)
    folded = syncbn.fold(trained(model), normal(2, 3, 5, 5))
    assert type(folded[1]) is nn.Identity
    assert type(folded[3]) is nn.GroupNorm
    assert not any("syncbn" in name for name in vars(folded[3]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    model, x = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), dtype), normal(2, 3, 5, 5).to(dtype)
    folded = syncbn.fold(model, x)
    assert {p.dtype for p in folded.parameters()} == {dtype}
    exact = syncbn.fold(copy.deepcopy(model).double(), x.double())
    assert torch.equal(folded[0].weight, exact[0].weight.to(dtype))
    assert torch.equal(folded[0].bias, exact[0].bias.to(dtype))
    model[1].running_var.fill_(0)
    model[1].weight.data.fill_(6e4)
    if dtype == torch.float16:
        with pytest.raises(
            ValueError, match=r"not finite in 0 \(torch.float16\) with 1. If it is too large for a half"
        ):
            syncbn.fold(model, x)


@torch.jit.script
def unseen(x):
    return x.mean()


def test_what_torch_does_not_see_is_found_by_the_outputs():
    net = trained(Net(lambda n, x: n.norm(y := n.conv(x)) + unseen(y)))
    with pytest.raises(
        ValueError, match=r"^fold: with norm folded into conv, the outputs differ by .* unseen by torch"
    ):
        syncbn.fold(net, normal(2, 3, 5, 5))
    net = trained(Net(lambda n, x: n.norm(n.conv(x)) * n.norm.eps))
    with pytest.raises(ValueError, match=r"without its norms the model fails, as something reads one of them: .*eps"):
        syncbn.fold(net, normal(2, 3, 5, 5))
    net = trained(Net(lambda n, x: n.norm(n.conv(x)) * float("nan")))
    with pytest.raises(ValueError, match="returns finite tensors"):
        syncbn.fold(net, normal(2, 3, 5, 5))


@dataclasses.dataclass(slots=True)
class Boxes:
    values: torch.Tensor


class Unknown:
    def __init__(self, values):
        self.values = values


def test_outputs_of_several_kinds():
    x = normal(2, 3, 5, 5)
    for wrap in (Boxes, torch.Tensor.to_sparse, lambda y: (y.detach().to_sparse(), "text")):
        net = trained(Net(lambda n, x, wrap=wrap: wrap(n.norm(n.conv(x)))))
        assert type(syncbn.fold(net, x).norm) is nn.Identity
    with pytest.raises(ValueError, match=r"lists, tuples, dicts or dataclasses of tensors, got Unknown"):
        syncbn.fold(trained(Net(lambda n, x: Unknown(n.norm(n.conv(x))))), x)
    net = trained(Net(lambda n, x: n.norm(y := n.conv(x))[:, : 1 + int(abs(unseen(y) - n.usual) < 1e-6)]))
    with torch.no_grad():
        net.usual = unseen(net.conv(net.stem_norm(net.stem(x))))
    with pytest.raises(
        ValueError, match=r"other shapes: \(2, 1, 5, 5\), not \(2, 2, 5, 5\). Rounding may .* Or: Some"
    ):
        syncbn.fold(net, x)


def test_a_model_that_magnifies_rounding_is_folded_with_a_warning():
    net = trained(Net(lambda n, x: (n.norm(n.conv(x)) * 1e4).sin()), torch.float32)
    with pytest.warns(
        UserWarning,
        match=r"differ by .*e-0\d of their range, but in float64 they differ by .*e-1\d: the model magnifies",
    ):
        folded = syncbn.fold(net, normal(2, 3, 5, 5).float())
    assert type(folded.norm) is nn.Identity
    equal(net.double(), folded.double(), normal(2, 3, 5, 5), tolerance=0.1)


def compiled():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model.compile()
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), r"\(the model itself\): in training mode"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4).train(), nn.Dropout()), "  1: in training mode"),
        (nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)).eval(), "none of the norms can .*  0: its input is not"),
        (nn.Sequential(nn.LazyConv2d(4, 3)).eval(), "0: a lazy layer that does not know its shape yet; run one batch"),
        (nn.DataParallel(nn.Conv2d(3, 4, 3)).eval(), r"wrapped by DataParallel; fold what is inside, its module"),
        (nn.Sequential(torch.jit.script(nn.ReLU())).eval(), "0: scripted or traced"),
        (nn.Sequential(torch.ao.nn.quantized.DeQuantize()).eval(), "0: quantized; fold before"),
        (compiled().eval(), "compiled; fold before"),
        (nn.Sequential(nn.Linear(2, 2, device="meta")).eval(), "0: on the meta device; load its values first"),
    ],
)  # fmt: skip
def test_refused(model, message):
    if "  1: in training" in message:
        model.training = model[0].training = False
    with pytest.raises(ValueError, match=f"(?s)^fold: .*{message}"):
        syncbn.fold(model, torch.randn(2, 3, 5, 5))


def test_bad_examples_and_nothing_to_fold():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    for example in ([torch.randn(2, 3, 5, 5)], None, {"x": 1}):
        with pytest.raises(
            ValueError, match="expected example to be a tensor or a tuple of positional arguments, got"
        ):
            syncbn.fold(model, example)
    with pytest.raises(ValueError, match="expected model to be"):
        syncbn.fold("model", torch.randn(2, 3, 5, 5))
    with pytest.warns(UserWarning, match="found no layer with running statistics"):
        folded = syncbn.fold(model, torch.randn(2, 3, 5, 5))
    assert folded is not model
