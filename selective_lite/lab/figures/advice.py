"""Advice: which method to start with at a budget, in lines that name their rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..experiments.intervals import LEAST, Difference, compared
from ..experiments.results import Row, rows_of
from ..experiments.run import Cell
from .comparison import points

HEAD: Cell = ("head", 0.0)
FULL: Cell = ("full", 1.0)
MARGIN = 0.01  # what a cheaper method may lose against the best, of the whole interval
# What finding a mask costs, from nothing to many passes over the data; in a tie take the first.
EFFORT = (
    *("random", "magnitude", "sara", "lora_linear", "child_tuning_d", "fish", "spt"),
    *("lt_sft", "unstructured", "structured"),
)


@dataclass(frozen=True)
class Advice:
    """Where to start at one budget.

    Attributes
    ----------
    budget
        The fraction of the weights.
    chosen
        The method that validation found best, each at its own rate.
    level
        Itself, and the methods that lose less than `MARGIN` against it by their whole interval,
        cheapest first.
    over_head
        What the first of these gains over the head alone.
    under_full
        What it gains over full fine-tuning.
    """

    budget: float
    chosen: str
    level: Sequence[str]
    over_head: Difference
    under_full: Difference

    @property
    def start(self) -> str:
        """The method to start with: the cheapest of those on a level with the best."""
        return self.level[0]


def advice(rows: Iterable[Row], sweeps: Iterable[Row]) -> list[Advice]:
    """Where to start at each budget that has several methods, by the rows of one task.

    Validation names the best method of a budget; the test split then says which others are on a
    level with it: not those that cannot be told from it, which a method may be for its noise, but
    those whose interval excludes a loss of a point. P values of the verdicts hold for all of these
    comparisons together.

    Parameters
    ----------
    rows
        Finished runs, with ``head`` and ``full`` among them.
    sweeps
        The sweeps that chose their rates.
    """
    rows = [row for row in rows if isinstance(row["config"]["budget"], float)]
    reached = {
        (sweep["config"]["method"], sweep["config"]["budget"]): max(
            value for value in sweep["validation"] if value is not None
        )
        for sweep in sweeps
    }
    at: dict[float, list[str]] = {}
    for method in EFFORT:
        for budget in {row["config"]["budget"] for row in rows}:
            if len(rows_of(rows, method, budget)) >= LEAST:
                at.setdefault(budget, []).append(method)
    first = {
        budget: (max((reached[method, budget], method) for method in methods)[1], budget)
        for budget, methods in at.items()
    }
    pairs = [
        ((method, budget), other)
        for budget, methods in at.items()
        for method in methods
        for other in (first[budget], HEAD, FULL)
        if (method, budget) != other
    ]
    found = compared(rows, pairs)
    advised = []
    for budget, methods in sorted(at.items()):
        chosen = first[budget][0]
        level = [
            method
            for method in methods
            if method == chosen or found[(method, budget), first[budget]].interval[0] > -MARGIN
        ]
        start = (level[0], budget)
        advised.append(Advice(budget, chosen, level, found[start, HEAD], found[start, FULL]))
    return advised


def lines(found: Iterable[Advice], names: Mapping[str, str], file: str) -> list[str]:
    """Where to start at each budget, in lines of which the last names the rows they follow from."""
    said = []
    for one in found:
        level = ", ".join(names[method] for method in one.level if method != one.chosen)
        seeds = min(one.over_head.seeds, one.under_full.seeds)
        said += [
            f"{100 * one.budget:g} %: start with {names[one.start]}",
            f"    best on validation {names[one.chosen]}; within a point of it: {level or 'none'}",
            f"    over the head alone {points(one.over_head)}, {one.over_head.verdict}",
            f"    against full {points(one.under_full)}, {one.under_full.verdict}",
            f"    rows: {file}, budget {one.budget:g}, {seeds} seeds; head; full",
        ]
    return said
