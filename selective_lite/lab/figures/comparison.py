"""Comparison: rows of several methods, drawn against their size and put into words the same way on every page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from ..experiments.results import Row, compare, of, read, stale
from . import plots

CONTROLS = ("random", "shuffled", "fish_shuffled")


def budgets(rows: Iterable[Row], method: str) -> list[float | str]:
    """The budgets at which a method has rows, largest first; ``"own"`` is that of a rule."""
    found = {row["config"]["budget"] for row in rows if row["config"]["method"] == method}
    return sorted(found, key=lambda budget: -1.0 if budget == "own" else -budget)


def show(name: str, names: Mapping[str, str]) -> list[Row]:
    """What ``results/<name>.json`` says of some methods: a table, and accuracy drawn against size.

    Parameters
    ----------
    name
        Of the file.
    names
        A config's method to its label.

    Returns
    -------
    list of dict
        The rows.

    Raises
    ------
    AssertionError
        Other code than today's has made one of them.
    """
    rows = [row for row in read(name) if row["config"]["method"] in names]
    assert stale(rows) == [], "the library has changed since: run make results"
    print(table(rows, names))
    print("not in results:", missing(rows, names))
    print(
        f"{rows[0]['tested']:,} test examples; the commoner answer alone: {rows[0]['majority']:.1%}"
    )
    with plots.figure(alt=described(rows, names), height=3.6) as (_, ax):
        draw(ax, rows, names)
    return rows


def forest(differences: Iterable[tuple[str, float, float, float]]) -> None:
    """Draw paired differences, ``(label, points, low, high)``, with their intervals, and print what each says."""
    differences = list(differences)
    said = sentences(differences)
    alt = "Paired differences of test accuracy in points, 95 % intervals. " + said.replace(
        "\n", "; "
    )
    with plots.figure(alt=alt, height=1.0 + 0.3 * len(differences), width=6.6) as (_, ax):
        plots.interval(ax, differences, unit="points")
    print(said)


class Summary(NamedTuple):
    """A method's rows at one budget: accuracies are in %, over the seeds."""

    budget: float | str
    rate: float
    seeds: int
    trained: float
    mean: float
    lowest: float
    highest: float


def summaries(rows: Iterable[Row], method: str) -> list[Summary]:
    """A method at each of its budgets, largest first."""
    rows, found = list(rows), []
    for budget in budgets(rows, method):
        runs = of(rows, method, budget)
        accuracy = 100 * np.array([row["accuracy"] for row in runs])
        trained = float(np.mean([row["trained"] for row in runs]))
        spread = accuracy.mean(), accuracy.min(), accuracy.max()
        found.append(
            Summary(budget, runs[0]["config"]["lr"], len(runs), trained, *map(float, spread))
        )
    return found


def table(rows: Iterable[Row], names: Mapping[str, str]) -> str:
    """A line a method and budget: rate, trained weights, seeds, test accuracy."""
    rows = list(rows)
    lines = [
        f"{'':<22}{'budget':>8}{'rate':>8}{'trained':>12}   test accuracy: mean [lowest, highest seed]"
    ]
    for method, name in names.items():
        for budget, rate, seeds, trained, mean, lowest, highest in summaries(rows, method):
            size = budget if isinstance(budget, str) else f"{budget:.2%}"
            spread = f" [{lowest:.2f}, {highest:.2f}]" if seeds > 1 else "  one seed"
            lines.append(f"{name:<22}{size:>8}{rate:>8g}{trained:>12,.0f}   {mean:.2f}{spread}")
    return "\n".join(lines)


def draw(ax: Any, rows: Iterable[Row], names: Mapping[str, str]) -> None:
    """Test accuracy against the number of trained weights; full fine-tuning is a line across, controls are grey.

    Parameters
    ----------
    ax : matplotlib Axes
    rows : rows of `results.read`
    names : mapping of a config's method to its label, in the order of the legend

    Raises
    ------
    ValueError
        No row is of one of these methods.
    """
    rows = [row for row in rows if row["config"]["method"] in names]
    if not rows:
        raise ValueError(f"rows hold none of {list(names)}")
    colors = iter(plots.PALETTE)
    markers = iter("osD^v<>P*X")
    for method, name in names.items():
        found = summaries(rows, method)
        if not found:
            continue
        size, mean, low, high = np.array(
            [(s.trained, s.mean, s.lowest, s.highest) for s in found]
        ).T
        if method == "full":
            ax.axhspan(low[0], high[0], color=plots.GREY, alpha=0.2, linewidth=0)
            ax.axhline(mean[0], color=plots.GREY, linestyle="--", linewidth=1.2, label=name)
            continue
        color, style = (plots.GREY, ":") if method in CONTROLS else (next(colors), "-")
        spread = np.stack([mean - low, high - mean])
        fill = "full" if found[0].seeds > 1 else "none"
        if fill == "none":
            ax.set_title("hollow: one seed", loc="right", fontsize=8.5)
        look = {"color": color, "linestyle": style, "marker": next(markers), "fillstyle": fill}
        ax.errorbar(size, mean, spread, capsize=3, label=name, **look)
    ax.set(xscale="log", xlabel="trained weights beside the head", ylabel="test accuracy in %")
    ax.legend(fontsize=8.5, loc="center left", bbox_to_anchor=(1.01, 0.5))


def described(rows: Iterable[Row], names: Mapping[str, str]) -> str:
    """What `draw` shows, as a sentence for a figure's alt text."""
    rows = list(rows)
    parts = [
        f"{name} {found.mean:.1f} % with {found.trained:,.0f}"
        for method, name in names.items()
        for found in reversed(summaries(rows, method))
    ]
    return (
        "Test accuracy against trained weights, mean and range over seeds: "
        + "; ".join(parts)
        + "."
    )


def missing(rows: Iterable[Row], names: Mapping[str, str]) -> str:
    """The labels of the methods that have no rows, or "nothing"."""
    found = {row["config"]["method"] for row in rows}
    return ", ".join(name for method, name in names.items() if method not in found) or "nothing"


def paired(
    rows: Iterable[Row], names: Mapping[str, str], pairs: Iterable[tuple[str, str]]
) -> list[tuple[str, float, float, float]]:
    """Paired differences ``(label, points, low, high)``, as `plots.interval` draws them, at each budget that has both.

    Full fine-tuning is compared with every budget, and a rule of its own size with every budget of
    the other.
    """
    rows, found = list(rows), []
    for ours, theirs in pairs:
        for budget in budgets(rows, ours):
            for other in budgets(rows, theirs):
                if budget == other or "own" in (budget, other) or theirs == "full":
                    title = f"{label(names, ours, budget)} \u2212 {label(names, theirs, other)}"
                    found.append((title, *compare(of(rows, ours, budget), of(rows, theirs, other))))
    return found


def label(names: Mapping[str, str], method: str, budget: float | str) -> str:
    """A method's name, with its budget if it has one."""
    return names[method] if budget in ("own", 1.0) else f"{names[method]} {budget:.2%}"


def verdict(low: float, high: float) -> str:
    """What a 95 % interval of a difference says."""
    return "better" if low > 0 else "worse" if high < 0 else "not distinguishable"


def sentences(differences: Iterable[tuple[str, float, float, float]]) -> str:
    """A line for every paired difference: its verdict, the points and the interval."""
    return "\n".join(
        f"{title}: {verdict(low, high)}, {difference:+.2f} points [{low:+.2f}, {high:+.2f}]"
        for title, difference, low, high in differences
    )
