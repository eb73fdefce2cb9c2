"""Compose: one delta from several, the sum of their weighted differences (task arithmetic, Ilharco et al. 2023)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .delta import Delta, assemble
from .file import bits


def combine(
    base: nn.Module, deltas: Sequence[Delta], weights: Sequence[float], *, head: int | None = None
) -> Delta:
    """The delta whose difference to the base is the weighted sum of the differences of several.

    Where only one delta has a position and its weight is 1, the result has its value to the bit.

    Parameters
    ----------
    base
        The model that all of them were made from; it is not changed.
    deltas
        At least one, without small modules.
    weights
        A finite number for each; a negative one takes a task away.
    head
        Whose task head the result has, an index into `deltas`: a head is new, and no difference
        that could be summed. ``None`` where all have the same head, or none.

    Raises
    ------
    DeltaError
        If a delta is not for this base.
    ValueError
        If there are not as many weights as deltas, a weight is not finite, a delta has small
        modules, heads differ and `head` does not say which, a tensor is the head of one delta and
        not of another, a sum is not finite in the base's dtype, or all differences cancel out.
    """
    if (
        not deltas
        or len(deltas) != len(weights)
        or not all(math.isfinite(weight) for weight in weights)
    ):
        raise ValueError(
            f"weights={list(weights)} must be a finite number for each of the {len(deltas)} deltas"
        )
    for i, delta in enumerate(deltas):
        if delta.modules:
            raise ValueError(
                f"deltas[{i}] has small modules, which are no difference of a weight; merge_adapters in the tuned "
                "model, then diff again"
            )
        delta.base_values(base)
    own_head, named = _head(deltas, head), dict(base.named_parameters())
    parts: dict[str, list[tuple[float, Tensor, Tensor]]] = {}
    for delta, weight in zip(deltas, weights, strict=True):
        for name, (where, values) in delta._replaced().items():
            if name not in delta.head:
                index = (
                    torch.arange(values.numel(), device="cpu") if where is None else where.long()
                )
                parts.setdefault(name, []).append((weight, index, values.reshape(-1)))
    if clash := set(parts) & {name for delta in deltas for name in delta.head}:
        raise ValueError(f"deltas do not agree whether {min(clash)!r} is part of the head")
    changed = {name: _sum(name, named[name], parts[name]) for name in named if name in parts}
    if not (own_head or any(len(where) for where, _ in changed.values())):
        raise ValueError(
            f"with weights={list(weights)} the differences cancel out; there is nothing to store"
        )
    terms = (
        f"{w:g} {delta.metadata['method']}".rstrip()
        for delta, w in zip(deltas, weights, strict=True)
    )
    return assemble(
        named, changed, own_head, {}, method=" + ".join(terms), total=deltas[0].metadata["total"]
    )


def _head(deltas: Sequence[Delta], chosen: int | None) -> dict[str, Tensor]:
    heads = [{name: bits(tensor) for name, tensor in delta.head.items()} for delta in deltas]
    if chosen is None:
        for i, other in enumerate(heads):
            if set(other) != set(heads[0]) or not all(
                torch.equal(other[name], heads[0][name]) for name in other
            ):
                raise ValueError(
                    f"deltas[0] and deltas[{i}] have different heads; give head=0 to head={len(heads) - 1}"
                )
    elif chosen not in range(len(deltas)):
        raise ValueError(f"head={chosen} is no index of {len(deltas)} deltas")
    return {name: tensor.clone() for name, tensor in deltas[chosen or 0].head.items()}


def _sum(
    name: str, base: Tensor, parts: Sequence[tuple[float, Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """The positions of one tensor at which the sum differs from the base, and its values there."""
    union = torch.unique(torch.cat([where for _, where, _ in parts]))
    theta0 = base.detach().reshape(-1)[union.to(base.device)].cpu()
    share = torch.zeros(len(union), dtype=torch.float64)
    theta = -share  # of zeros, only -0.0 changes nothing that is added to it
    for weight, where, values in parts:
        at = torch.searchsorted(union, where)
        share[at] += weight
        theta[at] += weight * values.double()
    # (eq-combine)  theta = theta0 + sum_i w_i (theta_i - theta0), in the order that loses nothing if one w_i is 1
    theta = torch.where(share == 1, theta, theta + (1 - share) * theta0.double()).to(theta0.dtype)
    if not theta.isfinite().all():
        raise ValueError(f"the weighted sum is not finite in {name!r}, which is {theta0.dtype}")
    changed = bits(theta) != bits(theta0)
    return union[changed], theta[changed]
