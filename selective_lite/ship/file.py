"""Container: named tensors and metadata as a safetensors file with a SHA-256 over both, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes
from torch import Tensor


class DeltaError(ValueError):
    """A delta file that is damaged, or does not fit the model; the model was not touched."""


def write(
    path: str | os.PathLike, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]
) -> None:
    """Write the file in place of what was there; `metadata` must be JSON-able."""
    path, text = Path(path), json.dumps(metadata, sort_keys=True)
    content = save_bytes(dict(tensors), {"selective_lite": text, "sha256": digest(text, tensors)})
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as file:
        try:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def read(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and metadata that `write` was given, after the check of their SHA-256.

    Raises
    ------
    DeltaError
        If this is another kind of file, or a damaged one.
    """
    content = Path(path).read_bytes()
    try:
        tensors = load_bytes(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
        text = header["selective_lite"]
        found, metadata = digest(text, tensors), json.loads(text)
        if not isinstance(metadata, dict):
            raise TypeError("metadata is no object")
    except (SafetensorError, KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise DeltaError(f"{path} is no delta file, or a damaged one: {error}") from None
    if found != header.get("sha256"):
        raise DeltaError(f"{path} is damaged: its SHA-256 is not the one it was saved with")
    return tensors, metadata


def digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over a text and named tensors: names, dtypes, shapes and bytes, in the order of the names."""
    found = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        found.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        found.update(raw(tensor))
    return found.hexdigest()


def bits(tensor: Tensor) -> Tensor:
    """A tensor's bits as integers of its element size, so that zeros of both signs differ and NaNs compare."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().contiguous().view(integers[tensor.element_size()])


def raw(tensor: Tensor) -> memoryview:
    """A tensor's bytes, row-major; of a tensor on the CPU without a copy."""
    return bits(tensor.cpu()).reshape(-1).numpy().data
