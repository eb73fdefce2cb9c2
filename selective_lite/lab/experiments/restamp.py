"""Restamp: rows whose code has changed are current again if their first losses come out the same.

``python -m selective_lite.lab.experiments.restamp`` (``make restamp``) replays the first steps of
every such row as it was made: same config, same number of threads, on the CPU if it was made there.
Losses that agree bit for bit vouch for the row, which gets the hash of today's code; others are
listed. A row without losses is vouched for by a run of the same study and cell that agrees. Rows
are written one by one, so that a restamp that was stopped goes on where it was. Names of files
limit it to these, ``--only fish random`` to the rows of these methods.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Collection, Iterable
from datetime import date
from typing import NamedTuple

import torch

from . import results, studies
from .results import Row
from .run import device_of, losses

CELL = ("method", "budget", "seed", "task")
WORKERS = 2


class Replay(NamedTuple):
    """What a row's first steps give now."""

    config: Row
    losses: list[float]
    error: str
    seconds: float


def replay(row: Row) -> Replay:
    """Repeat the first steps of a row; an error is kept as text, to go on with the others."""
    start = time.perf_counter()
    found: list[float] = []
    error = ""
    torch.set_num_threads(row["threads"])
    try:
        with device_of(row):
            found = losses(studies.STUDIES[row["study"]], row["config"], len(row["first_losses"]))
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}"
    return Replay(row["config"], found, error, time.perf_counter() - start)


def stamp(row: Row) -> None:
    """Put today's hash on a row; the old one and the date are kept."""
    old = [row["library"], date.today().isoformat()]
    row["restamped"] = [*row.get("restamped", []), old]
    row["roots"] = list(studies.roots_of(row))
    row["library"] = studies.today(row)


def verdict(row: Row, found: Replay) -> str:
    """Empty if a replay agrees bit for bit, else the first difference."""
    if found.error:
        return found.error
    if len(found.losses) != len(row["first_losses"]):
        return f"has {len(found.losses)} losses, not {len(row['first_losses'])}"
    for step, (old, new) in enumerate(zip(row["first_losses"], found.losses, strict=True), 1):
        if old != new:
            return f"loss {step} was {old!r}, is {new!r} (made with {row['versions']})"
    return ""


def voucher(row: Row, runs: Iterable[Row]) -> Row | None:
    """The current run that vouches for a row without losses: of its cell, at the rate it chose."""
    config, study = row["config"], studies.STUDIES[row["study"]]
    lr = config["lr"] if "lr" in config else study.choose(row)
    wanted = {**{key: config[key] for key in CELL if key in config}, "lr": lr}
    for run in runs:
        if wanted.items() <= run["config"].items() and run.get("first_losses"):
            return None if studies.changed([run]) else run
    return None


def restamp(
    names: Iterable[str] | None = None,
    *,
    only: Collection[str] = (),
    workers: int = WORKERS,
) -> list[str]:
    """Restamp the rows of these files, or of all; a line for each row that was not.

    Parameters
    ----------
    names
        Names of files in ``results/``, without ``.json``.
    only
        Methods whose rows are restamped; none for all rows.
    workers
        Number of rows that are replayed at the same time.

    Returns
    -------
    list of str
        A line for each row that keeps its old hash: which row, and why.
    """
    names = (
        sorted(path.stem for path in results.CHECKOUT.glob("*.json")) if names is None else names
    )
    files = {name: results.read(name) for name in names}
    left: list[str] = []

    def wanted(rows: list[Row]) -> list[Row]:
        return [
            row for row in studies.changed(rows) if not only or row["config"].get("method") in only
        ]

    for name, rows in files.items():
        old = [row for row in wanted(rows) if row.get("first_losses")]
        for found in results.in_processes(replay, old, workers):
            (row,) = (row for row in old if row["config"] == found.config)
            difference = verdict(row, found)
            if difference:
                left.append(f"{name} {said(row)}: {difference}")
            else:
                stamp(row)
                results.write(name, rows)
            outcome = "differs" if difference else "agrees"
            print(f"{name} {said(row)}: {outcome}, {found.seconds:.1f} s", flush=True)
    for name, rows in files.items():
        for row in wanted(rows):
            if row.get("first_losses"):
                continue
            if "study" not in row:
                left.append(f"{name} {said(row)}: has no losses; run `make benchmarks`")
            elif voucher(row, results.read(row["study"])):
                stamp(row)
                results.write(name, rows)
                print(f"{name} {said(row)}: vouched for by its run", flush=True)
            else:
                left.append(f"{name} {said(row)}: no current run vouches for it")
    return left


def said(row: Row) -> str:
    """A row in a few words."""
    config = row["config"]
    return " ".join(f"{key} {config[key]}" for key in (*CELL, "lr", "way") if key in config)


def main() -> None:
    """Restamp all files, or some, and print what was not."""
    parser = argparse.ArgumentParser(description="Restamp rows whose first losses are the same.")
    parser.add_argument("names", nargs="*", help="files in results/, without .json; all if none")
    parser.add_argument("--only", nargs="+", default=(), metavar="METHOD", help="methods")
    given, start = parser.parse_args(), time.perf_counter()
    left = restamp(given.names or None, only=given.only)
    print("\n".join([f"\n{len(left)} rows keep their old hash:", *left] if left else ["", "None."]))
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
