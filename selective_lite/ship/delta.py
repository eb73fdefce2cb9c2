"""Delta: what fine-tuning changed, as positions, tensors, buffers and small modules.

Values replace the base's (a sum with a difference would not give them back exactly), so that
applying and reverting are exact to the bit.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..layers.masked import training_of
from ..layers.small import adapters, add_adapters, find_layers, remove_adapters
from ..params import candidates, unwrap
from ..selection import Selection
from .base import Names, at, check_tensor, find_names, fingerprint, tensors_of
from .file import (
    CODED,
    MODULES,
    PARTS,
    STEPS,
    DeltaError,
    Encoding,
    bits,
    body_of,
    count,
    decode,
    encode,
    fits,
    flat_names,
    step_dtypes,
)
from .steps import HALVES, stepped

Reader = Callable[[str, "Tensor | None"], Tensor]  # (name, positions or None for all) -> values


class Coded(Mapping[str, Tensor]):
    """Values that are steps from the base's: whoever looks at them is told so, and misses none.

    Attributes
    ----------
    known
        ``{name: values}``, of the tensors that are not coded.
    steps
        ``{name: int16 steps}``, of those that are; see `steps_between`.
    """

    def __init__(self, known: dict[str, Tensor], steps: dict[str, Tensor]) -> None:
        self.known, self.steps = known, steps

    def __getitem__(self, name: str) -> NoReturn:
        raise DeltaError(CODED)

    def __iter__(self) -> Iterator[str]:
        raise DeltaError(CODED)

    def __len__(self) -> int:
        raise DeltaError(CODED)


@dataclass(frozen=True, eq=False)
class Delta:
    """Tuned values at sorted flat positions of a base's tensors, whole tensors, and small modules.

    Attributes
    ----------
    positions, values
        ``{name: int32 or int64}`` and ``{name: tuned values}``; values replace the base's, they are
        not differences. They have the base's dtype, or are float32 for a half-precision base. Where
        a compressed file coded them against the base's, looking at them raises a `DeltaError` until
        `resolve`.
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
        ``rounds_to``, ``{name: dtype}``; where values are coded against the base's ``steps``,
        ``{dtype: {name: number of values}}``; and ``complete`` if every selected weight is there,
        whether it moved or not.
    modules
        ``{weight name: {part: tensor}}``, the small modules of `adapters`; the weights they belong
        to are the base's.
    buffers
        ``{name: tensor}``, persistent buffers that changed, such as batch-norm statistics.
    before
        ``{name: values}``, the base's own at the positions in half-precision tensors, where they
        are known: what a compressed file codes `values` against.
    """

    positions: dict[str, Tensor]
    values: Mapping[str, Tensor]
    dense: dict[str, Tensor]
    head: dict[str, Tensor]
    metadata: dict[str, Any] = field(default_factory=dict)
    modules: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    before: dict[str, Tensor] = field(default_factory=dict)

    @property
    def parts(self) -> dict[str, Any]:
        """``{part: tensors by name}``, as files hold them: values, or ``steps`` of coded ones."""
        found = {part: getattr(self, part) for part in (*PARTS, MODULES)}
        if isinstance(self.values, Coded):
            return found | {"values": self.values.known, STEPS: self.values.steps}
        return found | {STEPS: {}}

    @property
    def count(self) -> int:
        """Number of replaced weights outside the head, and of the small modules' weights."""
        return count(self.parts)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors as they are in a flat file."""
        parts = self.parts
        tensors = (*flat_names(parts).values(), *parts[STEPS].values())
        return sum(t.numel() * t.element_size() for t in tensors)

    def places(self) -> dict[str, Tensor | None]:
        """Where the base's values are replaced, ``{name: positions or None for all}``."""
        return {**self.positions, **dict.fromkeys((*self.dense, *self.head, *self.buffers))}

    def replaced(self) -> dict[str, tuple[Tensor | None, Tensor]]:
        """What replaces the base's values, ``{name: (positions or None for all, values)}``.

        Raises
        ------
        DeltaError
            If values are coded against the base's.
        """
        tensors = {**self.values, **self.dense, **self.head, **self.buffers}
        return {name: (where, tensors[name]) for name, where in self.places().items()}

    def base_dtypes(self) -> dict[str, str]:
        """The dtype of every tensor of the base, by name, such as ``"torch.float32"``."""
        small = {name: t for name, pieces in self.modules.items() for t in pieces.values()}
        found = {**small, **self.dense, **self.head, **self.buffers, **self.parts["values"]}
        dtypes = {name: str(tensor.dtype) for name, tensor in found.items()}
        return {**dtypes, **self.metadata.get("rounds_to", {}), **step_dtypes(self.metadata)}

    def save(self, path: str | os.PathLike, encoding: Encoding = "flat") -> None:
        """Write the delta as safetensors, with a SHA-256 over all of it; complete or not at all.

        Parameters
        ----------
        path
            Path of the file; one that is there is replaced.
        encoding
            ``"flat"`` stores positions and values as they are, for every tool to read;
            ``"gap-lzma"`` positions as compressed gaps, in a third of the bytes, and half-precision
            values as steps from the base's, in about two bits each after training at a low rate.

        Raises
        ------
        ValueError
            If `encoding` is another one, or the base's values are not known that it codes against,
            or (a `DeltaError`) ``"flat"`` those that it is to store: `resolve` first. Nothing is
            written.
        """
        encode(path, self.parts, self.before, self.metadata, encoding)

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

    def resolve(self, model: nn.Module) -> Delta:
        """The delta with its values and the base's, so that it can be looked at and saved anyhow.

        Only half-precision values from a file need it: of a compressed one the values are not
        known without the base, of a flat one the base's are not.

        Parameters
        ----------
        model
            The base; it is checked as by `apply`, with the same errors, and not changed.
        """
        return self.with_base(self.check(model)[1])

    def with_base(self, found: Mapping[str, Tensor]) -> Delta:
        """As `resolve`, by the base's values (see `base_values`), which must have been checked."""
        parts = self.parts
        steps = {name: stepped(found[name], steps) for name, steps in parts[STEPS].items()}
        values = {**parts["values"], **steps}
        before = {n: found[n] for n in values if values[n].dtype in HALVES}
        metadata = {key: said for key, said in self.metadata.items() if key != STEPS}
        return replace(self, values=values, before=before, metadata=metadata)

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
        dtypes, places = self.base_dtypes(), self.places()
        for name, own in names.found.items():
            shape = self.metadata["shapes"][name]
            check_tensor(own, names.tensors[own], shape, dtypes[name], own in names.tables)
        if self.modules:
            self._check_layers(model, names.found)

        def read(name: str, where: Tensor | None) -> Tensor:
            return at(names.tensors[names.found[name]], where)

        values = {name: read(name, places[name]) for name in names.found if name in places}
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
            if fingerprint(found.get(name), self.sampled(name, read)) != expected:
                raise DeltaError(
                    f"model's {names[name]!r} is not the base's at the replaced positions: "
                    "model is not the base that this delta was made from (or already carries a "
                    "delta). Rows that were added to an embedding are drawn anew for every model: "
                    "copy them from the tuned one, or ship that tensor whole (head=)"
                )

    def sampled(self, name: str, read: Reader) -> Tensor | None:
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
    """A delta in a model; keeps the k original values, so that `revert` is exact.

    Attributes
    ----------
    delta
        The delta, with its values, even if its file codes them against the base's.
    names
        ``{name in the delta: name in the model}``.
    """

    def __init__(self, delta: Delta, model: nn.Module) -> None:
        self.delta, self._model = delta, unwrap(model)
        self._put()

    def _put(self) -> None:
        model = self._model
        names, self._original = self.delta.check(model)
        self.delta = delta = self.delta.with_base(self._original)
        self.names, self._reverted = names.found, False
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
        places = self.delta.places()
        for name, new in values.items():
            tensor, where = tensors[self.names[name]], places[name]
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
        delta, model = self.delta, self._model
        if training_of(model) is not None:
            raise DeltaError("model is in masked training; leave that first, then revert")
        found = adapters(model) if self._modules else {}
        for name, module in self._modules.items():
            if found.get(self.names[name]) is not module:
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
            _expect(name, at(tensors[self.names[name]], where), values)
        if self._modules:
            remove_adapters(model, [self.names[name] for name in self._modules])
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


def load(path: str | os.PathLike) -> Delta:
    """Read a delta file and check all of it: checksum, names, shapes, dtypes, every position.

    Raises
    ------
    DeltaError
        If anything is wrong with the file; it says what.
    """
    parts = decode(path)
    if steps := parts.pop(STEPS):
        parts["values"] = Coded(parts["values"], steps)
    return Delta(**parts)
