"""The runner: how a study's config becomes a row, a sweep over learning rates, or a few losses."""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from ...methods.fixed_mask import fixed_mask
from ...params import head_weights, snapshot
from ...training import Phase, fit
from ..device import VARIABLE
from . import results
from .recipes import LR_HEAD, Config, Recipe
from .results import Row

KEPT = 5  # losses that a row keeps, for a page to repeat
RATES = tuple(float(f"{digit}e{power}") for power in range(-6, 2) for digit in (1, 3))
Cell = tuple[str, float | str]  # a method and its budget


class StopEarly(Exception):
    """Raised inside a run of which only the first losses are wanted."""


def no_config(config: Config) -> bool:
    """Pick no config."""
    return False


@dataclass(frozen=True)
class Study:
    """The rows of one file, and what makes them; its functions are top-level ones, for processes.

    Attributes
    ----------
    name
        Name of the file, ``results/<name>.json``; the sweeps are in ``<name>_rates.json``.
    data
        What every config says of the data, one for each task.
    recipes
        Function ``(model, data, config, lr) -> phases`` of each method; a generator may return what
        its rows say of the end.
    start
        Function ``config -> (model, data)``; ``data.train`` has ``batches(size, seed)``.
    validate
        Function ``(model, data) -> number`` on the validation split, to choose a rate by.
    measure
        Function ``(model, data) -> results`` of a finished run; only it reads the test split.
    grids
        Rates to try for each method and budget; none if there is nothing to tune. One rate is where
        `bracket` begins, on the seeds of `tuned_on` together.
    seeds
        Function ``(method, budget) -> seeds``.
    choose
        Function ``sweep -> rate``.
    ship
        Function ``(snapshot before, model, config) -> results`` on the file that a run ships.
    late
        Function ``config -> bool``: whether its run reads other rows.
    lower
        Whether lower validation numbers are better.
    cliff
        A sweep ends after the first rate that is worse than the best so far by more than this.
    tuned_by
        Name of the file whose sweeps choose the rates, on its own task (default: its own sweeps).
    tuned_on
        Seeds of a sweep that `bracket` makes.
    scaled
        Cells that are not tuned: the cell whose rate they take, and by what it is multiplied.
    """

    name: str
    data: tuple[Config, ...]
    recipes: Mapping[str, Recipe]
    start: Callable[[Config], tuple[Any, Any]]
    validate: Callable[[Any, Any], float]
    measure: Callable[[Any, Any], Row]
    grids: Mapping[Cell, tuple[float, ...] | float]
    seeds: Callable[[str, float | str], tuple[int, ...]]
    choose: Callable[[Row], float]
    ship: Callable[[Mapping[str, torch.Tensor], Any, Config], Row] | None = None
    late: Callable[[Config], bool] = no_config
    lower: bool = False
    cliff: float = math.inf
    tuned_by: str | None = None
    tuned_on: tuple[int, ...] = (0,)
    scaled: Mapping[Cell, tuple[Cell, float]] = field(default_factory=dict)

    def roots(self, config: Config) -> list[str]:
        """The definitions and settings that a config's row follows from, as for `code_hash`."""
        recipe = self.recipes[config["method"]]
        used: list[Callable[..., Any]] = [sweep, self.start, self.validate, recipe]
        settings = [f"lower={self.lower}", f"cliff={self.cliff}"]
        if "grid" not in config and "start" not in config:
            used = [run, self.start, self.measure, *([self.ship] if self.ship else []), recipe]
            settings = []
        return [*(results.place(definition) for definition in used), *settings]

    def rate_configs(self) -> Iterator[Config]:
        """The sweeps: a method at a budget over its grid, on the validation split."""
        if self.tuned_by is None:
            for data in self.data:
                for (method, budget), grid in self.grids.items():
                    cell = {"method": method, "budget": budget}
                    if isinstance(grid, float):
                        yield {**cell, "seeds": self.tuned_on, "start": grid, **data}
                    elif grid:
                        yield {**cell, "seed": 0, "grid": grid, **data}

    def configs(self) -> Iterator[Config]:
        """The runs: a method at a budget with the rate that its sweep chose, for every seed."""
        chosen = {
            (c["method"], c["budget"], self._data(c)): self.choose(sweep)
            for sweep in results.read((self.tuned_by or self.name) + "_rates")
            if (c := sweep["config"])
        }
        for data in self.data:
            for seed in sorted({seed for cell in self.grids for seed in self.seeds(*cell)}):
                for (method, budget), grid in self.grids.items():
                    if seed in self.seeds(method, budget):
                        cell = (method, budget)
                        tuned, factor = self.scaled.get(cell, (cell, 1.0))
                        fixed = not grid and cell not in self.scaled and not self.tuned_by
                        lr = 0.0 if fixed else factor * chosen[(*tuned, self._data(data))]
                        at_seed = {"method": method, "budget": budget, "seed": seed}
                        yield {**at_seed, "lr": lr, **data}

    def _data(self, config: Config) -> str:
        """What a config says of its data, as a key; if another study tunes, of its task only."""
        if self.tuned_by:
            return self.tuned_by
        return json.dumps([config.get(name) for name in self.data[0]])


