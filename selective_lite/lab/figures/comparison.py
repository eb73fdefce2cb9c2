"""Comparison: the rows of several methods as a table, a figure against size, and verdicts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from ..experiments.intervals import Difference, compared, mean_and_reach
from ..experiments.results import FIRST, Row, compare, read, rows_of
from ..experiments.run import Cell
from . import plots

CONTROLS = ("random", "shuffled", "fish_shuffled")
LINES = {"full": "--", "head": ":"}  # what has one size and is drawn across, with its dashes


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
    reach: float
    elsewhere: float | None


def summaries(rows: Iterable[Row], method: str) -> list[Summary]:
    """A method at each of its budgets, largest first.

    ``reach`` is half of the 95 % t interval, NaN for one seed; ``elsewhere`` is how many texts of
    other domains are still told apart, if the rows say so.
    """
    rows, found = list(rows), []
    for budget in budgets(rows, method):
        runs = rows_of(rows, method, budget)
        spread = mean_and_reach([100 * row["accuracy"] for row in runs])
        trained = float(np.mean([row.get("trained", 0) for row in runs]))
        kept = [100 * row["told_apart"] for row in runs if "told_apart" in row]
        elsewhere = float(np.mean(kept)) if kept else None
        rate = runs[0]["config"]["lr"]
        found.append(Summary(budget, rate, len(runs), trained, *spread, elsewhere))
    return found


def edition(rows: Iterable[Row]) -> str:
    """What to say above rows of the first edition; "" if there is none among them."""
    if all(row.get("edition") != FIRST for row in rows):
        return ""
    return "First edition: made by the first edition's protocol, to be made anew by a fairer one."


def table(rows: Iterable[Row], names: Mapping[str, str]) -> str:
    """A line for each method and budget: rate, trained weights, test accuracy with its t interval.

    Rows that say what a model forgets have a last column: the share of texts of other domains that
    are still told apart. Above all, once, what `edition` says.
    """
    rows = list(rows)
    forgets = any("told_apart" in row for row in rows)
    lines = [edition(rows)] if edition(rows) else []
    last = "  domains told apart" if forgets else ""
    lines.append(f"{'':<24}{'budget':>9}{'rate':>9}{'trained':>12}   test accuracy, %{last}")
    for method, name in names.items():
        for one in summaries(rows, method):
            size = one.budget if isinstance(one.budget, str) else f"{100 * one.budget:g} %"
            spread = (
                f"{one.mean:.2f} \u00b1 {one.reach:.2f}" if one.seeds > 1 else f"{one.mean:.2f}"
            )
            end = f"{spread:<17}" + (f"{one.elsewhere:>19.1f}" if one.elsewhere else "")
            line = f"{name:<24}{size:>9}{one.rate:>9g}{one.trained:>12,.0f}   {end}"
            lines.append(line.rstrip())
    lines.append("\u00b1: 95 % t interval over seeds; without it, one seed")
    return "\n".join(lines)


def draw(ax: Any, rows: Iterable[Row], names: Mapping[str, str]) -> None:
    """Draw test accuracy against the number of trained weights.

    Full fine-tuning and the head alone are lines across the picture; controls are grey.

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
        found = sorted(summaries(rows, method), key=lambda one: one.trained)
        if not found:
            continue
        if method in LINES:
            low, high = found[0].mean - found[0].reach, found[0].mean + found[0].reach
            if found[0].seeds > 1:
                ax.axhspan(low, high, color=plots.GREY, alpha=0.2, linewidth=0)
            look = {"color": plots.GREY, "linestyle": LINES[method], "linewidth": 1.2}
            ax.axhline(found[0].mean, label=name, **look)
            continue
        color, style = (plots.GREY, ":") if method in CONTROLS else (next(colors), "-")
        size, mean = ([getattr(one, key) for one in found] for key in ("trained", "mean"))
        fill = "full" if max(one.seeds for one in found) > 1 else "none"
        if fill == "none":
            ax.set_title("hollow: one seed", loc="right", fontsize=8.5)
        reach = [0.0 if one.seeds == 1 else one.reach for one in found]
        look = {"color": color, "linestyle": style, "marker": next(markers), "fillstyle": fill}
        ax.errorbar(size, mean, reach, capsize=3, label=name, **look)
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
    return "Test accuracy against trained weights, mean over seeds: " + "; ".join(parts) + "."


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
