"""Layers, inputs and comparisons that the parts share."""

import itertools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

import syncbn
from syncbn.ops import backends

from . import requirements

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
OPERATORS = "syncbn, cuda operators"  # the kind of a layer of ours that runs on torch's operators, not on Triton
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Relative to the largest value of a tensor. The full types as the library promises for mean/std up to 100; half types
# at twice the rounding of their own values (2^-8 and 2^-11), for rounding upon rounding.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def name_of(dtype: torch.dtype) -> str:
    """Return "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")


def full(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the sums, and of parameters: float32 for half types."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


def draw(
    shape: Sequence[int], dtype: torch.dtype, device: str, form: str = "contiguous", seed: int = 0, mean: float = 0.5
) -> Tensor:
    """Draw values of standard deviation 1 on the CPU, the same for every device."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator) + mean
    return x.to(device, dtype).contiguous(memory_format=FORMATS[form])


def make_layer(kind: str, num_features: int, device: str, dtype: torch.dtype, **options: Any) -> nn.Module:
    """Make a layer with weights that are not 1: "BatchNorm2d", "SyncBatchNorm" of torch, "syncbn" or OPERATORS."""
    ours = dict.fromkeys(("syncbn", OPERATORS), syncbn.SyncBatchNorm)
    classes: dict[str, Any] = {"BatchNorm2d": nn.BatchNorm2d, "SyncBatchNorm": nn.SyncBatchNorm, **ours}
    layer: nn.Module = classes[kind](num_features, device=device, dtype=dtype, **options)
    if len(parameters := list(layer.parameters())):
        weight, bias = parameters
        with torch.no_grad():
            weight.copy_(draw([num_features], torch.float32, "cpu", seed=7, mean=1.5))
            bias.copy_(draw([num_features], torch.float32, "cpu", seed=8))
    return layer


def within(kind: str) -> AbstractContextManager[None]:
    """Return the context in which a layer of this kind runs."""
    return syncbn.use_kernels("cuda") if kind == OPERATORS else nullcontext()


def run_layer(layer: nn.Module, x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    """Return y and the gradients of x, weight and bias of the loss ``(y * dy).sum()``."""
    y = layer(x)
    return y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], dy)


def error_of(found: Tensor, truth: Tensor, scale: float | None = None) -> float:
    """Return the largest difference, relative to the largest value of the truth or to ``scale``; inf for NaN."""
    if truth.numel() == 0:
        return 0.0 if found.shape == truth.shape else float("inf")
    if found.shape != truth.shape:
        return float("inf")
    if scale is None:
        scale = truth.abs().max().item()
    difference = (found.detach().double().cpu() - truth.double().cpu()).abs()
    return float(difference.nan_to_num(float("inf"), float("inf")).max()) / max(scale, 1e-30)


def back_end(layer: nn.Module, x: Tensor) -> str:
    """Return the name of the kernels that serve ``layer`` on inputs like ``x`` here; starts their self-check."""
    names = ("weight", "bias", "running_mean", "running_var")
    kernels = backends.choose(x, *(getattr(layer, name) for name in names))
    module = kernels.__name__ if isinstance(kernels, ModuleType) else type(kernels).__module__
    return module.partition(".ops.")[2].partition(".")[0]


def refuse_reference(layer: nn.Module, x: Tensor, failures: list[str]) -> str:
    """Return `back_end`; that a GPU is left to slower kernels than could be had is a failure."""
    name = back_end(layer, x)
    problem = _slower(name) if x.is_cuda else None
    if problem is not None:
        failures.append(f"{name_of(x.dtype)}, {tuple(x.shape)}: {problem}")
    return name


def _slower(name: str) -> str | None:
    """Return what is wrong with the back end that serves a GPU, if anything is."""
    if name == "reference":
        return "the layer runs on the reference kernels, not on those for CUDA"
    if name == "cuda" and backends._chosen == "auto" and not requirements.import_problem("triton"):
        return "the layer runs on torch's operators (cuda), not on triton, though Triton is installed; choice: auto"
    return None


def cases(dtypes: Sequence[torch.dtype] = DTYPES) -> list[tuple[torch.dtype, str]]:
    """Return all pairs of dtype and memory format."""
    return list(itertools.product(dtypes, FORMATS))
