"""Benchmark: squared gradients of samples: in passes, one by one, and by vmap of dense gradients.

The three take turns in one process; what each holds at most is measured in a process of its own.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any
from unittest import mock

import torch
from processes import KEEPS, forget_peak, fresh, peak, resident, settle
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import selective_lite as sl
from selective_lite.kernels import per_sample
from selective_lite.lab import load_classifier, load_language_model, results

OURS, LOOP, DENSE = "selective_lite", "one by one", "torch.func.vmap"
WAYS = (OURS, LOOP, DENSE)
MINILM = {"model": "minilm", "samples": 256, "batch": 32, "tokens": 32, "chunk": 8, "rounds": 3}
SMOLLM2 = {"model": "smollm2", "samples": 32, "batch": 8, "tokens": 64, "chunk": 2, "rounds": 3}
CONFIGS = [MINILM, SMOLLM2]
ROOTS = ["scores.py:squared_gradient"]


def job(config: Mapping[str, Any]) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """The model, and batches of random texts without padding, which a plain vmap could not read."""
    torch.manual_seed(0)
    language = config["model"] == "smollm2"
    model, _ = (load_language_model if language else load_classifier)(config["model"])
    place = next(model.parameters()).device
    ids = torch.randint(1000, 20000, (config["samples"], config["tokens"]), device=place)
    labels = ids if language else torch.arange(len(ids), device=place) % 2
    size = config["batch"]
    pairs = zip(ids.split(size), labels.split(size), strict=True)
    return model.eval(), [{"input_ids": texts, "labels": own} for texts, own in pairs]


def dense(model: nn.Module, batches: list[dict[str, Tensor]], chunk: int) -> dict[str, Tensor]:
    """The same scores by per-sample gradients of whole tensors, `chunk` samples at a time."""
    weights = {name: p.detach() for name, p in sl.weights(model).items()}
    sums = {name: torch.zeros_like(p) for name, p in weights.items()}

    def loss(weights: dict[str, Tensor], sample: dict[str, Tensor]) -> Tensor:
        one = {key: value.unsqueeze(0) for key, value in sample.items()}
        return functional_call(model, weights, kwargs=one, tie_weights=True).loss

    for batch in batches:
        for first in range(0, len(batch["labels"]), chunk):
            part = {key: value[first : first + chunk] for key, value in batch.items()}
            for name, found in vmap(grad(loss), in_dims=(None, 0))(weights, part).items():
                sums[name] += found.detach().square_().sum(0)
    return sums


def scores(way: str, model: nn.Module, batches: list[dict[str, Tensor]], chunk: int) -> Any:
    """The scores by one of `WAYS`."""
    if way == DENSE:
        return dense(model, batches, chunk)
    if way == OURS:
        return sl.squared_gradient(model, batches)
    with mock.patch.object(per_sample.Samples, "_agrees", return_value=False):
        return sl.squared_gradient(model, batches)


def timed(config: Mapping[str, Any]) -> results.Row:
    """Seconds of every way, the ratios of paired rounds, and how far the scores are apart."""
    model, batches = job(config)
    for way in WAYS:
        scores(way, model, batches[:1], config["chunk"])
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    found: dict[str, Any] = {}
    for _ in range(config["rounds"]):
        for way in WAYS:
            start = time.perf_counter()
            found[way] = scores(way, model, batches, config["chunk"])
            seconds[way].append(time.perf_counter() - start)
    largest = max(float(score.max()) for score in found[LOOP].values())
    return {
        "median_seconds": {way: round(statistics.median(took), 3) for way, took in seconds.items()},
        "over_ours": {
            way: round(
                statistics.median(a / b for a, b in zip(seconds[way], seconds[OURS], strict=True)),
                3,
            )
            for way in WAYS[1:]
        },
        "apart": {
            way: max(
                float((found[way][name] - score).abs().max()) / largest
                for name, score in found[LOOP].items()
            )
            for way in (OURS, DENSE)
        },
    }


def held(argument: tuple[Mapping[str, Any], str]) -> int:
    """The most bytes over the loaded model while two batches are scored."""
    config, way = argument
    model, batches = job(config)
    settle()
    loaded = resident()
    forget_peak()
    scores(way, model, batches[:2], config["chunk"])
    return peak() - loaded


def run(config: Mapping[str, Any]) -> results.Row:
    """The row of a config."""
    threads = torch.get_num_threads()
    row = fresh(timed, config, threads=threads, allocator=KEEPS)
    return {**row, "bytes": {way: fresh(held, (config, way), threads=threads) for way in WAYS}}


if __name__ == "__main__":
    rows = results.run_missing("scoring", CONFIGS, run, lambda config: ROOTS)
    print(f"on {rows[0]['device']}")
    print(f"{'':10} {'':18} {'seconds':>9} {'over ours':>10} {'peak MiB':>9} {'apart':>9}")
    for row in rows:
        for way in WAYS:
            print(
                f"{row['config']['model']:10} {way:18} {row['median_seconds'][way]:9.2f}"
                f" {row['over_ours'].get(way, 1):10.2f} {row['bytes'][way] / 2**20:9.0f}"
                f" {row['apart'].get(way, 0):9.1e}"
            )
