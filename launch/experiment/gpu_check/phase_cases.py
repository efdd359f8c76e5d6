"""The inputs on which the phases of a training step are compared."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .inputs import full

_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
_SHAPES: tuple[tuple[str, tuple[int, ...], float], ...] = (  # layout, shape, mean
    ("contiguous", (6, 7, 5, 4), 0.5),
    ("channels_last", (6, 8, 5, 4), 0.5),
    ("contiguous", (33, 7), 0.5),
    ("contiguous", (6, 7, 9), 0.5),
    ("contiguous", (3, 4, 2, 3, 4), 0.5),
    ("channels_last", (3, 4, 2, 3, 4), 0.5),
    ("contiguous", (9, 5, 1, 1), 0.5),
    ("contiguous", (4, 3, 16, 16), 50.0),  # mean/std up to 100 by channel, up to which float32 promises 2e-5
    ("channels_last", (4, 3, 16, 16), 50.0),
    ("contiguous", (8, 32, 56, 56), 0.5),  # sums of many values, several blocks of a kernel
    ("channels_last", (8, 32, 56, 56), 0.5),
)
_EMPTY = ("contiguous", (0, 5, 4, 4), 0.5)
_STEEP_MEAN = 5000.0  # mean/std up to 1e4, by channel
_MORE: dict[str, tuple[tuple[str, tuple[int, ...], float], ...]] = {  # by back end
    "reference": (("strided", (6, 7, 5, 4), 0.5), ("permuted", (6, 7, 5), 0.5), _EMPTY),
    "triton": (_EMPTY,),
}
_STEEP = ("contiguous", (4, 3, 16, 16), _STEEP_MEAN), ("channels_last", (4, 3, 16, 16), _STEEP_MEAN)
MOMENTUM = 0.3
NUM_BATCHES = 4  # with this one; the cumulative average has a momentum of 1 / NUM_BATCHES


@dataclass
class Case:
    """One input with everything around it."""

    layout: str
    label: str  # shape, mean, parameters and momentum
    x: Tensor
    dy: Tensor
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor
    running_var: Tensor
    momentum: float | Tensor | None
    is_dense: bool
    is_steep: bool


def make_cases(dtype: torch.dtype, device: str, back_end: str) -> list[Case]:
    """Draw the inputs of one dtype that a back end takes.

    Triton compiles kernels for every combination of a shape and what goes with it, so most shapes get one each.
    """
    cases: list[Case] = []
    in_tensor = torch.tensor(MOMENTUM, dtype=torch.float64, device=device)
    kinds: tuple[tuple[str, torch.dtype | None, float | Tensor | None], ...] = (
        ("no weight", None, MOMENTUM),
        (f"weight {full(dtype)}, momentum in a tensor", full(dtype), in_tensor),
        (f"weight {dtype}, cumulative average", dtype, None),
    )
    shapes = _SHAPES + _MORE.get(back_end, ())
    if back_end == "triton" and dtype == torch.float32:
        shapes += _STEEP
    for number, (layout, shape, mean) in enumerate(shapes):
        generator = torch.Generator().manual_seed(len(cases))
        x, dy = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
        x = x * torch.linspace(0.5, 2, shape[1]).double().view(-1, *[1] * (len(shape) - 2)) + mean
        x, dy = (_lay_out(t.to(device, dtype), layout) for t in (x, dy))
        some = kinds if back_end != "triton" or number < 2 else (kinds[number % len(kinds)],)
        for kind, of, momentum in some:
            weight, bias = (None if of is None else _per_channel(shape[1], seed, device, of) for seed in (1, 2))
            mean_before, var_before = (_per_channel(shape[1], seed, device, full(dtype)) for seed in (3, 4))
            label = f"{'x'.join(map(str, shape))}, mean {mean:g}, {kind.replace('torch.', '')}"
            facts = back_end != "reference", mean == _STEEP_MEAN
            cases.append(Case(layout, label, x, dy, weight, bias, mean_before, var_before, momentum, *facts))
    return cases


def _per_channel(num_features: int, seed: int, device: str, dtype: torch.dtype) -> Tensor:
    return (torch.rand(num_features, generator=torch.Generator().manual_seed(seed)) + 0.5).to(device, dtype)


def _lay_out(x: Tensor, layout: str) -> Tensor:
    if layout == "channels_last":
        return x.contiguous(memory_format=_LAST[x.dim()])
    if layout == "strided":
        return torch.stack([x, x + 1], dim=-1)[..., 0]
    if layout == "permuted":
        return x.transpose(0, 2).contiguous().transpose(0, 2)
    return x
