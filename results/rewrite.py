"""Rewrite the deltas beside the rows from the first file format: ``python results/rewrite.py``.

Positions and values stay as they are, to the bit. What the new format says in addition (the base,
its labels, a fingerprint for every tensor) is read from the base itself. The rows' bytes and
checksums follow. A file that is in the new format already is left alone.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import selective_lite as sl
from selective_lite.lab.models import load_classifier, load_language_model
from selective_lite.ship.base import at, tensors_of
from selective_lite.ship.diff import assemble
from selective_lite.ship.file import digest, read
from selective_lite.ship.positions import unpack

HERE = Path(__file__).resolve().parent
BASES: dict[str, Callable[[], tuple[Any, Any]]] = {
    "minilm": load_classifier,
    "smollm2": load_language_model,
}
FILES = {
    "movies": ("minilm", "deltas"),
    "tweets": ("minilm", "deltas"),
    "products": ("minilm", "deltas"),
    "editorials": ("minilm", "deltas"),
    "language": ("smollm2", "language"),
}


def parts_of(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors of one part, by the names of the base's tensors."""
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def rewritten(file: Path, base: nn.Module) -> sl.Delta:
    """The delta of a file of the first format, with what its base says."""
    tensors, old = read(file)
    values, dense = parts_of(tensors, "values/"), parts_of(tensors, "dense/")
    names = sorted(values)
    found = unpack(tensors["gaps"], [len(values[name]) for name in names])
    positions = dict(zip(names, found, strict=True))
    named = tensors_of(base)
    before = {
        n: at(named[n], positions.get(n)) for n in old["shapes"] if "head/" + n not in tensors
    }
    if digest("", before) != old["fingerprint"]:
        raise ValueError(f"{file.name} is not of this base")
    whole = {name: (torch.arange(t.numel()), t.reshape(-1)) for name, t in dense.items()}
    delta = assemble(
        base,
        lambda name, where: at(named[name], where),
        {**{name: (positions[name], values[name]) for name in names}, **whole},
        parts_of(tensors, "head/"),
        {},
        method=old["method"],
        total=old["total"],
    )
    same = all(
        torch.equal(delta.positions[n].long(), positions[n])
        and digest("", {n: delta.values[n]}) == digest("", {n: values[n]})
        for n in names
    )
    kept = {**delta.dense, **delta.head}
    if not same or digest("", kept) != digest("", {**dense, **parts_of(tensors, "head/")}):
        raise ValueError(f"{file.name} would change")
    assert {n: prod(s) for n, s in delta.metadata["shapes"].items()} == {
        n: prod(s) for n, s in old["shapes"].items()
    }
    return delta


def sha256(file: Path) -> str:
    """Checksum of a file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def main() -> None:
    """Rewrite every file that is in the first format, and the bytes and checksum in its row."""
    bases: dict[str, nn.Module] = {}
    for name, (source, rows) in FILES.items():
        file, table = HERE / f"{name}.safetensors", HERE / f"{rows}.json"
        if "version" not in read(file)[1]:
            print(f"{file.name} is in the format of today", file=sys.stderr)
            continue
        if source not in bases:
            bases[source] = BASES[source]()[0]
        old, size = sha256(file), file.stat().st_size
        rewritten(file, bases[source]).save(file, "gap-lzma")
        lines = table.read_text().splitlines(keepends=True)
        (number,) = (i for i, line in enumerate(lines) if old in line)
        line = lines[number].replace(old, sha256(file))
        lines[number] = re.sub(rf'"bytes": {size}\b', f'"bytes": {file.stat().st_size}', line)
        table.write_text("".join(lines))
        print(f"{file.name}: {size:,} to {file.stat().st_size:,} bytes", file=sys.stderr)


if __name__ == "__main__":
    main()
