"""Benchmark: deltas of 0.5 % of a BERT of MiniLM's size, and of one step of MiniLM in bfloat16."""

from __future__ import annotations

import copy
import importlib.util
import lzma
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

import selective_lite as sl
from selective_lite.lab import results
from selective_lite.lab.data.sentiment import load_task
from selective_lite.lab.models import load_classifier
from selective_lite.ship.file import Encoding, raw

SIZES = {
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
}
CONFIG = {"sizes": SIZES, "budget": 0.005, "warmup": 3, "rounds": 25}
ROOTS = [
    "ship/delta.py:Delta",
    "ship/diff.py:diff",
    "ship/delta.py:load",
    "selection.py:select",
    "methods/controls.py:random_scores",
]
HALF = {"model": "minilm", "task": "movies", "batch_size": 32, "rate": 3e-6}
HALF_ROOTS = [*ROOTS[:3], "lab/data/sentiment.py:load_task", "lab/models.py:load_classifier"]
ENCODINGS: tuple[Encoding, ...] = ("flat", "gap-lzma")


def deltas(base: nn.Module, budget: float) -> list[sl.Delta]:
    """Two tasks: other random weights of the same model moved, and other heads."""
    found = []
    for seed in (0, 1):
        tuned, selection = copy.deepcopy(base), sl.select(sl.random_scores(base, seed), budget)
        with torch.no_grad():
            for name, where in selection.indices.items():
                tuned.get_parameter(name).view(-1)[where.long()] += 0.01
            for p in sl.head_weights(tuned).values():
                p.add_(0.01)
        found.append(sl.diff(base, tuned, method="random"))
    return found


def entropy_bound(total: int, k: int) -> float:
    """Bytes that any code of k positions of `total` needs on average: log2 (total choose k) / 8."""
    return (
        (math.lgamma(total + 1) - math.lgamma(k + 1) - math.lgamma(total - k + 1)) / math.log(2) / 8
    )


def timed(seconds: dict[str, list[float]], name: str, call: Callable[[], Any]) -> Any:
    """What the call gives; its seconds are kept under the name."""
    start = time.perf_counter()
    given = call()
    seconds.setdefault(name, []).append(time.perf_counter() - start)
    return given


def run(config: Mapping[str, Any]) -> results.Row:
    """Bytes of both encodings over the bound, and median seconds of every verb."""
    torch.manual_seed(0)
    base = BertForSequenceClassification(BertConfig(**config["sizes"])).eval()
    state = copy.deepcopy(base.state_dict())
    one, other = deltas(base, config["budget"])
    k = sum(len(values) for values in one.values.values())
    bound, values = entropy_bound(one.metadata["total"], k), 4 * k
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        paths = {encoding: Path(folder) / encoding for encoding in ENCODINGS}
        for _ in range(config["warmup"] + config["rounds"]):
            for encoding, path in paths.items():
                timed(seconds, f"save {encoding}", partial(one.save, path, encoding))
                timed(seconds, f"load {encoding}", partial(sl.load, path))
            applied = timed(seconds, "apply", partial(one.apply, base))
            applied = timed(seconds, "switch", partial(applied.switch, other))
            timed(seconds, "revert", applied.revert)
            timed(seconds, "load all weights", partial(base.load_state_dict, state))
        sizes = {encoding: path.stat().st_size for encoding, path in paths.items()}
    return {
        "k": k,
        "total": one.metadata["total"],
        "entropy_bound": round(bound),
        "bytes": sizes,
        "over_bound": {
            encoding: round(size / (bound + values), 4) for encoding, size in sizes.items()
        },
        "median_seconds": {
            name: round(statistics.median(taken[config["warmup"] :]), 5)
            for name, taken in seconds.items()
        },
    }


def run_half(config: Mapping[str, Any]) -> results.Row:
    """Bytes of one step of AdamW on float32 weights, as bfloat16 before and after; no clock runs.

    Beside ours are those of the exclusive or of all bits, compressed: what needs no positions.
    """
    tuned, tokenizer = load_classifier(config["model"])
    tuned = tuned.cpu()
    base = copy.deepcopy(tuned).bfloat16()
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=config["rate"])
    task = load_task(config["task"], tokenizer)
    tuned(**next(iter(task.train.batches(config["batch_size"])))).loss.backward()
    optimizer.step()
    delta = sl.diff(base, tuned.bfloat16(), method="one step")
    before = b"".join(raw(p) for p in base.parameters())
    after = b"".join(raw(p) for p in tuned.parameters())
    xor = (np.frombuffer(before, np.uint8) ^ np.frombuffer(after, np.uint8)).tobytes()
    sizes = {"xor, LZMA": len(lzma.compress(xor))}
    if importlib.util.find_spec("zstandard"):
        zstandard = importlib.import_module("zstandard")
        sizes["xor, zstd"] = len(zstandard.ZstdCompressor(level=19).compress(xor))
    with tempfile.TemporaryDirectory() as folder:
        for encoding in ENCODINGS:
            delta.save(path := Path(folder) / encoding, encoding)
            sizes[encoding] = path.stat().st_size
        with sl.load(path).apply(base):
            assert b"".join(raw(p) for p in base.parameters()) == after
    k, total = delta.count, delta.metadata["total"]
    return {
        "k": k,
        "total": total,
        "entropy_bound": round(entropy_bound(total, k)),
        "directions": round(k / 8),
        "bytes": sizes,
    }


if __name__ == "__main__":
    row = results.run_missing("delta", [CONFIG], run, lambda config: ROOTS)[0]
    print(f"{row['k']:,} of {row['total']:,} weights")
    print(f"entropy of their positions: {row['entropy_bound']:,} bytes")
    for encoding in ENCODINGS:
        share = f"{row['over_bound'][encoding]:7.3f} x (entropy + values)"
        print(f"{encoding:16} {row['bytes'][encoding]:9,} bytes {share}")
    for verb, median_seconds in row["median_seconds"].items():
        print(f"{verb:16} {1000 * median_seconds:9.1f} ms")
    half = results.run_missing("delta_half", [HALF], run_half, lambda config: HALF_ROOTS)[0]
    share = half["k"] / half["total"]
    print(f"one step in bfloat16: {half['k']:,} of {half['total']:,} weights, {share:.2%}")
    print(f"entropy of their positions: {half['entropy_bound']:,} bytes")
    for encoding, size in half["bytes"].items():
        print(f"{encoding:16} {size:9,} bytes")
