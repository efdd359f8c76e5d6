"""FixUp: what it promises at the start, its block against the formula, which nets it takes, and the way back."""

import copy
import math
import pickle
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import syncbn
from experiment.training.models import classifiers
from experiment.training.models.unet import UNet
from experiment.training.task import Classifier
from syncbn.nn.fixup import FixupBlock, FixupLinear, NoNorm, ScalarBias, scalar_names, scalars

KEYS = {2: ["bias1a", "bias1b", "bias2a", "scale", "bias2b"]}
KEYS[3] = ["bias1a", "bias1b", "bias2a", "bias2b", "bias3a", "scale", "bias3b"]


def net(num_blocks=2, width=4, block=None, classes=5):
    """A net of one stage, as written."""
    block = block or (lambda: classifiers.Block(width, width, stride=1))
    first = [nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    last = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes)]
    return nn.Sequential(*first, *(block() for _ in range(num_blocks)), *last)


def basic(width=4, **options):
    from torchvision.models.resnet import BasicBlock

    return BasicBlock(width, width, **options)


def bottleneck(width=4, **options):
    from torchvision.models.resnet import Bottleneck

    return Bottleneck(width, width // 4, **options)


def shortcut(width):
    return nn.Sequential(nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width))


def fixed(model, seed=0):
    torch.manual_seed(seed)
    return syncbn.convert(model, "fixup")


def randomized(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.5, generator=generator)
    return model


BLOCKS = {
    "basic": basic,
    "basic, shortcut": lambda: basic(downsample=shortcut(4)),
    "bottleneck": bottleneck,
    "bottleneck, shortcut": lambda: bottleneck(downsample=shortcut(4)),
    "own": lambda: classifiers.Block(4, 4, stride=1),
}


def reference(x, w, num_convs, padding):
    """The block of the authors' code, in plain operators: a name of each scalar, no loop over layers."""
    side = "shortcut" if "shortcut.0.weight" in w else "downsample"
    skip = F.conv2d(x + w["bias1a"], w[f"{side}.0.weight"]) if f"{side}.0.weight" in w else x
    out = torch.relu(F.conv2d(x + w["bias1a"], w["conv1.weight"], padding=padding[0]) + w["bias1b"])
    if num_convs == 2:
        out = F.conv2d(out + w["bias2a"], w["conv2.weight"], padding=padding[1])
        return torch.relu(out * w["scale"] + w["bias2b"] + skip)
    out = torch.relu(F.conv2d(out + w["bias2a"], w["conv2.weight"], padding=padding[1]) + w["bias2b"])
    out = F.conv2d(out + w["bias3a"], w["conv3.weight"], padding=padding[2])
    return torch.relu(out * w["scale"] + w["bias3b"] + skip)


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_and_its_gradients_are_the_authors(name):
    block = randomized(fixed(net(block=BLOCKS[name])).double())[3]
    num_convs = 3 if "bottleneck" in name else 2
    own = [key for key, _ in block.named_parameters(recurse=False)]
    assert own == KEYS[num_convs]
    assert all(block.get_parameter(key).shape == (1,) for key in own)
    torch.manual_seed(2)
    x, dy = (torch.randn(2, 4, 5, 5, dtype=torch.float64) for _ in range(2))
    inputs = [x.requires_grad_(), *block.parameters()]
    y = block(x)
    leaves = {key: p.detach().clone().requires_grad_() for key, p in block.named_parameters()}
    wanted = reference(x, leaves, num_convs, (0, 1, 0) if num_convs == 3 else (1, 1))
    torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-12)
    grads = torch.autograd.grad(wanted, [x, *leaves.values()], dy)
    torch.testing.assert_close(torch.autograd.grad(y, inputs, dy), grads, rtol=1e-12, atol=1e-12)
    assert all(grad.abs().max() > 1e-3 for grad in grads)


