"""Intervals: how much one method is better than another, and how sure that is.

Both sources of chance count: another seed would give other runs, another test set other examples.
The difference of each seed is one number; their mean has a t interval, with what the test set adds.
Where several differences are judged together, the verdicts are Holm's (1979): at most one family in
twenty has a false one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import stats

from . import results
from .run import Cell

LEVEL = 0.95
LEAST = 3  # seeds, for a verdict


@dataclass(frozen=True)
class Difference:
    """A mean difference over seeds, with what is known of its error.

    Attributes
    ----------
    mean
        Ours minus theirs.
    error
        Standard error of the mean.
    freedom
        Degrees of freedom of the error, by Welch and Satterthwaite; infinite for one seed, whose
        error is the test set's alone.
    seeds
        Number of pairs of runs.
    p
        Probability of a mean as far from zero if the true one is zero; `holm` corrects it.
    """

    mean: float
    error: float
    freedom: float
    seeds: int
    p: float

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of this difference alone, low and high."""
        reach = float(stats.t.ppf(0.5 + LEVEL / 2, self.freedom)) * self.error
        return self.mean - reach, self.mean + reach

    @property
    def verdict(self) -> str:
        """``"better"``, ``"worse"`` or ``"not distinguishable"``, where larger is better.

        Raises
        ------
        ValueError
            With fewer than three seeds.
        """
        if self.seeds < LEAST:
            raise ValueError(f"seeds={self.seeds} are too few for a verdict; it takes {LEAST}")
        if self.p >= 1 - LEVEL:
            return "not distinguishable"
        return "better" if self.mean > 0 else "worse"


def difference(
    ours: Mapping[int, Any], theirs: Mapping[int, Any], weight: Sequence[float] | None = None
) -> Difference:
    """The difference between paired runs, with a t interval over seeds and test examples.

    The variance of the mean is s^2 / n of the n seeds' differences, and the variance between test
    examples over their number: all seeds were tested on the same ones.

    Parameters
    ----------
    ours, theirs
        ``{seed: one number for each test example}``; seeds that both have are paired.
    weight
        Weight of each example, such as its number of tokens: sums of differences are divided by
        sums of weights.

    Raises
    ------
    ValueError
        If no seed is in common, or numbers of examples differ.
    """
    common = sorted(ours.keys() & theirs.keys())
    if not common:
        raise ValueError(f"ours has seeds {sorted(ours)}, theirs {sorted(theirs)}: none in common")
    try:
        both = np.array([[ours[seed], theirs[seed]] for seed in common], dtype=float)
        each = both[:, 0] - both[:, 1]
        w = np.ones(each.shape[1]) if weight is None else np.asarray(weight, float)
        means = each.sum(1) / w.sum()
        mean = float(means.mean())
        # A ratio of sums: the residuals of its linear approximation (delta method).
        between_examples = float(np.var(each.mean(0) - mean * w, ddof=1)) * len(w) / w.sum() ** 2
    except (ValueError, IndexError) as error:
        raise ValueError("ours, theirs and weight need the same number of examples") from error
    seeds = len(common)
    between_seeds = float(means.var(ddof=1)) / seeds if seeds > 1 else 0.0
    variance = between_seeds + between_examples
    freedom = (seeds - 1) * (variance / between_seeds) ** 2 if between_seeds else np.inf
    if variance:
        p = 2 * float(stats.t.sf(abs(mean) / variance**0.5, freedom))
    else:
        p = float(mean == 0)
    return Difference(mean, variance**0.5, float(freedom), seeds, p)


def holm(family: Iterable[Difference]) -> list[Difference]:
    """The same differences with p values that hold for all of them together (Holm 1979)."""
    members = list(family)
    order = sorted(range(len(members)), key=lambda i: members[i].p)
    corrected, least = list(members), 0.0
    for rank, i in enumerate(order):
        least = max(least, min(1.0, (len(members) - rank) * members[i].p))
        corrected[i] = replace(members[i], p=least)
    return corrected


