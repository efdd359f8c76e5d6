"""Compare what a model returns before and after its norms were folded."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from .folded import fold_all, plain_copy
from .pairs import copy_of_arguments, run, tensors

TOLERANCE = 1e-5  # of the largest value: rounding of float32 reaches 2e-6 in networks of 50 to 160 layers
_WHY = (
    "Something may read that layer's output unseen by torch (a scripted function, say); or rounding decides the "
    "output, as with boxes that are kept or not: then fold the part of the model before that."
)


def verify(model: nn.Module, pairs: dict[str, str], expected: Any, args: Any, dtype: torch.dtype | None) -> None:
    """Raise if the folded model returns something else on ``args`` than ``expected``, what the model returned.

    The norm to blame is found by halving: so many of them can be folded, and with the next one it goes wrong.
    """
    if not any(bool(torch.isfinite(tensor).any()) for tensor in _outputs(expected)):
        raise ValueError("fold: expected an example for which the model returns finite tensors; nothing was compared.")

    def problem_of(names: list[str]) -> str | None:
        folded = fold_all(plain_copy(model, dtype), {name: pairs[name] for name in names})
        try:
            output = run(folded, copy_of_arguments(args, dtype))
        except Exception as error:
            return f"the model fails with {error!r}: something reads the norm's attributes."
        deviation = _worst(output, expected)
        return (
            None if deviation <= TOLERANCE else f"the outputs differ by {deviation:.1e} of their largest value. {_WHY}"
        )

    names = [*pairs]
    problem, good, bad = problem_of(names), 0, len(names)
    if problem is None:
        return
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if problem_of(names[:middle]) is None else (good, middle)
    raise ValueError(f"fold: with {names[bad - 1]} folded into {pairs[names[bad - 1]]}, {problem}")


def error_of(actual: Tensor, expected: Tensor) -> float:
    """Return the largest error, relative to the largest value; infinite where shapes or non-finite values differ."""
    if actual.shape != expected.shape:
        return math.inf
    dtype = torch.complex128 if expected.is_complex() else torch.float64
    actual, expected = (tensor.detach().to("cpu", dtype) for tensor in (actual, expected))
    finite = torch.isfinite(expected)
    if not torch.equal(torch.isfinite(actual), finite):
        return math.inf
    error, scale = ((tensor[finite].abs()) for tensor in (actual - expected, expected))
    if not len(error) or not error.any():
        return 0.0
    return (error.max() / scale.max()).item()  # infinite, where 0 was expected


def _outputs(output: Any) -> list[Tensor]:
    """List the tensors in what a model returned: the floating ones, if there are any."""
    found = [*tensors(output)]
    return [tensor for tensor in found if tensor.is_floating_point() or tensor.is_complex()] or found


def _worst(actual: Any, expected: Any) -> float:
    """Return the largest `error_of` the tensors in two outputs; infinite if they are not as many."""
    both = _outputs(actual), _outputs(expected)
    if len(both[0]) != len(both[1]):
        return math.inf
    return max((error_of(a, b) for a, b in zip(*both, strict=True)), default=math.inf)
