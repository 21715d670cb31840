"""What every figure and every page share: colours, sizes, pictures inside a page, the page's template."""

from __future__ import annotations

import base64
import hashlib
import io
import math
from collections.abc import Callable
from typing import Any

import jinja2
import matplotlib as mpl
import numpy as np
from astropy.table import Table
from astropy.visualization import make_lupton_rgb
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

MASS_LABEL = r"$\log_{10}\,(M_{500c}\,/\,M_\odot)$"
"""Axis label of masses."""
BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
SKY, PURPLE = "#56B4E9", "#CC79A7"
"""Colours that all readers can tell apart: Okabe & Ito 2008."""
INK, GREY, GROUND = "#1b1d21", "#6a7076", "#fefefe"
"""Lines and text, what stands behind them, and the paper. Nothing else has these colours: a dark page changes them."""
_DARK = {INK: "#e8e9eb", GREY: "#9aa1a8", GROUND: "#1e2125", BLUE.lower(): "#4aa8e6"}
"""Colour of a figure -> the same on a dark page; the last ground is that of the page's panels in style.html."""
_RGB_WEIGHT = {"u": 3.0, "g": 1.5, "r": 1.0, "i": 0.7, "z": 0.55}
"""Weights with which an early-type galaxy at z about 0.2 comes out yellow in a colour composite."""
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "legend.frameon": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "pix2mass",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.facecolor": GROUND,
    "figure.facecolor": GROUND,
    "savefig.facecolor": GROUND,
}


def literal(text: str) -> str:
    """Text for a figure, to be drawn as it stands: matplotlib takes what is between two dollar signs for mathematics,
    and stops where it cannot read it."""
    return text.replace("$", r"\$")


def new_figure(width_in: float, height_in: float) -> tuple[Figure, Axes]:
    """An empty figure with one panel."""
    figure = Figure(figsize=(width_in, height_in), layout="constrained")
    return figure, figure.subplots()


def data_uri(draw: Callable[[Axes], Any], width_in: float = 4.6, height_in: float = 3.9) -> str:
    """Draw one panel and return it as an SVG for the src of an <img>; see :func:`figure_uri`."""
    with mpl.rc_context(STYLE):
        figure, ax = new_figure(width_in, height_in)
        draw(ax)
        return figure_uri(figure)


def figure_uri(figure: Figure) -> str:
    """A figure as an SVG for the src of an <img>, which follows the reader's choice of a light or a dark page.

    The picture brings its own ground, so that it stays readable where a browser does not follow.
    """
    buffer = io.StringIO()
    with mpl.rc_context(STYLE):
        figure.savefig(buffer, format="svg", dpi=160, metadata={"Date": None})
    svg = buffer.getvalue()
    names = {colour: f"--c{number}" for number, colour in enumerate(_DARK)}
    light = "".join(f"{name}:{colour};" for colour, name in names.items())
    dark = "".join(f"{name}:{_DARK[colour]};" for colour, name in names.items())
    for colour, name in names.items():
        svg = svg.replace(f": {colour}", f": var({name})")
    style = f"<style>svg{{{light}}}@media(prefers-color-scheme:dark){{svg{{{dark}}}}}</style>"
    start = svg.index(">", svg.index("<svg ")) + 1
    return "data:image/svg+xml;base64," + base64.b64encode((svg[:start] + style + svg[start:]).encode()).decode()


def composite(flux: np.ndarray, mask: np.ndarray, bands: str) -> tuple[np.ndarray, str]:
    """A picture of a cutout (Lupton et al. 2004, PASP 116, 133), and what it shows.

    Args:
        flux: (n_bands, h, w).
        mask: of the same shape, True = unusable.
        bands: their names.

    Returns:
        (h, w, 3) uint8 with masked pixels in grey, and the bands it is made of, in words.
    """
    flux = np.where(mask, 0.0, np.nan_to_num(flux))
    chosen = "irg" if set("irg") <= set(bands) else bands[::-1][:3]
    if len(chosen) < 3:
        chosen = bands[-1]
    channels = [flux[bands.index(band)] * _RGB_WEIGHT.get(band, 1.0) for band in chosen]
    usable = ~mask[[bands.index(band) for band in chosen]].any(axis=0)
    middle = channels[len(channels) // 2][usable]
    noise = 1.4826 * float(np.median(np.abs(middle - np.median(middle)))) if middle.size else 1.0
    channels = channels * 3 if len(channels) == 1 else channels
    stretch = 8 * noise or 1.0
    with np.errstate(invalid="ignore"):  # astropy divides 0 by 0 where the sky is black
        rgb = np.array(make_lupton_rgb(*channels, minimum=0, stretch=stretch, Q=8))  # type: ignore[arg-type]
    rgb[~usable] = 128
    what = f"colour composite of {', '.join(chosen)}" if len(chosen) == 3 else f"{chosen} band in grey"
    return rgb, what


def numbers(table: Table, name: str) -> np.ndarray:
    """A column as float64, NaN where masked."""
    return np.asarray(np.ma.filled(np.ma.asarray(table[name], float), np.nan), float)


def page_template(name: str) -> jinja2.Template:
    """A template of the folder ``templates``; everything that it is given is escaped."""
    loader = jinja2.PackageLoader("pix2mass.report")
    environment = jinja2.Environment(
        loader=loader,
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    environment.filters["number"] = format_number
    environment.filters["signed"] = lambda value, digits=3: format_number(value, digits, "+")
    environment.filters["duration"] = format_duration
    script = loader.get_source(environment, "tables.js")[0]
    environment.globals["script"] = Markup(script)
    environment.globals["script_hash"] = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template(name)


def format_number(value: Any, digits: int = 3, sign: str = "") -> str:
    """A number with a true minus sign; a dash where there is none."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return "–"
    rounded = round(value, digits) + 0.0  # the sum takes the sign off a zero
    return f"{rounded:{sign}.{digits}f}".replace("-", "−")


def format_duration(seconds: float) -> str:
    """Seconds in the unit that reads best."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    if seconds < 6000:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"
