"""Tables as text: in the terminal and in Markdown, from the same cells."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from experiment.bench.timing import Quartiles


@dataclass(frozen=True)
class Table:
    """Cells are text; ``note`` says what they are."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def markdown(self) -> str:
        """Lay out the table for a Markdown file, title and note before it."""
        rule = ["---:" if self._holds_numbers(number) else "---" for number in range(len(self.columns))]
        lines = [f"| {' | '.join(map(_cell, cells))} |" for cells in (self.columns, rule, *self.rows)]
        return "\n".join([f"### {self.title}", "", *([self.note, ""] if self.note else []), *lines, ""])

    def show(self, console: Console) -> None:
        """Print the table."""
        table = RichTable(
            title=escape(self.title), caption=escape(self.note) or None, title_justify="left", caption_justify="left"
        )
        for number, column in enumerate(self.columns):
            is_text = not self._holds_numbers(number)
            table.add_column(escape(column), justify="left" if is_text else "right", no_wrap=is_text)
        for row in self.rows:
            table.add_row(*map(escape, row))
        console.print(table)

    def _holds_numbers(self, number: int) -> bool:
        return all(row[number][:1].isdigit() or not row[number] for row in self.rows)


def _cell(text: str) -> str:
    """Escape what would end the cell or begin HTML."""
    return html.escape(text, quote=False).replace("|", r"\|").replace("\n", " ")


def as_they_are(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """Lay out flat rows, a column for each key."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return Table(title, columns, [[_text(row.get(column)) for column in columns] for row in rows])


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def shape_text(shape: Sequence[int]) -> str:
    """Write a shape, short."""
    return f"({','.join(map(str, shape))})"


def ratio(value: float | None) -> str:
    """Write a ratio, or nothing."""
    return "" if value is None else f"{value:.2f}"


def spread(values: Quartiles | None, digits: int = 2) -> str:
    """Write the median and the quartiles around it, or nothing."""
    if values is None:
        return ""
    low, median, high = (f"{value:.{digits}f}" for value in values)
    return f"{median} ({low}\N{EN DASH}{high})"
