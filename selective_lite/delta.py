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

from .params import head_weights, weights

VERSION = 1
POSITIONS, VALUES, DENSE, HEAD = "positions/", "values/", "dense/", "head/"


class DeltaError(ValueError):
    """A delta file that is damaged, or does not fit the model; the model was not touched."""


@dataclass(frozen=True, eq=False)
class Delta:
    """Tuned values at sorted flat positions of a base model's tensors, and whole tensors beside them.

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
        values wherever the delta replaces them.
    """

    positions: dict[str, Tensor]
    values: dict[str, Tensor]
    dense: dict[str, Tensor]
    head: dict[str, Tensor]
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Number of replaced weights outside the head."""
        return sum(v.numel() for v in self.values.values()) + sum(t.numel() for t in self.dense.values())

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors as they are stored."""
        return sum(t.numel() * t.element_size() for t in self._tensors().values())

    def _tensors(self) -> dict[str, Tensor]:
        parts = ((POSITIONS, self.positions), (VALUES, self.values), (DENSE, self.dense), (HEAD, self.head))
        return {prefix + name: t.contiguous() for prefix, part in parts for name, t in part.items()}

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
        """Put the tuned values into a model, in place.

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
            was made from. The model is unchanged.
        """
        named = dict(model.named_parameters())
        for name, shape in self.metadata["shapes"].items():
            if name not in named:
                raise DeltaError(f"model has no parameter {name!r}; this delta is for another base")
            if list(named[name].shape) != shape:
                raise DeltaError(f"model's {name!r} has shape {list(named[name].shape)}, the delta's base has {shape}")
            if str(named[name].dtype) != self.metadata["dtypes"][name]:
                wanted = self.metadata["dtypes"][name]
                raise DeltaError(f"model's {name!r} is {named[name].dtype}, the delta's base is {wanted}; convert it")
        if self._fingerprint(named) != self.metadata["fingerprint"]:
            raise DeltaError(
                "model's weights are not the base that this delta was made from (or already carry a delta)"
            )
        return Applied(self, named)

    def _fingerprint(self, named: Mapping[str, Tensor]) -> str:
        replaced = {name: _at(named[name], self.positions[name]) for name in self.positions}
        replaced |= {name: named[name].detach() for name in self.dense}
        return _digest("", replaced)


