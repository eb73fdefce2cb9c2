"""Atlas: all methods on one task, against budget, against learning rate, and what they forget."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import count
from typing import Any, NamedTuple

import numpy as np

from ..experiments.intervals import Difference, against, mean_and_reach
from ..experiments.results import Row, rows_of
from ..experiments.run import Cell
from . import plots
from .comparison import CONTROLS, label, points

FLOOR = 0.0  # the budget of what trains nothing


def look(names: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Colour, line and marker of each method: the same in every picture of a page.

    Controls are grey and differ in their dashes.
    """
    colors, markers, dashes = iter(plots.PALETTE * 2), iter("osD^v<>P*Xhd"), iter((":", "--", "-."))
    return {
        method: {
            "color": plots.GREY if method in CONTROLS else next(colors),
            "linestyle": next(dashes) if method in CONTROLS else "-",
            "marker": next(markers),
        }
        for method in names
    }


def by_budget(
    ax: Any, rows: Iterable[Row], names: Mapping[str, str], key: str = "accuracy"
) -> dict[str, list[tuple[float, float, float]]]:
    """Draw a result against the budget, in percent, with t intervals over seeds.

    What has one budget (full fine-tuning, the head alone) is a line across, with a band.

    Parameters
    ----------
    ax : matplotlib Axes
    rows : rows of one task
    names : label of each method
    key : which share of a row is drawn, such as ``"accuracy"`` or ``"told_apart"``

    Returns
    -------
    dict
        For each method what was drawn: ``(budget, mean, reach)`` with means in percent.
    """
    rows, drawn = list(rows), {}
    looks, at, order = look(names), set[float](), count()
    for method, name in names.items():
        found = sorted(
            {
                float(row["config"]["budget"])
                for row in rows
                if row["config"]["method"] == method and isinstance(row["config"]["budget"], float)
            }
        )
        found_at = [
            (b, *mean_and_reach([100 * row[key] for row in rows_of(rows, method, b)]))
            for b in found
        ]
        if not found_at:
            continue
        drawn[method] = found_at
        if found[-1] in (FLOOR, 1.0):
            _, mean, reach = found_at[-1]
            ax.axhline(mean, color="#333333", linewidth=1, linestyle=looks[method]["linestyle"])
            ax.text(1.01, mean, name, transform=ax.get_yaxis_transform(), va="center", fontsize=8.5)
            if reach > 0:
                ax.axhspan(mean - reach, mean + reach, color="#333333", alpha=0.1, linewidth=0)
            continue
        budget, mean_, reach_ = np.array(found_at).T
        # Side by side, so that no interval hides another.
        place = 100 * budget * 1.05 ** (next(order) - 2)
        ax.plot(place, mean_, label=name, **looks[method])
        color = looks[method]["color"]
        ax.errorbar(place, mean_, reach_, fmt="none", ecolor=color, elinewidth=1, alpha=0.6)
        at.update(found)
    ax.set(xscale="log", xlabel="budget in %")
    ax.set_xticks([100 * b for b in sorted(at)], [f"{100 * b:g}" for b in sorted(at)])
    ax.minorticks_off()
    return drawn


def worth(
    rows: Iterable[Row], names: Mapping[str, str], control: str = "random"
) -> dict[Cell, Difference]:
    """What each method gains over chance at every budget that both have, each at its own rate.

    Returns
    -------
    dict
        ``{(method, budget): difference}`` in accuracy; p values hold for all of them together.
    """
    some = [
        row
        for row in rows
        if row["config"]["method"] in {*names, control}
        and isinstance(row["config"]["budget"], float)
    ]
    return {cell: found for (_, cell), found in against(some, {control: None}).items()}


def worth_sentences(found: Mapping[Cell, Difference], names: Mapping[str, str]) -> list[str]:
    """A sentence for each gain over chance, by budget."""
    lines = []
    for (method, budget), one in sorted(found.items(), key=lambda item: float(item[0][1])):
        lines.append(f"{label(names, method, budget)}: {points(one)} over chance, {one.verdict}")
    return lines


def by_rate(
    ax: Any, sweeps: Iterable[Row], names: Mapping[str, str], budget: float
) -> dict[str, dict[float, float]]:
    """Draw validation accuracy against the learning rate, at one budget; rates that failed are not.

    Several sweeps of a method are one curve.

    Returns
    -------
    dict
        ``{method: {rate: accuracy in percent}}``.
    """
    looks = look(names)
    tried: dict[str, dict[float, float]] = {}
    for row in sweeps:
        method = row["config"]["method"]
        if method in names and row["config"]["budget"] == budget:
            for rate, value in zip(row["rates"], row["validation"], strict=True):
                if value is not None:
                    tried.setdefault(method, {})[rate] = 100 * value
    drawn = {method: dict(sorted(curve.items())) for method, curve in tried.items()}
    for method in names:
        if method in drawn:
            ax.plot(*zip(*drawn[method].items(), strict=True), label=names[method], **looks[method])
    ax.set(xscale="log", xlabel="learning rate", ylabel="validation accuracy in %")
    return drawn


