"""The report as one self-contained HTML page, with its plots as files beside it."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from experiment.claims import plots, selection
from experiment.claims.algebra import SENTENCES
from experiment.claims.claim import Claim, Plot
from experiment.claims.findings import Outcome, corrected_p, find, number
from experiment.claims.learning import STEPS
from experiment.claims.names import describe
from experiment.claims.runs import Row
from experiment.comparison.formatting import count, p_text
from experiment.comparison.statistics import mean_interval
from experiment.pages.figures import DARK, LIGHT
from experiment.pages.html import InlineFigure, templates, write_figure
from experiment.training.atomic_files import write_file

TEMPLATE = "page.html.jinja"
Command = Callable[[str | None], str]


def write_report(
    claims: Sequence[Claim], seeds: Sequence[int] | None, rows: Mapping[str, Row], folder: Path, command: Command
) -> list[Outcome]:
    """Write `index.html` and `plots/` into `folder`; equal rows give equal files.

    Args:
        claims: The claims of the page, in order.
        seeds: Of the results; None for each claim's own.
        rows: All rows by name, of these claims and others.
        folder: Made if it is not there.
        command: Gives the command that runs some claims, by their names, or with None all of this page.

    Returns:
        What was found for each claim.
    """
    outcomes = [find(claim, seeds or claim.seeds, rows) for claim in claims]
    names = {name for claim in claims for name in (claim.name, claim.tuned_by)}
    used = [row for outcome in outcomes for row in outcome.rows]
    page = (
        templates(Path(__file__).parent)
        .get_template(TEMPLATE)
        .render(
            title="Sentences about BatchNorm, put to the test",
            outcomes=outcomes,
            sentences=[(sentence, sentence.measure()) for sentence in SENTENCES],
            figures={outcome.claim.name: _figures(outcome, folder) for outcome in outcomes},
            tables={outcome.claim.name: _table(outcome) for outcome in outcomes},
            selection_seeds=selection.SEEDS,
            command=command,
            settings_steps=STEPS,
            describe=describe,
            number=number,
            p_text=p_text,
            count=count,
            corrected=corrected_p(outcomes),
            minutes=round(sum(row["seconds"] for row in rows.values() if row["claim"] in names) / 60),
            versions=sorted({f"{name} {version}" for row in used for name, version in row["versions"].items()}),
        )
    )
    write_file(folder / "index.html", page)
    return outcomes


def _figures(outcome: Outcome, folder: Path) -> list[InlineFigure]:
    """Draw the figures for which there are numbers."""
    drawn = [i for i, plot in enumerate(outcome.claim.plots) if plots.lines_of(plot, outcome.rows)]
    return [_figure(outcome, index, folder) for index in drawn]


def _figure(outcome: Outcome, index: int, folder: Path) -> InlineFigure:
    """Draw a figure for light and for dark."""
    plot: Plot = outcome.claim.plots[index]
    name = f"{outcome.claim.name}_{index + 1}"
    figures = [plots.draw(plot, outcome.rows, theme) for theme in (LIGHT, DARK)]
    text = f"{plot.title}: {plot.y_label}. " + "; ".join(
        f"{line} " + ", ".join(f"{number(interval.mean)}{f' at {x:g}' if plot.x else ''}" for x, interval in points)
        for line, points in plots.lines_of(plot, outcome.rows).items()
    )
    return write_figure(name, figures, text, plot.title, folder)


def _table(outcome: Outcome) -> list[tuple[str, str, list[str], int]]:
    """Average over seeds: setting, rate, numbers of the claim's columns, and n."""
    lines = []
    for setting in outcome.claim.settings:
        rows = [row for row in outcome.rows if row["setting"] == setting]
        if rows:
            rate = "" if rows[0]["rate"] is None else f"{rows[0]['rate']:g}"
            cells = [_mean(rows, name, label.endswith("%")) for name, label in outcome.claim.columns.items()]
            lines.append((describe(setting), rate, cells, len(rows)))
    return lines


def _mean(rows: Sequence[Row], name: str, percent: bool) -> str:
    """Write the mean and half of its interval; errors are fractions and shown in percent."""
    factor = 100 if percent and name.endswith("_error") else 1
    values = [factor * row["numbers"][name] for row in rows if row["numbers"].get(name) is not None]
    if not values:
        return "not finite"
    interval, note = mean_interval(values), "" if len(values) == len(rows) else f" (n = {len(values)})"
    half = "" if interval.half is None else f" ± {number(interval.half)}"
    return f"{number(interval.mean)}{half}{note}"
