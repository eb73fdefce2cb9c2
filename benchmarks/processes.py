"""Fresh processes, each of one thread, whose peak memory is their own."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch


def fresh(job: Callable[[Any], Any], argument: Any) -> Any:
    """What `job(argument)` gives in a process that has done nothing else."""
    # glibc then gives a freed tensor's pages back at once
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(1 << 22)
    with ProcessPoolExecutor(1, get_context("spawn"), torch.set_num_threads, (1,)) as process:
        return process.submit(job, argument).result()


def resident() -> int:
    """Bytes of this process that are in memory, or allocated on the GPU where there is one."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else _status("VmRSS")


def peak() -> int:
    """The most that `resident` was since `forget_peak`, or since the process began."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _status("VmHWM")


def forget_peak() -> None:
    """Let `peak` begin anew."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def _status(kind: str) -> int:
    return 1024 * int(re.findall(rf"{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text())[0])
