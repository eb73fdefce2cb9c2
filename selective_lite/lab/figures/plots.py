"""Plots: the style of the book's figures, a few kinds of them, and how they reach the page."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib import colors
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from PIL import Image

from ...params import layer_of
from ..kinds import KINDS, kind_of

# Okabe and Ito's palette (2008): told apart with every common kind of colour vision. Black, then
# yellow, come last because one dominates a picture and the other is faint on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
GREY = "#767676"
DASHES = ("-", "--", "-.", ":")

# Inches: at 110 CSS pixels an inch a column on a desktop, and 9-pixel type on a 360-pixel phone.
WIDTH = 5.2
CSS_PIXELS = 110
SVG_BYTES = 40_000  # above this, a figure has so many points that a bitmap is smaller

STYLE: dict[Any, Any] = {
    "figure.figsize": (WIDTH, 3.2),
    "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
    "savefig.facecolor": "white",
    "font.family": "DejaVu Sans",
    "font.size": 10.5,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.labelsize": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#444444",
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#E2E2E2",
    "grid.linewidth": 0.7,
    # The dash pattern changes with the colour, so that colour never carries a difference alone.
    "axes.prop_cycle": cycler(color=PALETTE[:7], linestyle=(DASHES * 2)[:7]),
    "lines.linewidth": 1.8,
    "lines.markersize": 5.0,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "svg.fonttype": "path",
    "svg.hashsalt": "selective_lite",
}


class Selected(Protocol):
    """What a picture needs of a selection: its counts and the shapes of all tensors."""

    @property
    def shapes(self) -> Mapping[str, Sequence[int]]:
        """Shape of every tensor that was scored, selected from or not."""

    def per_tensor(self) -> Mapping[str, float]:
        """Count the selected weights of each tensor."""


def style() -> AbstractContextManager[None]:
    """Context in which matplotlib draws in the book's style; nothing is changed outside it."""
    return matplotlib.rc_context(STYLE)


def _checked(alt: str) -> str:
    if not isinstance(alt, str) or len(alt.strip()) < 20:
        raise ValueError(
            f"alt={alt!r}: say in a sentence (20 characters or more) what the figure shows"
        )
    return " ".join(alt.split())


def image(data: bytes, kind: str, alt: str, width: int) -> str:
    """Write an ``<img>`` element that carries its own bytes.

    Parameters
    ----------
    data : bytes
        The picture.
    kind : str
        Its media type: ``"png"`` or ``"svg+xml"``.
    alt : str
        What the picture shows, 20 characters or more.
    width : int
        CSS pixels on a wide screen; a narrow one shrinks it.

    Raises
    ------
    ValueError
        ``alt`` says too little.
    """
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    text = html.escape(_checked(alt), quote=True)
    look = "max-width:100%;height:auto;background:#fff"
    return f'<img alt="{text}" width="{width}" style="{look}" src="{source}">'


def png(fig: Figure, dpi: float, tints: int = 48) -> bytes:
    """Draw a figure as a PNG of few colours, and so of few bytes, at ``dpi`` dots an inch."""
    buffer = io.BytesIO()
    with style():
        fig.savefig(buffer, format="png", dpi=dpi)
    picture = Image.open(buffer).convert("RGB")
    # The commonest colours stay exact, so that a flat area keeps its meaning; the shades of smooth
    # edges move a little.
    pixels = np.asarray(picture).reshape(-1, 3).astype(np.int32) @ np.array([1 << 16, 1 << 8, 1])
    shades, place, counts = np.unique(pixels, return_inverse=True, return_counts=True)
    kept = shades[np.argsort(-counts, kind="stable")[:tints]]
    table, palette = (np.stack([c >> 16, c >> 8 & 255, c & 255], axis=1) for c in (shades, kept))
    nearest = ((table[:, None] - palette) ** 2).sum(-1).argmin(1).astype(np.uint8)
    reduced = Image.fromarray(nearest[place].reshape(picture.height, picture.width))
    reduced.putpalette(palette.astype(np.uint8).tobytes())
    small = io.BytesIO()
    reduced.save(small, format="PNG", optimize=True)
    return small.getvalue()


