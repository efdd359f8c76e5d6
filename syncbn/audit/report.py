"""Write the advice and the table of an audit."""

import math
import textwrap
from dataclasses import dataclass

from ..conversion.third_party import is_sync_name
from .rows import AuditRow

# The error of 16 independent values, which is that of 16 images whose pixels all say the same, the worst case. With 16
# images per rank BatchNorm trains as well as with 32; with 8 it begins to lose (Wu & He 2018, table 2).
SMALL_ERROR = math.sqrt(2 / 16)
WIDTH = 100  # characters of a line
_HEADER = ("layer", "kind", "C", "values", "in group", "error", "bound", "in group")
_LEGEND = "values per channel; error of the batch variance; bound: sqrt(2 / values); ~: error / sqrt(ranks)"


@dataclass(frozen=True)
class Audit:
    """What `syncbn.audit` found; ``print`` shows it as a table of 100 columns."""

    rows: list[AuditRow]
    redundant_biases: list[str]
    num_redundant_parameters: int
    advice: str
    summary: str

    def __str__(self) -> str:
        """Lay out the table with its notes, the redundant biases and the advice."""
        biases = ""
        if self.redundant_biases:
            names = ", ".join(self.redundant_biases)
            biases = f"Redundant biases ({self.num_redundant_parameters} parameters), subtracted by BatchNorm: {names}"
        texts = [line for text in (biases, f"Advice: {self.advice}") for line in textwrap.wrap(text, WIDTH)]
        return "\n".join([self.summary, "", *_table(self.rows), "", _LEGEND, *texts])


def advise(rows: list[AuditRow], per_rank_batch_size: int, num_images: int) -> str:
    """Give one sentence of advice: what is impossible first, else by the largest errors against SMALL_ERROR."""
    batched = [row for row in rows if row.count is not None]
    if not batched and any(row.note.startswith("not") for row in rows):
        return "No layer with batch statistics could be measured: see the notes."
    if not batched:
        return "No layer here normalizes by the batch, so the batch per rank does not matter to normalization."
    impossible = [row for row in batched if row.group_count == 1]
    if impossible:
        names = _names(impossible)
        return f"Use more images per rank or GroupNorm: {names} cannot be normalized, not even over the group."
    alone = [row for row in batched if row.note.startswith("cannot")]
    if alone:
        return f"Synchronize (syncbn.convert): {_names(alone)} cannot be normalized on one rank, but over the group."
    measured = [row for row in batched if row.group_error is not None]
    if not measured:
        need = 2 * per_rank_batch_size
        why = f"give a batch of {need} images or more, not {num_images}" if num_images < need else "see the notes"
        return f"The error of the batch variance was not measured: {why}."
    return _advise_by_error(measured)


def _advise_by_error(rows: list[AuditRow]) -> str:
    worst = max(rows, key=_error)
    worst_in_group = max(rows, key=lambda row: row.group_error or 0.0)
    small = _percent(SMALL_ERROR)
    if _error(worst) <= SMALL_ERROR:
        return (
            f"Plain BatchNorm suffices: the worst layer, {worst.name}, has {_words(worst)} on one rank, below the "
            f"{small} of 16 independent images, with which BatchNorm is known to train well."
        )
    if worst_in_group.group_count == worst_in_group.count:
        return (
            f"Use more images per rank or GroupNorm: the worst layer, {worst_in_group.name}, has "
            f"{_words(worst_in_group)}, above {small}, and no other rank to share statistics with."
        )
    if (worst_in_group.group_error or 0.0) <= SMALL_ERROR:
        synchronize = "Keep synchronizing" if is_sync_name(worst.kind) else "Synchronize (syncbn.convert)"
        return (
            f"{synchronize} over {_num_ranks(worst)} ranks: that brings the worst layer, {worst.name}, from "
            f"{_words(worst)} to {_group_percent(worst)}, below {small}."
        )
    return (
        "Use GroupNorm, larger groups or more images per rank: even the group's batch is small, as synchronizing over "
        f"{_num_ranks(worst_in_group)} ranks brings the worst layer, {worst_in_group.name}, from "
        f"{_words(worst_in_group)} to {_group_percent(worst_in_group)} only, above {small}."
    )


def _error(row: AuditRow) -> float:
    return math.inf if row.error is None else row.error  # nothing varies on one rank: worse than any number


def _words(row: AuditRow) -> str:
    return "no variance at all" if row.error is None else f"an error of {_percent(row.error)}"


def _table(rows: list[AuditRow]) -> list[str]:
    """Align the columns; a long name keeps its end, a note stands below its row."""
    cells = [_HEADER, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(_HEADER))]
    widths[0] = min(widths[0], WIDTH - sum(widths[1:]) - 2 * (len(widths) - 1))
    lines = []
    for line, note in zip(cells, ["", *(row.note for row in rows)], strict=True):
        name = line[0] if len(line[0]) <= widths[0] else "…" + line[0][1 - widths[0] :]
        texts = [cell.ljust(width) for cell, width in zip((name, line[1]), widths, strict=False)]
        numbers = [cell.rjust(width) for cell, width in zip(line[2:], widths[2:], strict=True)]
        lines.append("  ".join(texts + numbers).rstrip())
        lines += textwrap.wrap(note, WIDTH, initial_indent="    ", subsequent_indent="    ")
    return lines


def _cells(row: AuditRow) -> tuple[str, ...]:
    kind = row.kind if len(row.kind) <= 17 else row.kind[:16] + "…"
    counts = ["" if count is None else str(count) for count in (row.count, row.group_count)]
    return (
        row.name,
        kind,
        str(row.num_features),
        *counts,
        _percent(row.error),
        _percent(row.bound),
        _group_percent(row),
    )


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}%"


def _group_percent(row: AuditRow) -> str:
    return ("~" if row.is_estimate else "") + _percent(row.group_error)


def _num_ranks(row: AuditRow) -> int:
    return (row.group_count or 0) // (row.count or 1)


def _names(rows: list[AuditRow]) -> str:
    others = f" and {len(rows) - 1} more" if len(rows) > 1 else ""
    return rows[0].name + others
