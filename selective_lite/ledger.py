"""Ledger: where the bytes of training are, by kind; what selecting saves, and what it does not."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .masked import SUFFIX


def ledger(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, int]:
    """Bytes that a model and its optimizer hold now; call it after a step, while gradients are there.

    Parameters
    ----------
    model
        In masked training or not.
    optimizer
        Whose state is counted.

    Returns
    -------
    dict
        Bytes by kind: ``weights`` (every unique parameter and buffer), ``gradients``, ``optimizer`` (state tensors),
        ``index`` (positions of a selection). Tensors that share storage count once. Activations are not included.
    """
    weights: list[Tensor] = list(model.parameters())
    index: list[Tensor] = []
    for name, buffer in model.named_buffers():
        (index if SUFFIX + "_" in name else weights).append(buffer)
    state = [] if optimizer is None else [t for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t)]
    return {
        "weights": _bytes(weights),
        "gradients": _bytes(p.grad for p in model.parameters() if p.grad is not None),
        "optimizer": _bytes(state),
        "index": _bytes(index),
    }


def _bytes(tensors: Iterable[Tensor]) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
