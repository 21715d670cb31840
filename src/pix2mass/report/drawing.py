"""What every figure and every page share: colours, sizes, pictures inside a page, the page's template."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable
from typing import Any

import jinja2
import matplotlib as mpl
import numpy as np
from astropy.table import Table
from matplotlib.axes import Axes
from matplotlib.figure import Figure

MASS_LABEL = r"$\log_{10}\,(M_{500c}\,/\,M_\odot)$"
"""Axis label of masses."""
BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
SKY, PURPLE = "#56B4E9", "#CC79A7"
"""Colours that all readers can tell apart: Okabe & Ito 2008."""
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "legend.frameon": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "pix2mass",
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}


def new_figure(width_in: float, height_in: float) -> tuple[Figure, Axes]:
    """An empty figure with one panel."""
    figure = Figure(figsize=(width_in, height_in), layout="constrained")
    return figure, figure.subplots()


def data_uri(draw: Callable[[Axes], Any], width_in: float = 4.6, height_in: float = 3.9) -> str:
    """Draw one panel and return it as an SVG for the src of an <img>."""
    with mpl.rc_context(STYLE):
        figure, ax = new_figure(width_in, height_in)
        draw(ax)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", dpi=160, metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def numbers(table: Table, name: str) -> np.ndarray:
    """A column as float64, NaN where masked."""
    return np.asarray(np.ma.filled(np.ma.asarray(table[name], float), np.nan), float)


def page_template(name: str) -> jinja2.Template:
    """A template of the folder ``templates``; everything that it is given is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pix2mass.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    environment.filters["number"] = format_number
    environment.filters["signed"] = lambda value, digits=3: format_number(value, digits, "+")
    environment.filters["duration"] = format_duration
    return environment.get_template(name)


def format_number(value: Any, digits: int = 3, sign: str = "") -> str:
    """A number with a true minus sign; a dash where there is none."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return "–"
    return f"{value:{sign}.{digits}f}".replace("-", "−")


def format_duration(seconds: float) -> str:
    """Seconds in the unit that reads best."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    if seconds < 6000:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"
