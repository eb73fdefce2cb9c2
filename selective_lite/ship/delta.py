"""Delta: what fine-tuning changed, as positions, tensors and small modules; apply and revert are bit-exact."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..layers.small import (
    KINDS,
    adapter_parameters,
    adapters,
    add_adapters,
    find_layers,
    part_shapes,
    remove_adapters,
)
from ..params import head_weights, weights
from .file import DeltaError, bits, digest, read, write
from .positions import increasing, pack, unpack

Encoding = Literal["flat", "gap-lzma"]
# The oldest version that can hold it: 2 has small modules; in 3 one stream of gaps stands for all
# positions.
VERSIONS: dict[int, Encoding] = {1: "flat", 2: "flat", 3: "gap-lzma"}
POSITIONS, VALUES, DENSE, HEAD, MODULES, GAPS = (
    "positions/",
    "values/",
    "dense/",
    "head/",
    "modules/",
    "gaps",
)


@dataclass(frozen=True, eq=False)
class Delta:
    """Tuned values at sorted flat positions of a base model's tensors, whole tensors, and small modules beside them.

    Attributes
    ----------
    positions, values
        ``{name: int32 or int64}`` and ``{name: tuned values}``; values replace the base's, they are
        not differences.
    dense
        ``{name: tensor}``, tensors of the base that changed everywhere.
    head
        ``{name: tensor}``, the task head; it is new, and no part of the base's fingerprint.
    metadata
        ``version``, ``method``, ``shapes`` and ``dtypes`` by name, and ``fingerprint``: a SHA-256
        of the base's own values wherever the delta replaces them, and of as many of a matrix's
        values as its small module has. With small modules also ``modules``, ``{weight name:
        {"kind": "lora" or "adapter", "rank": int}}``.
    modules
        ``{weight name: {part: tensor}}``, the small modules of `adapters`; the weights they belong
        to are the base's.
    """

    positions: dict[str, Tensor]
    values: dict[str, Tensor]
    dense: dict[str, Tensor]
    head: dict[str, Tensor]
    metadata: dict[str, Any] = field(default_factory=dict)
    modules: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Number of replaced weights outside the head, and of the small modules' weights."""
        return sum(
            t.numel()
            for key, t in self._tensors().items()
            if key.startswith((VALUES, DENSE, MODULES))
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors as they are stored."""
        return sum(t.numel() * t.element_size() for t in self._tensors().values())

    def _replaced(self) -> dict[str, tuple[Tensor | None, Tensor]]:
        """What replaces the base's values, ``{name: (positions, or None for the whole tensor, values)}``."""
        whole = {name: (None, tensor) for name, tensor in (*self.dense.items(), *self.head.items())}
        return {
            **whole,
            **{name: (self.positions[name], values) for name, values in self.values.items()},
        }

    def _named(self) -> list[tuple[str, Tensor]]:
        """Every stored tensor but the positions, with the name of the base's tensor that it belongs to."""
        small = [
            (name, tensor) for name, parts in self.modules.items() for tensor in parts.values()
        ]
        return [*self.values.items(), *self.dense.items(), *self.head.items(), *small]

    def _tensors(self) -> dict[str, Tensor]:
        small = {
            f"{name}/{part}": t for name, parts in self.modules.items() for part, t in parts.items()
        }
        parts = {
            POSITIONS: self.positions,
            VALUES: self.values,
            DENSE: self.dense,
            HEAD: self.head,
            MODULES: small,
        }
        return {
            prefix + name: t.contiguous()
            for prefix, part in parts.items()
            for name, t in part.items()
        }

    def save(self, path: str | os.PathLike, encoding: Encoding = "flat") -> None:
        """Write the delta as safetensors, with a SHA-256 over tensors and metadata; complete or not at all.

        Parameters
        ----------
        path
            Of the file; one that is there is replaced.
        encoding
            ``"flat"`` stores positions as they are, for every tool to read; ``"gap-lzma"`` as
            compressed gaps, in a third of the bytes.

        Raises
        ------
        ValueError
            If `encoding` is another one.
        """
        if encoding not in VERSIONS.values():
            raise ValueError(
                f"encoding={encoding!r} is unknown; choose one of {(*dict.fromkeys(VERSIONS.values()),)}"
            )
        tensors, metadata = self._tensors(), {**self.metadata, "version": 2 if self.modules else 1}
        if encoding == "gap-lzma":
            tensors = {
                key: tensor for key, tensor in tensors.items() if not key.startswith(POSITIONS)
            }
            tensors[GAPS] = pack([self.positions[name] for name in sorted(self.values)])
            metadata["version"] = 3
            del metadata["dtypes"]  # the tensors say it
        write(path, tensors, metadata)

    def apply(self, model: nn.Module) -> Applied:
        """Put the tuned values and the small modules into a model, in place.

        Parameters
        ----------
        model
            The base model that the delta was made from, on any device.

        Returns
        -------
        Applied
            Its ``revert()`` gives back every bit; as a context manager it reverts when the block is
            left.

        Raises
        ------
        DeltaError
            If a tensor is missing, or has another shape or dtype, or the base's values are not
            those that the delta was made from, or a layer cannot take its small module. The model
            is unchanged.
        """
        return Applied(self, model)

    def base_values(self, model: nn.Module) -> dict[str, Tensor]:
        """The base's own values where this delta replaces them, on the CPU; errors as `apply`.

        Returns
        -------
        dict
            ``{name: values (k,)}`` for single positions, ``{name: tensor (numel,)}`` for dense
            tensors and the head.
        """
        named = dict(model.named_parameters())
        for name, shape in self.metadata["shapes"].items():
            if name not in named:
                raise DeltaError(f"model has no parameter {name!r}; this delta is for another base")
            if list(named[name].shape) != shape:
                raise DeltaError(
                    f"model's {name!r} has shape {list(named[name].shape)}, the delta's base has {shape}"
                )
            wanted = self.metadata["dtypes"][name]
            if str(named[name].dtype) != wanted:
                raise DeltaError(
                    f"model's {name!r} is {named[name].dtype}, the delta's base is {wanted}; convert it"
                )
        if self.modules:
            self._check_places(model)
        found = {name: _at(named[name], where) for name, (where, _) in self._replaced().items()}
        if self._fingerprint(named, found) != self.metadata["fingerprint"]:
            raise DeltaError(
                "model's weights are not the base that this delta was made from (or already carry a delta)"
            )
        return found

    def _check_places(self, model: nn.Module) -> None:
        try:
            places = find_layers(
                model, {name: self.metadata["modules"][name]["rank"] for name in self.modules}
            )
        except ValueError as error:
            raise DeltaError(f"model cannot take this delta's small modules: {error}") from None
        for name, (_, d_in, d_out) in places.items():
            if not _fits(self.modules[name], self.metadata["modules"][name], d_in, d_out):
                raise DeltaError(
                    f"the small module of {name!r} is not for a layer from {d_in} to {d_out} features"
                )

    def _fingerprint(self, named: Mapping[str, Tensor], replaced: Mapping[str, Tensor]) -> str:
        covered = {name: values for name, values in replaced.items() if name not in self.head}
        for (
            name,
            parts,
        ) in (
            self.modules.items()
        ):  # not replaced; some of its values, evenly spread, tell the matrix
            size = named[name].numel()
            count = min(size, sum(t.numel() for t in parts.values()))
            covered[MODULES + name] = _at(
                named[name], torch.arange(count, device="cpu") * size // count
            )
        return digest("", covered)


class Applied:
    """A delta in a model; keeps the k original values, so that `revert` is exact."""

    def __init__(self, delta: Delta, model: nn.Module) -> None:
        self._delta, self._model = delta, model
        self._put()

    def _put(self) -> None:
        delta, model = self._delta, self._model
        self._original = delta.base_values(model)
        self._named, self._modules, self._reverted = (
            dict(model.named_parameters()),
            dict[str, nn.Module](),
            False,
        )
        for name, parts in delta.modules.items():
            spec = delta.metadata["modules"][name]
            self._modules |= add_adapters(model, (name,), kind=spec["kind"], rank=spec["rank"])
            self._modules[name].load_state_dict(parts)
        self._write({name: values for name, (_, values) in delta._replaced().items()})

    @torch.no_grad()
    def _write(self, values: Mapping[str, Tensor]) -> None:
        for name, (where, _) in self._delta._replaced().items():
            p = self._named[name]
            if where is None:
                p.copy_(values[name].reshape(p.shape))
            else:
                p.put_(where.to(p.device, torch.int64), values[name].to(p.device))

    def revert(self) -> None:
        """Give the model back its original bits; a second call does nothing.

        Raises
        ------
        DeltaError
            If the delta's values are no longer in the model: something else was applied on top, or
            it was trained.
        """
        if self._reverted:
            return
        delta, found = self._delta, adapters(self._model) if self._modules else {}
        for name, module in self._modules.items():
            if found.get(name) is not module:
                raise DeltaError(
                    f"{name!r} no longer has this delta's small module; put it back or reload the base"
                )
            for part, p in module.named_parameters():
                _expect(f"{name}/{part}", p, delta.modules[name][part])
        for name, (where, values) in delta._replaced().items():
            _expect(name, _at(self._named[name], where), values)
        if self._modules:
            remove_adapters(self._model, list(self._modules))
        self._write(self._original)
        self._original, self._reverted = {}, True

    def switch(self, delta: Delta) -> Applied:
        """Take this delta out and put another one of the same base in, in place; if that fails, this one is back.

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
    """The delta from a base to a tuned model: every weight whose bits differ, and the small modules it has.

    Parameters
    ----------
    base
        The model before, or its `snapshot`.
    tuned
        The model after.
    head
        As in `weights`; the head is stored whole.
    method
        How it was tuned, for the reader of the file.

    Raises
    ------
    ValueError
        If base and tuned do not have the same tensors, shapes and dtypes, or nothing differs, or
        the base has small modules of its own.
    """
    before = dict(base.named_parameters()) if isinstance(base, nn.Module) else dict(base)
    small, own = adapters(tuned), adapter_parameters(tuned)
    if (isinstance(base, nn.Module) and adapters(base)) or any(name in before for name in own):
        raise ValueError(
            "base has small modules; merge or remove them, so that it is an ordinary model"
        )
    for name, module in small.items():
        if module.kind not in KINDS:
            raise ValueError(
                f"tuned has a small module of kind {module.kind!r} at {name!r}; merge it first"
            )
        if any(p.dtype != tuned.get_parameter(name).dtype for p in module.parameters()):
            raise ValueError(
                f"tuned has a small module of another dtype than {name!r}; convert the whole model"
            )
    candidates = {name: p for name, p in weights(tuned, head).items() if name not in own}
    heads = {name: _copy(p) for name, p in head_weights(tuned, head).items() if name not in own}
    changed = {}
    for name, after in candidates.items():
        if (
            name not in before
            or before[name].shape != after.shape
            or before[name].dtype != after.dtype
        ):
            raise ValueError(
                f"base has no {name!r} of shape {tuple(after.shape)} and {after.dtype}"
            )
        flat = after.detach().reshape(-1).cpu()
        where = (bits(flat) != bits(before[name].cpu()).reshape(-1)).nonzero().squeeze(1)
        changed[name] = where, flat[where]
    if not (heads or small or any(len(where) for where, _ in changed.values())):
        raise ValueError("base and tuned are equal bit by bit; there is nothing to store")
    total = sum(p.numel() for p in candidates.values())
    return assemble(before, changed, heads, small, method=method, total=total)


def assemble(
    base: Mapping[str, Tensor],
    changed: Mapping[str, tuple[Tensor, Tensor]],
    head: dict[str, Tensor],
    small: Mapping[str, Any],
    *,
    method: str,
    total: int,
) -> Delta:
    """The delta of changed values, ``{name: (sorted positions, values)}``, a head, and small modules, to a base."""
    positions, values, dense = {}, {}, {}
    for name, (where, new) in changed.items():
        size = base[name].numel()
        if len(where) == size:
            dense[name] = new.reshape(base[name].shape)
        elif len(where):
            positions[name], values[name] = where.to(_index_dtype(size)), new
    stored = {name: {**base, **head}[name] for name in (*positions, *dense, *head, *small)}
    metadata: dict[str, Any] = {
        "version": 2 if small else 1,
        "method": method,
        "total": total,
        "shapes": {name: list(p.shape) for name, p in stored.items()},
        "dtypes": {name: str(p.dtype) for name, p in stored.items()},
    }
    if small:
        metadata["modules"] = {
            name: {"kind": module.kind, "rank": module.rank} for name, module in small.items()
        }
    modules = {
        name: {part: _copy(p) for part, p in m.named_parameters()} for name, m in small.items()
    }
    delta = Delta(positions, values, dense, head, metadata, modules)
    replaced = {
        name: _at(base[name], where)
        for name, (where, _) in delta._replaced().items()
        if name not in head
    }
    metadata["fingerprint"] = delta._fingerprint(base, replaced)
    return delta


def load(path: str | os.PathLike) -> Delta:
    """Read a delta file and check all of it: checksum, version, names, shapes, dtypes, and every position.

    Raises
    ------
    DeltaError
        If anything is wrong with the file; it says what.
    """
    tensors, metadata = read(path)
    version = metadata.get("version")
    if type(version) is not int or version not in VERSIONS:
        raise DeltaError(f"{path} has format version {version}, this library reads {(*VERSIONS,)}")
    if version == 1:  # it knows no modules: what its metadata say of them has no meaning
        metadata.pop("modules", None)
    delta, small, stream = Delta({}, {}, {}, {}, metadata), dict[str, Tensor](), dict[str, Tensor]()
    parts = {VALUES: delta.values, DENSE: delta.dense, HEAD: delta.head}
    parts |= {GAPS: stream} if version == 3 else {POSITIONS: delta.positions}
    parts |= {MODULES: small} if version >= 2 else {}
    for key, tensor in tensors.items():
        prefix = next((p for p in parts if key.startswith(p)), None)
        if prefix is None:
            raise DeltaError(f"{path} holds an unknown tensor {key!r}")
        parts[prefix][key.removeprefix(prefix)] = tensor
    for key, tensor in small.items():
        name, _, part = key.rpartition("/")
        delta.modules.setdefault(name, {})[part] = tensor
    try:
        if version == 3:
            metadata["dtypes"] = {name: str(tensor.dtype) for name, tensor in delta._named()}
        _check_metadata(delta)
        if version == 3:
            _unpack(delta, stream)
        _check(delta)
    except (KeyError, TypeError, AttributeError, OverflowError) as error:
        raise DeltaError(f"{path} has incomplete metadata: {error!r}") from None
    return delta


def _unpack(delta: Delta, stream: Mapping[str, Tensor]) -> None:
    """Put the positions of a stream of gaps into a delta, checked, each in the dtype that `diff` gives it."""
    names = sorted(delta.values)
    if (
        set(stream) != {""}
        or stream[""].dtype != torch.uint8
        or any(v.dim() != 1 for v in delta.values.values())
    ):
        raise DeltaError("delta's gaps must be one stream of bytes, for vectors of values")
    try:
        positions = unpack(stream[""], [len(delta.values[name]) for name in names])
    except ValueError as error:
        raise DeltaError(f"delta's gaps do not fit its values: {error}") from None
    for name, index in zip(names, positions, strict=True):
        size = prod(delta.metadata["shapes"][name])
        _check_positions(name, index, size)
        delta.positions[name] = index.to(_index_dtype(size))


def _check_positions(name: str, index: Tensor, size: int) -> None:
    if not increasing(index, size):
        raise DeltaError(f"delta's positions in {name!r} must increase strictly within [0, {size})")


def _check_metadata(delta: Delta) -> None:
    for key, kind in (
        ("fingerprint", str),
        ("method", str),
        ("total", int),
        ("shapes", dict),
        ("dtypes", dict),
    ):
        if type(delta.metadata[key]) is not kind:
            raise DeltaError(
                f"delta's {key} is a {type(delta.metadata[key]).__name__}, not a {kind.__name__}"
            )
    for name, shape in delta.metadata["shapes"].items():
        if type(shape) is not list or not all(
            type(size) is int and 0 <= size < 2**63 for size in shape
        ):
            raise DeltaError(f"delta's shape of {name!r} is {shape}")


def _check(delta: Delta) -> None:
    shapes, dtypes = delta.metadata["shapes"], delta.metadata["dtypes"]
    stored = [*delta.values, *delta.dense, *delta.head]
    unique = set(delta.positions) == set(delta.values) and len(set(stored)) == len(stored)
    if not unique or {*stored, *delta.modules} != set(shapes):
        raise DeltaError("delta's tensors and its metadata do not name the same parameters")
    for name, (index, values) in delta._replaced().items():
        if index is None:
            if list(values.shape) != shapes[name]:
                raise DeltaError(
                    f"delta's {name!r} has shape {list(values.shape)}, its metadata say {shapes[name]}"
                )
            continue
        if (
            index.dtype not in (torch.int32, torch.int64)
            or index.dim() != 1
            or index.shape != values.shape
        ):
            raise DeltaError(f"delta's positions in {name!r} must be integers, one for every value")
        _check_positions(name, index, prod(shapes[name]))
    for name, tensor in delta._named():
        if str(tensor.dtype) != dtypes[name] or not tensor.is_floating_point():
            raise DeltaError(f"delta's {name!r} is {tensor.dtype}, its metadata say {dtypes[name]}")
    _check_modules(delta)


def _check_modules(delta: Delta) -> None:
    """A small module has the parts that its kind and rank say, for a matrix of this shape or its transpose."""
    metadata, shapes = delta.metadata, delta.metadata["shapes"]
    specs = metadata["modules"] if metadata["version"] == 2 else metadata.get("modules", {})
    if set(specs) != set(delta.modules):
        raise DeltaError("delta's small modules and its metadata do not name the same parameters")
    for name, spec in specs.items():
        kind, rank, shape = spec["kind"], spec["rank"], shapes[name]
        known = kind in KINDS and type(rank) is int and len(shape) == 2 and 1 <= rank <= min(shape)
        if not known or not any(
            _fits(delta.modules[name], spec, *sizes) for sizes in (shape, shape[::-1])
        ):
            raise DeltaError(
                f"delta's small module of {name!r} is no {kind!r} of rank {rank!r} for shape {shape}"
            )


def _fits(parts: Mapping[str, Tensor], spec: Mapping[str, Any], d_in: int, d_out: int) -> bool:
    """Whether these are the tensors of a small module of this kind and rank, for a layer from `d_in` to `d_out`."""
    found = {part: tuple(tensor.shape) for part, tensor in parts.items()}
    return found == part_shapes(spec["kind"], d_in, d_out, spec["rank"])


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone()


def _at(tensor: Tensor, positions: Tensor | None = None) -> Tensor:
    """A copy on the CPU of a tensor's values at flat positions, or of all of them."""
    flat = tensor.detach().reshape(-1)
    return (
        _copy(flat)
        if positions is None
        else flat.index_select(0, positions.to(tensor.device)).cpu()
    )


def _index_dtype(size: int) -> torch.dtype:
    return torch.int32 if size < 2**31 else torch.int64
