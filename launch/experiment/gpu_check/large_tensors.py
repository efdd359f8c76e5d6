"""Part `large`: Triton's kernels on a tensor of more than 2**31 values, whose offsets need 64 bits.

Sums are compared with those of float64, taken piece by piece; outputs at the ends of a channel and in its middle.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from syncbn.ops import triton
from syncbn.ops.reference import Running

from . import float64_reference
from .inputs import TOLERANCE, error_of, name_of
from .phase_errors import sums_error
from .result import Outcome, Row, Table

_NUM = 2**30 + 8  # values of each of two channels, 4.3 GB; 24 fewer in all are 2**31 - 8
_PIECE = 2**26
_END = 1000  # values of a channel that are compared, at either end and in the middle
_DTYPE = torch.float16
_EPS = 1e-5


@torch.no_grad()
def measure(device: str) -> Outcome:
    """Run the four phases on the same memory, seen as channels first, as channels last, and as one channel."""
    x, dy = (torch.randn(2 * _NUM, dtype=_DTYPE, device=device) for _ in range(2))
    x += 0.5
    rows: list[Row] = []
    failures: list[str] = []
    for shape in ((1, 2, _NUM), (_NUM, 2), (1, 1, 2 * _NUM), (1, 1, 2 * _NUM - 24)):
        label = "x".join(map(str, shape))
        for what, error, tolerance in _errors(*(t[: math.prod(shape)].view(shape) for t in (x, dy))):
            rows.append({"shape": label, "what": what, "error": error, "tolerance": tolerance})
            if isinstance(error, str) or not error <= tolerance:
                failures.append(f"{label}, {what}: {error}, tolerance {tolerance:.3g}")
    summary = f"{2 * _NUM} values of {name_of(_DTYPE)} in {len(rows)} comparisons: sums and outputs as in float64"
    return Outcome(summary, [Table("Large tensors against float64", rows)], failures)


def _errors(x: Tensor, dy: Tensor) -> Iterator[tuple[str, float | str, float]]:
    """Compare each phase, given the true results of those before; give what, its error, the tolerance."""
    kernels = triton.kernels_for(x, None, None, None, None, quietly=False)
    if kernels is None:
        yield "kernels", "expected those of triton for this input, got none", 0.0
        return
    moments = _moments(x)
    of_sums = TOLERANCE[torch.float32]
    yield "sums", sums_error(kernels.forward_reduce(x), moments), of_sums
    true = moments.statistics(_EPS)
    y, _ = kernels.forward_apply(x, moments.sums().to(x.device), None, None, Running(), _EPS)
    error = max(
        error_of(float64_reference.per_channel(y_part), float64_reference.normalized(part, true, None, None))
        for part, y_part in _ends(x, y)
    )
    yield "y", error, TOLERANCE[_DTYPE]
    del y
    statistics = true.to(x.device)
    found, _, _ = kernels.backward_reduce(dy, x, statistics, None, None)
    sums = _gradient_sums(dy, x, statistics)
    scale = max(float64_reference.norm(sums), moments.num**0.5)  # sums of random signs
    yield "sums of gradients", error_of(found, sums, scale), of_sums
    sums += moments.num * torch.linspace(0.5, 1.5, len(sums), dtype=torch.float64)  # not small beside the terms of dx
    dx = kernels.backward_apply(dy, x, statistics, None, sums.to(x.device))
    error = max(
        error_of(
            float64_reference.per_channel(dx_part), float64_reference.backward_apply(dy_part, part, true, None, sums)
        )
        for part, dy_part, dx_part in _ends(x, dy, dx)
    )
    yield "dx", error, TOLERANCE[_DTYPE]


def _ends(*tensors: Tensor) -> Iterator[list[Tensor]]:
    """Give equal parts of tensors: their first values per channel, those in the middle, and the last."""
    dim = 0 if tensors[0].dim() == 2 else 2
    num = tensors[0].shape[dim]
    for start in (0, num // 2, num - _END):
        yield [t.narrow(dim, start, _END) for t in tensors]


def _total(sums: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Add up ``sums`` of all pieces, which it gets in float64 as ``(C, n)``."""
    seen: Sequence[Tensor] = [t.movedim(1, 0).flatten(1) for t in tensors]  # views
    pieces = zip(*(torch.split(t, _PIECE, dim=1) for t in seen), strict=True)
    return torch.stack([sums(*(piece.double() for piece in several)) for several in pieces]).sum(0)


def _moments(x: Tensor) -> float64_reference.Moments:
    num = x.numel() // x.shape[1]
    mean = _total(lambda values: values.sum(1), x) / num
    var = _total(lambda values: (values - mean[:, None]).square_().sum(1), x) / num
    return float64_reference.Moments(mean.cpu(), var.cpu(), num)


def _gradient_sums(dy: Tensor, x: Tensor, statistics: Tensor) -> Tensor:
    mean, invstd = statistics[:-1].view(2, -1, 1)

    def sums(gradient: Tensor, values: Tensor) -> Tensor:
        return torch.cat([gradient.sum(1), (gradient * (values - mean) * invstd).sum(1)])

    return _total(sums, dy, x).cpu()
