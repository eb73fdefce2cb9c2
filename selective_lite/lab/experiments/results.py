"""Rows: long runs kept in `results/`, each with the code that made it, and differences of rows."""

from __future__ import annotations

import base64
import importlib.resources
import inspect
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .provenance import PACKAGE, code_hash

Row = dict[str, Any]
Roots = Sequence[str]
Known = dict[tuple[str, ...], str]
# provenance: apart
CHECKOUT = PACKAGE.parent / "results"
FIRST = "first"  # the edition of rows that a later protocol makes anew


# provenance: apart, reads results
def find(file: str) -> Path | None:
    """Path of a file in `results/`: in the checkout, else in the installed package, else None."""
    packaged = Path(str(importlib.resources.files("selective_lite") / "rows"))
    return next(
        (folder / file for folder in (CHECKOUT, packaged) if (folder / file).is_file()), None
    )


# provenance: apart, reads results
def read(name: str) -> list[Row]:
    """Rows of ``results/<name>.json``, from the checkout or the installed package; [] if none."""
    file = find(f"{name}.json")
    return json.loads(file.read_text()) if file else []


def place(definition: Callable[..., Any]) -> str:
    """Where a top-level function or class is defined, as `code_hash` takes it: ``"file.py:name"``.

    The file is relative to the package. A module that runs as a script is found too.
    """
    file = Path(inspect.getsourcefile(definition) or "").resolve()
    return f"{file.relative_to(PACKAGE).as_posix()}:{definition.__qualname__}"


def today(row: Row, roots: Callable[[Row], Roots], known: Known | None = None) -> str:
    """Hash of the code that would make a row today; empty if that code is not there any more.

    Parameters
    ----------
    row
        The row.
    roots
        Function ``row -> definitions`` that it follows from.
    known
        Hashes that were found so far, by definitions; new ones are added.
    """
    known = {} if known is None else known
    try:
        wanted = tuple(roots(row))
        if wanted not in known:
            known[wanted] = code_hash(wanted)
        return known[wanted]
    except (KeyError, OSError, ValueError):
        return ""


def changed(rows: Iterable[Row], roots: Callable[[Row], Roots]) -> list[Row]:
    """The rows whose code has changed since they were made."""
    known: Known = {}
    return [row for row in rows if row["library"] != today(row, roots, known)]


def stale(rows: Iterable[Row], roots: Callable[[Row], Roots]) -> list[Row]:
    """The rows whose code has changed, except those of the first edition, which say so instead."""
    return changed((row for row in rows if row.get("edition") != FIRST), roots)


def run_missing(
    name: str,
    configs: Iterable[Mapping[str, Any]],
    run: Callable[[Mapping[str, Any]], Row],
    roots: Callable[[Mapping[str, Any]], Roots],
    *,
    workers: int = 1,
    late: Callable[[Mapping[str, Any]], bool] = lambda config: False,
    study: str | None = None,
) -> list[Row]:
    """Run every config without a current row, and write each row as soon as it is made.

    A killed run loses only the rows it was making. Rows of other configs, or made by code that has
    changed, are replaced at the end; rows of the first edition stay.

    Parameters
    ----------
    name
        Name of the file, ``results/<name>.json``.
    configs
        JSON-able mappings; a config identifies its row.
    run
        Function ``config -> result``, a JSON-able dict.
    roots
        Function ``config -> definitions`` that the result follows from, as `code_hash` takes them.
    workers
        Number of configs that run at the same time, each in a process of one thread: faster than
        one process with all threads, and a row does not depend on the number of cores. 1 runs them
        in this process, with the threads that are set.
    late
        Function ``config -> bool``: whether its run reads other rows, and so starts after them.
    study
        Name of the `Study` that makes these rows, if one does.

    Returns
    -------
    list of dict
        One row for each config, in their order: ``config``, the result's own keys, ``seconds``,
        ``device``, ``threads``, ``versions``, ``roots``, and ``library``, the hash of these.
    """
    wanted = [json.loads(json.dumps(dict(config))) for config in configs]
    old = [row for row in read(name) if row["config"] in wanted]
    outdated = stale(old, lambda row: roots(row["config"]))
    rows = [row for row in old if row not in outdated]
    # Hashed before the runs: a file edited meanwhile is not the code that is loaded.
    stamps = [
        {
            **({"study": study} if study else {}),
            "roots": list(roots(config)),
            "library": code_hash(roots(config)),
        }
        for config in wanted
    ]
    missing = [config for config in wanted if all(row["config"] != config for row in rows)]
    for turn in (False, True):
        for row in run_parallel(run, [c for c in missing if late(c) is turn], workers):
            rows.append({**row, **stamps[wanted.index(row["config"])]})
            write(name, rows)
            brief = f"{_brief(row['config'])} {_brief(row)}"
            print(f"{name} {len(rows)}/{len(wanted)}: {brief}", file=sys.stderr, flush=True)
    rows.sort(key=lambda row: wanted.index(row["config"]))
    write(name, rows)
    hours = sum(row["seconds"] for row in rows) / 3600
    said = f"{name}: {len(rows)} rows, {hours:.2f} hours of runs, {workers} at a time"
    print(said, file=sys.stderr, flush=True)
    return rows


