"""Delta: what fine-tuning changed, as positions, tensors, buffers and small modules.

Values replace the base's (a sum with a difference would not give them back exactly), so that
applying and reverting are exact to the bit.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.masked import training_of
from ..layers.small import (
    KINDS,
    adapter_parameters,
    adapters,
    add_adapters,
    find_layers,
    remove_adapters,
)
from ..params import candidates, head_weights, named_buffers, ties, unwrap, weights
from ..selection import Selection
from .base import (
    Names,
    at,
    base_of,
    check_tensor,
    find_names,
    fingerprint,
    library_version,
    tensors_of,
)
from .file import (
    MODULES,
    PARTS,
    DeltaError,
    Encoding,
    bits,
    body_of,
    count,
    decode,
    encode,
    fits,
    flat_names,
    index_dtype,
    replaced_by,
)

Reader = Callable[[str, "Tensor | None"], Tensor]  # (name, positions or None for all) -> values


@dataclass(frozen=True, eq=False)
class Delta:
    """Tuned values at sorted flat positions of a base's tensors, whole tensors, and small modules.

    Attributes
    ----------
    positions, values
        ``{name: int32 or int64}`` and ``{name: tuned values}``; values replace the base's, they are
        not differences. They have the base's dtype, or are float32 for a half-precision base.
    dense
        ``{name: tensor}``, tensors of the base that changed everywhere.
    head
        ``{name: tensor}``, the task head; it is new, so that no fingerprint covers it.
    metadata
        ``base`` (what is known of it: ``name_or_path``, ``revision``, ``class``, ``dtype``,
        ``num_labels``, ``id2label``), ``library`` (this library's version), ``method``, ``k`` and
        ``total`` (weights replaced, and candidates), ``shapes`` by name, ``ties``, ``{name: other
        names of the same tensor}``, and ``fingerprints``: for every name outside the head, sorted,
        the start of a SHA-256 of the base's own values that are replaced, and of some of a matrix
        that has a small module. With small modules also ``modules``, ``{weight name: {"kind":
        "lora" or "adapter", "rank": int}}``; where float32 values stand for a half-precision base
        ``rounds_to``, ``{name: dtype}``; and ``complete`` if every selected weight is there,
        whether it moved or not.
    modules
        ``{weight name: {part: tensor}}``, the small modules of `adapters`; the weights they belong
        to are the base's.
    buffers
        ``{name: tensor}``, persistent buffers that changed, such as batch-norm statistics.
    """

    positions: dict[str, Tensor]
    values: dict[str, Tensor]
    dense: dict[str, Tensor]
    head: dict[str, Tensor]
    metadata: dict[str, Any] = field(default_factory=dict)
    modules: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)

    @property
    def parts(self) -> dict[str, Any]:
        """``{part: tensors by name}``, the attributes that hold tensors."""
        return {part: getattr(self, part) for part in (*PARTS, MODULES)}

    @property
    def count(self) -> int:
        """Number of replaced weights outside the head, and of the small modules' weights."""
        return count(self.parts)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors as they are stored."""
        return sum(t.numel() * t.element_size() for t in flat_names(self.parts).values())

    def replaced(self) -> dict[str, tuple[Tensor | None, Tensor]]:
        """What replaces the base's values, ``{name: (positions or None for all, values)}``."""
        return {name: (where, values) for name, where, values in replaced_by(self.parts)}

    def base_dtypes(self) -> dict[str, str]:
        """The dtype of every tensor of the base, by name, such as ``"torch.float32"``."""
        small = {n: str(t.dtype) for n, pieces in self.modules.items() for t in pieces.values()}
        found = {name: str(values.dtype) for name, (_, values) in self.replaced().items()}
        return {**small, **found, **self.metadata.get("rounds_to", {})}

    def save(self, path: str | os.PathLike, encoding: Encoding = "flat") -> None:
        """Write the delta as safetensors, with a SHA-256 over all of it; complete or not at all.

        Parameters
        ----------
        path
            Path of the file; one that is there is replaced.
        encoding
            ``"flat"`` stores positions as they are, for every tool to read; ``"gap-lzma"`` as
            compressed gaps, in a third of the bytes.

        Raises
        ------
        ValueError
            If `encoding` is another one.
        """
        encode(path, self.parts, self.metadata, encoding)

    def apply(self, model: nn.Module) -> Applied:
        """Put the tuned values, buffers and small modules into a model, in place.

        Parameters
        ----------
        model
            The base model that the delta was made from, on any device, also compiled, wrapped, or
            as a part of another one (or the part without its head: then the head is left out, and
            a warning says so).

        Returns
        -------
        Applied
            Its ``revert()`` gives back every bit; as a context manager it reverts when the block is
            left.

        Raises
        ------
        DeltaError
            If a tensor is missing, has another shape or dtype or is tied to others, or the base's
            values are not those that the delta was made from, or a layer cannot take its small
            module, or the model is in masked training. The model is unchanged.
        """
        return Applied(self, model)

    def base_values(self, model: nn.Module) -> dict[str, Tensor]:
        """The base's own values where this delta replaces them, on the CPU; errors as `apply`.

        Returns
        -------
        dict
            ``{name: values (k,)}`` for single positions, ``{name: tensor (numel,)}`` for dense
            tensors, buffers and the head; by the delta's names.
        """
        return self.check(model)[1]

    def selection(self, model: nn.Module | None = None) -> Selection:
        """Which weights the delta replaces, for a model's training to start from.

        Parameters
        ----------
        model
            The base: the selection then has the shapes of all candidates, in model order, under
            the model's names. ``None`` gives the shapes of the tensors in the delta only.

        Raises
        ------
        DeltaError
            If the model lacks one of the tensors.
        ValueError
            If the delta replaces no weight outside the head and the buffers.
        """
        shapes = {name: tuple(shape) for name, shape in self.metadata["shapes"].items()}
        where = {name: index.long() for name, index in self.positions.items()}
        where |= {name: torch.arange(t.numel(), device="cpu") for name, t in self.dense.items()}
        if not where:
            raise ValueError("delta replaces no weight outside its head, so that none is selected")
        if model is None:
            return Selection(where, {n: shapes[n] for n in where}, self.metadata["method"])
        names = self.names(model).found
        free = candidates(model, [names[name] for name in self.head if name in names])
        found = {names[name]: index for name, index in where.items()}
        all_shapes = {name: tuple(p.shape) for name, p in free.items()}
        all_shapes |= {names[name]: shapes[name] for name in where}
        ordered = {name: found[name] for name in all_shapes if name in found}
        return Selection(ordered, all_shapes, self.metadata["method"])

    def names(self, model: nn.Module) -> Names:
        """Where the delta's tensors are in a model; errors as `apply`."""
        return find_names(body_of(self.parts), list(self.head), self.metadata, model)

    def check(self, model: nn.Module) -> tuple[Names, dict[str, Tensor]]:
        """Where the delta's tensors are in a model, and the values there; errors as `apply`."""
        if training_of(model) is not None:
            raise DeltaError(
                "model is in masked training; leave that first (close it), or put the values into "
                "it with tuning.resume(delta)"
            )
        names = self.names(model)
        dtypes, replaced = self.base_dtypes(), self.replaced()
        for name, own in names.found.items():
            shape = self.metadata["shapes"][name]
            check_tensor(own, names.tensors[own], shape, dtypes[name], own in names.tables)
        if self.modules:
            self._check_layers(model, names.found)

        def read(name: str, where: Tensor | None) -> Tensor:
            return at(names.tensors[names.found[name]], where)

        values = {name: read(name, replaced[name][0]) for name in names.found if name in replaced}
        self.check_base(read, values, names.found)
        return names, values

    def check_base(
        self, read: Reader, found: Mapping[str, Tensor], names: Mapping[str, str]
    ) -> None:
        """Raise a `DeltaError` naming the first tensor whose values are not the base's.

        Parameters
        ----------
        read
            ``(name, positions) -> values`` of the model that may be the base.
        found
            Its values where the delta replaces them.
        names
            The model's names by the delta's, for the message.
        """
        body = body_of(self.parts)
        for name, expected in zip(body, self.metadata["fingerprints"], strict=True):
            if fingerprint(found.get(name), self._sampled(name, read)) != expected:
                raise DeltaError(
                    f"model's {names[name]!r} is not the base's at the replaced positions: "
                    "model is not the base that this delta was made from (or already carries a "
                    "delta). Rows that were added to an embedding are drawn anew for every model: "
                    "copy them from the tuned one, or ship that tensor whole (head=)"
                )

    def _sampled(self, name: str, read: Reader) -> Tensor | None:
        """Some values of a matrix that has a small module, evenly spread."""
        if name not in self.modules:
            return None
        size = prod(self.metadata["shapes"][name])
        count = min(size, sum(t.numel() for t in self.modules[name].values()))
        return read(name, torch.arange(count, device="cpu") * size // count)

    def _check_layers(self, model: nn.Module, names: Mapping[str, str]) -> None:
        specs = self.metadata[MODULES]
        try:
            layers = find_layers(unwrap(model), {names[n]: specs[n]["rank"] for n in specs})
        except ValueError as error:
            raise DeltaError(f"model cannot take this delta's small modules: {error}") from None
        for name, spec in specs.items():
            _, d_in, d_out = layers[names[name]]
            if not fits(self.modules[name], spec, d_in, d_out):
                raise DeltaError(
                    f"the small module of {name!r} is not for a layer from {d_in} to {d_out} "
                    "features"
                )


class Applied:
    """A delta in a model; keeps the k original values, so that `revert` is exact."""

    def __init__(self, delta: Delta, model: nn.Module) -> None:
        self._delta, self._model = delta, unwrap(model)
        self._put()

    def _put(self) -> None:
        delta, model = self._delta, self._model
        names, self._original = delta.check(model)
        self._names, self._reverted = names.found, False
        self._modules: dict[str, nn.Module] = {}
        if names.left_out:
            warnings.warn(
                f"model has no {names.left_out[0]!r}: the delta's head was left out",
                stacklevel=4,
            )
        for name, pieces in delta.modules.items():
            spec, own = delta.metadata[MODULES][name], names.found[name]
            self._modules[name] = add_adapters(model, (own,), kind=spec["kind"], rank=spec["rank"])[
                own
            ]
            self._modules[name].load_state_dict(pieces)
        tuned = {name: values for name, (_, values) in delta.replaced().items()}
        self._write({name: tuned[name] for name in self._original}, names.tensors)

    @torch.no_grad()
    def _write(self, values: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
        replaced = self._delta.replaced()
        for name, new in values.items():
            tensor, where = tensors[self._names[name]], replaced[name][0]
            if where is None:
                tensor.copy_(new.reshape(tensor.shape))
            else:
                new = new.to(tensor.device, tensor.dtype)
                tensor.put_(where.to(tensor.device, torch.int64), new)

    def revert(self) -> None:
        """Give the model back its original bits; a second call does nothing.

        Raises
        ------
        DeltaError
            If the delta's values are no longer in the model: something else was applied on top, or
            it was trained (or is in masked training).
        """
        if self._reverted:
            return
        delta, model = self._delta, self._model
        if training_of(model) is not None:
            raise DeltaError("model is in masked training; leave that first, then revert")
        found = adapters(model) if self._modules else {}
        for name, module in self._modules.items():
            if found.get(self._names[name]) is not module:
                raise DeltaError(
                    f"{name!r} no longer has this delta's small module; put it back or reload the "
                    "base"
                )
            for piece, p in module.named_parameters():
                _expect(f"{name}/{piece}", p, delta.modules[name][piece])
        # Looked up again: a buffer is another tensor after model.to(device).
        tensors, replaced = tensors_of(model), delta.replaced()
        for name in self._original:
            where, values = replaced[name]
            _expect(name, at(tensors[self._names[name]], where), values)
        if self._modules:
            remove_adapters(model, [self._names[name] for name in self._modules])
        self._write(self._original, tensors)
        self._original, self._reverted = {}, True

    def switch(self, delta: Delta) -> Applied:
        """Take this delta out and put another one of the same base in; if that fails, this is back.

        Raises
        ------
        DeltaError
            As `revert` and `Delta.apply`. The model is unchanged.
        """
        self.revert()
        try:
            return delta.apply(self._model)
        except BaseException:
            self._put()
            raise

    def __enter__(self) -> Applied:
        return self

    def __exit__(self, *exception: object) -> None:
        self.revert()


def _expect(name: str, found: Tensor, value: Tensor) -> None:
    value = value.to(found.dtype)  # float32 values of a half-precision base
    if not torch.equal(bits(found.cpu()).reshape(-1), bits(value).reshape(-1)):
        raise DeltaError(
            f"{name!r} no longer holds this delta's values; revert what was applied after it first"
        )


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

    named = weights(tuned, head, with_frozen=True)
    compared: dict[str, Tensor] = {name: p for name, p in named.items() if name not in own}
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
    replaced = delta.replaced()
    metadata["fingerprints"] = [
        fingerprint(
            start(name, replaced[name][0]) if name in replaced else None,
            delta._sampled(name, start),
        )
        for name in body_of(delta.parts)
    ]
    return delta


def load(path: str | os.PathLike) -> Delta:
    """Read a delta file and check all of it: checksum, names, shapes, dtypes, every position.

    Raises
    ------
    DeltaError
        If anything is wrong with the file; it says what.
    """
    return Delta(**decode(path))
