"""Time one layer, forward and backward, without the exchange: in a group whose collectives return at once."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from experiment.bench import timing
from experiment.bench.contenders import CONTENDERS, base_for, count_graph_breaks, prepare
from experiment.bench.spawn import fake_group
from experiment.bench.tables import Table, ratio, shape_text, spread
from syncbn import use_kernels

Row = dict[str, Any]
BASES = ("plain", "plain_compiled", "floor")
_CLASSES = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def measure(config: DictConfig) -> list[Row]:
    """Time one forward and backward pass of every contender, for every shape and memory format.

    Returns:
        Rows of `shape`, `format` ("contiguous" or "channels_last", which inputs of 2 and 3 dimensions do not have),
        `graph_breaks`, None for what is not compiled, and what `timing.summarize` says.
    """
    part, rows = config.layer, []
    cases = [(tuple(s), f) for s in part.shapes for f in part.formats if f == "contiguous" or len(s) in _LAST]
    torch.manual_seed(0)
    with fake_group():
        for shape, form in cases:
            x, dy = (_random(shape, form, part.dtype, config.device) for _ in range(2))
            if any(CONTENDERS[name].is_compiled for name in part.contenders):
                torch.compiler.reset()  # a graph for each case would be too many for one function
            passes = {name: _both_passes(make_layer(name, x), x, dy) for name in part.contenders}
            breaks = {name: count_graph_breaks(name, run) for name, run in passes.items()}
            times = timing.interleave(passes, part.rounds, lambda n: use_kernels(CONTENDERS[n].kernels), config.device)
            for row in timing.summarize(times, BASES):
                rows.append({"shape": list(shape), "format": form, "graph_breaks": breaks[row["contender"]], **row})
    return rows


def make_layer(name: str, x: Tensor) -> nn.Module:
    """Make the contender's layer for inputs like ``x``; parameters are float32 for half types."""
    dtype = x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32
    return prepare(name, _CLASSES[x.dim()](x.shape[1], dtype=dtype), x.device)


def _both_passes(layer: nn.Module, x: Tensor, dy: Tensor) -> Callable[[], object]:
    inputs = [x, *layer.parameters()]
    return lambda: torch.autograd.grad(layer(x), inputs, dy)


def _random(shape: Sequence[int], form: str, dtype: str, device: str) -> Tensor:
    memory_format = _LAST[len(shape)] if form == "channels_last" else torch.contiguous_format
    x = torch.randn(*shape, device=device).to(getattr(torch, dtype), memory_format=memory_format)
    return x.requires_grad_()


def tabulate(rows: Sequence[Row]) -> list[Table]:
    """Lay out a summary by contender, and ratios and times by shape."""
    names = list(dict.fromkeys(row["contender"] for row in rows))
    return [_summary(rows, names), _by_case(rows, names)]


def _summary(rows: Sequence[Row], names: Sequence[str]) -> Table:
    forms = list(dict.fromkeys(row["format"] for row in rows))
    lines = []
    for name in names:
        mine, plain = [row for row in rows if row["contender"] == name], base_for(name, "plain")
        means = [_mean([row for row in mine if row["format"] == form], plain) for form in forms]
        worst = max((row["ratios"][plain].median for row in mine if plain in row["ratios"]), default=None)
        ends = [_mean(mine, "plain"), _mean(mine, "floor")]
        lines.append([CONTENDERS[name].label, *means, _mean(mine, plain), ratio(worst), *ends])
    columns = ["", *forms, "all", "worst", "to eager nn.BatchNorm", "to floor"]
    num_breaks = [row["graph_breaks"] for row in rows if row["graph_breaks"] is not None]
    note = (
        "Time over that of nn.BatchNorm, of compiled ones over that of nn.BatchNorm compiled; the last columns over "
        "that of nn.BatchNorm not compiled, and of the streaming floor. Geometric means over shapes of the medians of "
        "ratios within a round."
    ) + (f" Graph breaks: {sum(num_breaks)}." if num_breaks else "")
    return Table("Layer, forward and backward", columns, lines, note)


def _mean(rows: Sequence[Row], base: str) -> str:
    medians = [row["ratios"][base].median for row in rows if base in row["ratios"]]
    return ratio(timing.geometric_mean(medians) if medians else None)


def _by_case(rows: Sequence[Row], names: Sequence[str]) -> Table:
    cases: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        cases.setdefault((shape_text(row["shape"]), row["format"]), {})[row["contender"]] = row
    lines = []
    for case, of in cases.items():
        cells = [spread(of[name]["ratios"].get(base_for(name, "plain"))) for name in names if name != "plain"]
        lines.append([*case, *([f"{of['plain']['ms'].median:.3g}"] if "plain" in of else []), *cells])
    plain = ["plain, ms"] if "plain" in names else []
    note = "Median (quartiles) of the ratios to plain nn.BatchNorm, of compiled to compiled, within a round."
    columns = ["shape", "format", *plain, *(name for name in names if name != "plain")]
    return Table("Layer by shape", columns, lines, note)
