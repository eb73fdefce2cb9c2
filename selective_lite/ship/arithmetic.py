"""Arithmetic: one delta from several, as a chain or as the weighted sum of their differences.

Task arithmetic (Ilharco et al. 2023).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from ..layers.small import adapters
from .base import at, tensors_of
from .delta import Delta
from .diff import assemble
from .file import DeltaError, bits


def compose(base: nn.Module, deltas: Sequence[Delta]) -> Delta:
    """The delta that does at once what several ones do in turn: 0 -> 1 -> 2 as 0 -> 2, to the bit.

    It is what `diff` from the base to the last model gives: what ends where it began is not in it,
    and of a float32 value for a half-precision weight it has what applying makes of it.

    Parameters
    ----------
    base
        The model that the first delta was made from. The deltas go in, each checked against what
        those before it give, and are taken out: no bit of it has changed when this is left.
    deltas
        At least one, each made from the model that those before it give.

    Raises
    ------
    DeltaError
        If a delta does not go onto what those before it give, such as a second small module into
        one layer, or the base lacks its head; it says which delta, and where.
    ValueError
        If there is no delta, the base has small modules, or all changes cancel out.
    """
    if not deltas:
        raise ValueError("deltas=[] must hold at least one delta")
    if small := adapters(base):
        raise ValueError(f"base has a small module at {min(small)!r}; merge or remove it")
    tensors, places = tensors_of(base), dict[str, Tensor]()
    head, buffers = set[str](), set[str]()
    with ExitStack() as stack:
        for i, delta in enumerate(deltas):
            try:
                if left_out := delta.names(base).left_out:
                    raise DeltaError(f"base has no {left_out[0]!r}; load the class that was tuned")
                names = stack.enter_context(delta.apply(base)).names
            except DeltaError as error:
                raise DeltaError(
                    f"deltas[{i}] does not go onto what is before it: {error}"
                ) from None
            for name, where in delta.places().items():
                own = names[name]
                if where is None:
                    where = torch.arange(tensors[own].numel(), device="cpu")
                places[own] = torch.cat([places.get(own, where[:0]), where.long()]).unique()
            head |= {names[name] for name in delta.head}
            buffers |= {names[name] for name in delta.buffers}
        after = {name: at(tensors[name], places[name]) for name in tensors if name in places}
        small = adapters(base)
    # The base is as it was.
    changed, whole = {}, dict[str, Tensor]()
    for name, values in after.items():
        moved = bits(values) != bits(at(tensors[name], places[name]))
        if name not in head | buffers:
            changed[name] = places[name][moved], values[moved]
        elif name in head or moved.any():
            whole[name] = values.reshape(tensors[name].shape)
    return assemble(
        base,
        lambda name, where: at(tensors[name], where),
        changed,
        {name: tensor for name, tensor in whole.items() if name in head},
        {name: tensor for name, tensor in whole.items() if name not in head},
        method=", then ".join(delta.metadata["method"] or "not said" for delta in deltas),
        total=deltas[0].metadata["total"],
        small=small,
    )


def combine(
    base: nn.Module, deltas: Sequence[Delta], weights: Sequence[float], *, head: int | None = None
) -> Delta:
    """The delta whose difference to the base is the weighted sum of several ones.

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
        Index of the delta whose task head and buffers the result has: a head is new, so that
        there is no difference to sum, and statistics do not add up. ``None`` where all have the
        same, or none.

    Raises
    ------
    DeltaError
        If a delta is not for this base.
    ValueError
        If there are not as many weights as deltas, a weight is not finite, a delta has small
        modules, heads or buffers differ and `head` does not say which, a tensor is the head of one
        delta and not of another, a sum is not finite in the base's dtype, or all differences
        cancel out.
    """
    if (
        not deltas
        or len(deltas) != len(weights)
        or not all(math.isfinite(weight) for weight in weights)
    ):
        raise ValueError(
            f"weights={list(weights)} must be a finite number for each of the {len(deltas)} deltas"
        )
    if head is not None and head not in range(len(deltas)):
        raise ValueError(f"head={head} is not an index of {len(deltas)} deltas")
    names, deltas = [], list(deltas)
    for i, delta in enumerate(deltas):
        if delta.modules:
            raise ValueError(
                f"deltas[{i}] has small modules, which are not a difference of a weight; "
                "merge_adapters in the tuned model, then diff again"
            )
        places, before = delta.check(base)
        names.append(places.found)
        deltas[i] = delta.with_base(before)
    tensors = tensors_of(base)
    heads = _chosen("heads", [delta.head for delta in deltas], head, names, tensors)
    buffers = _chosen("buffers", [delta.buffers for delta in deltas], head, names, tensors)
    parts: dict[str, list[tuple[float, Tensor, Tensor]]] = {}
    for delta, own, weight in zip(deltas, names, weights, strict=True):
        for name, (where, values) in delta.replaced().items():
            if name not in delta.head and name not in delta.buffers:
                every = torch.arange(values.numel(), device="cpu")
                index = every if where is None else where.long()
                parts.setdefault(own[name], []).append((weight, index, values.reshape(-1)))
    of_heads = {
        own[name]
        for delta, own in zip(deltas, names, strict=True)
        for name in delta.head
        if name in own
    }
    if clash := set(parts) & of_heads:
        raise ValueError(f"deltas do not agree whether {min(clash)!r} is part of the head")
    changed = {name: _sum(name, tensors[name], parts[name]) for name in tensors if name in parts}
    if not (heads or buffers or any(len(where) for where, _ in changed.values())):
        raise ValueError(
            f"with weights={list(weights)} the differences cancel out; there is nothing to store"
        )
    terms = (
        f"{w:g} {delta.metadata['method']}".rstrip()
        for delta, w in zip(deltas, weights, strict=True)
    )
    return assemble(
        base,
        lambda name, where: at(tensors[name], where),
        changed,
        heads,
        buffers,
        method=" + ".join(terms),
        total=deltas[0].metadata["total"],
    )


def _chosen(
    what: str,
    found: Sequence[Mapping[str, Tensor]],
    head: int | None,
    names: Sequence[Mapping[str, str]],
    base: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """The tensors of one of the deltas that go into the result whole, in the base's dtype."""
    renamed = [
        {
            own[name]: tensor.to(base[own[name]].dtype)
            for name, tensor in part.items()
            if name in own
        }
        for part, own in zip(found, names, strict=True)
    ]
    for i, other in enumerate(renamed if head is None else ()):
        if set(other) != set(renamed[0]) or not all(
            torch.equal(bits(other[name]), bits(renamed[0][name])) for name in other
        ):
            raise ValueError(
                f"deltas[0] and deltas[{i}] have different {what}; give head=0 to "
                f"head={len(found) - 1}, the delta whose {what} the result has"
            )
    return {name: tensor.clone() for name, tensor in renamed[head or 0].items()}


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
    # (eq-combine)  theta = theta0 + sum_i w_i (theta_i - theta0)
    # in an order that loses nothing where one w_i is 1
    theta = torch.where(share == 1, theta, theta + (1 - share) * theta0.double()).to(theta0.dtype)
    if not theta.isfinite().all():
        raise ValueError(f"the weighted sum is not finite in {name!r}, which is {theta0.dtype}")
    changed = bits(theta) != bits(theta0)
    return union[changed], theta[changed]