def make(study: Study) -> None:
    """Run what is missing of a study: on CPU as many runs at the same time as there are cores."""
    how: dict[str, Any] = {
        "workers": 1 if torch.cuda.is_available() else os.cpu_count() or 1,
        "late": study.late,
        "study": study.name,
    }
    if sweeps := list(study.rate_configs()):
        results.run_missing(
            study.name + "_rates", sweeps, partial(sweep, study), study.roots, **how
        )
    results.run_missing(study.name, study.configs(), partial(run, study), study.roots, **how)


def train(
    model: Any, split: Any, config: Config, method: Iterable[Phase], **options: Any
) -> list[dict[str, Any]]:
    """Fit with a config's batches of a split, and the optimizer of `fit`."""
    batches = split.batches(config["batch"], seed=config["seed"])
    return fit(model, method, batches, **options)


def losses(study: Study, config: Config, steps: int = KEPT) -> list[float]:
    """Repeat the first steps of a row: their task losses, to compare with ``first_losses``."""
    model, data = study.start(config)
    method = study.recipes[config["method"]](model, data, config, config["lr"])
    return first_losses(model, data.train, config, method, steps)


def first_losses(
    model: Any, split: Any, config: Config, method: Iterable[Phase], steps: int
) -> list[float]:
    """The task losses of a method's first steps; training ends there."""
    found: list[float] = []

    def stop(record: dict[str, Any]) -> None:
        found.append(record["loss"])
        if len(found) == steps:
            raise StopEarly

    with suppress(StopEarly):
        train(model, split, config, method, on_step=stop)
    return found


def repeat(study: Study, row: Row, steps: int = 2) -> str:
    """Repeat the first steps of a row: what was recorded, and the losses now.

    A row that was made on a CPU is repeated on one.

    Raises
    ------
    AssertionError
        If a loss differs by more than one part in a thousand.
    """
    with device_of(row):
        again = losses(study, row["config"], steps)
    torch.testing.assert_close(again, row["first_losses"][:steps], rtol=1e-3, atol=0.0)
    recorded, repeated = (
        ", ".join(f"{loss:.6f}" for loss in found) for found in (row["first_losses"][:steps], again)
    )
    return f"{row['config']['method']}: recorded {recorded}; repeated {repeated}"


@contextmanager
def device_of(row: Row) -> Iterator[None]:
    """Context in which models start on the CPU, if that made the row."""
    wish = os.environ.get(VARIABLE)
    if row["device"].startswith("cpu"):
        os.environ[VARIABLE] = "cpu"
    try:
        yield
    finally:
        os.environ.pop(VARIABLE, None)
        if wish is not None:
            os.environ[VARIABLE] = wish


def run(study: Study, config: Config) -> Row:
    """One row: train, then measure, which reads the test split once."""
    model, data = study.start(config)
    before = snapshot(model) if study.ship else {}
    last: Row = {}

    def noted() -> Iterator[Phase]:
        method = iter(study.recipes[config["method"]](model, data, config, config["lr"]))
        while True:
            try:
                phase = next(method)
            except StopIteration as end:
                last.update(end.value or {})
                return
            # Before it is trained: SaRA lets go of weights that have changed and are shipped.
            last.update(trained=trained(phase, model), **selected(phase))
            yield phase

    records = train(model, data.train, config, noted())
    row = study.measure(model, data)
    if not last:
        return row
    return {
        **row,
        "first_losses": [record["loss"] for record in records[:KEPT]],
        **last,
        **(study.ship(before, model, config) if study.ship else {}),
    }


