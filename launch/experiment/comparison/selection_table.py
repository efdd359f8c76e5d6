"""How each arm's learning rate was chosen, as the page shows it."""

from dataclasses import dataclass, field

from experiment.comparison.formatting import count
from experiment.comparison.results_table import ResultsTable


@dataclass
class SelectionLine:
    """What one arm tried with one choice of options: the validation error by learning rate, None without a number."""

    arm: str
    options: str
    errors: dict[float, float | None] = field(default_factory=dict)
    chosen: float | None = None
    at_edge: bool = False


def selection_lines(results: ResultsTable) -> list[SelectionLine]:
    """List the candidates by arm and options, the rates rising."""
    lines: dict[tuple[str, str], SelectionLine] = {}
    for row in results.candidates:
        rate, _, options = row["candidate"].removeprefix("lr ").partition(", ")
        line = lines.setdefault((row["arm"], options), SelectionLine(row["arm"], options))
        evaluation: dict[str, float | None] = next(iter((row.get("evaluations") or {}).values()), {})
        line.errors[float(rate)] = evaluation.get("val_error")
    chosen = {row["arm"]: row["selection"] for row in results.done if row.get("selection")}
    for line in lines.values():
        line.errors = dict(sorted(line.errors.items()))
        choice = chosen.get(line.arm)
        if choice and line.options == ", ".join(f"{name} {value}" for name, value in choice["options"].items()):
            line.chosen, line.at_edge = choice["lr"], choice["at_edge"]
    return list(lines.values())


def how_chosen(results: ResultsTable) -> str | None:
    """Say by which runs, in words; None if rates were not chosen."""
    choices = [row["selection"] for row in results.done if row.get("selection")]
    if not choices:
        return None
    first = choices[0]
    return (
        f"Before the grid was run, each arm tried these learning rates on seed {first['seed']}, which is none of the "
        f"grid's, with {first['world_size']} ranks, {count(first['per_rank_batch_size'], 'image')} per rank and a "
        f"schedule of at most {count(first['max_epochs'], 'epoch')}. Taken is the one with the least error on "
        f"validation images, with {first['mode']} statistics, for all batch sizes, ranks and groups; where it "
        "was the lowest or highest, further rates were tried. No test image was read."
    )
