"""Delta: what fine-tuning changed, as one small checked file; apply and revert are bit-exact."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes
from torch import Tensor, nn

from .adapters import KINDS, adapter_parameters, adapters, add_adapters, check_places, part_shapes, remove_adapters
from .params import head_weights, weights

VERSIONS = (1, 2)  # 2 has small modules; a delta without them is still written as 1
POSITIONS, VALUES, DENSE, HEAD, MODULES = "positions/", "values/", "dense/", "head/", "modules/"


class DeltaError(ValueError):
    """A delta file that is damaged, or does not fit the model; the model was not touched."""


@dataclass(frozen=True, eq=False)
class Delta:
    """Tuned values at sorted flat positions of a base model's tensors, whole tensors, and small modules beside them.

    Attributes
    ----------
    positions, values
        ``{name: int32 or int64}`` and ``{name: tuned values}``; values replace the base's, they are not differences.
    dense
        ``{name: tensor}``, tensors of the base that changed everywhere.
    head
        ``{name: tensor}``, the task head; it is new, and no part of the base's fingerprint.
    metadata
        ``version``, ``method``, ``shapes`` and ``dtypes`` by name, and ``fingerprint``: a SHA-256 of the base's own
        values wherever the delta replaces them, and of as many of a matrix's values as its small module has. With
        small modules also ``modules``, ``{weight name: {"kind": "lora" or "adapter", "rank": int}}``.
    modules
        ``{weight name: {part: tensor}}``, the small modules of `adapters`; the weights they belong to are the base's.
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
        return sum(t.numel() for key, t in self._tensors().items() if key.startswith((VALUES, DENSE, MODULES)))

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors as they are stored."""
        return sum(t.numel() * t.element_size() for t in self._tensors().values())

    def _replaced(self) -> dict[str, tuple[Tensor | None, Tensor]]:
        """What replaces the base's values, ``{name: (positions, or None for the whole tensor, values)}``."""
        whole = {name: (None, tensor) for name, tensor in (*self.dense.items(), *self.head.items())}
        return {**whole, **{name: (self.positions[name], values) for name, values in self.values.items()}}

    def _tensors(self) -> dict[str, Tensor]:
        small = {f"{name}/{part}": t for name, parts in self.modules.items() for part, t in parts.items()}
        parts = {POSITIONS: self.positions, VALUES: self.values, DENSE: self.dense, HEAD: self.head, MODULES: small}
        return {prefix + name: t.contiguous() for prefix, part in parts.items() for name, t in part.items()}

    def save(self, path: str | os.PathLike) -> None:
        """Write the delta as safetensors, with a SHA-256 over tensors and metadata; complete or not at all."""
        path = Path(path)
        tensors = self._tensors()
        text = json.dumps(self.metadata, sort_keys=True)
        content = save_bytes(tensors, {"selective_lite": text, "sha256": _digest(text, tensors)})
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as file:
            try:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise

    def apply(self, model: nn.Module) -> Applied:
        """Put the tuned values and the small modules into a model, in place.

        Parameters
        ----------
        model
            The base model that the delta was made from, on any device.

        Returns
        -------
        Applied
            Its ``revert()`` gives back every bit; as a context manager it reverts when the block is left.

        Raises
        ------
        DeltaError
            If a tensor is missing, or has another shape or dtype, or the base's values are not those that the delta
            was made from, or a layer cannot take its small module. The model is unchanged.
        """
        named = dict(model.named_parameters())
        for name, shape in self.metadata["shapes"].items():
            if name not in named:
                raise DeltaError(f"model has no parameter {name!r}; this delta is for another base")
            if list(named[name].shape) != shape:
                raise DeltaError(f"model's {name!r} has shape {list(named[name].shape)}, the delta's base has {shape}")
            wanted = self.metadata["dtypes"][name]
            if str(named[name].dtype) != wanted:
                raise DeltaError(f"model's {name!r} is {named[name].dtype}, the delta's base is {wanted}; convert it")
        self._check_places(model)
        if self._fingerprint(named) != self.metadata["fingerprint"]:
            raise DeltaError(
                "model's weights are not the base that this delta was made from (or already carry a delta)"
            )
        return Applied(self, model, named)

    def _check_places(self, model: nn.Module) -> None:
        try:
            places = check_places(model, {name: self.metadata["modules"][name]["rank"] for name in self.modules})
        except ValueError as error:
            raise DeltaError(f"model cannot take this delta's small modules: {error}") from None
        for name, (_, d_in, d_out) in places.items():
            if not _fits(self.modules[name], self.metadata["modules"][name], d_in, d_out):
                raise DeltaError(f"the small module of {name!r} is not for a layer from {d_in} to {d_out} features")

    def _fingerprint(self, named: Mapping[str, Tensor]) -> str:
        replaced = {name: _at(named[name], self.positions[name]) for name in self.positions}
        replaced |= {name: named[name].detach() for name in self.dense}
        for name, parts in self.modules.items():  # not replaced; some of its values, evenly spread, tell the matrix
            size = named[name].numel()
            count = min(size, sum(t.numel() for t in parts.values()))
            replaced[MODULES + name] = _at(named[name], torch.arange(count, device="cpu") * size // count)
        return _digest("", replaced)


class Applied:
    """A delta in a model; keeps the k original values, so that `revert` is exact."""

    def __init__(self, delta: Delta, model: nn.Module, named: Mapping[str, nn.Parameter]) -> None:
        self._delta, self._model, self._named, self._reverted = delta, model, named, False
        self._modules: dict[str, nn.Module] = {}
        for name, parts in delta.modules.items():
            spec = delta.metadata["modules"][name]
            self._modules |= add_adapters(model, (name,), kind=spec["kind"], rank=spec["rank"])
            self._modules[name].load_state_dict(parts)
        replaced = delta._replaced()
        self._original = {name: (where, _at(named[name], where).clone()) for name, (where, _) in replaced.items()}
        self._write(replaced)

    @torch.no_grad()
    def _write(self, replaced: Mapping[str, tuple[Tensor | None, Tensor]]) -> None:
        for name, (where, values) in replaced.items():
            p = self._named[name]
            if where is None:
                p.copy_(values.reshape(p.shape))
            else:
                p.view(-1)[where.to(p.device, torch.int64)] = values.to(p.device, p.dtype)

    def revert(self) -> None:
        """Give the model back its original bits; a second call does nothing.

        Raises
        ------
        DeltaError
            If the delta's values are no longer in the model: something else was applied on top, or it was trained.
        """
        if self._reverted:
            return
        delta, found = self._delta, adapters(self._model)
        for name, module in self._modules.items():
            if found.get(name) is not module:
                raise DeltaError(f"{name!r} no longer has this delta's small module; put it back or reload the base")
            for part, p in module.named_parameters():
                _expect(f"{name}/{part}", p, delta.modules[name][part])
        for name, (where, values) in delta._replaced().items():
            _expect(name, _at(self._named[name], where), values)
        remove_adapters(self._model, list(self._modules))
        self._write(self._original)
        self._original, self._reverted = {}, True

    def __enter__(self) -> Applied:
        return self

    def __exit__(self, *exception: object) -> None:
        self.revert()


def _expect(name: str, found: Tensor, value: Tensor) -> None:
    if _raw(found.cpu()) != _raw(value.to(found.dtype)):
        raise DeltaError(f"{name!r} no longer holds this delta's values; revert what was applied after it first")


def diff(
    base: nn.Module | Mapping[str, Tensor], tuned: nn.Module, *, head: Sequence[str] | None = None, method: str = ""
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
        If base and tuned do not have the same tensors, shapes and dtypes, or nothing differs, or the base has small
        modules of its own.
    """
    before = dict(base.named_parameters()) if isinstance(base, nn.Module) else dict(base)
    small, own = adapters(tuned), adapter_parameters(tuned)
    if (isinstance(base, nn.Module) and adapters(base)) or any(name in before for name in own):
        raise ValueError("base has small modules; merge or remove them, so that it is an ordinary model")
    for name, module in small.items():
        if module.kind not in KINDS:
            raise ValueError(f"tuned has a small module of kind {module.kind!r} at {name!r}; merge it first")
        if any(p.dtype != tuned.get_parameter(name).dtype for p in module.parameters()):
            raise ValueError(f"tuned has a small module of another dtype than {name!r}; convert the whole model")
    candidates = {name: p for name, p in weights(tuned, head).items() if name not in own}
    heads = {name: _copy(p) for name, p in head_weights(tuned, head).items() if name not in own}
    positions, values, dense = {}, {}, {}
    for name, after in candidates.items():
        if name not in before or before[name].shape != after.shape or before[name].dtype != after.dtype:
            raise ValueError(f"base has no {name!r} of shape {tuple(after.shape)} and {after.dtype}")
        flat = after.detach().reshape(-1).cpu()
        changed = (_bits(flat) != _bits(before[name].detach().reshape(-1).cpu())).nonzero().squeeze(1)
        if len(changed) == flat.numel():
            dense[name] = _copy(after)
        elif len(changed):
            positions[name] = changed.to(torch.int32 if flat.numel() < 2**31 else torch.int64)
            values[name] = flat[changed].clone()
    if not (values or dense or heads or small):
        raise ValueError("base and tuned are equal bit by bit; there is nothing to store")
    stored = {name: {**candidates, **heads}[name] for name in (*positions, *dense, *heads, *small)}
    metadata: dict[str, Any] = {
        "version": 2 if small else 1,
        "method": method,
        "total": sum(p.numel() for p in candidates.values()),
        "shapes": {name: list(p.shape) for name, p in stored.items()},
        "dtypes": {name: str(p.dtype) for name, p in stored.items()},
    }
    if small:
        metadata["modules"] = {name: {"kind": module.kind, "rank": module.rank} for name, module in small.items()}
    modules = {name: {part: _copy(p) for part, p in m.named_parameters()} for name, m in small.items()}
    delta = Delta(positions, values, dense, heads, metadata, modules)
    metadata["fingerprint"] = delta._fingerprint(before)
    return delta


def load(path: str | os.PathLike) -> Delta:
    """Read a delta file and check all of it: checksum, version, names, shapes, dtypes, and every position.

    Raises
    ------
    DeltaError
        If anything is wrong with the file; it says what.
    """
    content = Path(path).read_bytes()
    try:
        tensors = load_bytes(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
        metadata = json.loads(header["selective_lite"])
        if not isinstance(metadata, dict):
            raise TypeError("metadata is no object")
    except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise DeltaError(f"{path} is no delta file, or a damaged one: {error}") from None
    if _digest(header["selective_lite"], tensors) != header.get("sha256"):
        raise DeltaError(f"{path} is damaged: its SHA-256 is not the one it was saved with")
    if metadata.get("version") not in VERSIONS:
        raise DeltaError(f"{path} has format version {metadata.get('version')}, this library reads {VERSIONS}")
    delta, small = Delta({}, {}, {}, {}, metadata), dict[str, Tensor]()
    parts = {POSITIONS: delta.positions, VALUES: delta.values, DENSE: delta.dense, HEAD: delta.head}
    parts |= {MODULES: small} if metadata["version"] == 2 else {}
    for key, tensor in tensors.items():
        prefix = next((p for p in parts if key.startswith(p)), None)
        if prefix is None:
            raise DeltaError(f"{path} holds an unknown tensor {key!r}")
        parts[prefix][key.removeprefix(prefix)] = tensor
    for key, tensor in small.items():
        name, _, part = key.rpartition("/")
        delta.modules.setdefault(name, {})[part] = tensor
    try:
        _check(delta)
    except (KeyError, TypeError, AttributeError, OverflowError) as error:
        raise DeltaError(f"{path} has incomplete metadata: {error!r}") from None
    return delta


def _check(delta: Delta) -> None:
    shapes, dtypes = delta.metadata["shapes"], delta.metadata["dtypes"]
    stored = [*delta.values, *delta.dense, *delta.head]
    unique = set(delta.positions) == set(delta.values) and len(set(stored)) == len(stored)
    if not unique or {*stored, *delta.modules} != set(shapes):
        raise DeltaError("delta's tensors and its metadata do not name the same parameters")
    if not isinstance(delta.metadata["fingerprint"], str):
        raise DeltaError("delta has no fingerprint of its base")
    for name in shapes:
        if not all(isinstance(size, int) and size >= 0 for size in shapes[name]):
            raise DeltaError(f"delta's shape of {name!r} is {shapes[name]}")
    for name, (index, values) in delta._replaced().items():
        if index is None:
            if list(values.shape) != shapes[name]:
                raise DeltaError(f"delta's {name!r} has shape {list(values.shape)}, its metadata say {shapes[name]}")
            continue
        if index.dtype not in (torch.int32, torch.int64) or index.dim() != 1 or index.shape != values.shape:
            raise DeltaError(f"delta's positions in {name!r} must be integers, one for every value")
        size = prod(shapes[name])
        if len(index) == 0 or index[0] < 0 or index[-1] >= size or (index.long().diff() <= 0).any():
            raise DeltaError(f"delta's positions in {name!r} must increase strictly within [0, {size})")
    replaced = [(name, values) for name, (_, values) in delta._replaced().items()]
    small = [(name, tensor) for name, parts in delta.modules.items() for tensor in parts.values()]
    for name, tensor in replaced + small:
        if str(tensor.dtype) != dtypes[name] or not tensor.is_floating_point():
            raise DeltaError(f"delta's {name!r} is {tensor.dtype}, its metadata say {dtypes[name]}")
    _check_modules(delta)


def _check_modules(delta: Delta) -> None:
    """A small module has the parts that its kind and rank say, for a matrix of this shape or its transpose."""
    specs, shapes = delta.metadata["modules"] if delta.metadata["version"] == 2 else {}, delta.metadata["shapes"]
    if set(specs) != set(delta.modules):
        raise DeltaError("delta's small modules and its metadata do not name the same parameters")
    for name, spec in specs.items():
        kind, rank, shape = spec["kind"], spec["rank"], shapes[name]
        known = kind in KINDS and type(rank) is int and len(shape) == 2 and 1 <= rank <= min(shape)
        if not known or not any(_fits(delta.modules[name], spec, *sizes) for sizes in (shape, shape[::-1])):
            raise DeltaError(f"delta's small module of {name!r} is no {kind!r} of rank {rank!r} for shape {shape}")


def _fits(parts: Mapping[str, Tensor], spec: Mapping[str, Any], d_in: int, d_out: int) -> bool:
    """Whether these are the tensors of a small module of this kind and rank, for a layer from `d_in` to `d_out`."""
    found = {part: tuple(tensor.shape) for part, tensor in parts.items()}
    return found == part_shapes(spec["kind"], d_in, d_out, spec["rank"])


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone()


def _at(tensor: Tensor, positions: Tensor | None) -> Tensor:
    flat = tensor.detach().reshape(-1)
    return (flat if positions is None else flat[positions.to(tensor.device, torch.int64)]).cpu()


def _bits(tensor: Tensor) -> Tensor:
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(integers[tensor.element_size()])


def _raw(tensor: Tensor) -> bytes:
    return _bits(tensor.detach().cpu()).numpy().tobytes()


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over a text and named tensors: names, dtypes, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(_raw(tensor))
    return digest.hexdigest()
