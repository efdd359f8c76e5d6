"""Read a normalization layer's autograd node: how to normalize again, to the bit, from what the graph keeps."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.autograd import STEP_NODE
from ..ops.reference import Running
from .boxes import PLAIN, Box, peek
from .formulas import ACTIVATIONS, Normalized

_EPS = {"NativeBatchNormBackward0": "_saved_eps", "CudnnBatchNormBackward0": "_saved_epsilon"}
_one_pass: dict[tuple[Any, ...], bool] = {}  # by kind of input: whether `_by_statistics` gives the bits of `_anew`


def node_under(node: Any) -> Any:
    """Return the node of the normalization in a layer that may activate too; None if there is none."""
    while node is not None and type(node).__name__ in ACTIVATIONS:
        node = node.next_functions[0][0]
    name = type(node).__name__
    return node if name in _EPS or (name == STEP_NODE and getattr(node, "summed", None) is not None) else None


def is_known(layer: nn.Module) -> bool:
    """Whether a layer's forward is no user's own, which may use its parameters otherwise, or hooks of its own."""
    return type(layer).forward.__module__.partition(".")[0] in ("torch", "syncbn", "timm")


def read(node: Any, layer: nn.Module) -> Normalized | None:
    """Return how to compute the output of a layer's node again, None if that cannot be known."""
    if "bias" not in layer._parameters or not is_known(layer):
        return None
    bias = layer._parameters["bias"]
    kind = type(node).__name__, type(layer)
    if type(node).__name__ == STEP_NODE:
        x, *rest = peek(lambda: node.saved_tensors)
        weight = rest[0].tensor if len(rest) == 2 else None
        if x.is_changed or (bias is not None and not _is_bias(bias, node.next_functions[len(rest)][0])):
            return None
        apply = partial(_by_sums, node.kernels, node.summed, _copy(weight), _copy(bias), node.eps)
        return Normalized(x, apply, kind)
    is_training = node._saved_training
    names = "input", "weight", *(("result1", "result2") if is_training else ("running_mean", "running_var"))
    boxes = {name: peek(partial(getattr, node, f"_saved_{name}")) for name in names}
    tensors: dict[str, Any] = {name: box[0].tensor if box else None for name, box in boxes.items()}
    if not boxes["input"] or boxes["input"][0].is_changed or not _is_bias(bias, node.next_functions[2][0]):
        return None
    [x], affine = boxes["input"], (_copy(tensors["weight"]), _copy(bias))
    eps = getattr(node, _EPS[type(node).__name__])
    if not is_training:
        running = _copy(tensors["running_mean"]), _copy(tensors["running_var"])
        return Normalized(x, partial(_by_running, running, affine, eps), (*kind, "running"))
    mean, invstd = tensors["result1"], tensors["result2"]
    if type(node).__name__ != "NativeBatchNormBackward0" or not _is_one_pass(x, *affine):
        return Normalized(x, partial(_anew, affine, eps), (*kind, "anew"))
    apply = partial(_by_statistics, mean, _slope(invstd, affine[0]), affine[1])
    return Normalized(x, apply, (*kind, "statistics"))


def _is_bias(bias: Tensor | None, edge: Any) -> bool:
    """Whether a layer's bias is what its node added, by the node's edge to it."""
    if bias is None or edge is None:
        return edge is None and (bias is None or not bias.requires_grad)
    return bias.grad_fn is edge or getattr(edge, "variable", None) is bias


def _copy(tensor: Tensor | None) -> Tensor | None:
    """Copy O(C) numbers: an optimizer, or FSDP, may change them before backward."""
    return None if tensor is None else tensor.detach().clone()


def _by_sums(kernels: Any, summed: Tensor, weight: Any, bias: Any, eps: float, x: Tensor) -> Tensor:
    y: Tensor = kernels.forward_apply(x, summed, weight, bias, Running(), eps)[0]
    return y


def _by_running(running: tuple[Any, Any], affine: tuple[Any, Any], eps: float, x: Tensor) -> Tensor:
    return F.batch_norm(x, *running, *affine, False, 0.0, eps)


def _anew(affine: tuple[Any, Any], eps: float, x: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, *affine, True, 0.0, eps)


def _slope(invstd: Tensor, weight: Tensor | None) -> Tensor:
    return invstd if weight is None else invstd * weight


def _by_statistics(mean: Tensor, slope: Tensor, bias: Any, x: Tensor) -> Tensor:
    """Normalize in one pass: eval mode with a variance of 1 and invstd within the weight."""
    one = torch.ones_like(mean)  # F.batch_norm refuses an eps of 0 before torch 2.13
    return torch.batch_norm(x, slope, bias, mean, one, False, 0.0, 0.0, False)


def _is_one_pass(box: Box, *affine: Tensor | None) -> bool:
    """Whether normalizing by known statistics gives the same bits: tried once, with a weight and bias that tell."""
    kind = (*box.kind, *(None if t is None else t.dtype for t in affine))
    if kind not in _one_pass:
        x = box.compute()
        if not tells(x):
            return False
        steps = torch.linspace(0.3, 1.7, x.shape[1])
        weight, bias = (None if t is None else (steps - i).to(t) for i, t in enumerate(affine))
        with torch.no_grad():
            y, mean, invstd = torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, 1e-5)
            again = _by_statistics(mean, _slope(invstd, weight), bias, x)
        _one_pass[kind] = have_equal_bits(y, again)
    return _one_pass[kind]


def tells(tensor: Tensor) -> bool:
    """Whether a comparison with this map can tell a right formula from a wrong one."""
    return tensor.numel() > 0 and bool(tensor.min() < tensor.max())


def have_equal_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors agree to the bit: a NaN with a NaN too, 0 not with -0."""
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    is_alike = type(a) in PLAIN and a.dtype == b.dtype and a.shape == b.shape
    return is_alike and torch.equal(a.contiguous().view(whole), b.contiguous().view(whole))
