"""Benchmark: what it costs to choose a mask of MiniLM: seconds, and peak memory over the model.

The task and the methods are those of the reviews; a method that trains first is measured until it
has its mask. Each is measured in a fresh process.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from processes import KEEPS, forget_peak, fresh, peak, resident, settle

from selective_lite.lab import results
from selective_lite.lab.experiments import reviews
from selective_lite.lab.experiments.run import train

METHODS = ("random", "sara", "magnitude", "child_tuning_d", "fish", "lt_sft", "unstructured")
CONFIGS = [
    {"method": method, "budget": 0.005, "seed": 0, "task": "movies", **reviews.DATA}
    for method in METHODS
]
RATE = 1e-3  # of the phase that is not run


def chosen(config: Mapping[str, Any]) -> results.Row:
    """Choose the mask: seconds, and the most bytes over the loaded model."""
    model, data = reviews.start(config)
    settle()
    loaded = resident()
    forget_peak()
    start = time.perf_counter()
    method = iter(reviews.RECIPES[config["method"]](model, data, config, RATE))
    phase = next(method)
    if phase.selection is None:
        train(model, data.train, config, [phase])
        phase = next(method)
    found = phase.selection
    assert found is not None
    took = time.perf_counter() - start
    return {"took": round(took, 3), "bytes": peak() - loaded, "selected": found.count}


def run(config: Mapping[str, Any]) -> results.Row:
    """The row of a config: seconds with memory that is kept, bytes with memory given back."""
    threads = torch.get_num_threads()
    fast = fresh(chosen, config, threads=threads, allocator=KEEPS)
    return {**fast, "bytes": fresh(chosen, config, threads=threads)["bytes"]}


def roots(config: Mapping[str, Any]) -> list[str]:
    """Definitions that a row follows from."""
    return [results.place(reviews.RECIPES[config["method"]]), results.place(reviews.start)]


if __name__ == "__main__":
    rows = results.run_missing("choosing", CONFIGS, run, roots)
    print(f"on {rows[0]['device']}")
    for row in rows:
        mib = row["bytes"] / 2**20
        print(f"{row['config']['method']:16} {row['took']:8.2f} s {mib:8.0f} MiB")
