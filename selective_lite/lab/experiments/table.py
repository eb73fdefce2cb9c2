"""The table: all rows of the studies in one flat list, and as a file for pandas or a spreadsheet.

Run this module (part of ``make results``) to write ``results/rows.csv``.
"""

from __future__ import annotations

import csv
import io
from typing import Any

from . import results
from .results import FIRST
from .studies import STUDIES

FILE = "rows.csv"
# What a config names and every row has a column for, then what a row measured.
NAMED = ("task", "method", "budget", "seed", "lr", "train", "batch", "epochs", "samples")
LEVELS = ("head", "pooling", "reduction", "relaxed", "lr_alpha")
MEASURED = (
    *("trained", "selected", "accuracy", "loss", "majority", "told_apart"),
    *("bits_a_token", "other", "tested", "seconds", "device", "library"),
)
COLUMNS = ("study", *NAMED, *LEVELS, *MEASURED)


def table() -> list[dict[str, Any]]:
    """One dictionary for each finished run of the second edition, with the same keys in all.

    What a run does not have is None: a language model has no accuracy, the head alone trains no
    weights.

    Examples
    --------
    >>> {"study", "method", "budget", "seed", "lr"} <= set(COLUMNS)
    True
    """
    return [
        {"study": name, **{key: {**row["config"], **row}.get(key) for key in COLUMNS[1:]}}
        for name in STUDIES
        for row in results.read(name)
        if row.get("edition") != FIRST
    ]


def text() -> str:
    """The table as comma-separated values, a line for each run."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(table())
    return buffer.getvalue()


if __name__ == "__main__":
    results.CHECKOUT.mkdir(exist_ok=True)
    (results.CHECKOUT / FILE).write_text(text())
