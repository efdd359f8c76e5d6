"""Save figures as PNG, SVG and SVG within a page; equal figures give equal bytes."""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from xml.etree import ElementTree

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_RESOLUTION = 200  # dots per inch
_REFERENCE = re.compile(r"url\(#([^)]+)\)")


@contextmanager
def ignore_missing_glyphs() -> Iterator[None]:
    """Draw a box for a letter that matplotlib's font lacks; a browser has a font for it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        yield


def to_png(figure: Figure) -> bytes:
    """Draw as PNG."""
    FigureCanvasAgg(figure)
    return _save(figure, format="png", dpi=_RESOLUTION, metadata={"Software": None})


def to_svg(figure: Figure) -> bytes:
    """Draw as an SVG file whose texts are texts."""
    FigureCanvasSVG(figure)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "syncbn"}):
        return _save(figure, format="svg", metadata={"Date": None})


def _save(figure: Figure, **how: object) -> bytes:
    buffer = io.BytesIO()
    with ignore_missing_glyphs():
        figure.savefig(buffer, **how)  # type: ignore[arg-type]
    return buffer.getvalue()


def to_inline_svg(svg: bytes, prefix: str, title: str) -> str:
    """Make an SVG file part of an HTML page: ids of its own, a title for those who do not see it, no metadata."""
    ElementTree.register_namespace("", _SVG)
    root = ElementTree.fromstring(svg)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{_SVG}}}metadata", f"{{{_SVG}}}style"):  # its style would be the whole page's
                parent.remove(child)
    for element in root.iter():
        _rename(element, prefix)
    width, height = (float(number) for number in root.attrib["viewBox"].split()[2:])
    root.attrib.pop("version", None)
    root.attrib.update(
        {
            "role": "img",
            "aria-labelledby": f"{prefix}-title",
            "width": f"{width:g}",
            "height": f"{height:g}",
            "stroke-linejoin": "round",
            "stroke-linecap": "butt",
        }
    )
    heading = ElementTree.Element(f"{{{_SVG}}}title", {"id": f"{prefix}-title"})
    heading.text = title
    root.insert(0, heading)
    return ElementTree.tostring(root, encoding="unicode")


def _rename(element: ElementTree.Element, prefix: str) -> None:
    for name, value in list(element.attrib.items()):
        if name == "id":
            element.set(name, f"{prefix}-{value}")
        elif name == f"{{{_XLINK}}}href":
            del element.attrib[name]
            element.set("href", f"#{prefix}-{value.removeprefix('#')}")
        else:
            element.set(name, _REFERENCE.sub(rf"url(#{prefix}-\1)", value))
