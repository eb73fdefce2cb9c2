"""Explorers: pictures with a slider that work in the static page, every frame drawn beforehand."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import ipywidgets as widgets
import numpy as np
import torch
from matplotlib import colors, rc_context
from matplotlib.figure import Figure

from ...methods.hard_concrete import check_stretch
from ...selection import select
from . import plots

MAX_FRAMES = 15  # an axis
FRAME_BYTES = 15_000  # a frame as the page carries it, base64 included

Alt: TypeAlias = Callable[[str, str], str] | Mapping[str, Sequence[str]]


def frame(fig: Figure) -> bytes:
    """Draw a figure as a PNG small enough for one frame of an explorer.

    Parameters
    ----------
    fig : matplotlib Figure

    Returns
    -------
    bytes
        At most three quarters of ``FRAME_BYTES`` (base64 adds a third), at the highest resolution
        tried that fits, from 150 down to 80 dots an inch.

    Raises
    ------
    ValueError
        The figure does not fit even at 80 dots an inch.
    """
    # 600 characters are kept for the markup and the alternative text
    limit = (FRAME_BYTES - 600) * 3 // 4
    dpi = 150.0
    while True:
        data = plots.png(fig, dpi, tints=24)
        if len(data) <= limit:
            return data
        if dpi <= 80:
            raise ValueError(
                f"fig takes {len(data)} bytes at {dpi:.0f} dpi, over {limit}: "
                "draw fewer marks or a smaller figure"
            )
        # Bytes grow about linearly with dpi for line art: aim a little under the limit, but always
        # step down.
        dpi = max(80.0, min(0.95 * dpi * limit / len(data), dpi - 10))


def _frame_html(axis: str, label: str, fig: Figure, alt: str) -> widgets.HTML:
    """One frame: the preset's name, and the picture under it."""
    picture = plots.image(frame(fig), "png", alt, round(fig.get_figwidth() * plots.CSS_PIXELS))
    caption = f"<strong>{html.escape(axis)} = {html.escape(label)}</strong>"
    caption = f'<figcaption aria-live="polite">{caption}</figcaption>'
    value = f'<figure style="margin:0">{caption}{picture}</figure>'
    if len(value) > FRAME_BYTES:
        raise ValueError(
            f"alt of {axis} = {label} has {len(alt)} characters: "
            f"shorten it, the frame is over {FRAME_BYTES}"
        )
    return widgets.HTML(value)


def _switch(control: Any, trait: str, pages: list[Any]) -> Any:
    """Make a box that shows the page whose number ``control`` holds, with or without a kernel."""
    if hasattr(widgets, "Stack"):
        stack = widgets.Stack(pages, selected_index=getattr(control, trait))
        widgets.jslink((control, trait), (stack, "selected_index"))
        return stack
    # Colab's ipywidgets 7 has no Stack, but it always has a kernel.
    box = widgets.Box([pages[getattr(control, trait)]])

    def turn(change: Any) -> None:
        box.children = (pages[change["new"]],)

    control.observe(turn, trait)
    return box


def explorer(
    title: str,
    axes: Mapping[str, Sequence[tuple[str, Figure]]],
    alt: Alt,
    start: Mapping[str, int] | None = None,
) -> widgets.VBox:
    """Make a picture that a reader moves along one axis at a time.

    Parameters
    ----------
    title : str
        Shown above the controls.
    axes : dict of str to list of (label, Figure)
        For every axis its presets in order, each with its picture; at most 15.
    alt : callable (axis, label) -> str, or dict of str to list of str
        Alternative text of every frame.
    start : dict of str to int
        Number of the preset shown first, for axes that do not start at 0.

    Returns
    -------
    ipywidgets.VBox
        Last in a cell, it shows itself. Its controls are linked in the browser, so it works in the
        built page.

    Raises
    ------
    ValueError
        No axis, an axis with no frame or more than 15, texts that do not match the frames, or a
        frame over 15 kB.
    """
    if not axes:
        raise ValueError("axes is empty: give at least one axis with its frames")
    panels = []
    for axis, presets in axes.items():
        if not 1 <= len(presets) <= MAX_FRAMES:
            raise ValueError(f"axes[{axis!r}] has {len(presets)} frames: give 1 to {MAX_FRAMES}")
        texts = [alt(axis, label) for label, _ in presets] if callable(alt) else list(alt[axis])
        if len(texts) != len(presets):
            raise ValueError(
                f"alt[{axis!r}] has {len(texts)} texts for {len(presets)} frames: give one each"
            )
        pages = [
            _frame_html(axis, label, fig, text)
            for (label, fig), text in zip(presets, texts, strict=True)
        ]
        first = (start or {}).get(axis, 0)
        slider = widgets.IntSlider(
            value=first,
            min=0,
            max=len(pages) - 1,
            description=axis,
            readout=False,  # the number of a frame says nothing; its caption does
            layout={"width": "auto"},
            style={"description_width": "initial"},
        )
        panels.append(widgets.VBox([slider, _switch(slider, "value", pages)]))
    heading = widgets.HTML(f"<strong>{html.escape(title)}</strong>")
    layout = {"width": "100%", "max_width": f"{round(plots.WIDTH * plots.CSS_PIXELS) + 40}px"}
    if len(panels) == 1:
        return widgets.VBox([heading, panels[0]], layout=layout)
    # A drop-down is a native <select>: screen readers announce it and its choice, which toggle
    # buttons do not do.
    choice = widgets.Dropdown(options=list(axes), index=0, description="move along")
    return widgets.VBox([heading, choice, _switch(choice, "index", panels)], layout=layout)


