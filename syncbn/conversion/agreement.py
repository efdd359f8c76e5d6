"""Compare what a model returns before and after its norms were folded."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from .folded import fold_all, plain_copy
from .pairs import copy_of_arguments, run, tensors

TOLERANCE = 1e-5  # of the range: rounding of float32 reaches 2e-6 in networks of 50 to 160 layers
_WHY = (
    "Something may read that layer's output unseen by torch (a scripted function, say); or the model magnifies "
    "rounding, which model.double() shows, or decides by it, as on boxes: then fold the part before that."
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
        return None if deviation <= TOLERANCE else f"the outputs differ by {deviation:.1e} of their range. {_WHY}"

    names = [*pairs]
    problem, good, bad = problem_of(names), 0, len(names)
    if problem is None:
        return
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if problem_of(names[:middle]) is None else (good, middle)
    raise ValueError(f"fold: with {names[bad - 1]} folded into {pairs[names[bad - 1]]}, {problem}")


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
    """List the tensors in what a model returned: the floating ones, if there are any."""
    found = [*tensors(output)]
    return [tensor for tensor in found if tensor.is_floating_point() or tensor.is_complex()] or found


def _worst(actual: Any, expected: Any) -> float:
    """Return the largest `error_of` the tensors in two outputs; infinite if they are not as many."""
    both = _outputs(actual), _outputs(expected)
    if len(both[0]) != len(both[1]):
        return math.inf
    return max((error_of(a, b) for a, b in zip(*both, strict=True)), default=math.inf)
