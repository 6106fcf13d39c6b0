"""Colors of figures and pages: distinct for categories, ordered for numbers, legible as text.

Qualitative colors are those of Okabe and Ito (2008, "Color Universal Design"), followed by some of
Tol's "muted" scheme; ordered colors are the darker part of matplotlib's plasma. Color-blind readers
can distinguish both, and the ordered ones survive a gray printer.
"""

import re
from collections.abc import Iterable
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import to_hex, to_rgb

OKABE_ITO = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Colors without an order, the most distinct first; yellow is too light for lines."""

TOL = ("#882255", "#999933", "#332288", "#aa4499", "#117733")
"""More colors without an order, for the eighth category and those after it."""

PAPER = {"light": "#ffffff", "dark": "#15171a"}
"""The background of pages."""

INK = {"light": "#1c1e21", "dark": "#e6e8ea"}
"""The text of pages."""

LEGIBLE = 4.5
"""The least contrast of text with its background, as WCAG 2 requires at level AA."""

NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[-+]?\d+)?")


def colors(values: Iterable[Any]) -> dict[Any, str]:
    """Maps each distinct value to a color.

    Numbers get ordered colors, darker for larger numbers, and so do texts that differ only in one
    number ("20 layers", "56 layers"). Other values get distinct colors in order of appearance, or
    ordered colors if there are more values than those.
    """
    distinct = list(dict.fromkeys(values))
    numbers = _numbers(distinct)
    qualitative = OKABE_ITO + TOL
    if numbers is None and len(distinct) <= len(qualitative):
        return dict(zip(distinct, qualitative, strict=False))
    ordered = [distinct[index] for index in np.argsort(numbers)] if numbers else distinct
    shades = np.linspace(0.74, 0.0, len(ordered)) if len(ordered) > 1 else [0.25]
    plasma = matplotlib.colormaps["plasma"]
    return {value: to_hex(plasma(shade)) for value, shade in zip(ordered, shades, strict=True)}


def _numbers(values: list[Any]) -> list[float] | None:
    """Returns the number that each value is or contains; None if they differ in more than that."""
    if all(isinstance(value, int | float | np.number) for value in values):
        return [float(value) for value in values]
    if len(values) < 2 or not all(isinstance(value, str) for value in values):
        return None
    found = [NUMBER.findall(value) for value in values]
    if any(len(each) != 1 for each in found) or len({NUMBER.sub("", v) for v in values}) > 1:
        return None
    return [float(number) for [number] in found]


def contrast(first: str, second: str) -> float:
    """Returns the contrast ratio of two colors as WCAG 2 defines it, between 1 and 21."""
    low, high = sorted((_luminance(first), _luminance(second)))
    return (high + 0.05) / (low + 0.05)


def _luminance(color: str) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def legible(color: str, theme: str = "light") -> str:
    """Returns the color, as much darker or lighter as text of it must be to be legible."""
    toward = "#000000" if theme == "light" else "#ffffff"
    blends = (_blend(color, toward, share) for share in np.linspace(0, 1, 41))
    return next(each for each in blends if contrast(each, PAPER[theme]) >= LEGIBLE)


def dark(color: str) -> str:
    """Returns what stands for a color of a figure on the dark page.

    Grays are mirrored, so that paper becomes the page and ink its text; other colors keep their
    hue and are legible.
    """
    rgb = to_rgb(color)
    if max(rgb) - min(rgb) < 0.05:
        return _blend(INK["dark"], PAPER["dark"], float(np.mean(rgb)))
    return legible(color, "dark")


def _blend(first: str, second: str, share: float) -> str:
    """Returns the mixture of two colors with a share of the second."""
    pairs = zip(to_rgb(first), to_rgb(second), strict=True)
    red, green, blue = ((1 - share) * a + share * b for a, b in pairs)
    return to_hex((red, green, blue))
