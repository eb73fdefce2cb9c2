"""The language plan: SmolLM2 tuned on tweets, the runs behind the page on language models.

As in `plan`: rates are chosen on the validation split with seed 0, the test split is read once, by
a finished row. Run this file (part of ``make results``) to run what is missing; where there is a
GPU, a larger profile too.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import torch

from ...methods.fish import fish
from ...params import snapshot, weights
from ...scores import random_scores
from ...selection import Selection, select
from ...ship.delta import Delta, diff
from ...training import Phases, fixed_mask
from ..data.tweets import Texts, bits, load_texts
from ..models import load_language_model
from . import results
from .four_deltas import sha256
from .run import FIRST, climb, first_losses, train

Config = Mapping[str, Any]

NAME = "language"
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
# By half decades, from small to large; a sweep ends at the first that costs more than the best so
# far.
GRIDS: dict[tuple[str, float], tuple[float, ...]] = {
    ("fish", 0.005): (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    ("random", 0.005): (1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    ("fish", 0.0002): (1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    ("random", 0.0002): (3e-2, 1e-1, 3e-1, 1.0, 3.0),
}
SHIPPED = {
    "method": "fish",
    "budget": 0.0002,
    "seed": 0,
}  # the run whose delta is kept beside the rows


def start(config: Config) -> tuple[Any, Texts]:
    """The model and the texts that a config names."""
    pretrained, tokenizer = loaded()
    model = copy.deepcopy(pretrained)
    torch.manual_seed(config["seed"])
    sizes = {part: config[part] for part in ("train", "validation", "test")}
    return model, load_texts(config["task"], tokenizer, **sizes, device=model.device)


@cache
def loaded() -> tuple[Any, Any]:
    """The model and its tokenizer, read once a process: the file and its vocabulary take half a minute."""
    return load_language_model()


def chosen(model: Any, texts: Texts, config: Config) -> Selection:
    """The weights that a config's method selects: by FISH, or at random."""
    if config["method"] == "random":
        return select(random_scores(model, config["seed"]), config["budget"])
    batches = texts.train.batches(config["batch"], seed=config["seed"])
    return fish(model, batches, config["budget"], samples=config["samples"])


def method(model: Any, selection: Selection, config: Config, lr: float) -> Phases:
    """How a config trains a selection."""
    return fixed_mask(model, selection, lr=lr, epochs=config["epochs"])


def losses(config: Config, steps: int = FIRST) -> list[float]:
    """Repeat the first steps of a row, as `experiments.losses`."""
    model, texts = start(config)
    selection = chosen(model, texts, config)
    return first_losses(
        model, texts.train, config, method(model, selection, config, config["lr"]), steps
    )


def run(config: Config) -> results.Row:
    """One row: train, then read the test texts once; a mask's delta is measured, and kept where it is `SHIPPED`."""
    model, texts = start(config)
    row: results.Row = {}
    if config["method"] != "untouched":
        base, selection = snapshot(model), chosen(model, texts, config)
        records = train(model, texts.train, config, method(model, selection, config, config["lr"]))
        row = {
            "first_losses": [record["loss"] for record in records[:FIRST]],
            **_size(base, model, selection, config),
        }
    cost, tokens = bits(model, texts.test)
    validation, predicted = bits(model, texts.validation)
    return {
        "bits_a_token": float(cost.sum() / tokens.sum()),
        "validation": float(validation.sum() / predicted.sum()),
        "bits": [round(cost, 3) for cost in cost.tolist()],
        "tokens": tokens.tolist(),
        **row,
    }


def _size(base: Any, model: Any, selection: Selection, config: Config) -> results.Row:
    """The weights that were trained, and the bytes of their delta."""
    delta = diff(base, model, method=f"{config['method']}, {config['task']}")
    file = results.CHECKOUT / f".{os.getpid()}.safetensors"
    try:
        delta.save(file, "gap-lzma")
        size = {"bytes": file.stat().st_size, "sha256": sha256(file)}
        if shipped(config):
            os.replace(file, results.CHECKOUT / f"{NAME}.safetensors")
    finally:
        file.unlink(missing_ok=True)
    return {"trained": selection.count, "per_tensor": selection.per_tensor(), **size}


def shipped(config: Config) -> bool:
    """Whether a config's delta is kept beside the rows."""
    return {**SHIPPED, **DATA}.items() <= dict(config).items()


def mask_of(delta: Delta, model: Any) -> Selection:
    """The selection that a delta tunes: its positions, and all of a tensor that it replaces whole."""
    whole = {name: torch.arange(tensor.numel()) for name, tensor in delta.dense.items()}
    places = {**{name: index.long() for name, index in delta.positions.items()}, **whole}
    candidates = weights(model)
    return Selection(
        {name: places[name] for name in candidates if name in places},
        {name: tuple(p.shape) for name, p in candidates.items()},
    )


def sweep(config: Config) -> results.Row:
    """Validation bits a token at rates from small to large; weights are scored once.

    It ends at the first rate that costs more than the best so far, or whose loss is not finite.
    """
    untuned, texts = start(config)
    selection = chosen(untuned, texts, config)

    def gain(lr: float) -> float:
        torch.manual_seed(config["seed"])
        model = copy.deepcopy(untuned)
        try:
            train(model, texts.train, config, method(model, selection, config, lr))
        except ValueError:
            return -math.inf
        cost, tokens = bits(model, texts.validation)
        return -float(cost.sum() / tokens.sum())

    found = climb(config["grid"], gain, cliff=0.0).values()
    return {"validation": [-gained if math.isfinite(gained) else None for gained in found]}


def rate(sweep: results.Row) -> float:
    """The rate with the fewest validation bits."""
    tried = zip(sweep["validation"], sweep["config"]["grid"], strict=False)  # the first of the grid
    return min((cost, lr) for cost, lr in tried if cost is not None)[1]


def roots(config: Config) -> list[str]:
    """The code that a config's row follows from."""
    return [
        "lab/experiments/tweets.py:sweep" if "grid" in config else "lab/experiments/tweets.py:run"
    ]


def rate_configs(data: Config = DATA) -> Iterator[Config]:
    """What is tuned: a method at a budget, over its grid, on seed 0 and the validation split."""
    for (name, budget), grid in GRIDS.items():
        yield {"method": name, "budget": budget, "seed": 0, "grid": grid, **data}


def configs(data: Config = DATA, file: str = NAME) -> Iterator[Config]:
    """The rows, each method at a budget with its own rate, and the untouched model."""
    yield {"method": "untouched", "budget": 0.0, "seed": 0, "lr": 0.0, **data}
    swept = results.read(file + "_rates")
    rates = {(row["config"]["method"], row["config"]["budget"]): rate(row) for row in swept}
    for name, budget in GRIDS:
        for seed in SEEDS[budget]:
            yield {
                "method": name,
                "budget": budget,
                "seed": seed,
                "lr": rates[name, budget],
                **data,
            }


def everything(name: str, data: Config) -> None:
    """Run what is missing of the sweeps and rows: on CPU as many side by side as there are cores."""
    workers = 1 if torch.cuda.is_available() else os.cpu_count() or 1
    results.run_missing(name + "_rates", list(rate_configs(data)), sweep, roots, workers=workers)
    results.run_missing(name, list(configs(data, name)), run, roots, workers=workers)


if __name__ == "__main__":
    everything(NAME, DATA)
    if torch.cuda.is_available():
        everything(NAME + "_large", LARGE)
