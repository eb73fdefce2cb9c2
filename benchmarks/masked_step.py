"""Benchmark: one training step of MiniLM, 32 x 32 tokens, six ways; medians and ratios.

All ways run in one process, interleaved.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from ways import WAYS, trained

import selective_lite as sl
from selective_lite.lab import load_classifier, results

CONFIGS = [
    {
        "model": "minilm",
        "batch": 32,
        "tokens": 32,
        "budget": budget,
        "rank": 8,
        "warmup": 3,
        "rounds": 25,
    }
    for budget in (0.0002, 0.005, 0.05)
]
ROOTS = [
    "ship/tuning.py:masked",
    "methods/controls.py:random",
    "params.py:head_weights",
    "memory.py:ledger",
]


def contenders(
    config: Mapping[str, Any],
) -> dict[str, tuple[nn.Module, torch.optim.Optimizer | None]]:
    """Each way of training: its own copy of the model, and its optimizer."""
    base, _ = load_classifier(config["model"])
    base.train()
    sizes = {"budget": config["budget"], "rank": config["rank"]}
    return {way: trained(way, copy.deepcopy(base), **sizes) for way in WAYS}


def step(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, batch: Mapping[str, torch.Tensor]
) -> tuple[float, float]:
    """Seconds of the forward, and of the whole step with backward and update."""
    wait: Callable[[], None] = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    start = time.perf_counter()
    loss = model(**batch).loss
    wait()
    forward = time.perf_counter() - start
    loss.backward()
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad()
    wait()
    return forward, time.perf_counter() - start


def held(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, batch: Mapping[str, torch.Tensor]
) -> dict[str, int]:
    """Bytes by kind after a step, with the gradients still there."""
    model(**batch).loss.backward()
    bytes_held = sl.ledger(model, optimizer)
    model.zero_grad()
    return bytes_held


def run(config: Mapping[str, Any]) -> results.Row:
    """Median seconds and bytes of every contender, and the ratios that the design asks for."""
    torch.manual_seed(0)
    ways = contenders(config)
    device = next(ways["floor"][0].parameters()).device
    ids = torch.randint(1000, 30000, (config["batch"], config["tokens"]), device=device)
    labels = torch.randint(0, 2, (config["batch"],), device=device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for round_number in range(config["warmup"] + config["rounds"]):
        for name, (model, optimizer) in ways.items():
            taken = step(model, optimizer, batch)
            if round_number >= config["warmup"]:
                seconds[name].append(taken)
    forward, median = (
        {name: statistics.median(pair[part] for pair in pairs) for name, pairs in seconds.items()}
        for part in (0, 1)
    )
    ours = median["selective_lite"]
    return {
        "forward_seconds": {name: round(value, 4) for name, value in forward.items()},
        "median_seconds": {name: round(value, 4) for name, value in median.items()},
        "ours_over": {name: round(ours / value, 3) for name, value in median.items()},
        "over_full": {
            name: round(value / median["full AdamW"], 3) for name, value in median.items()
        },
        "bytes": {name: held(model, optimizer, batch) for name, (model, optimizer) in ways.items()},
        "trainable": {
            name: sum(p.numel() for p in model.parameters() if p.requires_grad)
            for name, (model, _) in ways.items()
        },
    }


if __name__ == "__main__":
    for row in results.run_missing("masked_step", CONFIGS, run, lambda config: ROOTS):
        print(f"budget {row['config']['budget']:.2%}, on {row['device']}")
        print(
            f"{'':20} {'seconds':>8} {'ours / it':>9} {'it / full':>9}"
            f" {'gradients':>10} {'optimizer':>10}"
        )
        for way, median_seconds in row["median_seconds"].items():
            counted = row["bytes"][way]
            print(
                f"{way:20} {median_seconds:8.4f}"
                f" {row['ours_over'][way]:9.3f} {row['over_full'][way]:9.3f}"
                f" {counted['gradients']:10,} {counted['optimizer']:10,}"
            )