class Applied:
    """A delta in a model; keeps the k original values, so that `revert` is exact."""

    def __init__(self, delta: Delta, named: Mapping[str, nn.Parameter]) -> None:
        self._whole = {name: named[name] for name in (*delta.dense, *delta.head)}
        self._partly = {name: named[name] for name in delta.positions}
        self._delta = delta
        self._original = {name: p.detach().clone() for name, p in self._whole.items()}
        self._original |= {name: _at(p, delta.positions[name]) for name, p in self._partly.items()}
        self._write({**delta.dense, **delta.head, **delta.values})

    @torch.no_grad()
    def _write(self, values: Mapping[str, Tensor]) -> None:
        for name, p in self._whole.items():
            p.copy_(values[name])
        for name, p in self._partly.items():
            index = self._delta.positions[name].to(p.device, torch.int64)
            p.view(-1)[index] = values[name].to(p.device, p.dtype)

    def revert(self) -> None:
        """Give the model back its original bits; a second call does nothing.

        Raises
        ------
        DeltaError
            If the delta's values are no longer in the model: something else was applied on top, or it was trained.
        """
        if not self._original:
            return
        delta = self._delta
        for name, value in (*delta.dense.items(), *delta.head.items()):
            _expect(name, self._whole[name].detach(), value)
        for name, value in delta.values.items():
            _expect(name, _at(self._partly[name], delta.positions[name]), value)
        self._write(self._original)
        self._original = {}

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
    """The delta from a base to a tuned model: every weight whose bits differ.

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
        If base and tuned do not have the same tensors, shapes and dtypes, or nothing differs.
    """
    before = dict(base.named_parameters()) if isinstance(base, nn.Module) else dict(base)
    candidates, heads = weights(tuned, head), head_weights(tuned, head)
    positions, values, dense = {}, {}, {}
    for name, after in candidates.items():
        if name not in before or before[name].shape != after.shape or before[name].dtype != after.dtype:
            raise ValueError(f"base has no {name!r} of shape {tuple(after.shape)} and {after.dtype}")
        flat = after.detach().reshape(-1).cpu()
        changed = (_bits(flat) != _bits(before[name].detach().reshape(-1).cpu())).nonzero().squeeze(1)
        if len(changed) == flat.numel():
            dense[name] = after.detach().cpu().clone()
        elif len(changed):
            positions[name] = changed.to(torch.int32 if flat.numel() < 2**31 else torch.int64)
            values[name] = flat[changed].clone()
    if not (values or dense or heads):
        raise ValueError("base and tuned are equal bit by bit; there is nothing to store")
    stored = {**{name: candidates[name] for name in (*positions, *dense)}, **heads}
    delta = Delta(
        positions,
        values,
        dense,
        {name: p.detach().cpu().clone() for name, p in heads.items()},
        {
            "version": VERSION,
            "method": method,
            "total": sum(p.numel() for p in candidates.values()),
            "shapes": {name: list(p.shape) for name, p in stored.items()},
            "dtypes": {name: str(p.dtype) for name, p in stored.items()},
        },
    )
    delta.metadata["fingerprint"] = delta._fingerprint(before)
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
    if metadata.get("version") != VERSION:
        raise DeltaError(f"{path} has format version {metadata.get('version')}, this library reads {VERSION}")
    delta = Delta({}, {}, {}, {}, metadata)
    parts = {POSITIONS: delta.positions, VALUES: delta.values, DENSE: delta.dense, HEAD: delta.head}
    for key, tensor in tensors.items():
        prefix = next((p for p in parts if key.startswith(p)), None)
        if prefix is None:
            raise DeltaError(f"{path} holds an unknown tensor {key!r}")
        parts[prefix][key.removeprefix(prefix)] = tensor
    try:
        _check(delta)
    except (KeyError, TypeError, AttributeError, OverflowError) as error:
        raise DeltaError(f"{path} has incomplete metadata: {error!r}") from None
    return delta


def _check(delta: Delta) -> None:
    shapes, dtypes = delta.metadata["shapes"], delta.metadata["dtypes"]
    stored = [*delta.values, *delta.dense, *delta.head]
    if set(delta.positions) != set(delta.values) or len(set(stored)) != len(stored) or set(stored) != set(shapes):
        raise DeltaError("delta's tensors and its metadata do not name the same parameters")
    if not isinstance(delta.metadata["fingerprint"], str):
        raise DeltaError("delta has no fingerprint of its base")
    for name in stored:
        if not all(isinstance(size, int) and size >= 0 for size in shapes[name]):
            raise DeltaError(f"delta's shape of {name!r} is {shapes[name]}")
    for name, values in delta.values.items():
        index, size = delta.positions[name], prod(shapes[name])
        if index.dtype not in (torch.int32, torch.int64) or index.dim() != 1 or index.shape != values.shape:
            raise DeltaError(f"delta's positions in {name!r} must be integers, one for every value")
        if len(index) == 0 or index[0] < 0 or index[-1] >= size or (index.long().diff() <= 0).any():
            raise DeltaError(f"delta's positions in {name!r} must increase strictly within [0, {size})")
    for name, tensor in (*delta.dense.items(), *delta.head.items()):
        if list(tensor.shape) != shapes[name]:
            raise DeltaError(f"delta's {name!r} has shape {list(tensor.shape)}, its metadata say {shapes[name]}")
    for name, tensor in (*delta.values.items(), *delta.dense.items(), *delta.head.items()):
        if str(tensor.dtype) != dtypes[name] or not tensor.is_floating_point():
            raise DeltaError(f"delta's {name!r} is {tensor.dtype}, its metadata say {dtypes[name]}")


def _at(tensor: Tensor, positions: Tensor) -> Tensor:
    return tensor.detach().reshape(-1)[positions.to(tensor.device, torch.int64)].cpu()


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
