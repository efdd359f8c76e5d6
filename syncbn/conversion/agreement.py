"""Compare what a model returns before and after its norms were folded."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .folded import fold_all, plain_copy
from .pairs import copy_of_arguments, run, tensors

TOLERANCE = 1e-5  # of the largest value: rounding of float32 reaches 2e-6 in networks of 50 to 160 layers


def verify(
    model: nn.Module, pairs: dict[str, str], expected: Any, args: tuple[Any, ...], dtype: torch.dtype | None
) -> None:
    """Raise if the folded model says something else than the model on the example."""
    folded = fold_all(plain_copy(model, dtype), pairs)
    try:
        output = run(folded, copy_of_arguments(args, dtype))
    except Exception as error:
        raise ValueError(f"fold: the folded model fails; something reads a norm that was folded: {error!r}") from error
    if not any(bool(torch.isfinite(tensor).any()) for tensor in _outputs(expected)):
        raise ValueError("fold: expected an example for which the model returns finite tensors; nothing was compared.")
    deviation = _worst(output, expected)
    if deviation <= TOLERANCE:
        return
    plain, folded = plain_copy(model, dtype), fold_all(plain_copy(model, dtype), pairs)
    at = _first_deviation(plain, folded, pairs, [copy_of_arguments(args, dtype) for _ in range(2)])
    raise ValueError(
        f"fold: the outputs would differ by {deviation:.1e} of the largest value, expected at most {TOLERANCE:.0e}; "
        f"the first norm that differs is {at}. Something before it may read the output of a layer where torch does not "
        "see it; or the output is decided by rounding, as boxes are: then fold the part of the model before that."
    )


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


def _first_deviation(model: nn.Module, folded: nn.Module, names: Iterable[str], args: list[tuple[Any, ...]]) -> str:
    """Say at which norm, in the order of the forward, outputs begin to differ; else, where they differ most."""
    seen: dict[str, Tensor] = {}
    errors: dict[str, float] = {}
    for name in names:
        before, after = model.get_submodule(name), folded.get_submodule(name)
        before.register_forward_hook(lambda _, __, y, name=name: seen.update({name: y.clone()}))
        after.register_forward_hook(lambda _, __, y, name=name: errors.update({name: error_of(y, seen[name])}))
    run(model, args[0])
    run(folded, args[1])
    first = next((name for name, error in errors.items() if error > TOLERANCE), max(errors, key=lambda n: errors[n]))
    return f"{first} ({errors[first]:.1e})"
