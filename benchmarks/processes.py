"""Fresh processes, whose peak memory is their own."""

from __future__ import annotations

import ctypes
import gc
import os
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

# glibc gives a large buffer that is freed back to the system at once, and the next step pays for
# new pages; or it keeps them, and the peak says no longer how much was in use.
RETURNS = {"MALLOC_MMAP_THRESHOLD_": str(1 << 22)}
KEEPS = {"MALLOC_MMAP_THRESHOLD_": str(1 << 33), "MALLOC_TRIM_THRESHOLD_": str(1 << 33)}


def fresh(
    job: Callable[[Any], Any],
    argument: Any,
    *,
    threads: int = 1,
    allocator: Mapping[str, str] = RETURNS,
) -> Any:
    """What `job(argument)` gives in a process that has done nothing else."""
    before = dict(os.environ)
    for setting in {**RETURNS, **KEEPS}:
        os.environ.pop(setting, None)
    os.environ.update(allocator)
    try:
        with ProcessPoolExecutor(1, get_context("spawn"), torch.set_num_threads, (threads,)) as one:
            return one.submit(job, argument).result()
    finally:
        os.environ.clear()
        os.environ.update(before)


def settle() -> None:
    """Give back what loading has freed: a peak would hide in it."""
    gc.collect()
    with suppress(OSError, AttributeError):  # glibc's
        ctypes.CDLL(None).malloc_trim(0)


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
