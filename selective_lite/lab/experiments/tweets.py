"""The tweets: SmolLM2 tuned as a language model, the runs behind the page on language models.

As with the movies, rates are chosen on the validation split with seed 0, and the test split is read
once, by a finished run. Run this module (part of ``make results``) to run what is missing; on a
GPU, a larger study too.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ...methods.controls import random_scores
from ...methods.fish import fish as fish_selection
from ...methods.fixed_mask import fixed_mask
from ...selection import select
from ...ship.diff import diff
from ...training import Phase, Phases
from ..data.tweets import Texts, bits, load_texts
from ..models import load_language_model
from . import results
from .four_deltas import sha256
from .recipes import Config, Recipe
from .run import Cell, Study, make

NAME, LARGE_NAME = "language", "language_large"
DATA = {
    "task": "tweets",
    "train": 192,
    "validation": 40,
    "test": 200,
    "batch": 8,
    "epochs": 1,
    "samples": 32,
}
LARGE = {
    **DATA,
    "train": 1600,
    "validation": 200,
    "test": 800,
    "batch": 32,
    "epochs": 3,
    "samples": 256,
}
SEEDS = {0.005: (0, 1, 2), 0.0002: (0,)}
# By half decades, from small to large; a sweep ends at the first rate that costs more than the
# best so far.
GRIDS: dict[Cell, tuple[float, ...]] = {
    ("untouched", 0.0): (),
    ("fish", 0.005): (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    ("random", 0.005): (1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    ("fish", 0.0002): (1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    ("random", 0.0002): (3e-2, 1e-1, 3e-1, 1.0, 3.0),
}
SHIPPED = {"method": "fish", "budget": 0.0002, "seed": 0}  # the run whose delta is kept


def start(config: Config) -> tuple[Any, Texts]:
    """The model and the texts that a config names."""
    pretrained, tokenizer = loaded()
    model = copy.deepcopy(pretrained)
    torch.manual_seed(config["seed"])
    sizes = {part: config[part] for part in ("train", "validation", "test")}
    return model, load_texts(config["task"], tokenizer, **sizes, device=model.device)


@cache
def loaded() -> tuple[Any, Any]:
    """The model and its tokenizer, read once in a process, since reading takes half a minute."""
    return load_language_model()


def untouched(model: Any, texts: Texts, config: Config, lr: float) -> Iterator[Phase]:
    """No training."""
    yield from ()


def fish(model: Any, texts: Texts, config: Config, lr: float) -> Phases:
    """FISH, with the empirical Fisher information of some training texts."""
    batches = texts.train.batches(config["batch"], seed=config["seed"])
    selection = fish_selection(model, batches, config["budget"], samples=config["samples"])
    return fixed_mask(model, selection, lr=lr, epochs=config["epochs"])


def random(model: Any, texts: Texts, config: Config, lr: float) -> Phases:
    """The control: positions drawn uniformly."""
    selection = select(random_scores(model, config["seed"]), config["budget"])
    return fixed_mask(model, selection, lr=lr, epochs=config["epochs"])


# provenance: apart
RECIPES: dict[str, Recipe] = {"untouched": untouched, "fish": fish, "random": random}


def validate(model: Any, texts: Texts) -> float:
    """Bits per token on the validation split."""
    cost, tokens = bits(model, texts.validation)
    return float(cost.sum() / tokens.sum())


def measure(model: Any, texts: Texts) -> results.Row:
    """Bits and tokens of every test text, and bits per token on both splits."""
    cost, tokens = bits(model, texts.test)
    return {
        "bits_a_token": float(cost.sum() / tokens.sum()),
        "validation": validate(model, texts),
        "bits": [round(cost, 3) for cost in cost.tolist()],
        "tokens": tokens.tolist(),
    }


def ship(before: Mapping[str, Tensor], model: Any, config: Config) -> results.Row:
    """Bytes of the delta's file, which is kept if the run is `SHIPPED`."""
    delta = diff(before, model, method=f"{config['method']}, {config['task']}")
    file = results.CHECKOUT / f".{os.getpid()}.safetensors"
    try:
        delta.save(file, "gap-lzma")
        size = {"bytes": file.stat().st_size, "sha256": sha256(file)}
        if shipped(config):
            os.replace(file, results.CHECKOUT / f"{NAME}.safetensors")
    finally:
        file.unlink(missing_ok=True)
    return size


def shipped(config: Config) -> bool:
    """Whether a config's delta is kept with the rows."""
    return {**SHIPPED, **DATA}.items() <= dict(config).items()


def seeds(method: str, budget: float | str) -> tuple[int, ...]:
    """Three seeds at the larger budget; the untouched model has none to vary."""
    return (0,) if method == "untouched" else SEEDS[float(budget)]


def rate(sweep: results.Row) -> float:
    """The rate with the fewest validation bits."""
    tried = zip(sweep["validation"], sweep["config"]["grid"], strict=False)  # the first of the grid
    return min((cost, lr) for cost, lr in tried if cost is not None)[1]


STUDY = Study(
    NAME,
    data=(DATA,),
    recipes=RECIPES,
    start=start,
    validate=validate,
    measure=measure,
    grids=GRIDS,
    seeds=seeds,
    choose=rate,
    ship=ship,
    lower=True,
    cliff=0.0,
)
LARGER = replace(STUDY, name=LARGE_NAME, data=(LARGE,))

if __name__ == "__main__":
    make(STUDY)
    if torch.cuda.is_available():
        make(LARGER)