def _canvas(height: float, **margins: float) -> Figure:
    """Make a figure with fixed margins: with constrained layout, frames would jump."""
    with plots.style(), rc_context({"figure.constrained_layout.use": False}):
        fig = Figure(figsize=(plots.WIDTH, height))
    fig.subplots_adjust(**{"left": 0.12, "right": 0.97, "bottom": 0.16, "top": 0.9, **margins})
    return fig


def stretched_cdf(
    x: np.ndarray, log_alpha: float, beta: float, left: float, right: float
) -> np.ndarray:
    """P(stretched gate <= x) before clamping, for left < x < right (Louizos et al. 2018, sec. 2.2).

    Parameters
    ----------
    x : array
    log_alpha, beta : float
        Location, and temperature > 0.
    left, right : float
        The paper's gamma and zeta, the ends of the stretch: left < 0 and right > 1.

    Returns
    -------
    array
        float64, same shape as ``x``.
    """
    s = (np.asarray(x, dtype=float) - left) / (right - left)
    # Q(s) = sigmoid(beta (log s - log(1 - s)) - log_alpha)
    return 1 / (1 + np.exp(log_alpha - beta * (np.log(s) - np.log1p(-s))))


def stretched_density(
    x: np.ndarray, log_alpha: float, beta: float, left: float, right: float
) -> np.ndarray:
    """Density of the stretched gate before clamping: the derivative of `stretched_cdf`."""
    s = (np.asarray(x, dtype=float) - left) / (right - left)
    q = stretched_cdf(x, log_alpha, beta, left, right)
    # dQ/dx = Q (1 - Q) * beta * d logit(s)/ds * ds/dx
    return q * (1 - q) * beta / (s * (1 - s)) / (right - left)


def point_masses(log_alpha: float, beta: float, left: float, right: float) -> tuple[float, float]:
    """P(z = 0) and P(z = 1) of the hard-concrete gate: what clamping folds onto the two ends."""
    ends = stretched_cdf(np.array([0.0, 1.0]), log_alpha, beta, left, right)
    return float(ends[0]), float(1 - ends[1])


def _density_figure(at: Mapping[str, float], limits: tuple[float, float]) -> Figure:
    """Draw the stretched density, its tails beyond 0 and 1, and the point masses they become."""
    fig = _canvas(3.0, right=0.88)
    x = np.linspace(at["left"], at["right"], 802)[1:-1]
    y = stretched_density(x, **at)
    zero, one = point_masses(**at)
    with plots.style():
        ax = fig.subplots()
        ax.fill_between(
            x, y, where=(x >= 0) & (x <= 1), color=plots.PALETTE[0], alpha=0.25, linewidth=0
        )
        for tail in (x <= 0, x >= 1):
            ax.fill_between(x, y, where=tail, color=plots.PALETTE[1], alpha=0.3, linewidth=0)
        ax.plot(x, y, "-", color=plots.PALETTE[0])
        ax.set(xlim=limits, ylim=(0, 3), xlabel="gate z", ylabel="density (curve)")
        mass = ax.twinx()
        mass.bar([0, 1], [zero, one], width=0.018 * (limits[1] - limits[0]), color=plots.PALETTE[1])
        mass.set(ylim=(0, 1), ylabel="probability (bars)")
        mass.grid(visible=False)
        mass.spines["right"].set_visible(True)
        masses = {"= 0": zero, "= 1": one, "≠ 0": 1 - zero}
        ax.set_title("    ".join(f"P(z {place}) = {mass:.2f}" for place, mass in masses.items()))
    return fig


# Louizos et al.'s temperature and stretch
DENSITY_BASE = {"log_alpha": 0.0, "beta": 2 / 3, "left": -0.1, "right": 1.1}
DENSITY_PRESETS = {
    "log_alpha": (-5.0, -3.0, -1.0, 0.0, 1.0, 3.0, 5.0),
    "beta": (0.1, 1 / 3, 2 / 3, 1.0, 1.5, 2.0),
    "left": (-1.5, -1.0, -0.5, -0.25, -0.1, -0.01),
    "right": (1.01, 1.1, 1.25, 1.5, 2.0, 2.5),
}
SYMBOLS = {"log_alpha": "log α", "beta": "β", "left": "γ", "right": "ζ"}