def show(fig: Figure, alt: str) -> None:
    """Put a figure on the page, with alternative text, and close it.

    A small SVG stays SVG (crisp at any zoom); a large one becomes a PNG of twice the screen's
    resolution.

    Parameters
    ----------
    fig : matplotlib Figure
    alt : str
        What the figure shows, in a sentence: what a reader who cannot see it should know.

    Raises
    ------
    ValueError
        ``alt`` says too little (under 20 characters).
    """
    from IPython.display import HTML, display

    alt = _checked(alt)
    width = round(fig.get_figwidth() * CSS_PIXELS)
    buffer = io.BytesIO()
    with style():
        fig.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    data, kind = buffer.getvalue(), "svg+xml"
    if len(data) > SVG_BYTES:
        data, kind = min(
            (data, kind), (png(fig, 2 * CSS_PIXELS), "png"), key=lambda pair: len(pair[0])
        )
    plt.close(fig)
    display(HTML(image(data, kind, alt, width)))


@contextmanager
def figure(
    alt: str, height: float = 3.2, width: float = WIDTH, **subplots: Any
) -> Iterator[tuple[Figure, Any]]:
    """Draw inside the ``with`` block; the figure is shown when the block ends without an error.

    Parameters
    ----------
    alt : str
        What the figure shows, 20 characters or more.
    height, width : float
        Inches.
    **subplots
        Passed on to ``Figure.subplots`` (``nrows``, ``ncols``, ``sharex`` ...).

    Yields
    ------
    fig, axes
        As from ``plt.subplots``.
    """
    _checked(alt)
    with style():
        fig = Figure(figsize=(width, height), layout="constrained")
        yield fig, fig.subplots(**subplots)
        show(fig, alt)


def band(
    ax: Any,
    x: Sequence[float],
    runs: Any,
    label: str,
    spread: str = "range",
    color: str | None = None,
) -> np.ndarray:
    """Draw the mean over runs as a line and their spread as a band.

    Parameters
    ----------
    ax : matplotlib Axes
    x : sequence of float, shape (points,)
    runs : array, shape (runs, points)
        One row a seed.
    label : str
        Legend entry.
    spread : {"range", "95%"}
        From the lowest to the highest run, or from the 2.5th to the 97.5th percentile of 20 runs or
        more.
    color : str, optional
        By default the next of the cycle.

    Returns
    -------
    array, shape (3, points)
        Lower edge, mean, upper edge.

    Raises
    ------
    ValueError
        Shapes do not fit, ``spread`` is unknown, or "95%" is asked of fewer than 20 runs.
    """
    table = np.asarray(runs, dtype=float)
    if table.ndim != 2 or table.shape[1] != len(x) or not len(table):
        raise ValueError(f"runs has shape {table.shape}: give (runs, {len(x)}), one row a seed")
    if spread not in ("range", "95%"):
        raise ValueError(f"spread={spread!r}: give 'range' or '95%'")
    if spread == "95%" and len(table) < 20:
        raise ValueError(f"spread='95%' needs 20 runs, runs has {len(table)}: use 'range'")
    low, high = (
        (table.min(0), table.max(0))
        if spread == "range"
        else np.percentile(table, [2.5, 97.5], axis=0)
    )
    mean = table.mean(0)
    line = ax.plot(
        x,
        mean,
        label=label,
        marker="o" if len(x) <= 12 else "",
        **({"color": color} if color else {}),
    )[0]
    ax.fill_between(x, low, high, color=line.get_color(), alpha=0.18, linewidth=0)
    return np.stack([low, mean, high])


