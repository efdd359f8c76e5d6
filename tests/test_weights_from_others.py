"""Models of Keras and flax in ours, by the functions of docs/weights.md: evaluated, and trained one step further."""

import copy
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from parity import in_our_names, unbiased
from pytest_examples import find_examples
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from witnesses import ask

import syncbn

RECIPE = {}
exec(next(iter(find_examples(Path(__file__).parents[1] / "docs" / "weights.md"))).source, RECIPE)
load_batch_norm, load_kernel = RECIPE["load_batch_norm"], RECIPE["load_kernel"]

SIZES = 3, 0, 2  # images of the ranks
NUM_POSITIONS = 30, 12, 12, 12  # of an image, before each BatchNorm


def draw(seed):
    generator = np.random.default_rng(seed)
    return {"x": generator.normal(size=(sum(SIZES), 8, 7, 2)), "dy": generator.normal(size=(sum(SIZES), 3))}


class Flatten(nn.Module):
    """As where channels are last."""

    def forward(self, x):
        return x.movedim(1, -1).flatten(1)


def load(layers, **modules):
    """Chain modules, and fill those that ``layers`` names: with variables, and a BatchNorm's arguments."""
    model = nn.Sequential()
    for name, module in modules.items():
        model.add_module(name, module.double())
        if name in layers:
            values, arguments = layers[name]
            (load_batch_norm if isinstance(module, _BatchNorm) else load_kernel)(module, values, **arguments)
    return model


def train_rank(rank, world_size, model, x, dy):
    """One step on this rank's images: outputs, input gradient, gradients by name, and the buffers."""
    model = syncbn.convert(copy.deepcopy(model)).train()  # what comes here, all ranks share
    x = x.split(SIZES)[rank].requires_grad_()
    y = model(x)
    (y * dy.split(SIZES)[rank]).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return y.detach(), x.grad, gradients, dict(model.named_buffers())


def compare(run, model, batch, found):
    """Compare a filled model with what the witness found: evaluated, and after one step of three uneven ranks."""
    x, dy = torch.tensor(batch["x"]).movedim(-1, 1), torch.tensor(batch["dy"])
    close(model.eval()(x), found["y_eval"])
    results = run(train_rank, len(SIZES), model, x, dy)
    close(torch.cat([result[0] for result in results]), found["y"])
    close(torch.cat([result[1] for result in results]).movedim(1, -1), found["dx"])
    for name, layer in model.named_children():
        total = {key: [result[2][f"{name}.{key}"] for result in results] for key, _ in layer.named_parameters()}
        wanted = in_our_layout(layer, found["gradients"].get(name, {}))
        assert wanted.keys() == {key for key, parts in total.items() if parts[0] is not None}
        for key, gradient in wanted.items():
            close(sum(total[key]), gradient)
    norms = {name: layer for name, layer in model.named_children() if isinstance(layer, _BatchNorm)}
    for (name, layer), num_positions in zip(norms.items(), NUM_POSITIONS, strict=False):
        after, n = in_our_names(found["after"][name]), sum(SIZES) * num_positions
        ours = {key: results[0][3][f"{name}.{key}"] for key in ("running_mean", "running_var")}
        close(ours["running_mean"], after["running_mean"])
        close(ours["running_var"], unbiased([after["running_var"]], n, layer.momentum, layer.running_var))
        assert (ours["running_var"] - after["running_var"]).abs().max() > 1e-6


def in_our_layout(layer, gradients):
    """Translate a layer's gradients: that of a kernel has the layout of the kernel."""
    if "kernel" not in gradients:
        return in_our_names(gradients)
    twin = copy.deepcopy(layer)
    load_kernel(twin, gradients)
    return dict(twin.named_parameters())


def close(actual, wanted):
    torch.testing.assert_close(actual.detach(), torch.as_tensor(wanted).detach(), rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("keras") is None, reason="keras is not installed")
def test_a_model_of_keras(run):
    batch = draw(0)
    [found] = ask("keras_model_witness.py", [batch])
    for kernels in (found["variables"]["depthwise"], found["gradients"]["depthwise"]):
        kernels["kernel"] = kernels["kernel"].reshape(3, 3, 1, -1)
    model = load(
        {name: (values, found["arguments"].get(name, {})) for name, values in found["variables"].items()},
        conv=nn.Conv2d(2, 6, 3),
        norm=nn.BatchNorm2d(6),
        relu=nn.ReLU(),
        depthwise=nn.Conv2d(6, 12, 3, groups=6, bias=False),
        depthwise_norm=nn.BatchNorm2d(12),
        depthwise_relu=nn.ReLU(),
        last_conv=nn.Conv2d(12, 4, 1, bias=False),
        last_norm=nn.BatchNorm2d(4),
        flatten=Flatten(),
        head=nn.Linear(48, 3),
    )
    assert (model.norm.momentum, model.norm.eps) == (pytest.approx(0.01), 1e-3)
    compare(run, model, batch, found)


FLAX_ARGUMENTS = {
    "BatchNorm_0": {"momentum": 0.99, "epsilon": 1e-5},
    "BatchNorm_1": {"momentum": 0.8, "epsilon": 0.01},
    "BatchNorm_2": {"momentum": 0.5, "epsilon": 1e-5},
    "BatchNorm_3": {"momentum": 0.99, "epsilon": 1e-5},
}


@pytest.mark.slow
@pytest.mark.skipif(find_spec("flax") is None, reason="flax is not installed")
def test_a_model_of_flax(run):
    batch = draw(1)
    [found] = ask("flax_model_witness.py", [batch])
    params, batch_stats = found["params"], found["batch_stats"]
    layers = {
        name: ({**params.get(name, {}), **batch_stats.get(name, {})}, FLAX_ARGUMENTS.get(name, {}))
        for name in params | batch_stats
    }
    model = load(
        layers,
        Conv_0=nn.Conv2d(2, 6, 3),
        BatchNorm_0=nn.BatchNorm2d(6),
        relu_0=nn.ReLU(),
        Conv_1=nn.Conv2d(6, 12, 3, groups=3, bias=False),
        BatchNorm_1=nn.BatchNorm2d(12),
        relu_1=nn.ReLU(),
        Conv_2=nn.Conv2d(12, 4, 1, bias=False),
        BatchNorm_2=nn.BatchNorm2d(4),
        BatchNorm_3=nn.BatchNorm2d(4, affine=False),
        flatten=Flatten(),
        Dense_0=nn.Linear(48, 3),
    )
    compare(run, model, batch, found)


def batch_norm_values(names, num_features=3):
    return {name: np.full(num_features, 2.0) for name in names}


def test_what_is_missing_or_of_another_shape_is_refused():
    layer = syncbn.SyncBatchNorm(3)
    complete = batch_norm_values(("gamma", "beta", "moving_mean", "moving_variance"))
    for values, what in (
        (batch_norm_values(("gamma", "beta", "moving_mean")), "running_var"),
        (complete | {"gamma": np.ones(4)}, "size mismatch for weight"),
        ({"beta": np.ones(4)}, "size mismatch for bias"),
    ):
        with pytest.raises(RuntimeError, match=what):
            load_batch_norm(layer, values, momentum=0.99, epsilon=1e-3)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        load_batch_norm(syncbn.SyncBatchNorm(3, affine=False), complete, momentum=0.99, epsilon=1e-3)
    assert (layer.momentum, layer.eps) == (0.1, 1e-5)
    assert layer.weight.requires_grad
