"""Comparison: the rows of several methods as a table, a figure against size, and verdicts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from ..experiments.intervals import Difference, compared
from ..experiments.results import FIRST, Row, compare, read, rows_of
from ..experiments.run import Cell
from . import plots

CONTROLS = ("random", "shuffled", "fish_shuffled")


def budgets(rows: Iterable[Row], method: str) -> list[float | str]:
    """The budgets at which a method has rows, largest first; ``"own"`` (its own size) is last."""
    found = {row["config"]["budget"] for row in rows if row["config"]["method"] == method}
    return sorted(found, key=lambda budget: 1.0 if isinstance(budget, str) else -budget)


def show(name: str, names: Mapping[str, str]) -> list[Row]:
    """Print a table of some methods in ``results/<name>.json``, and draw accuracy against size.

    Parameters
    ----------
    name
        Name of the file.
    names
        Label of each method.

    Returns
    -------
    list of dict
        The rows.

    Raises
    ------
    AssertionError
        If the code of one has changed since (rows of the first edition say so in the table).
    """
    from ..experiments.studies import stale  # studies run as scripts: lab must not load them

    rows = [row for row in read(name) if row["config"]["method"] in names]
    assert stale(rows) == [], "the code has changed since: run `make restamp`, then `make results`"
    print(table(rows, names))
    print("not in results:", missing(rows, names))
    print(
        f"{rows[0]['tested']:,} test examples; always the majority class: {rows[0]['majority']:.1%}"
    )
    with plots.figure(alt=alt_text(rows, names), height=3.6) as (_, ax):
        draw(ax, rows, names)
    return rows


def show_differences(differences: Iterable[tuple[str, float, float, float]]) -> None:
    """Draw paired differences ``(label, points, low, high)`` with intervals, and print verdicts."""
    differences = list(differences)
    said = sentences(differences)
    alt = "Paired differences of test accuracy in points, 95 % intervals. " + said.replace(
        "\n", "; "
    )
    with plots.figure(alt=alt, height=1.0 + 0.3 * len(differences), width=6.6) as (_, ax):
        plots.interval(ax, differences, unit="points")
    print(said)


class Summary(NamedTuple):
    """A method's rows at one budget; accuracies in %, over the seeds."""

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
        runs = rows_of(rows, method, budget)
        accuracy = 100 * np.array([row["accuracy"] for row in runs])
        trained = float(np.mean([row["trained"] for row in runs]))
        spread = accuracy.mean(), accuracy.min(), accuracy.max()
        found.append(
            Summary(budget, runs[0]["config"]["lr"], len(runs), trained, *map(float, spread))
        )
    return found


def edition(rows: Iterable[Row]) -> str:
    """What to say above rows of the first edition; "" if there is none among them."""
    if all(row.get("edition") != FIRST for row in rows):
        return ""
    return "First edition: made by the first edition's protocol, to be made anew by a fairer one."


def table(rows: Iterable[Row], names: Mapping[str, str]) -> str:
    """A line for each method and budget: rate, trained weights, seeds, test accuracy.

    Above them, once, what `edition` says.
    """
    rows = list(rows)
    heading = "test accuracy: mean [lowest, highest seed]"
    lines = [edition(rows)] if edition(rows) else []
    lines.append(f"{'':<22}{'budget':>8}{'rate':>8}{'trained':>12}   {heading}")
    for method, name in names.items():
        for budget, rate, seeds, trained, mean, lowest, highest in summaries(rows, method):
            size = budget if isinstance(budget, str) else f"{budget:.2%}"
            spread = f" [{lowest:.2f}, {highest:.2f}]" if seeds > 1 else "  one seed"
            lines.append(f"{name:<22}{size:>8}{rate:>8g}{trained:>12,.0f}   {mean:.2f}{spread}")
    return "\n".join(lines)


