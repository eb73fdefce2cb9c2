"""Recipes: how a config of the plan becomes a method on a loaded model; a function is named as its configs' method."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from typing import Any

import torch

from ..methods.diff_pruning import diff_pruning
from ..params import weights
from ..scores import uniform
from ..select import Selection, select
from ..select import shuffled as shuffled_selection
from ..train import Phase, dense, fixed_mask
from . import results

Config = Mapping[str, Any]
Recipe = Callable[[Any, Config, float], Generator[Phase, None, None]]

LR_HEAD = 1e-3
LR_W, LR_ALPHA = 3e-4, 0.3


def full(model: Any, config: Config, lr: float) -> Generator[Phase, None, None]:
    """Full fine-tuning."""
    return dense(model, lr=lr, lr_head=LR_HEAD, epochs=config["epochs"])


def unstructured(model: Any, config: Config, lr: float) -> Generator[Phase, None, None]:
    """Diff Pruning with a gate for every weight: half of the epochs relaxed, half with the mask fixed."""
    return _diff_pruning(model, config, lr, groups=None)


def structured(model: Any, config: Config, lr: float) -> Generator[Phase, None, None]:
    """Diff Pruning with a second gate for every tensor."""
    return _diff_pruning(model, config, lr, groups="tensor")


def random(model: Any, config: Config, lr: float) -> Generator[Phase, None, None]:
    """The control: positions drawn uniformly."""
    return _fixed(model, select(uniform(model, config["seed"]), config["budget"]), config, lr)


def shuffled(model: Any, config: Config, lr: float) -> Generator[Phase, None, None]:
    """The control: random positions, as many in every tensor as unstructured Diff Pruning has at budget and seed."""
    like = {"method": "unstructured", "budget": config["budget"], "seed": config["seed"]}
    for row in results.read("diff_pruning_movies") + results.read("diff_pruning_movies_rates"):
        if like.items() <= row["config"].items():
            shapes = {name: tuple(p.shape) for name, p in weights(model).items()}
            first = {name: torch.arange(count) for name, count in row["per_tensor"].items() if count}
            return _fixed(model, shuffled_selection(Selection(first, shapes), config["seed"]), config, lr)
    raise ValueError(f"config={dict(config)} shuffles an unstructured row that is not there; run that first")


def _diff_pruning(model: Any, config: Config, lr: float, groups: Any) -> Generator[Phase, None, None]:
    relaxed = config["epochs"] // 2
    return diff_pruning(
        model,
        config["budget"],
        lr_w=LR_W,
        lr_alpha=LR_ALPHA,
        lr=lr,
        lr_head=LR_HEAD,
        epochs=(relaxed, config["epochs"] - relaxed),
        groups=groups,
        seed=config["seed"],
    )


def _fixed(model: Any, selection: Selection, config: Config, lr: float) -> Generator[Phase, None, None]:
    return fixed_mask(model, selection, lr=lr, lr_head=LR_HEAD, epochs=config["epochs"])


RECIPES: dict[str, Recipe] = {recipe.__name__: recipe for recipe in (full, unstructured, structured, random, shuffled)}
