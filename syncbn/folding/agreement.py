"""Compare what a model returns before and after its norms were folded."""

import math
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from .folded import fold_all, plain_copy
from .readers import copy_of_arguments, run, tensors

TOLERANCE = 1e-5  # of the range: rounding of float32 reaches 2e-6 in networks of 50 to 160 layers
_IN_FLOAT64 = 1e-9  # a larger deviation in float64 is not due to rounding
_CAUSES = [
    "Something may read that layer's output unseen by torch (a scripted function, say).",
    "Rounding may decide the output, as with boxes that are kept or not: then fold the part of the model before that.",
]


def verify(model: nn.Module, pairs: dict[str, str], expected: Any, args: Any, dtype: torch.dtype | None) -> str | None:
    """Raise if the folded model returns something else on ``args`` than ``expected``, what the model returned.

    A model that magnifies rounding may deviate, too, but not in float64: then the text of a warning is returned. The
    norm to blame is found by halving: so many of them can be folded, and with the next one it goes wrong.
    """
    _refuse_if_incomparable(expected)
    names = [*pairs]

    def deviation(num: int) -> tuple[float, str]:
        folded = fold_all(plain_copy(model, dtype), {name: pairs[name] for name in names[:num]})
        return _deviation(folded, expected, args, dtype)

    (found, text), good, bad = deviation(len(names)), 0, len(names)
    if found <= TOLERANCE:
        return None
    exact = _deviation_in_float64(model, pairs, args)
    if exact <= _IN_FLOAT64:
        why = "the model magnifies rounding, or it computes in a half type (autocast)"
        return f"syncbn.fold: {text}, but in float64 they differ by {exact:.1e}: {why}."
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if deviation(middle)[0] <= TOLERANCE else (good, middle)
    causes = " Or: ".join(_CAUSES if math.isfinite(found) else _CAUSES[::-1])
    raise ValueError(f"fold: with {names[bad - 1]} folded into {pairs[names[bad - 1]]}, {text}. {causes}")


def _refuse_if_incomparable(expected: Any) -> None:
    found = _outputs(expected)
    if not found:
        raise ValueError(
            "fold: expected a model that returns a tensor, or lists, tuples, dicts or dataclasses of tensors, got "
            f"{type(expected).__name__}; nothing was compared."
        )
    if not any(bool(torch.isfinite(tensor).any()) for tensor in found):
        raise ValueError("fold: expected an example for which the model returns finite tensors; nothing was compared.")


def _deviation(folded: nn.Module, expected: Any, args: Any, dtype: torch.dtype | None) -> tuple[float, str]:
    """Run a folded model, and return the largest error of its outputs, also in words; infinite for other shapes."""
    try:
        output = run(folded, copy_of_arguments(args, dtype))
    except Exception as error:
        raise ValueError(
            f"fold: without its norms the model fails, as something reads one of them: {error!r}"
        ) from error
    both = _outputs(output), _outputs(expected)
    shapes = [[tuple(tensor.shape) for tensor in side] for side in both]
    if shapes[0] != shapes[1]:
        new, old = next((a, b) for a, b in zip_longest(*shapes, fillvalue="none") if a != b)
        return math.inf, f"the outputs have other shapes: {new}, not {old}"
    largest = max((error_of(a, b) for a, b in zip(*both, strict=True)), default=math.inf)
    return largest, f"the outputs differ by {largest:.1e} of their range"


def _deviation_in_float64(model: nn.Module, pairs: dict[str, str], args: Any) -> float:
    """Return the deviation of model and example in float64; infinite where that does not run."""
    double = torch.float64
    try:
        expected = run(plain_copy(model, double), copy_of_arguments(args, double))
        return _deviation(fold_all(plain_copy(model, double), pairs), expected, args, double)[0]
    except Exception:
        return math.inf


def error_of(actual: Tensor, expected: Tensor) -> float:
    """Return the largest error, relative to the range, or the largest value if that is more.

    Infinite where shapes differ, or finite values and others.
    """
    if actual.shape != expected.shape:
        return math.inf
    finite = torch.isfinite(expected).cpu()
    if not torch.equal(torch.isfinite(actual).cpu(), finite):
        return math.inf
    actual, expected = (torch.view_as_real(t) if t.is_complex() else t for t in (actual, expected))
    actual, expected = (t.detach().to("cpu", torch.float64)[finite] for t in (actual, expected))
    error = (actual - expected).abs().max().item() if expected.numel() else 0.0
    if error == 0:
        return 0.0
    scale = max(expected.max() - expected.min(), expected.abs().max()).item()
    return error / scale if scale else math.inf


def _outputs(output: Any) -> list[Tensor]:
    """List the tensors in what a model returned, dense: the floating ones, if there are any."""
    found = [t if t.layout in (torch.strided, torch.jagged) else t.to_dense() for t in tensors(output)]
    return [tensor for tensor in found if tensor.is_floating_point() or tensor.is_complex()] or found
