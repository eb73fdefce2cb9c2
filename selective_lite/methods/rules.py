"""Rules: selections of whole tensors, by their names."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import Module, Parameter

from ..heads import Head
from ..params import weights
from ..selection import Selection


def select_tensors(
    model: Module, predicate: Callable[[str, Parameter], bool], head: Head = None
) -> Selection:
    """Every weight of every candidate tensor for which `predicate(name, parameter)` holds.

    Raises
    ------
    ValueError
        If no tensor satisfies the rule.
    """
    candidates = weights(model, head)
    taken = {name: p.numel() for name, p in candidates.items() if predicate(name, p)}
    if not taken:
        remedy = "print(list(weights(model))) shows their names"
        raise ValueError(f"predicate holds for no candidate tensor; {remedy}")
    indices = {name: torch.arange(size, device="cpu") for name, size in taken.items()}
    return Selection(indices, {name: tuple(p.shape) for name, p in candidates.items()})
