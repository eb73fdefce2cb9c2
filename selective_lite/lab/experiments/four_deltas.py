"""Four deltas: four sentiment tasks on one MiniLM, each a small file kept with the rows.

LT-SFT at 0.02 % of the weights, and LoRA of about that size for comparison; both take on every task
the rate that the movies' validation split chose. Run this module (part of ``make results``) to make
what is missing.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ...params import head_weights
from ...ship.delta import Delta, load
from ...ship.diff import diff
from ..data.sentiment import DOMAINS
from . import movies, results
from .recipes import RECIPES, Config
from .run import Study, make

NAME = "deltas"
METHODS = {"lt_sft": "LT-SFT", "lora": "LoRA"}
BUDGET = 0.0002


def one_seed(method: str, budget: float | str) -> tuple[int, ...]:
    """The seed of every run."""
    return (0,)


def ship(before: Mapping[str, Tensor], model: Any, config: Config) -> results.Row:
    """Write the delta's file, or measure the file that the LoRA would have."""
    if config["method"] == "lora":
        return {"bytes": adapter_bytes(model)}
    delta = diff(before, model, method=f"LT-SFT, {config['task']}")
    file = results.CHECKOUT / f"{config['task']}.safetensors"
    delta.save(file, "gap-lzma")
    return {"bytes": file.stat().st_size, "sha256": sha256(file)}


def adapter_bytes(model: torch.nn.Module) -> int:
    """Bytes of a file with a model's LoRA and its head (peft's names are longer)."""
    low_rank = {name: p.detach().cpu() for name, p in model.named_parameters() if "lora_" in name}
    heads = {name: p.detach().cpu() for name, p in head_weights(model).items()}
    with tempfile.TemporaryDirectory() as folder:
        save_file({**low_rank, **heads}, file := os.path.join(folder, "adapter_model.safetensors"))
        return os.path.getsize(file)


def sha256(file: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def opened(task: str) -> Delta:
    """The delta of a task, from the checkout or the installed package.

    Raises
    ------
    FileNotFoundError
        If there is none for this task.
    """
    file = results.find(f"{task}.safetensors")
    if file is None:
        raise FileNotFoundError(f"task={task!r} has no delta; choose one of {DOMAINS}")
    return load(file)


STUDY = Study(
    NAME,
    data=tuple({"task": task, **movies.DATA} for task in DOMAINS),
    recipes=RECIPES,
    start=movies.start,
    validate=movies.validate,
    measure=movies.measure,
    grids={(method, BUDGET): () for method in METHODS},
    seeds=one_seed,
    choose=movies.rate,
    ship=ship,
    tuned_by=movies.NAME,
)

if __name__ == "__main__":
    make(STUDY)
