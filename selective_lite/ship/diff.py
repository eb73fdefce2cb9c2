"""Diff: the delta from a base to a tuned model, or of values that are known to have changed."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..kernels.sampled import index_dtype
from ..kernels.small import KINDS
from ..layers.masked import training_of
from ..layers.small import adapter_parameters, adapters
from ..params import head_weights, named_buffers, ties, weights
from .base import at, base_of, fingerprint, library_version, tensors_of
from .delta import Delta, Reader
from .file import MODULES, bits, body_of
from .steps import HALVES


def diff(
    base: nn.Module | Mapping[str, Tensor],
    tuned: nn.Module,
    *,
    head: Sequence[str] | None = None,
    method: str = "",
) -> Delta:
    """The delta from a base to a tuned model: every value whose bits differ, and small modules.

    In masked training, `tuned` is what it would be if training ended now.

    Parameters
    ----------
    base
        The model before, or its `snapshot`.
    tuned
        The model after.
    head
        Prefixes of the task head, as in `weights`; the head is stored whole.
    method
        How it was tuned, for the reader of the file.

    Raises
    ------
    ValueError
        If base and tuned do not have the same tensors, shapes and dtypes, or nothing differs, or
        the base has small modules of its own.

    Warns
    -----
    UserWarning
        If `base` is a mapping without any of the model's buffers: what changed in them is not
        shipped.
    """
    before = tensors_of(base) if isinstance(base, nn.Module) else dict(base)
    own = adapter_parameters(tuned)
    if (isinstance(base, nn.Module) and adapters(base)) or any(name in before for name in own):
        raise ValueError(
            "base has small modules; merge or remove them, so that it is an ordinary model"
        )
    training = training_of(tuned)
    now = {} if training is None else training.values()
    index = {} if training is None else training.selection.indices

    def after(name: str, tensor: Tensor) -> Tensor:
        """A tensor as it is now, on the CPU, flat; masked training may not have written it yet."""
        flat = at(tensor)
        if name in now and now[name].numel() == len(flat):
            return now[name].reshape(-1)
        return flat.index_copy_(0, index[name], now[name]) if name in now else flat

    candidates = weights(tuned, head, with_frozen=True)
    compared: dict[str, Tensor] = {name: p for name, p in candidates.items() if name not in own}
    buffers = named_buffers(tuned)
    if buffers and not any(name in before for name in buffers):
        warnings.warn(
            f"base holds no buffers, such as {next(iter(buffers))!r}; what changed in them is not "
            "shipped. Give the base, or its snapshot with buffers",
            stacklevel=2,
        )
        buffers = {}
    changed, moved = {}, dict[str, Tensor]()
    for name, tensor in {**compared, **buffers}.items():
        start = before.get(name)
        if start is None or start.shape != tensor.shape or start.dtype != tensor.dtype:
            raise ValueError(
                f"base has no {name!r} of shape {tuple(tensor.shape)} and {tensor.dtype}"
            )
        if start.is_meta or tensor.is_meta:
            raise ValueError(
                f"{name!r} is on the meta device (offloaded?), which holds no values; load the "
                "whole model first"
            )
        flat = after(name, tensor)
        where = (bits(flat) != bits(start.cpu()).reshape(-1)).nonzero().squeeze(1)
        if name in buffers:
            moved |= {name: flat.reshape(tensor.shape)} if len(where) else {}
        else:
            changed[name] = where, flat[where]
    heads = {
        name: after(name, p).reshape(p.shape)
        for name, p in head_weights(tuned, head).items()
        if name not in own
    }
    total = sum(p.numel() for name, p in weights(tuned, head).items() if name not in own)
    return assemble(
        tuned,
        lambda name, where: at(before[name], where),
        changed,
        heads,
        moved,
        method=method,
        total=total if training is None else training.total,
        base=base if isinstance(base, nn.Module) else tuned,
        small=adapters(tuned),
    )


def assemble(
    model: nn.Module,
    start: Reader,
    changed: Mapping[str, tuple[Tensor, Tensor]],
    head: dict[str, Tensor],
    buffers: dict[str, Tensor],
    *,
    method: str,
    total: int,
    base: nn.Module | None = None,
    small: Mapping[str, Any] | None = None,
) -> Delta:
    """The delta of values that are known to have changed.

    Parameters
    ----------
    model
        A model of the base's names, shapes and dtypes.
    start
        ``(name, positions or None for all) -> the base's values``, on the CPU, flat.
    changed
        ``{name: (sorted positions, values)}``, outside the head; none where nothing changed.
    head, buffers
        ``{name: tensor}`` on the CPU, whole.
    method, total
        For the metadata: how it was tuned, and how many candidates there were.
    base
        The model that says what the base is; default `model`.
    small
        ``{weight name: small module}``.

    Raises
    ------
    ValueError
        If nothing changed and there is no head, or a small module cannot be stored.
    """
    tensors, small, tied = tensors_of(model), small or {}, ties(model)
    for name, module in small.items():
        if module.kind not in KINDS:
            raise ValueError(
                f"tuned has a small module of kind {module.kind!r} at {name!r}; merge it first"
            )
        if any(p.dtype != tensors[name].dtype for p in module.parameters()):
            raise ValueError(
                f"tuned has a small module of another dtype than {name!r}; convert the whole model"
            )
    positions, values, dense = {}, {}, {}
    for name, (where, new) in changed.items():
        size = tensors[name].numel()
        if len(where) == size:
            dense[name] = new.reshape(tensors[name].shape)
        elif len(where):
            positions[name], values[name] = where.to(index_dtype(size)), new
    if not (values or dense or head or buffers or small):
        raise ValueError("base and tuned are equal bit by bit; there is nothing to store")
    modules = {
        name: {piece: p.detach().cpu().clone() for piece, p in module.named_parameters()}
        for name, module in small.items()
    }
    stored = dict.fromkeys((*values, *dense, *head, *buffers, *small))
    metadata: dict[str, Any] = {
        "encoding": "flat",
        "library": library_version(),
        "base": base_of(model if base is None else base),
        "method": method,
        "total": total,
        "shapes": {name: list(tensors[name].shape) for name in stored},
        "ties": {name: tied[name] for name in stored if name in tied},
    }
    delta = Delta(positions, values, dense, head, metadata, modules, buffers)
    rounded = {
        name: str(tensors[name].dtype)
        for name, (_, new) in delta.replaced().items()
        if new.dtype != tensors[name].dtype
    }
    metadata |= {"rounds_to": rounded} if rounded else {}
    if small:
        specs = {name: {"kind": m.kind, "rank": m.rank} for name, m in small.items()}
        metadata[MODULES] = specs
    metadata["k"] = delta.count
    places, metadata["fingerprints"] = delta.places(), []
    for name in body_of(delta.parts):
        found = start(name, places[name]) if name in places else None
        metadata["fingerprints"].append(fingerprint(found, delta.sampled(name, start)))
        if found is not None and name in values and values[name].dtype in HALVES:
            delta.before[name] = found
    return delta
