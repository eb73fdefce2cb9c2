"""Benchmark: peak memory of training steps of SmolLM2-135M over the loaded model.

Each way of training is measured in a fresh process.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from processes import forget_peak, fresh, peak, resident, settle
from ways import trained

import selective_lite as sl
from selective_lite.lab import load_language_model, results

CONFIGS = [
    {
        "way": way,
        "model": "smollm2",
        "batch": 4,
        "tokens": 64,
        "budget": 0.005,
        "rank": 8,
        "steps": 3,
    }
    for way in ("full AdamW", "peft SHiRA", "peft LoRA", "selective_lite", "floor")
]
ROOTS = [
    "ship/tuning.py:masked",
    "methods/controls.py:random",
    "params.py:head_weights",
    "memory.py:ledger",
]


def measure(config: Mapping[str, Any]) -> results.Row:
    """Train some steps: the peak over the loaded model, and the bytes that are held, by kind."""
    torch.manual_seed(0)
    model, _ = load_language_model(config["model"])
    place = next(model.parameters()).device
    ids = torch.randint(
        0, model.config.vocab_size, (config["batch"], config["tokens"]), device=place
    )
    selection = sl.random(model, config["budget"], seed=0)  # what selecting takes is not a step's
    settle()
    loaded = resident()
    forget_peak()
    model, optimizer = trained(config["way"], model.train(), selection, rank=config["rank"])
    for _ in range(config["steps"]):
        model(input_ids=ids, labels=ids).loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
    over = peak() - loaded
    model(input_ids=ids, labels=ids).loss.backward()
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {
        "trained": count,
        "bytes": {"loaded": loaded, "peak over it": over, **sl.ledger(model, optimizer)},
    }


def run(config: Mapping[str, Any]) -> results.Row:
    """The same in a fresh process."""
    return fresh(measure, config)


if __name__ == "__main__":
    rows = results.run_missing("peak_memory", CONFIGS, run, lambda config: ROOTS)
    print(f"on {rows[0]['device']}, MiB")
    print(
        f"{'':16} {'trained':>12} {'peak over the model':>20} {'gradients':>10} {'optimizer':>10}"
    )
    for row in rows:
        over, gradients, state = (
            row["bytes"][kind] / 2**20 for kind in ("peak over it", "gradients", "optimizer")
        )
        print(
            f"{row['config']['way']:16} {row['trained']:12,} {over:20,.0f}"
            f" {gradients:10,.1f} {state:10,.1f}"
        )