def _rows(rows: Any) -> tuple[list[str], np.ndarray]:
    """Labels and an array (rows, 3) of numbers, from tuples (label, estimate, low, high)."""
    labels = [str(row[0]) for row in rows]
    numbers = np.array([[float(v) for v in row[1:]] for row in rows])
    if numbers.ndim != 2 or numbers.shape[1] != 3:
        raise ValueError("rows: give at least one, each (label, estimate, low, high)")
    for label, (estimate, low, high) in zip(labels, numbers, strict=True):
        if not low <= estimate <= high:
            raise ValueError(
                f"row {label!r}: {estimate:g} is not in [{low:g}, {high:g}]; "
                "give (label, estimate, low, high)"
            )
    return labels, numbers


def bars(ax: Any, rows: Sequence[tuple[str, float, float, float]], color: str = PALETTE[0]) -> None:
    """Horizontal bars with intervals, first row on top; the axis starts where ``ax`` says.

    Parameters
    ----------
    ax : matplotlib Axes
    rows : sequence of (label, estimate, low, high)
    color : str

    Raises
    ------
    ValueError
        There is no row, or an estimate lies outside its interval.
    """
    labels, numbers = _rows(rows)
    at = np.arange(len(labels))[::-1]
    errors = np.stack([numbers[:, 0] - numbers[:, 1], numbers[:, 2] - numbers[:, 0]])
    ax.barh(at, numbers[:, 0], height=0.62, color=color, alpha=0.85)
    ax.errorbar(
        numbers[:, 0], at, xerr=errors, fmt="none", ecolor="#222222", elinewidth=1.3, capsize=3
    )
    ax.set_yticks(at, labels)
    ax.grid(axis="y", visible=False)


def interval(
    ax: Any,
    rows: Sequence[tuple[str, float, float, float]],
    unit: str = "",
    clear: Sequence[bool] | None = None,
) -> None:
    """Draw paired differences: in each row a point and its 95 % interval, against a line at zero.

    A filled point is clear of zero, a hollow one is not.

    Parameters
    ----------
    ax : matplotlib Axes
    rows : sequence of (label, difference, low, high)
    unit : str
        Written behind the numbers on the right, such as ``"points"``.
    clear : sequence of bool, optional
        Whether each difference has a verdict; by default, whether its interval excludes zero.

    Raises
    ------
    ValueError
        There is no row, or a difference lies outside its interval.
    """
    labels, numbers = _rows(rows)
    at = np.arange(len(labels))[::-1]
    ax.axvline(0, color="#444444", linewidth=1)
    filled = [low > 0 or high < 0 for _, low, high in numbers] if clear is None else clear
    for y, (estimate, low, high), full in zip(at, numbers, filled, strict=True):
        ax.plot([low, high], [y, y], "-", color=PALETTE[0], linewidth=2)
        ax.plot(
            estimate,
            y,
            "o",
            color=PALETTE[0],
            markerfacecolor=PALETTE[0] if full else "white",
            markersize=7,
        )
        ax.text(
            1.02,
            y,
            f"{estimate:+.2f} [{low:+.2f}, {high:+.2f}]".replace("-", "\u2212"),
            transform=ax.get_yaxis_transform(),
            va="center",
            fontsize=8.5,
        )
    ax.set_yticks(at, labels)
    ax.set_ylim(-0.6, len(labels) - 0.4)
    ax.set_title(f"difference{f' in {unit}' if unit else ''} [95 % interval]", loc="right")
    ax.grid(axis="y", visible=False)