def test_the_net_around_the_blocks():
    model = randomized(fixed(net(1)).double())
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    w = model.state_dict()
    hidden = torch.relu(F.conv2d(x, w["0.weight"], padding=1) + w["1.bias1"])
    hidden = reference(hidden, {k[2:]: v for k, v in w.items() if k.startswith("3.")}, 2, (1, 1))
    wanted = (hidden.mean((2, 3)) + w["6.bias2"]) @ w["6.weight"].T + w["6.bias"]
    torch.testing.assert_close(model(x), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("make", [classifiers.ResNet8, partial(classifiers.CifarResNet, depth=20)])
def test_at_the_start_logits_are_zero_and_blocks_their_shortcut(make):
    model = fixed(make(10, width=4))
    x, labels = torch.randn(3, 3, 16, 16), torch.tensor([1, 4, 9])
    logits = model(x)
    assert torch.count_nonzero(logits) == 0
    assert F.cross_entropy(logits, labels).item() == pytest.approx(math.log(10), rel=1e-6)
    hidden = x
    for layer in list(model)[:-3]:
        after = layer(hidden)
        if isinstance(layer, FixupBlock):
            assert torch.equal(after, F.relu(layer.shortcut(hidden)))
            assert after.count_nonzero() > 0
        hidden = after


def std_ratio(weights, wanted):
    """The std of weights over the wanted one, and five standard errors of that ratio."""
    values = torch.cat([w.detach().flatten() for w in weights]).double()
    return values.std().item() / wanted, 5 / math.sqrt(2 * len(values))


@pytest.mark.parametrize("num_blocks", [1, 4, 16])
@pytest.mark.parametrize("num_convs", [2, 3])
def test_the_weights_are_drawn_as_the_formula_says(num_convs, num_blocks):
    make = {2: basic, 3: bottleneck}[num_convs]
    model = fixed(net(num_blocks, 32, lambda: make(32, downsample=shortcut(32))))
    blocks = model[3:-3]
    assert len(blocks) == num_blocks
    factor = {2: num_blocks**-0.5, 3: num_blocks**-0.25}[num_convs]
    he = {"conv1": (32, 9), "downsample.0": (32, 1)} if num_convs == 2 else {"conv1": (8, 1), "conv2": (8, 9)}
    for name, (out_channels, positions) in he.items():
        wanted = math.sqrt(2 / (out_channels * positions)) * (1 if "downsample" in name else factor)
        ratio, error = std_ratio([block.get_parameter(f"{name}.weight") for block in blocks], wanted)
        assert ratio == pytest.approx(1, abs=error), name
    assert all(block.get_parameter(f"conv{num_convs}.weight").count_nonzero() == 0 for block in blocks)
    assert {block.get_parameter(k).item() for block in blocks for k in KEYS[num_convs] if k != "scale"} == {0}
    assert {block.scale.item() for block in blocks} == {1}
    ratio, error = std_ratio([model[0].weight], math.sqrt(2 / (32 * 9)))
    assert ratio == pytest.approx(1, abs=error)
    assert model[-1].weight.count_nonzero() == model[-1].bias.count_nonzero() == 0


def test_groups_spread_a_value_over_fewer_outputs():
    model = fixed(net(4, 64, lambda: bottleneck(64, groups=8, base_width=32)))
    ratio, error = std_ratio([block.conv2.weight for block in model[3:-3]], math.sqrt(2 / (8 * 9)) * 4 ** (-0.25))
    assert model[3].conv2.weight.shape == (64, 8, 3, 3)
    assert ratio == pytest.approx(1, abs=error)


def movement(model, num_steps=1, lr=0.1):
    """How far SGD moves the logits: the root mean square, on the images it trains on."""
    torch.manual_seed(3)
    x, labels = torch.randn(8, 3, 8, 8), torch.randint(5, (8,))
    before = model(x).detach()
    optimizer = torch.optim.SGD(model.parameters(), lr)
    for _ in range(num_steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()
    return (model(x).detach() - before).square().mean().sqrt().item()


def he(model):
    torch.manual_seed(0)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out")
    return syncbn.convert(model, "none")


def test_a_step_moves_the_logits_as_far_at_any_depth():
    """3, 15 and 63 blocks: about 0.03 each. Without FixUp and without a norm it explodes, with BatchNorm it grows."""
    nets = [partial(classifiers.CifarResNet, 5, width=8, depth=depth) for depth in (8, 32, 128)]
    moved = [movement(fixed(make())) for make in nets]
    assert 0.01 < min(moved) < max(moved) < min(0.1, 3 * min(moved))
    plain = [movement(he(make())) for make in nets[:2]]
    assert plain[1] > 100 * plain[0] > 100 * moved[0]
    torch.manual_seed(0)
    assert movement(nets[1]()) > 10 * moved[1]
    assert movement(fixed(nets[1]()), num_steps=4) < 0.5


def test_layers_begin_to_move_from_the_classifier_inwards():
    model = fixed(net(2))
    starts = {name: p.detach().clone() for name, p in model.named_parameters()}
    x, labels = torch.randn(8, 3, 6, 6), torch.randint(5, (8,))
    optimizer, moved = torch.optim.SGD(model.parameters(), 0.1), []
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()
        moved.append({name for name, p in model.named_parameters() if not torch.equal(p, starts[name])})
    assert moved[0] == {"7.weight", "7.bias"}
    second = {"0.weight", "1.bias1", "7.bias2"} | {f"{i}.{k}" for i in (3, 4) for k in ("conv2.weight", "bias2b")}
    assert moved[1] - moved[0] == second
    assert moved[2] == starts.keys()  # conv1, scale and the other biases last


def written():
    torch.manual_seed(0)
    model = classifiers.ResNet8(5, width=4)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_()
            layer.weight.data.uniform_(0.5, 2)
    return model


def kinds(model):
    return [(name, type(layer)) for name, layer in model.named_modules()]


def test_plan_lists_what_changes_and_touches_nothing():
    model = written()
    before, state = kinds(model), copy.deepcopy(model.state_dict())
    generator = torch.get_rng_state()
    rows = syncbn.plan(model, "fixup")
    assert kinds(model) == before
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), generator)
    changes = {row.name: (row.from_, row.to) for row in rows}
    assert len(changes) == len(rows) == 9 + 3 + 2
    assert changes["1"] == ("BatchNorm2d", "ScalarBias")
    assert changes["0"] == ("Conv2d", "Conv2d")
    assert changes["8"] == ("Linear", "FixupLinear")
    assert changes["3"] == ("Block", "FixupBlock")
    assert changes["4.shortcut.1"] == ("BatchNorm2d", "NoNorm")
    fixed(model)
    now = {name: type(layer).__name__ for name, layer in model.named_modules()}
    assert all(now[name] == to for name, (_, to) in changes.items())


