"""The device of tensors, and the seeds of chance."""

from __future__ import annotations

import os
import random

import numpy as np
import torch

VARIABLE = "SELECTIVE_LITE_DEVICE"


def _available(kind: str) -> int:
    """Count the usable devices of one kind: 0 where the machine has none."""
    if kind == "cuda":
        return torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "mps":
        return int(torch.backends.mps.is_available())
    return int(kind == "cpu")


def device() -> torch.device:
    """Choose the device: CUDA if there is one, then Apple's MPS, then the CPU.

    Returns
    -------
    torch.device
        The environment variable ``SELECTIVE_LITE_DEVICE`` overrides the choice: ``cpu``, ``mps``,
        ``cuda``, ``cuda:1``.

    Raises
    ------
    ValueError
        The variable names no device, or one this machine does not have.
    """
    wanted = os.environ.get(VARIABLE)
    if not wanted:
        return torch.device(next(kind for kind in ("cuda", "mps", "cpu") if _available(kind)))
    try:
        chosen = torch.device(wanted)
    except RuntimeError:
        chosen = None
    if chosen is None or chosen.type not in ("cuda", "mps", "cpu"):
        raise ValueError(
            f"{VARIABLE}={wanted!r} names no device; "
            "set it to cpu, mps, cuda or cuda:N, or unset it"
        )
    if (chosen.index or 0) >= _available(chosen.type):
        raise ValueError(
            f"{VARIABLE}={wanted!r}: this machine has no such device; set it to cpu, or unset it"
        )
    return chosen


def seed_everything(seed: int) -> torch.Generator:
    """Seed Python, numpy and torch (every device), and return a CPU generator with the same seed.

    Parameters
    ----------
    seed : int
        From 0 to 2**32 - 1, what numpy accepts.

    Returns
    -------
    torch.Generator
        On the CPU, so that its draws do not depend on the machine's accelerator.

    Raises
    ------
    ValueError
        ``seed`` is not an integer in that range.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed!r}: give an integer from 0 to {2**32 - 1}")
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - other libraries draw from the global state
    torch.manual_seed(seed)
    return torch.Generator(device="cpu").manual_seed(seed)
