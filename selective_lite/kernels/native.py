"""Native: one C source, compiled at first use by the system's compiler; where there is none, torch.

It computes what `sampled` computes, float32 on the CPU. The compiled library is kept in the user's
cache, by its source, the compiler and the processor. ``SELECTIVE_LITE_NATIVE=0`` does without it.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SOURCE = Path(__file__).with_name("products.c")
# Not -ffast-math: gcc before 13 would link code that switches denormals off in the whole process.
FLAGS = ("-O3", "-march=native", "-shared", "-fPIC")
PLAIN, KINDS = (Tensor, nn.Parameter), (torch.float32, torch.int32)
POINTER, SIZE = ctypes.c_void_p, ctypes.c_int64


class NativeWarning(UserWarning):
    """The C source could not be compiled, or computes something else; torch's operations do."""


@cache
def library() -> ctypes.CDLL | None:
    """The compiled source; None where it is switched off, or where it cannot be had.

    Warns
    -----
    NativeWarning
        If there is no compiler, or it fails, or what it made computes something else. Once a
        process; nothing is missing but speed.
    """
    if os.environ.get("SELECTIVE_LITE_NATIVE", "1") == "0":
        return None
    try:
        loaded = ctypes.CDLL(str(_compiled()))
        operand: list[Any] = [POINTER, POINTER, SIZE]
        loaded.sampled_product.argtypes = [*operand * 2, SIZE, POINTER, *[SIZE] * 4, POINTER]
        loaded.write_entries.argtypes, loaded.write_entries.restype = [*3 * [POINTER], SIZE], None
        loaded.gather_features.argtypes = [POINTER, SIZE, SIZE, POINTER, SIZE, SIZE, POINTER]
        loaded.gather_features.restype = None
        _check(loaded)
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        why = f"no native products ({error}), so masked training uses torch's, which are slower"
        warnings.warn(f"{why}; SELECTIVE_LITE_NATIVE=0 does so unsaid", NativeWarning, stacklevel=2)
        return None
    return loaded


def fits(*tensors: Tensor) -> ctypes.CDLL | None:
    """The library, if these are float32 values and int32 positions in this machine's memory."""
    if torch.compiler.is_compiling():
        return None
    for t in tensors:  # of every layer, at every step: not a comprehension, which is slower
        if type(t) not in PLAIN or t.dtype not in KINDS or t.device.type != "cpu":
            return None
    return library()


def _compiled() -> Path:
    names = (os.environ.get("CC"), "cc", "gcc", "clang")
    compiler = next(filter(None, (shutil.which(name) for name in names if name)), None)
    if compiler is None:
        raise RuntimeError("there is no C compiler, such as gcc")
    version = subprocess.run([compiler, "--version"], capture_output=True, timeout=60).stdout
    cache_home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    key = hashlib.sha256(SOURCE.read_bytes() + version + _processor() + repr(FLAGS).encode())
    kept = Path(cache_home, "selective_lite", "native", f"products-{key.hexdigest()[:16]}.so")
    if kept.exists():
        return kept
    kept.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=kept.parent) as folder:  # beside it, to be renamed at once
        made = Path(folder, kept.name)
        for threads in (["-fopenmp"], []):
            command = [compiler, *FLAGS, *threads, str(SOURCE), "-o", str(made)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=300)
            if done.returncode == 0:
                made.replace(kept)
                return kept
    raise RuntimeError(f"{compiler} failed: {done.stderr.strip()[:200]}")


def _processor() -> bytes:
    """What `-march=native` depends on."""
    flags = Path("/proc/cpuinfo")
    lines = flags.read_text().splitlines() if flags.exists() else []
    own = sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))})
    return "\n".join([platform.system(), platform.machine(), *own]).encode()


def _check(loaded: ctypes.CDLL) -> None:
    draw = torch.Generator().manual_seed(0)
    left, right = (torch.randn(70, n, generator=draw, device="cpu") for n in (9, 21))
    index = torch.arange(0, 9 * 21, 2, dtype=torch.int32, device="cpu")
    found = product(loaded, left, right, index, 9, 21, None, None)
    if not torch.allclose(found, (left.t() @ right).flatten()[index], atol=1e-4):
        raise RuntimeError("its products are wrong")


def product(
    loaded: ctypes.CDLL,
    left: Tensor,
    right: Tensor,
    index: Tensor,
    height: int,
    width: int,
    rows: Tensor | None,
    columns: Tensor | None,
) -> Tensor:
    """As `sampled.sampled_product`, of float32 operands on the CPU and int32 positions."""
    left, right = left.contiguous(), right.contiguous()
    sides: list[int | None] = []
    for operand, features in ((left, rows), (right, columns)):
        own = operand.shape[1 if features is None else 0]
        sides += [operand.data_ptr(), None if features is None else features.data_ptr(), own]
    tokens = left.shape[0 if rows is None else 1]
    found = torch.empty(len(index), dtype=torch.float32, device="cpu")
    sizes = (tokens, index.data_ptr(), len(index), height, width, torch.get_num_threads())
    if loaded.sampled_product(*sides, *sizes, found.data_ptr()):
        raise MemoryError(f"no memory for products of {len(index)} positions over {tokens} tokens")
    return found


def gather(loaded: ctypes.CDLL, operand: Tensor, features: Tensor) -> Tensor:
    """As `sampled.columns_as_rows`, of a contiguous float32 operand on the CPU."""
    found = torch.empty(len(features), len(operand), dtype=torch.float32, device="cpu")
    sizes = (*operand.shape, features.data_ptr(), len(features), torch.get_num_threads())
    loaded.gather_features(operand.data_ptr(), *sizes, found.data_ptr())
    return found


def write(loaded: ctypes.CDLL, dense: Tensor, values: Tensor, index: Tensor) -> None:
    """As `sampled.write`, of contiguous tensors."""
    values = values.contiguous()  # held until the call is over
    loaded.write_entries(dense.data_ptr(), values.data_ptr(), index.data_ptr(), len(index))
