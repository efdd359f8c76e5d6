"""The shares that layers of norm "sn" have learned, in the results of a run."""

from typing import Any

from rich.table import Table
from torch import nn

from syncbn.nn.switchable import KINDS, shares_of


def summarize(model: nn.Module) -> dict[str, Any]:
    """Return `shares` by layer: of the means and variances, by kind of statistics; nothing without such layers."""
    shares = shares_of(model)
    return {"shares": shares} if shares else {}


def table(results: dict[str, Any]) -> Table | None:
    """Lay out the shares, a line per layer; None without such layers."""
    if "shares" not in results:
        return None
    heads = [f"{what} {kind}" for what in ("mean", "var") for kind in KINDS]
    made = Table("layer", *heads, title="shares of the statistics", title_justify="left")
    for name, shares in results["shares"].items():
        numbers = [shares[what].get(kind) for what in ("mean", "var") for kind in KINDS]
        made.add_row(name, *("" if number is None else f"{number:.2f}" for number in numbers))
    return made