def run_parallel(
    run: Callable[[Mapping[str, Any]], Row], configs: list[Row], workers: int
) -> Iterator[Row]:
    """The rows of these configs, in the order in which they finish."""
    if workers == 1:
        yield from (run_one(run, config) for config in configs)
        return
    yield from in_processes(partial(run_one, run), configs, workers)


def in_processes(
    call: Callable[[Any], Any], arguments: Iterable[Any], workers: int
) -> Iterator[Any]:
    """Results of a picklable function, one for each argument, from processes of one thread."""
    pool = ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,))
    try:
        jobs = [pool.submit(call, argument) for argument in arguments]
        yield from (job.result() for job in as_completed(jobs))
    finally:
        pool.shutdown(cancel_futures=True)


def run_one(run: Callable[[Mapping[str, Any]], Row], config: Row) -> Row:
    """One row: a config, its result, and the circumstances."""
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
    """Replace ``results/<name>.json``, completely or not at all."""
    CHECKOUT.mkdir(exist_ok=True)
    scratch = CHECKOUT / f".{name}.json"
    scratch.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    os.replace(scratch, CHECKOUT / f"{name}.json")


def pack(correct: torch.Tensor) -> str:
    """A boolean vector as text, one bit for each example."""
    return base64.b64encode(np.packbits(correct.numpy()).tobytes()).decode()


def unpack(text: str, count: int) -> np.ndarray:
    """The boolean vector of length `count` that `pack` wrote."""
    return np.unpackbits(np.frombuffer(base64.b64decode(text), dtype=np.uint8), count=count).astype(
        bool
    )


def rows_of(rows: Iterable[Row], method: str, budget: float | str) -> list[Row]:
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
    ours: Iterable[Any],
    theirs: Iterable[Any],
    *,
    weight: Sequence[float] | None = None,
    draws: int = 2000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Mean difference between paired runs, ours minus theirs, and its bootstrap 95 % interval.

    Both sources of chance are resampled: the seeds (pairs of runs) and, within them, the test
    examples, which all runs share.

    Parameters
    ----------
    ours, theirs
        Numbers or booleans for each example, one vector for each seed, in the same order of seeds
        and examples.
    weight
        Weight of each example: sums of differences are divided by sums of weights, not by numbers
        of examples. With bits and numbers of tokens this gives bits per token.
    draws, seed
        Number of resamples, and seed of their generator.

    Returns
    -------
    tuple
        ``(difference, low, high)``.

    Raises
    ------
    ValueError
        If there is no pair, or shapes do not match.

    Examples
    --------
    >>> paired_difference([[True, True]], [[False, False]])
    (1.0, 1.0, 1.0)
    """
    a, b = (_table(runs) for runs in (ours, theirs))
    w = np.ones(a.shape[-1]) if weight is None else np.asarray(weight, float)
    if a.ndim != 2 or not a.size or a.shape != b.shape or a.shape[1:] != w.shape:
        raise ValueError(
            f"ours is {a.shape}, theirs {b.shape}, weight {w.shape}; "
            "give (seeds, examples) twice, and one weight for each example"
        )
    difference = a - b
    seeds, examples = difference.shape
    generator = np.random.default_rng(seed)
    # Equal examples are interchangeable, so only the number of times each pattern is drawn counts.
    patterns, counts = np.unique(np.vstack([difference, w]), axis=1, return_counts=True)
    runs = generator.integers(seeds, size=(draws, seeds))
    drawn = generator.multinomial(examples, counts / examples, size=draws)
    sums = (patterns[:-1][runs].mean(1) * drawn).sum(1)
    low, high = np.quantile(sums / (patterns[-1] * drawn).sum(1), [0.025, 0.975])
    mean = difference.mean() if weight is None else difference.mean(0).sum() / w.sum()
    return float(mean), float(low), float(high)


def _table(runs: Iterable[Any]) -> np.ndarray:
    """Runs as float64 (seeds, examples); (0,) if there are none or their lengths differ."""
    rows = [np.asarray(run, float) for run in runs]
    return np.stack(rows) if len({row.shape for row in rows}) == 1 else np.empty(0)


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
