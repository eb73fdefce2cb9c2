"""Benchmark: what `import selective_lite` costs beyond `import torch`.

Every import is in a fresh process, the two interleaved; medians are given. Bytecode is kept, as
`pip install` and every ordinary first run leave it: without it, most of the time is Python's
compiler's.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from selective_lite.lab import results

CONFIG = {"warmup": 2, "rounds": 15}
ROOTS = ["params.py:weights", "ship/tuning.py:masked", "selection.py:select"]

SCRIPT = (
    "import time, torch; start = time.perf_counter(); import {}; print(time.perf_counter() - start)"
)
KEEPS_BYTECODE = {key: own for key, own in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}


def run(config: Mapping[str, Any]) -> results.Row:
    """Median milliseconds of the import, and of importing nothing, once torch is there."""
    seconds: dict[str, list[float]] = {"selective_lite": [], "torch": []}
    for round_number in range(config["warmup"] + config["rounds"]):
        for name, found in seconds.items():
            command = [sys.executable, "-c", SCRIPT.format(name)]
            done = subprocess.run(
                command, check=True, capture_output=True, text=True, env=KEEPS_BYTECODE
            )
            taken = float(done.stdout)
            if round_number >= config["warmup"]:
                found.append(taken)
    return {
        "milliseconds": {
            name: round(1e3 * statistics.median(found), 2) for name, found in seconds.items()
        }
    }


if __name__ == "__main__":
    (row,) = results.run_missing("importing", [CONFIG], run, lambda config: ROOTS)
    print(f"import selective_lite after torch: {row['milliseconds']['selective_lite']:.1f} ms")