def share_by_layer(selection: Selected) -> tuple[list[str], list[str], np.ndarray]:
    """Compute the selected fraction by layer and kind of tensor.

    Parameters
    ----------
    selection : Selection
        Anything with ``shapes`` and ``per_tensor()``.

    Returns
    -------
    rows : list of str
        Layers, counted from 1, between what lies before the first and after the last.
    columns : list of str
        The kinds that occur.
    fractions : array, shape (rows, columns)
        In [0, 1]; NaN where a layer has no such tensor.
    """
    counts = selection.per_tensor()
    names = list(selection.shapes)
    last = max((n for n in map(layer_of, names) if n is not None), default=-1)
    seen, places = False, {}
    for name in names:
        number = layer_of(name)
        seen = seen or number is not None
        places[name] = ("before" if not seen else "after") if number is None else str(number + 1)
    rows = [r for r in ("before", *map(str, range(1, last + 2)), "after") if r in places.values()]
    columns = [
        c
        for c in (*(label for label, _ in KINDS[1:]), "other", KINDS[0][0])
        if c in map(kind_of, names)
    ]
    chosen, total = np.zeros((2, len(rows), len(columns)))
    for name in names:
        at = rows.index(places[name]), columns.index(kind_of(name))
        chosen[at] += counts.get(name, 0)
        total[at] += np.prod(selection.shapes[name], dtype=float)
    return rows, columns, np.divide(chosen, total, out=np.full_like(total, np.nan), where=total > 0)


def percent(fraction: float) -> str:
    """A fraction as a short percentage: two digits, no exponent, ``<0.001`` for less."""
    value = 100 * fraction
    if value == 0 or value >= 9.95:
        return f"{value:.0f}"
    if value < 0.001:
        return "<0.001"
    return f"{value:.{1 if value >= 0.995 else 2 if value >= 0.0995 else 3}f}"


def draw_share(ax: Any, selection: Selected, title: str = "") -> None:
    """Draw on ``ax`` which share of each layer's tensors is selected.

    The number in a cell is that share in percent. The colour compares it with the share selected
    over the whole model, from an eighth or less (brown) over equal (white) to eight times or more
    (blue), in steps of two, so that pictures of different budgets compare.

    Parameters
    ----------
    ax : matplotlib Axes
    selection : Selection
    title : str
    """
    rows, columns, fractions = share_by_layer(selection)
    total = sum(float(np.prod(shape, dtype=float)) for shape in selection.shapes.values())
    overall = sum(selection.per_tensor().values()) / total
    with np.errstate(divide="ignore"):
        ratio = np.clip(np.log2(fractions / overall), -3, 3)
    shades = colors.LinearSegmentedColormap.from_list(
        "share", ["#B35806", "#FFFFFF", "#0072B2"], N=7
    )
    colormap = shades.with_extremes(bad="#E6E6E6")
    norm = colors.Normalize(-3.5, 3.5)
    ax.imshow(ratio, cmap=colormap, norm=norm, aspect="auto", interpolation="nearest")
    for (i, j), fraction in np.ndenumerate(fractions):
        if not np.isnan(fraction):
            red, green, blue, _ = colormap(norm(ratio[i, j]))
            ink = "black" if 0.3 * red + 0.6 * green + 0.1 * blue > 0.5 else "white"
            text = percent(fraction).replace("0.", ".")  # narrow cells
            ax.text(j, i, text, ha="center", va="center", fontsize=8, color=ink)
    ax.set_xticks(
        range(len(columns)),
        [c.replace(" ", "\n").replace(",\n", "\n") for c in columns],
        fontsize=8,
    )
    ax.set_yticks(range(len(rows)), rows, fontsize=8.5)
    ax.set_xlabel("blue: more than in the whole model; brown: less", fontsize=8.5)
    ax.set_ylabel("layer")
    ax.tick_params(length=0)
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)
    ax.set_title(title or f"% selected of each kind of tensor ({percent(overall)} % of all)")


def share_figure(selection: Selected, title: str = "") -> Figure:
    """Draw where the selected weights lie, layer by kind of tensor; pass it to `show`.

    Parameters
    ----------
    selection : Selection
    title : str

    Returns
    -------
    matplotlib Figure
        Cells hold percentages; see `draw_share` for the colours.
    """
    with style():
        height = 1.2 + 0.3 * len(share_by_layer(selection)[0])
        fig = Figure(figsize=(WIDTH, height), layout="constrained")
        draw_share(fig.subplots(), selection, title)
    return fig
