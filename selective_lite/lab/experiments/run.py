"""Experiments: how a config becomes a row, or a sweep over learning rates; ``make results`` runs what is missing."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import torch

from ...params import head_weights
from ...training import Phase, fit, fixed_mask
from ..data.sentiment import Split, Task, evaluate, load_task
from ..device import VARIABLE
from ..models import load_classifier
from . import results
from .recipes import LR_HEAD, RECIPES, Config

FIRST = 5  # losses kept, for a page to repeat
OPTIMIZER = partial(torch.optim.AdamW, fused=True)


class Enough(Exception):
    """Raised inside a run whose first losses are all that is wanted."""


def roots(config: Config) -> list[str]:
    """The code that a config's row follows from, as `provenance.code_hash` takes it."""
    runner = "sweep" if "grid" in config else "run"
    return [f"lab/experiments.py:{runner}", f"lab/experiments/recipes.py:{config['method']}"]


def start(config: Config) -> tuple[Any, Task]:
    """The model (head drawn from the seed) and the task that a config names."""
    torch.manual_seed(config["seed"])  # dropout
    model, tokenizer = load_classifier(seed=config["seed"])
    device = next(model.parameters()).device
    return model, load_task(
        config["task"],
        tokenizer,
        train=config["train"],
        validation=config["validation"],
        device=device,
    )


def train(
    model: Any, split: Split, config: Config, method: Iterable[Phase], **options: Any
) -> list[dict[str, Any]]:
    """Fit with a config's batches of a split and the optimizer of all runs."""
    batches = split.batches(config["batch"], seed=config["seed"])
    return fit(model, method, batches, optimizer=OPTIMIZER, **options)


def losses(config: Config, steps: int = FIRST) -> list[float]:
    """Repeat the first steps of a row: the task losses, to be compared with the row's ``first_losses``."""
    model, task = start(config)
    return first_losses(
        model,
        task.train,
        config,
        RECIPES[config["method"]](model, task, config, config["lr"]),
        steps,
    )


def first_losses(
    model: Any, split: Split, config: Config, method: Iterable[Phase], steps: int
) -> list[float]:
    """The task losses of a method's first steps; training ends there."""
    found: list[float] = []

    def stop(record: dict[str, Any]) -> None:
        found.append(record["loss"])
        if len(found) == steps:
            raise Enough

    with suppress(Enough):
        train(model, split, config, method, on_step=stop)
    return found


def repeat(row: results.Row, steps: int = 2) -> str:
    """Repeat the first steps of a row, on the CPU if that made it; what was recorded, and what came now.

    Raises
    ------
    AssertionError
        If a loss differs by more than one in a thousand.
    """
    wish = os.environ.get(VARIABLE)
    if row["device"].startswith("cpu"):
        os.environ[VARIABLE] = "cpu"
    try:
        again = losses(row["config"], steps)
    finally:
        os.environ.pop(VARIABLE, None)
        if wish is not None:
            os.environ[VARIABLE] = wish
    torch.testing.assert_close(again, row["first_losses"][:steps], rtol=1e-3, atol=0.0)
    recorded, repeated = (
        ", ".join(f"{loss:.6f}" for loss in found) for found in (row["first_losses"][:steps], again)
    )
    return f"{row['config']['method']}: recorded {recorded}; repeated {repeated}"


def run(config: Config) -> results.Row:
    """One row: train, then read the test split once."""
    model, task = start(config)
    phases: list[Phase] = []

    def noted() -> Iterator[Phase]:
        for phase in RECIPES[config["method"]](model, task, config, config["lr"]):
            phases.append(phase)
            yield phase

    records = train(model, task.train, config, noted())
    test = evaluate(model, task.test)
    return {
        "accuracy": test["accuracy"],
        "loss": test["loss"],
        "validation": evaluate(model, task.validation)["accuracy"],
        "majority": task.majority,
        "tested": len(task.test),
        "correct": results.pack(test["correct"]),
        "first_losses": [record["loss"] for record in records[:FIRST]],
        "trained": _trained(phases[-1], model),
        **_selected(phases[-1]),
    }


def sweep(config: Config) -> results.Row:
    """Validation accuracy over a grid of learning rates; weights are scored, or gates relaxed, once."""
    model, task = start(config)
    untuned = copy.deepcopy(model)
    recipe = RECIPES[config["method"]]
    method = recipe(model, task, config, config["grid"][0])
    phases = iter(method)
    first = next(phases)
    chosen: Phase | None = None
    if first.selection is None and first.model is not None:
        train(model, task.train, config, [first])
        chosen, untuned = next(phases), model  # projected and not yet trained
    elif _is_fixed_mask(first, model):
        chosen = first
    method.close()
    accuracy: dict[float, float] = {}
    for lr in config["grid"]:
        torch.manual_seed(config["seed"])
        model = copy.deepcopy(untuned)
        method = recipe(model, task, config, lr)
        if chosen is not None and chosen.selection is not None:
            method = fixed_mask(
                model, chosen.selection, lr=lr, lr_head=LR_HEAD, epochs=chosen.epochs
            )
        train(model, task.train, config, method)
        accuracy[lr] = evaluate(model, task.validation)["accuracy"]
    return {"validation": list(accuracy.values()), **_selected(chosen or first)}


def climb(
    rates: Iterable[float], accuracy: Callable[[float], float], cliff: float = 0.1
) -> dict[float, float]:
    """Validation accuracy at rates from small to large, up to the first that loses `cliff` against the best so far.

    Such a rate has failed, and larger ones do too.
    """
    found: dict[float, float] = {}
    for lr in rates:
        found[lr] = accuracy(lr)
        if found[lr] < max(found.values()) - cliff:
            break
    return found


def _is_fixed_mask(phase: Phase, model: Any) -> bool:
    """Whether a phase trains a selection and the head, and does nothing else."""
    actions = (phase.penalty, phase.before_step, phase.after_step)
    return (
        actions == (None, None, None)
        and phase.selection is not None
        and phase.selection.count == _trained(phase, model)
    )


def _trained(phase: Phase, model: Any) -> int:
    """How many weights the phase trained, beside the head."""
    heads = {id(p) for p in head_weights(model).values()}
    return sum(p.numel() for group in phase.groups for p in group["params"] if id(p) not in heads)


def _selected(phase: Phase) -> results.Row:
    selection = phase.selection
    if selection is None:
        return {}
    return {
        "selected": selection.count,
        "total": selection.total,
        "per_tensor": selection.per_tensor(),
    }