def _density_alt(at: Mapping[str, float]) -> str:
    zero, one = point_masses(**at)
    settings = ", ".join(f"{SYMBOLS[name]} = {value:.3g}" for name, value in at.items())
    return (
        f"Density of the hard-concrete gate at {settings}: probability {zero:.2f} of exactly 0, "
        f"{one:.2f} of exactly 1 and {1 - zero - one:.2f} spread between them."
    )


def density_explorer(base: Mapping[str, float] = DENSITY_BASE) -> widgets.VBox:
    """Show the hard-concrete gate's density and point masses along log alpha, beta, gamma and zeta.

    Parameters
    ----------
    base : dict
        Values of ``log_alpha``, ``beta``, ``left`` and ``right`` while another one moves.

    Returns
    -------
    ipywidgets.VBox
        Every axis starts at its value in ``base``.

    Raises
    ------
    ValueError
        ``base`` lacks a value, or holds beta <= 0, left >= 0 or right <= 1.
    """
    if set(base) != set(DENSITY_BASE):
        raise ValueError(f"base has {sorted(base)}: give log_alpha, beta, left and right")
    check_stretch((base["left"], base["right"]))
    if base["beta"] <= 0:
        raise ValueError(
            f"base['beta']={base['beta']} must be positive; 2/3 is the authors' temperature"
        )
    axes, texts, start = {}, {}, {}
    for name, values in DENSITY_PRESETS.items():
        presets = sorted({*values, base[name]})
        points = [{**base, name: value} for value in presets]
        limits = (min(p["left"] for p in points) - 0.1, max(p["right"] for p in points) + 0.1)
        axis = SYMBOLS[name]
        axes[axis] = [(f"{at[name]:.3g}", _density_figure(at, limits)) for at in points]
        texts[axis] = [_density_alt(at) for at in points]
        start[axis] = presets.index(base[name])
    return explorer("Hard-concrete gate", axes, texts, start)


BUDGETS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3)


Placed: TypeAlias = Sequence[tuple[str, plots.Selected]]


def budget_explorer(
    scores: Mapping[str, torch.Tensor] | Placed | Mapping[str, Placed],
    budgets: Sequence[float] = BUDGETS,
    title: str = "Where the selected weights lie",
    start: int = 0,
) -> widgets.VBox:
    """Where the selected weights lie, layer by kind of tensor, as the budget moves.

    Parameters
    ----------
    scores : dict of str to tensor, list of (label, Selection), or dict of str to such a list
        Scores, from which the largest are selected at every budget; or selections that are already
        made, all on one axis or with an axis for each name.
    budgets : sequence of float or int
        Fractions or counts, used with scores only.
    title : str
    start : int
        Number of the budget shown first.

    Returns
    -------
    ipywidgets.VBox
    """
    if not isinstance(scores, Mapping):
        made: dict[str, Placed] = {"budget": scores}
    elif all(isinstance(score, torch.Tensor) for score in scores.values()):
        tensors: Mapping[str, Any] = scores
        labels = [f"{100 * b:g} %" if isinstance(b, float) else f"{b:,} weights" for b in budgets]
        chosen = [select(tensors, budget) for budget in budgets]
        made = {"budget": list(zip(labels, chosen, strict=True))}
    else:
        lists: Mapping[str, Any] = scores
        made = dict(lists)
    axes, texts = {}, {}
    for axis, selections in made.items():
        frames = [_place(axis if len(made) > 1 else "", *one) for one in selections]
        axes[axis] = [(label, fig) for label, fig, _ in frames]
        texts[axis] = [text for *_, text in frames]
    return explorer(title, axes, texts, dict.fromkeys(axes, start))


def _place(axis: str, label: str, selection: plots.Selected) -> tuple[str, Figure, str]:
    """A preset: its label, its picture, and what that shows."""
    rows, columns, fractions = plots.share_by_layer(selection)
    fig = _canvas(1.15 + 0.27 * len(rows), left=0.13, right=0.99, bottom=0.22, top=0.92)
    with plots.style():
        plots.draw_share(fig.subplots(), selection)
    top = np.unravel_index(np.nanargmax(fractions), fractions.shape)
    text = (
        f"Heat map of layers by kinds of tensor{axis and f', {axis}'} at budget {label}: the "
        f"largest share, {plots.percent(fractions[top])} %, is selected of {columns[top[1]]} "
        f"in layer {rows[top[0]]}."
    )
    return label, fig, text


