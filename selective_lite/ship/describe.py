"""Describe: what a delta holds, as a page that a person reads."""

from __future__ import annotations

import os
import re
from collections import Counter
from math import prod
from pathlib import Path

from .delta import DENSE, HEAD, MODULES, POSITIONS, VALUES, VERSIONS, Delta, load


def describe(delta: Delta | str | os.PathLike, *, tensors: int = 10) -> str:
    """A page about a delta or a delta file: method, counts, bytes, encoding, fullest tensors, layers, head, modules.

    Parameters
    ----------
    delta
        A delta, or the path of its file, which is checked as by `load`.
    tensors
        How many of the tensors with the largest replaced share to list.

    Returns
    -------
    str
        Lines of printable text, whatever the file holds.

    Raises
    ------
    DeltaError
        If the file is damaged.
    """
    path, delta = (None, delta) if isinstance(delta, Delta) else (Path(delta), load(delta))
    metadata, version = delta.metadata, delta.metadata["version"]
    counts = {
        name: values.numel() for name, values in (*delta.values.items(), *delta.dense.items())
    }
    k, total = sum(counts.values()), metadata["total"]
    small = Counter(
        f"{spec['kind']} of rank {spec['rank']}" for spec in metadata.get("modules", {}).values()
    )
    stored = f", file {path.stat().st_size:,} bytes" if path else ""
    shares = sorted(
        ((count / prod(metadata["shapes"][name]), name) for name, count in counts.items()),
        reverse=True,
    )
    layers = Counter[str]()
    for name, count in counts.items():
        layers[_layer(name)] += count
    lines = [
        f"method       {metadata['method'] or 'not said'}",
        f"replaced     {k:,} of {total:,} weights{_percent(k, total)}, in {len(counts)} tensors, "
        f"{len(delta.dense)} of them whole",
        f"head         {_amount(delta.head)}",
        f"modules      {', '.join(f'{count} x {kind}' for kind, count in small.items()) or 'none'}",
        f"dtypes       {', '.join(sorted(set(metadata['dtypes'].values())))}",
        f"in memory    {', '.join(f'{part} {size:,}' for part, size in _bytes(delta).items() if size)} bytes",
        f"encoding     {VERSIONS[version]}, format version {version}{stored}",
        f"base         {metadata['fingerprint'][:12]}, the fingerprint at the replaced positions",
    ]
    if counts:
        width = max(len(name) for _, name in shares[:tensors])
        lines += ["", "fullest tensors"]
        lines += [
            f"  {name:{width}}  {counts[name]:>11,} of {prod(metadata['shapes'][name]):>11,}  {share:8.3%}"
            for share, name in shares[:tensors]
        ]
        lines += ["", "layers"] + [
            f"  {layer:8}  {layers[layer]:>11,}  {layers[layer] / k:6.1%}"
            for layer in sorted(layers, key=_order)
        ]
    return "\n".join("".join(c if c.isprintable() else "?" for c in line) for line in lines)


def _layer(name: str) -> str:
    """The layer that a weight is in: the first number in its name."""
    found = re.search(r"(?:^|\.)(\d+)\.", name)
    return found[1] if found else "outside"


def _order(layer: str) -> tuple[int, str]:
    return len(layer), layer  # numbers by size, what is outside behind them


def _percent(k: int, total: int) -> str:
    return f" ({k / total:.3%})" if total > 0 else ""


def _amount(head: dict) -> str:
    return (
        f"{sum(t.numel() for t in head.values()):,} weights: {', '.join(sorted(head))}"
        if head
        else "none"
    )


def _bytes(delta: Delta) -> dict[str, int]:
    """Bytes of each part."""
    found = dict.fromkeys((POSITIONS, VALUES, DENSE, HEAD, MODULES), 0)
    for key, tensor in delta._tensors().items():
        found[key[: key.index("/") + 1]] += tensor.numel() * tensor.element_size()
    return {part.rstrip("/"): size for part, size in found.items()}