def test_twice_copies_and_the_way_back():
    model = written()
    before, parameters = kinds(model), dict(model.named_parameters())
    norms = {k: v.clone() for k, v in model.state_dict().items() if "norm" in k or k.startswith("1.") or ".1." in k}
    attributes = {name: set(vars(layer)) for name, layer in model.named_modules()}
    fixed(model)
    randomized(model)
    state = copy.deepcopy(model.state_dict())
    syncbn.convert(model, "fixup")
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert {row.reason for row in syncbn.plan(model, "fixup")} == {"already"}
    loaded = fixed(written(), seed=1)
    loaded.load_state_dict(state)
    x = torch.randn(2, 3, 8, 8)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        assert torch.equal(other(x), model(x))
        assert {row.reason for row in syncbn.plan(other, "fixup")} == {"already"}
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model):
        syncbn.revert(other)
        assert kinds(other) == before
        assert {name: set(vars(layer)) for name, layer in other.named_modules()} == attributes
        assert other.state_dict().keys() == written().state_dict().keys()
        for name, value in other.state_dict().items():
            torch.testing.assert_close(value, norms.get(name, state.get(name)), rtol=0, atol=0)
    assert all(p is parameters[name] for name, p in model.named_parameters())


@pytest.mark.parametrize("other", ["gn", "bn", "syncbn", "none"])
def test_to_another_norm_and_back(other):
    options = {"num_groups": 2} if other == "gn" else {}
    model = fixed(written())
    wanted = syncbn.convert(written(), other, **options)
    syncbn.convert(model, other, **options)
    assert kinds(model) == kinds(wanted)
    assert model.state_dict().keys() == wanted.state_dict().keys()
    fixed(model)
    assert torch.equal(model[3].conv1.weight, fixed(written())[3].conv1.weight)
    assert kinds(syncbn.revert(model)) == kinds(written())