def compared(
    rows: Iterable[results.Row], pairs: Iterable[tuple[Cell, Cell]]
) -> dict[tuple[Cell, Cell], Difference]:
    """What the first cell of each pair gains over the second; p values hold for all together.

    Parameters
    ----------
    rows
        Rows of one task. They say which answers are right, or how many bits each text cost.
    pairs
        Methods at budgets, ``((method, budget), (method, budget))``, each with rows.

    Returns
    -------
    dict
        ``{pair: difference}``, in accuracy or bits per token; more is better.

    Raises
    ------
    ValueError
        If a cell has no rows.
    """
    runs, weight = _runs(rows)
    pairs = list(pairs)
    if absent := sorted({str(cell) for pair in pairs for cell in pair if cell not in runs}):
        raise ValueError(f"pairs have cells without rows: {', '.join(absent)}")
    found = [difference(runs[ours], runs[theirs], weight) for ours, theirs in pairs]
    return dict(zip(pairs, holm(found), strict=True))


def against(
    rows: Iterable[results.Row], controls: Mapping[str, float | None]
) -> dict[tuple[str, Cell], Difference]:
    """What every method gains over each control; p values hold for all of them together.

    Parameters
    ----------
    rows
        As in `compared`.
    controls
        The budget at which a control stands; None compares methods with it at their own budget, or
        with the one of their size, whose budget is named after them.

    Returns
    -------
    dict
        ``{(control, (method, budget)): difference}``, as in `compared`.
    """
    rows = list(rows)
    cells = dict.fromkeys((row["config"]["method"], row["config"]["budget"]) for row in rows)
    pairs = {}
    for control, at in controls.items():
        for cell in cells:
            named = (control, cell[0] if cell[1] == "own" else cell[1])
            other = named if at is None else (control, at)
            if cell != other and other in cells:
                pairs[cell, other] = (control, cell)
    return {pairs[pair]: found for pair, found in compared(rows, pairs).items()}


def mean_and_reach(values: Sequence[float]) -> tuple[float, float]:
    """Mean of some seeds' numbers, and half of its 95 % t interval; NaN for one seed."""
    found = np.asarray(values, float)
    if len(found) < 2:
        return float(found.mean()), math.nan
    reach = stats.t.ppf(0.5 + LEVEL / 2, len(found) - 1) * found.std(ddof=1) / len(found) ** 0.5
    return float(found.mean()), float(reach)


def _runs(
    rows: Iterable[results.Row],
) -> tuple[dict[Cell, dict[int, Any]], Sequence[float] | None]:
    """One number for each test example by cell and seed, and the weights of the examples."""
    runs: dict[Cell, dict[int, Any]] = {}
    weight = None
    for row in rows:
        if "bits" in row:
            gain, weight = -np.array(row["bits"]), row["tokens"]
        else:
            gain = results.unpack(row["correct"], row["tested"])
        config = row["config"]
        runs.setdefault((config["method"], config["budget"]), {})[config["seed"]] = gain
    seeds = {seed for found in runs.values() for seed in found}
    for cell, found in runs.items():
        if cell[1] == 0:  # what trains nothing is the same for every seed
            runs[cell] = dict.fromkeys(seeds, next(iter(found.values())))
    return runs, weight


def sentences(rows: Iterable[results.Row], controls: Mapping[str, float | None]) -> str:
    """A line for each gain of `against` that has the seeds for a verdict."""
    lines = []
    for (control, (method, budget)), found in against(rows, controls).items():
        if found.seeds >= LEAST:
            low, high = found.interval
            numbers = f"{found.mean:+.4f} [{low:+.4f}, {high:+.4f}]"
            lines.append(f"{method} {budget}, against {control}: {found.verdict}, {numbers}")
    return "\n".join(lines)
