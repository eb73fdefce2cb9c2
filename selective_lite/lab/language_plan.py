"""The language plan: SmolLM2 tuned on tweets, the runs behind the page on language models.

As in `plan`: rates are chosen on the validation split with seed 0, the test split is read once, by a finished row. Run
this file (part of ``make results``) to run what is missing; where there is a GPU, a larger profile too.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Generator, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ..methods.fish import fish_mask, fisher_information
from ..params import snapshot
from ..scores import uniform
from ..select import Selection, select, shuffled
from ..ship.delta import diff
from ..train import Phase, fixed_mask
from . import results
from .experiments import FIRST, climb, first_losses, train
from .language import Texts, bits, load_texts
from .models import load_language_model
from .shipping import sha256

Config = Mapping[str, Any]

NAME = "language"
DATA = {"task": "tweets", "train": 320, "validation": 60, "test": 300, "batch": 8, "epochs": 1, "samples": 64}
LARGE = {**DATA, "train": 1600, "validation": 200, "test": 800, "batch": 32, "epochs": 3, "samples": 256}
SEEDS = (0, 1, 2)
ONE_SEED = ("untouched", "fish_shuffled", "lora")
# By half decades, from small to large; a sweep ends at the first that costs more than the best so far.
GRIDS: dict[tuple[str, float], tuple[float, ...]] = {
    ("fish", 0.005): (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    ("random", 0.005): (1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    ("fish_shuffled", 0.005): (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    ("lora", 0.005): (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    ("fish", 0.0002): (1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    ("random", 0.0002): (3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
}
RANK = 12  # beside queries and values: 0.51 % of SmolLM2-135M
SHIPPED = {"method": "fish", "budget": 0.0002, "seed": 0}  # the run whose delta is kept beside the rows


def start(config: Config) -> tuple[Any, Texts]:
    """The model and the texts that a config names."""
    loaded, tokenizer = _loaded()
    model = copy.deepcopy(loaded)
    torch.manual_seed(config["seed"])
    sizes = {part: config[part] for part in ("train", "validation", "test")}
    return model, load_texts(config["task"], tokenizer, **sizes, device=model.device)


@cache
def _loaded() -> tuple[Any, Any]:
    """Once a process: reading the quantized file and its vocabulary takes half a minute."""
    return load_language_model()


def chosen(model: Any, texts: Texts, config: Config) -> Selection | None:
    """The weights that a config's method selects; None for LoRA and the untouched model."""
    if config["method"] in ("lora", "untouched"):
        return None
    if config["method"] == "random":
        return select(uniform(model, config["seed"]), config["budget"])
    batches = texts.train.batches(config["batch"], seed=config["seed"])
    selection = fish_mask(fisher_information(model, batches, samples=config["samples"]), config["budget"])
    return shuffled(selection, config["seed"]) if config["method"] == "fish_shuffled" else selection


def method(model: Any, config: Config, selection: Selection | None, lr: float) -> Generator[Phase, None, None]:
    """How a config trains the model."""
    if selection is None:
        return lora(model, config, lr)
    return fixed_mask(model, selection, lr=lr, epochs=config["epochs"])


def lora(model: Any, config: Config, lr: float) -> Generator[Phase, None, None]:
    """peft's LoRA beside the queries and values of all layers."""
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["q_proj", "v_proj"]), model)
    added = [p for name, p in model.named_parameters() if "lora_" in name]
    yield Phase("LoRA", [{"params": added, "lr": lr, "weight_decay": 0.0}], config["epochs"])


def losses(config: Config, steps: int = FIRST) -> list[float]:
    """Repeat the first steps of a row, as `experiments.losses`."""
    model, texts = start(config)
    selection = chosen(model, texts, config)
    return first_losses(model, texts.train, config, method(model, config, selection, config["lr"]), steps)


def run(config: Config) -> results.Row:
    """One row: train, then read the test texts once; a mask's delta is measured, and kept where it is `SHIPPED`."""
    model, texts = start(config)
    row: results.Row = {}
    if config["method"] != "untouched":
        base = snapshot(model)
        selection = chosen(model, texts, config)
        records = train(model, texts.train, config, method(model, config, selection, config["lr"]))
        row = {"first_losses": [record["loss"] for record in records[:FIRST]], **_size(base, model, selection, config)}
    cost, tokens = bits(model, texts.test)
    validation, predicted = bits(model, texts.validation)
    return {
        "bits_a_token": float(cost.sum() / tokens.sum()),
        "validation": float(validation.sum() / predicted.sum()),
        "bits": [round(cost, 3) for cost in cost.tolist()],
        "tokens": tokens.tolist(),
        **row,
    }


def _size(base: Any, model: Any, selection: Selection | None, config: Config) -> results.Row:
    if selection is None:
        return {"trained": sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)}
    delta = diff(base, model, method=f"FISH, {config['task']}" if config["method"] == "fish" else config["method"])
    file = results.CHECKOUT / f".{os.getpid()}.safetensors"
    try:
        delta.save(file, "gap-lzma")
        size = {"bytes": file.stat().st_size, "sha256": sha256(file)}
        if shipped(config):
            os.replace(file, results.CHECKOUT / f"{NAME}.safetensors")
    finally:
        Path(file).unlink(missing_ok=True)
    return {"trained": selection.count, "per_tensor": selection.per_tensor(), **size}


def shipped(config: Config) -> bool:
    """Whether a config's delta is kept beside the rows."""
    return {**SHIPPED, **DATA}.items() <= dict(config).items()


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
            train(model, texts.train, config, method(model, config, selection, lr))
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
    return ["lab/language_plan.py:sweep" if "grid" in config else "lab/language_plan.py:run"]


def rate_configs(data: Config = DATA) -> Iterator[Config]:
    """What is tuned: a method at a budget, over its grid, on seed 0 and the validation split."""
    for (name, budget), grid in GRIDS.items():
        yield {"method": name, "budget": budget, "seed": 0, "grid": grid, **data}


def configs(data: Config = DATA, name: str = NAME) -> Iterator[Config]:
    """The rows, each method at a budget with its own rate, and the untouched model."""
    yield {"method": "untouched", "budget": 0.0, "seed": 0, "lr": 0.0, **data}
    rates = {(row["config"]["method"], row["config"]["budget"]): rate(row) for row in results.read(name + "_rates")}
    for seed in SEEDS:
        for name_budget in GRIDS:
            if seed == 0 or (name_budget[0] not in ONE_SEED and name_budget[1] == max(b for _, b in GRIDS)):
                method_name, budget = name_budget
                yield {"method": method_name, "budget": budget, "seed": seed, "lr": rates[name_budget], **data}


def everything(name: str, data: Config) -> None:
    """Run what is missing of the sweeps and rows: on CPU as many side by side as there are cores."""
    workers = 1 if torch.cuda.is_available() else os.cpu_count() or 1
    results.run_missing(name + "_rates", list(rate_configs(data)), sweep, roots, workers=workers)
    results.run_missing(name, list(configs(data, name)), run, roots, workers=workers)


if __name__ == "__main__":
    everything(NAME, DATA)
    if torch.cuda.is_available():
        everything(NAME + "_large", LARGE)
