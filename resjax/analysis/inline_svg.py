"""Draws figures for a page: wide and narrow, on light and dark paper, with text that can be read.

Files of figures are for print. On a page the same figure has text in place of outlines, colors that
the page's dark theme replaces, and beside the wide drawing a narrow one, which phones show.
"""

import base64
import html
import io
import re
from collections.abc import Iterable

import matplotlib
from matplotlib.figure import Figure

from resjax.analysis import figures as draw
from resjax.analysis.palette import dark

MOST_COLORS = 48
"""The most colors of a figure on dark paper; one with more has a color scale and stays white."""

LARGEST = 400_000
"""The most characters of a drawing; one with more, of hundreds of lines, is a picture instead."""

HEX = re.compile(r"#[0-9a-f]{6}\b")


def drawings(figure: Figure, prefix: str, title: str) -> str:
    """Returns the wide and the narrow drawing of a figure as HTML; the figure stays narrow.

    Args:
        figure: The figure.
        prefix: Begins each ID in the drawings, so that those of several figures differ.
        title: The text that stands for the figure where it cannot be seen.
    """
    layout = figure.get_layout_engine()
    figure.set_layout_engine("none")  # as it is laid out in the files
    wide = svg(figure, f"{prefix}-", title)
    if len(wide) > LARGEST:
        wide = _picture(figure, title)
    figure.set_layout_engine(layout)
    if figure.get_size_inches()[0] <= draw.COLUMN_WIDTH:
        return f'<div class="drawing">{wide}</div>'
    if wide.startswith("<img") or not draw.narrow(figure):
        return f'<div class="drawing scroll" tabindex="0">{wide}</div>'
    narrow = svg(figure, f"{prefix}-narrow-", title)
    return f'<div class="drawing wide">{wide}</div><div class="drawing narrow">{narrow}</div>'


def svg(figure: Figure, prefix: str, title: str) -> str:
    """Returns a figure as an SVG element whose colors the page can replace."""
    content = io.StringIO()
    with draw.style(), matplotlib.rc_context({"svg.fonttype": "none"}):
        figure.savefig(content, format="svg")
    text = content.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    # All drawings of a page share one namespace of IDs, and few of these are referred to.
    referred = set(re.findall(r'(?:href="#|url\(#)([^")]+)', text))
    text = re.sub(
        r' id="([^"]*)"', lambda m: f' id="{prefix}{m[1]}"' if m[1] in referred else "", text
    )
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{prefix}", text)
    # Tenths of a point are finer than the lines, and curves are most of a page's size.
    text = re.sub(r' d="[^"]*"', lambda path: _shorten(path[0]), text)
    text = re.sub(r"(\.\d\d)\d+", r"\1", text)
    text = re.sub(r"\s*\n\s*", "\n", text)
    text = text.replace("font-family: 'DejaVu Sans'; ", "")  # the style sheet names fonts like it
    text = re.sub(r' transform="rotate\(-0 [^"]*"', "", text)
    few = len(set(HEX.findall(text))) <= MOST_COLORS
    if few:
        text = HEX.sub(lambda color: f"var(--c-{color[0][1:]}, {color[0]})", text)
    kind = "themed" if few else "on-paper"
    label = html.escape(title)
    return text.replace("<svg", f'<svg role="img" class="{kind}" aria-label="{label}"', 1)


def _picture(figure: Figure, title: str) -> str:
    """Returns a figure as an image element with its pixels."""
    content = io.BytesIO()
    with draw.style():
        figure.savefig(content, format="png", dpi=200)
    data = base64.b64encode(content.getvalue()).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{html.escape(title)}">'


def _shorten(path: str) -> str:
    """Returns a path with tenths of points, in which lines follow lines without a letter."""
    path = re.sub(r"(\.\d)\d+", r"\1", path)
    return path if re.search("[CQ]", path) else re.sub(r"\s+L ", " ", path)


def dark_colors(page: str, colors: Iterable[str] = ()) -> str:
    """Returns the CSS variables that replace colors of a page's drawings on dark paper."""
    found = {*re.findall(r"var\(--c-([0-9a-f]{6})", page), *(color[1:] for color in colors)}
    found.add("000000")  # which Matplotlib does not write
    return "\n".join(f"--c-{color}: {dark(f'#{color}')};" for color in sorted(found))