def leads(
    curves: Mapping[str, Mapping[float, float]], ours: str, theirs: str
) -> tuple[dict[float, float], float]:
    """What a method leads by at each rate that both were run at, and with each at its own best."""
    mine, other = curves[ours], curves[theirs]
    common = {rate: mine[rate] - other[rate] for rate in mine if rate in other}
    return common, max(mine.values()) - max(other.values())


def dots(
    ax: Any, rows: Iterable[Row], names: Mapping[str, str], cells: Iterable[Cell]
) -> list[tuple[str, float, float]]:
    """Draw the accuracy of some cells, best at the top, with t intervals over seeds.

    Controls are grey; full fine-tuning and the head alone are lines across all of them.

    Parameters
    ----------
    ax : matplotlib Axes
    rows : rows of one task
    names : label of each method
    cells : methods at budgets; what has no rows is left out

    Returns
    -------
    list of tuple
        ``(label, mean, reach)`` in percent, as drawn from the top.
    """
    rows = list(rows)
    found = []
    for method, budget in cells:
        if runs := rows_of(rows, method, budget):
            spread = mean_and_reach([100 * row["accuracy"] for row in runs])
            found.append((*spread, label(names, method, budget), method))
    for place, (mean, reach, _, method) in enumerate(sorted(found)):
        look = {"color": plots.GREY if method in CONTROLS else plots.PALETTE[0], "capsize": 3}
        ax.errorbar(mean, place, xerr=reach if reach > 0 else None, fmt="o", **look)
    ax.set_yticks(range(len(found)), [name for *_, name, _ in sorted(found)])
    for method, budget, side in (("head", FLOOR, "right"), ("full", 1.0, "left")):
        if runs := rows_of(rows, method, budget):
            mean = 100 * float(np.mean([row["accuracy"] for row in runs]))
            ax.axvline(mean, color="#333333", linewidth=1, linestyle="--")
            ax.text(mean, len(found) - 0.4, names[method], ha=side, va="bottom", fontsize=8.5)
    ax.set(xlabel="test accuracy in %", ylim=(-0.6, len(found) - 0.4))
    ax.grid(axis="y", visible=False)
    return [(name, mean, reach) for mean, reach, name, _ in sorted(found, reverse=True)]


class Placed(NamedTuple):
    """Where a method's weights lie, by its rows: as much of a selection as `plots` draws."""

    shapes: Mapping[str, Sequence[int]]
    counts: Mapping[str, float]

    def per_tensor(self) -> Mapping[str, float]:
        """How many weights are selected in every tensor, the mean of the seeds."""
        return self.counts


def placed(
    rows: Iterable[Row], method: str, budget: float, shapes: Mapping[str, Sequence[int]]
) -> Placed:
    """Where the weights of a method at a budget lie, the mean of the seeds.

    Raises
    ------
    ValueError
        If it has no rows.
    """
    runs = rows_of(rows, method, budget)
    if not runs:
        raise ValueError(f"method={method!r} has no rows at budget={budget}")
    counts = {
        name: float(np.mean([run["per_tensor"].get(name, 0) for run in runs])) for name in shapes
    }
    return Placed(shapes, counts)


def shares(
    ax: Any, rows: Iterable[Row], names: Mapping[str, str], budget: float
) -> dict[tuple[str, str], float]:
    """Draw what the masks of every two scores share, in percent of k, as a table with colours.

    Parameters
    ----------
    ax : matplotlib Axes
    rows : rows of `experiments.masks`
    names : label of each score
    budget : which of their budgets

    Returns
    -------
    dict
        ``{(one, other): share}``, each pair once.
    """
    found = {}
    for row in rows:
        ours, theirs = row["config"]["ours"], row["config"]["theirs"]
        if row["config"]["budget"] == budget and ours["score"] != theirs["score"]:
            found[ours["score"], theirs["score"]] = row["shared"]
    table = np.full((len(names), len(names)), np.nan)
    for (one, other), shared in found.items():
        i, j = sorted((list(names).index(one), list(names).index(other)))
        table[j, i] = 100 * shared
    ax.imshow(np.sqrt(table), cmap="Blues", vmin=0, vmax=10, aspect="auto")
    for (i, j), value in np.ndenumerate(table):
        if not np.isnan(value):
            color = "white" if value > 40 else "black"
            ax.text(j, i, f"{value:.1f}", ha="center", va="center", fontsize=8.5, color=color)
    ax.set_xticks(range(len(names) - 1), list(names.values())[:-1], rotation=30, ha="right")
    ax.set_yticks(range(1, len(names)), list(names.values())[1:])
    ax.set_ylim(len(names) - 0.5, 0.5)
    ax.set_xlim(-0.5, len(names) - 1.5)
    ax.tick_params(length=0)
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)
    return found