def _leak_figure(drifts: Mapping[str, np.ndarray], selected: np.ndarray, norm: Any) -> Figure:
    """One heat map of drift a variant, side by side, on a common scale."""
    fig = _canvas(2.75, left=0.03, right=0.86, bottom=0.05, top=0.86, wspace=0.08)
    shades = colors.LinearSegmentedColormap.from_list(
        "drift", ["#F3E3D8", plots.PALETTE[1], "#4A1400"], N=8
    )
    colormap = shades.with_extremes(under="white")
    with plots.style():
        axes = fig.subplots(1, len(drifts), squeeze=False)[0]
        for ax, (variant, drift) in zip(axes, drifts.items(), strict=True):
            picture = ax.imshow(
                drift, cmap=colormap, norm=norm, interpolation="nearest", aspect="auto"
            )
            # The mask on top, in grey: those weights are meant to move.
            grey = np.where(selected, 1.0, np.nan)
            ax.imshow(grey, cmap="gray", vmin=0, vmax=2, interpolation="nearest", aspect="auto")
            worst = drift[~selected].max()
            ax.set_title(f"{variant}\n{_largest(worst)}", fontsize=9.5)
            ax.set(xticks=[], yticks=[])
            ax.grid(visible=False)
            ax.spines[:].set_visible(True)
        bar = fig.colorbar(picture, cax=fig.add_axes((0.875, 0.05, 0.025, 0.81)))
        bar.ax.tick_params(labelsize=8)
        bar.ax.minorticks_off()
    return fig


def _largest(worst: float) -> str:
    return f"largest change {worst:.1e}" if worst else "no change"


def leak_explorer(
    traces: Mapping[str, Any],
    selected: np.ndarray | None = None,
    steps: Sequence[int] | None = None,
    title: str = "Weights that nobody chose",
) -> widgets.VBox:
    """How far the unselected weights drift, step by step, under variants of masked training.

    It opens at the last step.

    Parameters
    ----------
    traces : dict of str to array, or dict of str to such a dict
        For each variant (``"naive AdamW"``, ``"compact"``) the values, or the absolute changes, of
        the weights of one matrix: shape (T, rows, columns), at T moments, the first before
        training. Changes are taken against the first moment. A dict of such dicts gives one axis of
        the explorer a cause (``"weight decay"``, ``"old momentum"``).
    selected : bool array, shape (rows, columns), optional
        The mask. These weights are meant to move: they are drawn grey and not counted. By default
        none.
    steps : sequence of int, shape (T,), optional
        The step of each moment; by default 0, 1, 2 ... More than 11 moments are thinned to 11.
    title : str

    Returns
    -------
    ipywidgets.VBox

    Raises
    ------
    ValueError
        No trace, or shapes that differ.
    """
    first = next(iter(traces.values()), None)
    causes = traces if isinstance(first, Mapping) else {"step": traces}
    axes, texts = {}, {}
    for cause, variants in causes.items():
        values = {name: np.asarray(trace, dtype=float) for name, trace in variants.items()}
        shapes = {trace.shape for trace in values.values()}
        if len(shapes) != 1 or len(shape := shapes.pop()) != 3 or not shape[0]:
            raise ValueError(
                f"traces of {cause!r}: give arrays (T, rows, columns) of one shape, T at least 1"
            )
        mask = (
            np.zeros(shape[1:], dtype=bool)
            if selected is None
            else np.asarray(selected, dtype=bool)
        )
        if mask.shape != shape[1:] or mask.all():
            raise ValueError(
                f"selected has shape {mask.shape}: give {shape[1:]}, "
                "with at least one weight unselected"
            )
        when = list(range(shape[0])) if steps is None else list(steps)
        if len(when) != shape[0]:
            raise ValueError(f"steps has {len(when)} entries for {shape[0]} moments: give one each")
        drifts = {name: np.abs(trace - trace[0]) for name, trace in values.items()}
        largest = max(drift[:, ~mask].max() for drift in drifts.values()) or 1.0
        norm = colors.LogNorm(largest * 1e-4, largest)
        moments = np.unique(np.linspace(0, shape[0] - 1, min(11, shape[0])).round().astype(int))
        axis = cause if cause == "step" else f"step ({cause})"
        axes[axis] = [
            (
                str(when[t]),
                _leak_figure({name: drift[t] for name, drift in drifts.items()}, mask, norm),
            )
            for t in moments
        ]
        texts[axis] = [
            f"Change of each unselected weight after {when[t]} steps: "
            + "; ".join(
                f"{name}, {_largest(drift[t][~mask].max())}" for name, drift in drifts.items()
            )
            + "."
            for t in moments
        ]
    return explorer(title, axes, texts, {axis: len(frames) - 1 for axis, frames in axes.items()})
