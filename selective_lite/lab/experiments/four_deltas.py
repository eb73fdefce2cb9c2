"""Shipping: four sentiment tasks on one MiniLM as four deltas, which are kept beside the rows and opened by the pages.

LT-SFT at 0.02 % of the weights, and LoRA of about that size to compare with; each takes on every
task the rate that the movies' validation split chose. Run this file (part of ``make results``) to
make what is missing.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from ...params import head_weights, snapshot
from ...ship.delta import Delta, diff, load
from ..data.sentiment import DOMAINS, evaluate
from . import movies, results
from .recipes import RECIPES, Config
from .run import start, train

NAME = "deltas"
METHODS = {"lt_sft": "LT-SFT", "lora": "LoRA"}
BUDGET = 0.0002


def configs() -> Iterator[Config]:
    """A delta and a LoRA for every task."""
    for method in METHODS:
        (sweep,) = results.of(results.read(movies.NAME + "_rates"), method, BUDGET)
        for task in DOMAINS:
            yield {
                "method": method,
                "budget": BUDGET,
                "seed": 0,
                "lr": movies.rate(sweep),
                "task": task,
                **movies.DATA,
            }


def roots(config: Config) -> list[str]:
    """The code that a config's row follows from."""
    return ["lab/experiments/four_deltas.py:run", f"lab/experiments/recipes.py:{config['method']}"]


def run(config: Config) -> results.Row:
    """Train, write the delta's file, or measure what the LoRA's would be, and read the test split once."""
    model, task = start(config)
    base = snapshot(model)
    train(model, task.train, config, RECIPES[config["method"]](model, task, config, config["lr"]))
    found = evaluate(model, task.test)
    row = {
        "accuracy": found["accuracy"],
        "validation": evaluate(model, task.validation)["accuracy"],
        "majority": task.majority,
        "tested": len(task.test),
        "correct": results.pack(found["correct"]),
    }
    if config["method"] == "lora":
        return {**row, **adapter_size(model)}
    delta = diff(base, model, method=f"LT-SFT, {config['task']}")
    file = results.CHECKOUT / f"{config['task']}.safetensors"
    delta.save(file, "gap-lzma")
    return {**row, "trained": delta.count, "bytes": file.stat().st_size, "sha256": sha256(file)}


def adapter_size(model: torch.nn.Module) -> results.Row:
    """How many weights a model's LoRA has, and the bytes of a file with them and the head (peft has longer names)."""
    low_rank = {name: p.detach().cpu() for name, p in model.named_parameters() if "lora_" in name}
    heads = {name: p.detach().cpu() for name, p in head_weights(model).items()}
    with tempfile.TemporaryDirectory() as folder:
        save_file({**low_rank, **heads}, file := os.path.join(folder, "adapter_model.safetensors"))
        return {
            "trained": sum(t.numel() for t in low_rank.values()),
            "bytes": os.path.getsize(file),
        }


def sha256(file: Path) -> str:
    """Of a file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def opened(task: str) -> Delta:
    """The delta of a task, out of the checkout or the installed package.

    Raises
    ------
    FileNotFoundError
        If there is none for this task.
    """
    file = results.find(f"{task}.safetensors")
    if file is None:
        raise FileNotFoundError(f"task={task!r} has no delta; there are those of {DOMAINS}")
    return load(file)


if __name__ == "__main__":
    workers = 1 if torch.cuda.is_available() else os.cpu_count() or 1
    results.run_missing(NAME, list(configs()), run, roots, workers=workers)
