"""Histograms as SVG that takes its colours from the page, light or dark."""

from __future__ import annotations

import io
import re
import statistics
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
from markupsafe import Markup, escape
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Colours that nothing else has; the page's own take their place.
_INK, _BARS = "#010203", "#040506"
_STYLE: dict[Any, Any] = {
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 9.0,
    "svg.fonttype": "none",  # text stays text, in the page's font
    "svg.hashsalt": "bcseg",  # the same plot is the same file
    "xtick.color": _INK,
    "ytick.color": _INK,
}
_BINS = 24


def histogram(values: Sequence[float], *, label: str, unit: str = "", of: str = "images") -> Markup:
    """Draw how often which value occurs.

    Args:
        values: finite numbers, in any order.
        label: what they are, such as `cells per image`.
        unit: of the values.
        of: whose they are, such as `images` or `cells`.

    Returns:
        An `<svg>` element to be put into a page, with its figures as text for screen readers; a
        sentence where there are no values.
    """
    if not values:
        return Markup('<p class="empty">No {} to be shown.</p>').format(label)
    figure = Figure(figsize=(3.6, 2.0), layout="constrained")
    with mpl.rc_context(_STYLE):
        axes = figure.add_subplot()
        axes.hist(values, bins=_BINS, color=_BARS)
        axes.set_xlabel(f"{label}, {unit}" if unit else label)
        axes.set_ylabel(of)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    return Markup(_for_a_page(text.getvalue(), _in_words(values, label, unit, of)))  # noqa: S704 - SVG made here; the words are escaped


def _in_words(values: Sequence[float], label: str, unit: str, of: str) -> str:
    middle = statistics.median(values)
    figures = f"median {middle:.4g}, from {min(values):.4g} to {max(values):.4g}"
    return f"Histogram of {label} over {len(values)} {of}: {figures} {unit}".rstrip()


def _for_a_page(svg: str, words: str) -> str:
    """Take the SVG out of its file; drop names that several plots would share, and fixed sizes."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="[a-z]+(\.[a-z]+)?_\d+"', "", svg)
    svg = re.sub(r'font: [^;"]*', "font: 9px inherit", svg)
    svg = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg {} \1 role="img">', svg, count=1)
    svg = svg.replace("{}", f'class="plot" aria-label="{escape(words)}"', 1)
    return svg.replace(_INK, "currentColor").replace(_BARS, "var(--accent)")