@pytest.mark.parametrize("other", ["wn", "gn_ws"])
def test_norms_of_weights_are_reverted_first(other):
    model = syncbn.convert(written(), other, **({"num_groups": 2} if other == "gn_ws" else {}))
    assert {row.reason for row in syncbn.plan(model, "fixup")} == {
        f"layers are parametrized by norm '{other}': revert first."
    }
    with pytest.raises(ValueError, match=f"(?s)1: layers are parametrized by norm '{other}'"):
        syncbn.convert(model, "fixup")
    fixed(syncbn.revert(model))
    with pytest.raises(ValueError, match=r"conv2 has 4 .* a direction: initialize or train them first; or .*exclude"):
        syncbn.convert(model, "wn")


def test_norms_follow_device_and_dtype_while_they_are_away():
    model = syncbn.revert(fixed(written()).double())
    assert {t.dtype for t in model.state_dict().values()} == {torch.float64, torch.int64}
    with torch.device("meta"):
        model = classifiers.ResNet8(width=4)
    assert all(p.is_meta for p in fixed(model).parameters())


def test_seeds_decide_and_only_new_blocks_draw():
    one, same, other = (fixed(written(), seed) for seed in (1, 1, 2))
    torch.testing.assert_close(one.state_dict(), same.state_dict(), rtol=0, atol=0)
    assert not torch.equal(one[0].weight, other[0].weight)
    state = torch.get_rng_state()
    syncbn.convert(one, "fixup")
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_stays_half(dtype):
    model, x = randomized(fixed(written())), torch.randn(2, 3, 8, 8)
    wanted, seen = model(x), []
    for layer in model.modules():
        if isinstance(layer, FixupBlock | ScalarBias):
            layer.register_forward_hook(lambda *args: seen.append(args[2].dtype))
    with torch.autocast("cpu", dtype):
        y = model(x)
    assert set(seen) == {dtype}
    torch.testing.assert_close(y.float(), wanted, rtol=0.1, atol=0.1 * wanted.abs().max().item())
    assert copy.deepcopy(model).to(dtype)(x.to(dtype)).dtype == dtype


def test_compiles_into_one_graph():
    model, x = randomized(fixed(net(1, block=BLOCKS["basic, shortcut"]))), torch.randn(2, 3, 8, 8)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    dy, parameters = torch.randn(2, 5), [*model.parameters()]
    y, wanted = compiled(x), model(x)
    torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)
    grads, wanted = (torch.autograd.grad(out, parameters, dy) for out in (y, wanted))
    torch.testing.assert_close(grads, wanted, rtol=1e-5, atol=1e-5)


ZOO = {
    "resnet18": (classifiers.torchvision, 2, 8),
    "resnet50": (classifiers.torchvision, 3, 16),
    "resnext50_32x4d": (classifiers.torchvision, 3, 16),
    "timm resnet18": (classifiers.timm, 2, 8),
    "timm resnet50": (classifiers.timm, 3, 16),
}


@pytest.mark.parametrize("name", [n if n == "resnet18" else pytest.param(n, marks=pytest.mark.slow) for n in ZOO])
def test_nets_of_other_packages(name):
    library, num_convs, num_blocks = ZOO[name]
    model = library(name.split()[-1], num_classes=7)
    before = kinds(model)
    fixed(model)
    blocks = [layer for layer in model.modules() if isinstance(layer, FixupBlock)]
    assert len(blocks) == num_blocks
    assert all([k for k, _ in b.named_parameters(recurse=False)] == scalar_names(num_convs) for b in blocks)
    assert type(model.bn1) is ScalarBias
    assert type(model.fc) is FixupLinear
    assert not [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert len(scalars(model)) == num_blocks * len(KEYS[num_convs]) + 2
    x = torch.randn(2, 3, 32, 32)
    assert model(x).count_nonzero() == 0
    model.fc.weight.data.normal_()
    model(x).square().sum().backward()
    assert all(b.get_parameter(f"conv{num_convs}.weight").grad.abs().sum() > 0 for b in blocks)
    assert kinds(syncbn.revert(model)) == before


def refused(model, *patterns, norm="fixup", **options):
    before, state = kinds(model), copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=".*".join([f"(?s)nothing was converted to '{norm}'", *patterns])) as error:
        syncbn.convert(model, norm, **options)
    assert kinds(model) == before
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    return str(error.value)


