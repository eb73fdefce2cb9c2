"""Benchmark: one training step, several ways; medians and ratios of paired rounds.

All ways of a row run in one fresh process, interleaved. The floor is a step's forward and every
input gradient, and nothing else. `take` 2 repeats `take` 1 at another hour.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock

import torch
from processes import KEEPS, RETURNS, fresh
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from ways import OURS, OURS_IN_TORCH, WAYS, trained

import selective_lite as sl
from selective_lite.kernels import native
from selective_lite.lab import load_classifier, load_task, results

MAIN = {
    "model": "minilm",
    "batch": 32,
    "tokens": 32,
    "budget": 0.005,
    "selection": "uniform",
    "dtype": "float32",
    "allocator": "keeps",
    "rank": 8,
    "warmup": 2,
    "rounds": 12,
    "take": 1,
}
LAYER = {"model": "llama layer", "batch": 4, "tokens": 128, "rounds": 5}  # 2,048 by 5,632
CONFIGS = [
    *({**MAIN, "budget": budget} for budget in (0.0002, 0.005, 0.05)),
    *(
        {**MAIN, "budget": budget, "selection": "FISH", "rounds": 7}
        for budget in (0.0002, 0.005, 0.05)
    ),
    {**MAIN, "allocator": "returns", "rounds": 7},
    {**MAIN, "dtype": "bfloat16", "rounds": 4},
    {**MAIN, **LAYER},
]
AGAIN = [{**config, "take": 2} for config in CONFIGS[:3]]
ROOTS = [
    "ship/tuning.py:masked",
    "methods/controls.py:random",
    "methods/fish.py:fish",
    "params.py:head_weights",
    "memory.py:ledger",
]


def base_of(config: Mapping[str, Any]) -> nn.Module:
    """The model that every way gets a copy of."""
    if config["model"] == "llama layer":
        shape = LlamaConfig(
            vocab_size=1000,
            hidden_size=2048,
            intermediate_size=5632,
            num_hidden_layers=1,
            num_attention_heads=16,
        )
        model: Any = LlamaForCausalLM(shape)
    else:
        model, _ = load_classifier(config["model"])
    return model.to(getattr(torch, config["dtype"])).train()


def selection_of(config: Mapping[str, Any], model: nn.Module) -> sl.Selection:
    """Uniform over all weights, or concentrated, as FISH's is."""
    if config["selection"] == "uniform":
        return sl.random(model, config["budget"], seed=0)
    _, tokenizer = load_classifier(config["model"])
    return sl.fish(
        model, load_task("movies", tokenizer).train.batches(32), config["budget"], samples=64
    )


def batch_of(config: Mapping[str, Any], model: Any) -> dict[str, torch.Tensor]:
    """Random tokens, all of them there."""
    draw = torch.Generator().manual_seed(0)
    shape = (config["batch"], config["tokens"])
    ids = torch.randint(100, model.config.vocab_size, shape, generator=draw)
    labels = (
        ids if config["model"] == "llama layer" else torch.randint(0, 2, shape[:1], generator=draw)
    )
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return {name: tensor.to(model.device) for name, tensor in batch.items()}


def absent() -> None:
    """In place of `native.library`: there is none."""


def products_of(way: str) -> AbstractContextManager:
    """A block in which the way that shows torch's operations has no C source."""
    return mock.patch.object(native, "library", absent) if way == OURS_IN_TORCH else nullcontext()


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


def measure(config: Mapping[str, Any]) -> results.Row:
    """Median seconds and bytes of every way, and ours over each: the median of paired rounds."""
    torch.manual_seed(0)
    base = base_of(config)
    selection, batch = selection_of(config, base), batch_of(config, base)
    ways = {way: trained(way, copy.deepcopy(base), selection, rank=config["rank"]) for way in WAYS}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    names = list(ways)
    for number in range(config["warmup"] + config["rounds"]):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            with products_of(name):
                taken = step(*ways[name], batch)
            if number >= config["warmup"]:
                seconds[name].append(taken)
    forward, whole = (
        {name: [pair[part] for pair in pairs] for name, pairs in seconds.items()} for part in (0, 1)
    )

    def over(way: str, other: str) -> float:
        paired = zip(whole[way], whole[other], strict=True)
        return round(statistics.median(a / b for a, b in paired), 3)

    return {
        "forward_seconds": {n: round(statistics.median(s), 4) for n, s in forward.items()},
        "median_seconds": {n: round(statistics.median(s), 4) for n, s in whole.items()},
        "ours_over": {name: over(OURS, name) for name in ways},
        "in_torch_over": {name: over(OURS_IN_TORCH, name) for name in ways},
        "over_full": {name: over(name, "full AdamW") for name in ways},
        "bytes": {name: held(model, optimizer, batch) for name, (model, optimizer) in ways.items()},
        "trainable": {
            name: sum(p.numel() for p in model.parameters() if p.requires_grad)
            for name, (model, _) in ways.items()
        },
    }


def run(config: Mapping[str, Any]) -> results.Row:
    """The same in a fresh process, with glibc set to keep or to return what is freed."""
    allocator = KEEPS if config["allocator"] == "keeps" else RETURNS
    return fresh(measure, config, threads=torch.get_num_threads(), allocator=allocator)


if __name__ == "__main__":
    for row in results.run_missing("masked_step", [*CONFIGS, *AGAIN], run, lambda config: ROOTS):
        config = row["config"]
        told = ("model", "selection", "dtype", "allocator", "take")
        print(f"{config['budget']:.2%}, {', '.join(str(config[key]) for key in told)}")
        print(f"{'':24} {'seconds':>8} {'ours / it':>9} {'in torch':>9} {'it / full':>9}")
        for way, seconds in row["median_seconds"].items():
            ratios = (row[key][way] for key in ("ours_over", "in_torch_over", "over_full"))
            print(f"{way:24} {seconds:8.4f} " + " ".join(f"{ratio:9.3f}" for ratio in ratios))
