"""Pages that need no other file: their templates, and figures in them that follow light and dark."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from experiment.pages.figure_files import to_inline_svg, to_png, to_svg
from experiment.training.atomic_files import write_file


@dataclass(frozen=True)
class InlineFigure:
    """One figure of a page, drawn for light and for dark."""

    name: str
    caption: str
    light: Markup
    dark: Markup


def templates(folder: Path) -> Environment:
    """Open the templates of a folder, which may extend `base.html.jinja`."""
    return Environment(
        loader=FileSystemLoader([folder, Path(__file__).parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def write_figure(name: str, figures: Sequence[Figure], title: str, caption: str, folder: Path) -> InlineFigure:
    """Write a figure to `folder/plots` as SVG and PNG, and give it for the page.

    Args:
        name: Of the files, and of the figure in the page.
        figures: For light and for dark.
        title: For those who do not see it.
        caption: Below it.
        folder: Of the page.
    """
    light, dark = [to_svg(figure) for figure in figures]
    write_file(folder / "plots" / f"{name}.svg", light)
    write_file(folder / "plots" / f"{name}.png", to_png(figures[0]))
    inline = [
        Markup(to_inline_svg(svg, f"{name}-{theme}", title)) for svg, theme in ((light, "light"), (dark, "dark"))
    ]
    return InlineFigure(name, caption, *inline)