@pytest.mark.parametrize(
    ("make", "first", "others"),
    [
        pytest.param(partial(classifiers.torchvision, "vgg11_bn"), "features.1", "features.5", marks=pytest.mark.slow),
        (UNet, "down1.1", "up1.4"),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), "1", None),
        (lambda: nn.BatchNorm2d(4), r"\(the module itself\)", None),
        pytest.param(partial(classifiers.timm, "resnet26d"), "conv1.4", "bn1", marks=pytest.mark.slow),
    ],
)
def test_nets_without_known_blocks_are_refused_with_the_blocks_listed(make, first, others):
    kinds = ("BasicBlock", "Bottleneck")
    listed = [f"{library}.models.resnet.{kind}" for library in ("timm", "torchvision") for kind in kinds]
    after = [] if others is None else [f"  {others}: as {first}"]
    refused(make(), f"{first}: FixUp changes", *listed, "Block", *after)


def test_one_norm_outside_is_refused_or_left_out():
    model = nn.Sequential(*written(), nn.BatchNorm1d(5))
    refused(model, r"  9: FixUp changes .*register_block adds one.*exclude")
    syncbn.convert(model, "fixup", exclude=["9"])
    assert type(model[9]) is nn.BatchNorm1d
    assert type(model[3]) is FixupBlock


@pytest.mark.parametrize("filters", [{"exclude": ["4.shortcut.1"]}, {"include": ["3.*", "4.norm1"]}])
def test_a_part_of_a_block_is_refused(filters):
    refused(written(), r"4.norm1: FixUp cannot change its block 4 \(Block\): .* would stay", **filters)


def test_whole_blocks_can_be_left_out_and_count_no_more():
    model = syncbn.convert(written(), "fixup", exclude=["5.*"])
    assert [type(layer) for layer in list(model)[3:6]] == [FixupBlock, FixupBlock, classifiers.Block]
    refused(model, "5.norm1: other layers are FixUp's, drawn for their number of blocks: revert them first")


@pytest.mark.parametrize("include", [["3.norm1"], ["3.norm2"], ["4.shortcut.1", "3.*"]])
def test_a_part_of_a_block_does_not_change_back(include):
    model = fixed(written())
    refused(model, r"\d.\w+[.\d]*: \d \(FixupBlock\) changes as a whole", norm="bn", include=include)
    refused(model, "FixupBlock", norm="gn", include=include, num_groups=2)
    block = include[0][0]
    syncbn.convert(model, "bn", include=[f"{block}.*"])
    assert [type(layer) is FixupBlock for layer in list(model)[3:6]] == [str(i) != block for i in (3, 4, 5)]


class OddBlock(classifiers.Block):
    pass


def drop(block):
    block.drop = nn.Dropout(0.1)


def silu(block):
    block.relu = nn.SiLU()


def transposed(block):
    block.conv2 = nn.ConvTranspose2d(4, 4, 3, padding=1)


def parametrized(block):
    nn.utils.parametrizations.weight_norm(block.conv1)


def patched(block):
    block.forward = lambda x: x


def taken(block):
    block.scale = 1


def already_none(block):
    block.norm1 = nn.Identity()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop, r"it has a Dropout \(drop\), expected relu"),
        (silu, r"it has a SiLU \(relu\), expected relu"),
        (transposed, "conv2 is a ConvTranspose2d, expected nn.Conv1d, 2d or 3d"),
        (parametrized, "conv1 is a ParametrizedConv2d"),
        (patched, "its forward was set on the instance"),
        (taken, "it has an attribute scale already"),
        (already_none, "expected a convolution conv1 with a BatchNorm norm1 behind it"),
    ],
)
def test_a_block_that_does_more_is_refused(change, message):
    model = net()
    change(model[4])
    refused(model, f"4.norm.: FixUp cannot change its block 4 .*{message}")


def test_a_bare_block_and_one_without_convolutions():
    block = classifiers.Block(4, 4, stride=1)
    refused(block, r"norm1: FixUp expects an nn.Linear .* got none")
    block.conv1 = block.conv2 = nn.Identity()
    refused(
        block, r"norm1: FixUp cannot change its block \(the module itself\) \(Block\): expected a convolution conv1"
    )


