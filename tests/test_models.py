"""Models of eight packages: converted, one step on two uneven ranks is the step of one process; and reverted."""

from importlib.util import find_spec

import pytest
import torch
import torch.distributed as dist
import zoo
from conftest import OPTIONAL
from torch.nn.modules.batchnorm import _BatchNorm

import syncbn

SIZES = [2, 1]  # samples of each rank
QUICK = {"timm resnet10t", "timm mobilenetv3_small_050", "torchvision resnet18", "torchvision shufflenet_v2_x0_5"}
CASES = [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in zoo.MODELS]


def tensors(output):
    """Yield the tensors of what a model returned."""
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, dict | list | tuple):
        for part in output.values() if isinstance(output, dict) else output:
            yield from tensors(part)


def evaluated(model, inputs):
    with torch.no_grad():
        return [y.clone() for y in tensors(model.eval()(*inputs))]


def share_of(whole, like, rank):
    """Return what the first or the last rank has of ``whole``, of as many samples as ``like``."""
    return whole[: len(like)] if rank == 0 else whole[len(whole) - len(like) :]


def step(model, inputs, weights=None, rank=None):
    """Return the outputs and weights of ``loss = sum(w * (y + y**2 / 2))``, after its backward pass."""
    outputs = [y for y in tensors(model(*inputs)) if y.is_floating_point() and y.requires_grad]
    if weights is None:
        weights = [zoo.normal(*y.shape, seed=4) for y in outputs]
    else:
        weights = [share_of(w, y, rank) for w, y in zip(weights, outputs, strict=True)]
    sum((w * (y + y.square() / 2)).sum() for w, y in zip(weights, outputs, strict=True)).backward()
    return [y.detach() for y in outputs], weights


def assert_close(name, actual, expected, scale):
    """Compare in float64 what differs by the order of sums alone.

    Relative to the largest value of the tensor: 1e-8, since three samples on maps of one pixel make 1 / std large,
    several times in a row (2e-9 was seen). Relative to ``scale``, that of all gradients: 1e-13, since some are zero by
    algebra, as that of a bias before a BatchNorm: they are the rounding of terms that cancel, and these terms are as
    large as other gradients (7e-15 was seen).
    """
    error = (actual - expected).abs().max().item() if actual.numel() else 0.0
    limit = 1e-8 * expected.abs().max().item() + 1e-13 * scale if actual.numel() else 0.0
    assert actual.shape == expected.shape, (name, actual.shape, expected.shape)
    assert error <= limit, f"{name}: off by {error:.1e}, expected at most {limit:.1e}"


def classes_of(model):
    return {name: type(layer) for name, layer in model.named_modules()}


def a_rank(rank, world_size, name):
    written, samples = zoo.build(name)
    expected, weights = step(written, zoo.joined(samples))
    model, _ = zoo.build(name)
    classes, keys = classes_of(model), [*model.state_dict()]
    norms = {layer_name for layer_name, cls in classes.items() if issubclass(cls, _BatchNorm)}
    rows = syncbn.plan(model)
    assert {row.name for row in rows if row.reason == "synchronizes"} == norms != set()
    assert all("FrozenBatchNorm" in row.from_ for row in rows if row.name not in norms)
    assert syncbn.convert(model) is model  # warnings are errors
    assert {n for n, m in model.named_modules() if isinstance(m, syncbn.SyncBatchNorm)} == norms
    assert [*model.state_dict()] == keys

    inputs = zoo.joined(samples[: SIZES[0]] if rank == 0 else samples[SIZES[0] :])
    outputs, _ = step(model, inputs, weights, rank)
    for number, (y, whole) in enumerate(zip(outputs, expected, strict=True)):
        assert_close(f"output {number}", y, share_of(whole, y, rank), whole.abs().max().item())
    compare_gradients(model, written)
    for (key, buffer), other in zip(model.named_buffers(), written.buffers(), strict=True):
        assert_close(key, buffer.double(), other.double(), 1.0)

    synchronized = evaluated(model, inputs)
    syncbn.revert(model)
    assert classes_of(model) == classes
    assert [*model.state_dict()] == keys
    for y, other in zip(evaluated(model, inputs), synchronized, strict=True):
        assert torch.equal(y, other)
    return len(norms)


def compare_gradients(model, written):
    """Compare the sum over the ranks with one process."""
    pairs = [(n, p.grad, q.grad) for (n, p), q in zip(model.named_parameters(), written.parameters(), strict=True)]
    assert [n for n, grad, _ in pairs if grad is None] == [n for n, _, grad in pairs if grad is None]
    pairs = [pair for pair in pairs if pair[1] is not None]
    scale = max(grad.abs().max().item() for _, _, grad in pairs)
    for name, grad, expected in pairs:
        dist.all_reduce(grad)
        assert_close(name, grad, expected, scale)


@pytest.mark.parametrize("name", CASES)
def test_a_model_on_two_uneven_ranks_equals_one_process(run, name):
    package = name.split()[0]
    if find_spec(package) is None:
        pytest.skip(OPTIONAL.get(package, f"{package} is not installed"))
    assert len(set(run(a_rank, 2, name, timeout=170))) == 1
