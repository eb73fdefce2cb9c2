"""Benchmark: selecting from up to 10^9 scores: seconds, and peak memory beside the scores.

The scores are made tensor by tensor.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

import torch
from processes import fresh, peak, resident
from torch import Tensor

import selective_lite as sl
from selective_lite.lab import results

CONFIGS = [
    {"scores": size, "tensors": 25, "budget": budget, "seed": 0}
    for size in (10**7, 10**8, 10**9)
    for budget in (0.005, 0.0002)
]
ROOTS = ["selection.py:select"]


class Drawn(Mapping[str, Tensor]):
    """Squares of normal numbers, like those of gradients, in equal tensors.

    A tensor is drawn each time it is asked for.
    """

    def __init__(self, scores: int, tensors: int, seed: int) -> None:
        self.size, self.seed = scores // tensors, seed
        self.names = [f"layer.{i}" for i in range(tensors)]
        self.made, self.seconds = 0, 0.0

    def __getitem__(self, name: str) -> Tensor:
        start = time.perf_counter()
        generator = torch.Generator().manual_seed(self.seed * len(self) + self.names.index(name))
        score = torch.randn(self.size, generator=generator).square_()
        self.made, self.seconds = self.made + 1, self.seconds + time.perf_counter() - start
        return score

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def measure(config: Mapping[str, Any]) -> results.Row:
    """Select once: seconds with and without making scores, and bytes beside what must be held.

    What must be held is the result and one tensor of scores.
    """
    # the first call brings code into memory
    sl.select(Drawn(10**5, 2, config["seed"]), config["budget"])
    scores = Drawn(config["scores"], config["tensors"], config["seed"])
    before, start = resident(), time.perf_counter()
    selection = sl.select(scores, config["budget"])
    seconds = time.perf_counter() - start
    held = {"one tensor": 4 * scores.size, "result": 8 * selection.count}
    extra = peak() - before - sum(held.values())
    total = sum(prod(shape) for shape in selection.shapes.values())
    return {
        "selected": selection.count,
        "seconds_selecting": round(seconds - scores.seconds, 2),
        "seconds_making": round(scores.seconds, 2),
        "passes": scores.made / len(scores),
        "bytes": {"scores": 4 * total, **held, "extra": extra},
        "extra_over_scores": round(extra / (4 * total), 4),
    }


def run(config: Mapping[str, Any]) -> results.Row:
    """The same in a fresh process."""
    return fresh(measure, config)


if __name__ == "__main__":
    rows = results.run_missing("selecting", CONFIGS, run, lambda config: ROOTS)
    print(
        f"{'scores':>13} {'budget':>7} {'selected':>9} {'selecting':>10} {'making':>8}"
        f" {'extra MB':>8} {'of scores':>9}"
    )
    for row in rows:
        print(
            f"{row['config']['scores']:13,} {row['config']['budget']:7.2%} {row['selected']:9,}"
            f" {row['seconds_selecting']:8.2f} s {row['seconds_making']:6.2f} s"
            f" {row['bytes']['extra'] / 1e6:8.1f}"
            f" {row['extra_over_scores']:9.2%}"
        )
