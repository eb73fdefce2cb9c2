"""Experiments: how a config of the plan becomes a row; ``make results`` runs what is missing."""

from __future__ import annotations

import copy
from collections.abc import Generator, Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch

from ..methods.diff_pruning import diff_pruning
from ..params import weights
from ..scores import uniform
from ..select import Selection, select, shuffled
from ..train import Phase, dense, fit, fixed_mask
from . import results
from .models import load_classifier
from .tasks import Task, evaluate, load_task

Config = Mapping[str, Any]

NAME = "diff_pruning_movies"
LR_HEAD = 1e-3
LR_W, LR_ALPHA = 3e-4, 0.3
FIRST = 5  # losses kept, for a page to repeat


class Enough(Exception):
    """Raised inside a run whose first losses are all that is wanted."""


def phases(model: Any, config: Config, lr: float) -> Generator[Phase, None, None]:
    """The method that a config names, on a loaded model."""
    method, budget, seed = config["method"], config["budget"], config["seed"]
    if method == "full":
        return dense(model, lr=lr, lr_head=LR_HEAD, epochs=config["epochs"])
    if method in ("random", "shuffled"):
        chosen = select(uniform(model, seed), budget) if method == "random" else _shuffled(model, config)
        return fixed_mask(model, chosen, lr=lr, lr_head=LR_HEAD, epochs=config["epochs"])
    return diff_pruning(
        model,
        budget,
        lr_w=LR_W,
        lr_alpha=LR_ALPHA,
        lr=lr,
        lr_head=LR_HEAD,
        epochs=_halves(config),
        groups="tensor" if method == "structured" else None,
        seed=seed,
    )


def _shuffled(model: Any, config: Config) -> Selection:
    """Random positions, as many in every tensor as the unstructured run of this budget and seed has."""
    like = {"method": "unstructured", "budget": config["budget"], "seed": config["seed"]}
    for row in results.read(NAME):
        if like.items() <= row["config"].items():
            shapes = {name: tuple(p.shape) for name, p in weights(model).items()}
            first = {name: torch.arange(count) for name, count in row["per_tensor"].items() if count}
            return shuffled(Selection(first, shapes), config["seed"])
    raise ValueError(f"config={dict(config)} shuffles an unstructured row that is not there; run that first")


def start(config: Config) -> tuple[Any, Task]:
    """The model (head drawn from the seed) and the task that a config names."""
    torch.manual_seed(config["seed"])  # dropout
    model, tokenizer = load_classifier(seed=config["seed"])
    device = next(model.parameters()).device
    return model, load_task(
        config["task"], tokenizer, train=config["train"], validation=config["validation"], device=device
    )


def losses(config: Config, steps: int = FIRST) -> list[float]:
    """Repeat the first steps of a row: the task losses, to be compared with the row's ``first_losses``."""
    model, task = start(config)
    found: list[float] = []

    def stop(record: Mapping[str, Any]) -> None:
        found.append(record["loss"])
        if len(found) == steps:
            raise Enough

    with suppress(Enough):
        fit(model, phases(model, config, config["lr"]), _batches(task, config), on_step=stop)
    return found


def run(config: Config) -> results.Row:
    """One row: train, then read the test split once."""
    model, task = start(config)
    selections: list[Selection | None] = []

    def noted() -> Iterator[Phase]:
        for phase in phases(model, config, config["lr"]):
            selections.append(phase.selection)
            yield phase

    records = fit(model, noted(), _batches(task, config))
    test = evaluate(model, task.test)
    return {
        "accuracy": test["accuracy"],
        "loss": test["loss"],
        "validation": evaluate(model, task.validation)["accuracy"],
        "majority": task.majority,
        "tested": len(task.test),
        "correct": results.pack(test["correct"]),
        "first_losses": [record["loss"] for record in records[:FIRST]],
        **_counts(selections[-1]),
    }


def sweep(config: Config) -> results.Row:
    """Validation accuracy over a grid of learning rates; Diff Pruning relaxes once, its fixed phase is swept."""
    model, task = start(config)
    selection: Selection | None = None
    if config["method"] == "unstructured":
        method = phases(model, config, config["grid"][0])
        fit(model, [next(method)], _batches(task, config))
        selection = next(method).selection
        method.close()  # projected, not yet trained
    untuned = copy.deepcopy(model)
    accuracy: dict[float, float] = {}
    for lr in config["grid"]:
        torch.manual_seed(config["seed"])
        model = copy.deepcopy(untuned)
        if selection is None:
            method = phases(model, config, lr)
        else:
            method = fixed_mask(model, selection, lr=lr, lr_head=LR_HEAD, epochs=_halves(config)[1])
        fit(model, method, _batches(task, config))
        accuracy[lr] = evaluate(model, task.validation)["accuracy"]
    best = max(accuracy, key=accuracy.__getitem__)
    return {"lr": best, "validation": [accuracy[lr] for lr in config["grid"]], **_counts(selection)}


def _halves(config: Config) -> tuple[int, int]:
    return config["epochs"] // 2, config["epochs"] - config["epochs"] // 2


def _batches(task: Task, config: Config) -> Any:
    return task.train.batches(config["batch"], seed=config["seed"])


def _counts(selection: Selection | None) -> results.Row:
    if selection is None:
        return {}
    return {"selected": selection.count, "total": selection.total, "per_tensor": selection.per_tensor()}