def sweep(study: Study, config: Config) -> Row:
    """Validation numbers over a grid of rates, or over those that `bracket` tries.

    A loss that is not finite counts as worst, and is kept as None.
    """
    sign = -1 if study.lower else 1
    if "start" in config:
        trials = [
            trial(study, {**config, "seed": seed, "lr": config["start"]})
            for seed in config["seeds"]
        ]
        found = bracket(
            lambda lr: sum(gain(lr) for gain, _ in trials) / len(trials), config["start"]
        )
        tried = {"rates": list(found), "per_seed": [selected(phase) for _, phase in trials]}
    else:
        trials = [trial(study, {**config, "lr": config["grid"][0]})]
        found, tried = climb(config["grid"], trials[0][0], study.cliff), {}
    numbers = [sign * value if math.isfinite(value) else None for value in found.values()]
    return {"validation": numbers, **(tried or selected(trials[0][1]))}


def trial(study: Study, config: Config) -> tuple[Callable[[float], float], Phase]:
    """What a rate gains on the validation split, as a function, and the first phase that has one.

    Weights are scored, or gates relaxed, only once, at the rate ``config["lr"]``.
    """
    model, data = study.start(config)
    untuned = copy.deepcopy(model)
    recipe = study.recipes[config["method"]]
    method = iter(recipe(model, data, config, config["lr"]))
    first = next(method)
    chosen: Phase | None = None
    if first.selection is None and first.model is not None:
        train(model, data.train, config, [first])
        chosen, untuned = next(method), model  # projected, not yet trained
    elif is_fixed_mask(first, model):
        chosen = first
    method.close()  # type: ignore[attr-defined]
    sign = -1 if study.lower else 1

    def gain(lr: float) -> float:
        torch.manual_seed(config["seed"])
        model = copy.deepcopy(untuned)
        method: Iterable[Phase] = recipe(model, data, config, lr)
        if chosen is not None and chosen.selection is not None:
            method = fixed_mask(
                model, chosen.selection, lr=lr, lr_head=LR_HEAD, epochs=chosen.epochs
            )
        try:
            train(model, data.train, config, method)
        except ValueError as error:
            if "lower the learning rate" not in str(error):
                raise
            return -math.inf
        return sign * study.validate(model, data)

    return gain, chosen or first


def bracket(value: Callable[[float], float], start: float) -> dict[float, float]:
    """Values at rates by half decades around a start, until the best lies between worse ones.

    Where the best is met twice or more, there is a worse rate on both sides of all of them.

    Raises
    ------
    ValueError
        If the start is none of `RATES`.
    """
    if start not in RATES:
        raise ValueError(f"start={start} is not by half decades; choose one of {RATES}")
    first = last = RATES.index(start)
    found = {start: value(start)}
    while True:
        top = max(found.values())
        if found[RATES[first]] == top and first > 0:
            first -= 1
            found[RATES[first]] = value(RATES[first])
        elif found[RATES[last]] == top and last < len(RATES) - 1:
            last += 1
            found[RATES[last]] = value(RATES[last])
        else:
            return dict(sorted(found.items()))


def best(sweep: Mapping[str, Any], *, lower: bool = False) -> float:
    """The rate of a bracketed sweep with the best number, the smallest of equals."""
    tried = zip(sweep["validation"], sweep["rates"], strict=True)
    sign = 1 if lower else -1
    return float(min((sign * value, lr) for value, lr in tried if value is not None)[1])


def climb(
    rates: Iterable[float], value: Callable[[float], float], cliff: float = 0.1
) -> dict[float, float]:
    """A value at rates from small to large, up to the first that loses `cliff` against the best.

    Such a rate has failed, and larger ones do too.
    """
    found: dict[float, float] = {}
    for lr in rates:
        found[lr] = value(lr)
        if found[lr] < max(found.values()) - cliff:
            break
    return found


def is_fixed_mask(phase: Phase, model: Any) -> bool:
    """Whether a phase trains a selection and the head, and does nothing else."""
    actions = (phase.penalty, phase.before_step, phase.after_step)
    return (
        actions == (None, None, None)
        and phase.selection is not None
        and phase.selection.count == trained(phase, model)
    )


def trained(phase: Phase, model: Any) -> int:
    """Number of weights that a phase trains, without the head."""
    heads = {id(p) for p in head_weights(model).values()}
    return sum(p.numel() for group in phase.groups for p in group["params"] if id(p) not in heads)


def selected(phase: Phase) -> Row:
    """What a row says of a phase's selection."""
    selection = phase.selection
    if selection is None:
        return {}
    return {
        "selected": selection.count,
        "total": selection.total,
        "per_tensor": selection.per_tensor(),
    }