def test_a_subclass_of_a_block_is_another_block_until_it_is_registered():
    model = net(block=lambda: OddBlock(4, 4, stride=1))
    refused(model, "1: FixUp changes", "3.norm1: as 1")
    for arguments in ({"convs": "conv1", "norms": "norm1"}, {"convs": ["a"], "norms": ["b"]}):
        with pytest.raises(ValueError, match="at least two convolutions and of the norm behind each, got convs="):
            syncbn.register_block(OddBlock, **arguments)
    for block in (OddBlock(4, 4, stride=1), "OddBlock", int):
        with pytest.raises(ValueError, match="register_block: expected a class of modules, got "):
            syncbn.register_block(block, convs=["conv1", "conv2"], norms=["norm1", "norm2"])
    syncbn.register_block(OddBlock, convs=["conv1", "conv2"], norms=["norm1", "norm2"])
    assert [type(layer) for layer in fixed(model)[3:5]] == [FixupBlock] * 2
    assert type(syncbn.revert(model)[3]) is OddBlock


def test_a_classifier_is_needed():
    refused(net()[:-1], r"1: FixUp expects an nn.Linear as the model's last linear layer, got none")
    model = net()
    nn.utils.parametrizations.weight_norm(model[-1])
    refused(model, "1: FixUp expects an nn.Linear .* got 7, a ParametrizedLinear")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "options", "message"),
    [
        ("resnet18", {"drop_path_rate": 0.5}, "drop_path"),
        ("resnet18", {"drop_block_rate": 0.5}, "drop_block"),
        ("seresnet18", {}, r"\(se\)"),
        ("resnetblur18", {}, r"\(aa\)"),
    ],
)
def test_timm_blocks_that_do_more_are_refused(arch, options, message):
    refused(classifiers.timm(arch, **options), rf"FixUp cannot change its block .*{message}.* expected relu")


def test_what_was_changed_since_is_not_reverted():
    model = fixed(written())
    nn.utils.parametrizations.weight_norm(model[8])
    with pytest.raises(ValueError, match="the class of 8 was changed after conversion; undo that first"):
        syncbn.revert(model)
    refused(model, "the class of 8 was changed", norm="bn")
    assert type(model[3]) is FixupBlock


def test_the_scalars_learn_at_a_tenth_of_the_rate():
    task = Classifier(fixed(written()), 5, 32, lr=0.4, weight_decay=0.3, warmup=0.5)
    task._trainer = SimpleNamespace(estimated_stepping_batches=4)
    made = task.configure_optimizers()
    groups = made["optimizer"].param_groups
    assert [group["initial_lr"] for group in groups] == pytest.approx([0.4, 0.4, 0.04])
    assert [group["weight_decay"] for group in groups] == [0.3, 0, 0.3]
    assert {id(p) for p in groups[2]["params"]} == {id(p) for p in scalars(task)}
    assert len(groups[2]["params"]) == 3 * 5 + 2
    assert sum(len(group["params"]) for group in groups) == len([*task.parameters()])
    for _ in range(3):
        assert groups[2]["lr"] == pytest.approx(0.1 * groups[0]["lr"])
        made["optimizer"].step()
        made["lr_scheduler"]["scheduler"].step()
    plain = Classifier(written(), 5, scalar_lr=0.7)
    plain._trainer = task._trainer
    assert len(plain.configure_optimizers()["optimizer"].param_groups) == 2


def train(rank, world_size):
    """Four steps of one rank's share of six images, uneven; of all in one process."""
    model = randomized(fixed(written()).double())
    wrapped = DistributedDataParallel(model) if world_size > 1 else model
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(6, 3, 8, 8, generator=generator, dtype=torch.float64).tensor_split([2] * (world_size - 1))[rank]
    labels = torch.randint(5, (6,), generator=generator).tensor_split([2] * (world_size - 1))[rank]
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9)
    for _ in range(4):
        optimizer.zero_grad()
        (world_size * F.cross_entropy(wrapped(x), labels, reduction="sum") / 6).backward()  # DDP takes the mean
        optimizer.step()
    return {name: value.detach() for name, value in model.state_dict().items()}


def test_two_ranks_do_what_one_process_does(run):
    alone = train(0, 1)
    start = randomized(fixed(written()).double()).state_dict()
    assert all(not torch.equal(value, start[name]) for name, value in alone.items())
    for state in run(train, 2):
        torch.testing.assert_close(state, alone, rtol=1e-9, atol=1e-9)


def test_no_norm_is_an_identity():
    layer, x = NoNorm(nn.BatchNorm2d(3, affine=False, track_running_stats=False)), torch.randn(2, 3)
    assert layer(x) is x
    assert not layer.state_dict()
