"""Results: long runs kept as rows, each with what made it, so that a stale row can be told from a current one."""

from __future__ import annotations

import base64
import importlib.resources
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .provenance import code_hash

Row = dict[str, Any]
CHECKOUT = Path(__file__).resolve().parents[3] / "results"


def find(file: str) -> Path | None:
    """A file of ``results/``, from the checkout or from the installed package; None if there is none."""
    packaged = Path(str(importlib.resources.files("selective_lite") / "rows"))
    return next(
        (folder / file for folder in (CHECKOUT, packaged) if (folder / file).is_file()), None
    )


def read(name: str) -> list[Row]:
    """The rows of ``results/<name>.json``, from the checkout or from the installed package; [] if there are none."""
    file = find(f"{name}.json")
    return json.loads(file.read_text()) if file else []


def stale(rows: Iterable[Row]) -> list[Row]:
    """The rows that other code than today's has made."""
    return [row for row in rows if row["library"] != code_hash(row["roots"])]


def run_missing(
    name: str,
    configs: Iterable[Mapping[str, Any]],
    run: Callable[[Mapping[str, Any]], Row],
    roots: Callable[[Mapping[str, Any]], list[str]],
    *,
    workers: int = 1,
    late: Callable[[Mapping[str, Any]], bool] = lambda config: False,
) -> list[Row]:
    """Run every config that has no current row, and keep each row as soon as it is there.

    A killed run costs the rows it was at. Rows of other configs, or of other code, are replaced at
    the end.

    Parameters
    ----------
    name
        Of the file ``results/<name>.json``.
    configs
        JSON-able mappings; a config is the identity of its row.
    run
        ``config -> result``, a JSON-able dict.
    roots
        ``config -> definitions`` that its result follows from, as `code_hash` takes them.
    workers
        So many configs run side by side, each in a process of one thread: faster than one with all
        threads, and a row does not depend on how many cores there were. 1 runs them here, with the
        threads that are set.
    late
        Whether a config's run reads rows of others; it starts when all others are there.

    Returns
    -------
    list of dict
        One row a config: ``config``, the result's own keys, ``seconds``, ``device``, ``threads``,
        ``versions``, ``roots``, and ``library``, the hash of these.
    """
    wanted = [json.loads(json.dumps(dict(config))) for config in configs]
    old = [row for row in read(name) if row["config"] in wanted]
    outdated = stale(old)
    rows = [row for row in old if row not in outdated]
    stamps = [
        {"roots": roots(config), "library": code_hash(roots(config))} for config in wanted
    ]  # the code loaded now
    missing = [config for config in wanted if all(row["config"] != config for row in rows)]
    for turn in (False, True):
        for row in _made(run, [config for config in missing if late(config) is turn], workers):
            rows.append({**row, **stamps[wanted.index(row["config"])]})
            write(name, rows)
            brief = f"{_brief(row['config'])} {_brief(row)}"
            print(f"{name} {len(rows)}/{len(wanted)}: {brief}", file=sys.stderr, flush=True)
    rows.sort(key=lambda row: wanted.index(row["config"]))
    write(name, rows)
    hours = sum(row["seconds"] for row in rows) / 3600
    print(
        f"{name}: {len(rows)} rows, {hours:.2f} hours of runs, {workers} at a time",
        file=sys.stderr,
        flush=True,
    )
    return rows


def _made(
    run: Callable[[Mapping[str, Any]], Row], configs: list[Row], workers: int
) -> Iterator[Row]:
    """The rows of these configs, as they come."""
    if workers == 1:
        yield from (_row(run, config) for config in configs)
        return
    pool = ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,))
    try:
        yield from (
            job.result()
            for job in as_completed([pool.submit(_row, run, config) for config in configs])
        )
    finally:
        pool.shutdown(cancel_futures=True)


def _row(run: Callable[[Mapping[str, Any]], Row], config: Row) -> Row:
    start = time.perf_counter()
    result = run(config)
    return {
        "config": config,
        **result,
        "seconds": round(time.perf_counter() - start, 1),
        "device": _device(),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }


def write(name: str, rows: list[Row]) -> None:
    """Replace ``results/<name>.json``, complete or not at all."""
    CHECKOUT.mkdir(exist_ok=True)
    scratch = CHECKOUT / f".{name}.json"
    scratch.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    os.replace(scratch, CHECKOUT / f"{name}.json")


def pack(correct: torch.Tensor) -> str:
    """A boolean vector as text, one bit an example."""
    return base64.b64encode(np.packbits(correct.numpy()).tobytes()).decode()


def unpack(text: str, count: int) -> np.ndarray:
    """The boolean vector of length `count` that `pack` wrote."""
    return np.unpackbits(np.frombuffer(base64.b64decode(text), dtype=np.uint8), count=count).astype(
        bool
    )


def of(rows: Iterable[Row], method: str, budget: float | str) -> list[Row]:
    """The rows of a method at a budget, by seed."""
    found = [
        row
        for row in rows
        if (row["config"]["method"], row["config"]["budget"]) == (method, budget)
    ]
    return sorted(found, key=lambda row: row["config"]["seed"])


def compare(ours: Iterable[Row], theirs: Iterable[Row]) -> tuple[float, float, float]:
    """Mean difference in accuracy over the seeds that both have, and its 95 % interval, in points.

    Raises
    ------
    ValueError
        If they have no seed in common.
    """
    correct = [
        {row["config"]["seed"]: unpack(row["correct"], row["tested"]) for row in rows}
        for rows in (ours, theirs)
    ]
    common = sorted(correct[0].keys() & correct[1].keys())
    if not common:
        raise ValueError(
            f"ours has seeds {sorted(correct[0])}, theirs {sorted(correct[1])}: none in common"
        )
    difference, low, high = paired_difference(
        *([found[seed] for seed in common] for found in correct)
    )
    return 100 * difference, 100 * low, 100 * high


def paired_difference(
    ours: Iterable[np.ndarray], theirs: Iterable[np.ndarray], *, draws: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """Mean difference in accuracy between paired runs, and its bootstrap 95 % interval.

    Both sources of chance are resampled: the seeds (pairs of runs) and, inside, the test examples
    that all share.

    Parameters
    ----------
    ours, theirs
        Per-example correctness, one boolean vector a seed, in the same order of seeds and examples.

    Returns
    -------
    tuple
        ``(difference, low, high)``, as fractions of one.
    """
    difference = np.stack(
        [a.astype(float) - b.astype(float) for a, b in zip(ours, theirs, strict=True)]
    )
    seeds, examples = difference.shape
    generator = np.random.default_rng(seed)
    # Examples with the same differences are interchangeable, so only how often each pattern is
    # drawn counts.
    patterns, counts = np.unique(difference, axis=1, return_counts=True)
    runs = generator.integers(seeds, size=(draws, seeds))
    drawn = generator.multinomial(examples, counts / examples, size=draws)
    means = (patterns[runs].mean(1) * drawn).sum(1) / examples
    low, high = np.quantile(means, [0.025, 0.975])
    return float(difference.mean()), float(low), float(high)


def _device() -> str:
    return (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"cpu, {os.cpu_count()} cores"
    )


def _brief(mapping: Mapping[str, Any]) -> str:
    return " ".join(
        f"{key}={value}"
        for key, value in mapping.items()
        if isinstance(value, (int, float, str)) and len(str(value)) < 30
    )