def draw(ax: Any, rows: Iterable[Row], names: Mapping[str, str]) -> None:
    """Draw test accuracy against the number of trained weights.

    Full fine-tuning is a line across the picture; controls are grey.

    Parameters
    ----------
    ax : matplotlib Axes
    rows : rows of `results.read`
    names : label of each method, in the order of the legend

    Raises
    ------
    ValueError
        If none of these methods has a row.
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


def alt_text(rows: Iterable[Row], names: Mapping[str, str]) -> str:
    """Alternative text of what `draw` shows."""
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
    """Paired differences ``(label, points, low, high)``, as `plots.interval` draws them.

    Two methods are compared at each budget that both have; full fine-tuning with every budget, and
    so is a method of its own size.
    """
    rows, found = list(rows), []
    for ours, theirs in pairs:
        for budget in budgets(rows, ours):
            for other in budgets(rows, theirs):
                if budget == other or "own" in (budget, other) or theirs == "full":
                    title = f"{label(names, ours, budget)} \u2212 {label(names, theirs, other)}"
                    both = rows_of(rows, ours, budget), rows_of(rows, theirs, other)
                    found.append((title, *compare(*both)))
    return found


def opponents(
    rows: Iterable[Row], names: Mapping[str, str], pairs: Iterable[tuple[str, str]]
) -> dict[tuple[Cell, Cell], str]:
    """The cells in which two methods meet, with a label for each pair.

    Methods meet at each budget that both have. Full fine-tuning, the head alone and a method of its
    own size meet the other at all of its budgets, and what has its own size the control of it.
    """
    rows, found = list(rows), {}
    for ours, theirs in pairs:
        others = budgets(rows, theirs)
        for budget in budgets(rows, ours):
            wanted = ours if budget == "own" else budget
            for other in others:
                if other == wanted or other in (0.0, 1.0) or others == ["own"]:
                    title = f"{label(names, ours, budget)} \u2212 {label(names, theirs, other)}"
                    found[(ours, budget), (theirs, other)] = title
    return found


def show_verdicts(
    rows: Iterable[Row], names: Mapping[str, str], pairs: Iterable[tuple[str, str]]
) -> dict[str, Difference]:
    """Draw what the first method of each pair gains, with intervals, and print the verdicts.

    Intervals are of each difference alone. Verdicts hold for all of them together (Holm), so a
    point whose interval excludes zero may be hollow.

    Parameters
    ----------
    rows
        Rows of one task.
    names
        Label of each method.
    pairs
        Methods, compared where `opponents` says.

    Returns
    -------
    dict
        `Difference` by label, in accuracy.

    Raises
    ------
    ValueError
        If a comparison has fewer than three seeds.
    """
    rows = list(rows)
    titles = opponents(rows, names, pairs)
    found = {titles[pair]: one for pair, one in compared(rows, titles).items()}
    lines = [f"{title}: {one.verdict}, {points(one)}" for title, one in found.items()]
    said = "\n".join(lines)
    alt = "Differences of test accuracy in points, with 95 % intervals. " + "; ".join(lines)
    drawn = [
        (title, 100 * one.mean, 100 * one.interval[0], 100 * one.interval[1])
        for title, one in found.items()
    ]
    clear = [one.verdict != "not distinguishable" for one in found.values()]
    with plots.figure(alt=alt, height=1.0 + 0.3 * len(found), width=6.6) as (_, ax):
        plots.interval(ax, drawn, unit="points", clear=clear)
    print(said)
    print(f"{len(found)} comparisons; verdicts hold for all of them together (Holm).")
    return found


def points(one: Difference) -> str:
    """A difference of accuracies in points, with its interval."""
    low, high = one.interval
    return f"{100 * one.mean:+.2f} points [{100 * low:+.2f}, {100 * high:+.2f}]"


def label(names: Mapping[str, str], method: str, budget: float | str) -> str:
    """A method's name, with its budget if it has one, or the name of the method of that size."""
    if budget in ("own", 1.0, 0.0):
        return names[method]
    if isinstance(budget, str):
        return f"{names[method]} ({names.get(budget, budget)}'s size)"
    return f"{names[method]} {100 * budget:g} %"


def verdict(low: float, high: float) -> str:
    """What the 95 % interval of a difference says."""
    return "better" if low > 0 else "worse" if high < 0 else "not distinguishable"


def sentences(differences: Iterable[tuple[str, float, float, float]]) -> str:
    """A line for each paired difference: its verdict, the points and the interval."""
    return "\n".join(
        f"{title}: {verdict(low, high)}, {difference:+.2f} points [{low:+.2f}, {high:+.2f}]"
        for title, difference, low, high in differences
    )
