"""Describe: what a delta holds, as a page that a person reads."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from torch import Tensor

from ..params import layer_of
from .delta import Delta, load
from .file import MODULES, STEPS, flat_names

LABELS = 8  # how many a line has room for


def describe(delta: Delta | str | os.PathLike, *, tensors: int = 10) -> str:
    """A page about a delta or its file: base, labels, budget, bytes, fullest tensors, layers.

    Parameters
    ----------
    delta
        A delta, or the path of its file, which is checked as by `load`.
    tensors
        Number of tensors to list, those with the largest replaced share.

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
    metadata = delta.metadata
    replaced = {**delta.positions, **delta.dense}
    counts = {name: tensor.numel() for name, tensor in replaced.items()}
    k, total = sum(counts.values()), metadata["total"]
    small = Counter(f"{s['kind']} of rank {s['rank']}" for s in metadata.get(MODULES, {}).values())
    stored = f", file {path.stat().st_size:,} bytes" if path else ""
    sizes = {name: prod(metadata["shapes"][name]) for name in counts}
    shares = sorted(((counts[name] / sizes[name], name) for name in counts), reverse=True)
    layers = Counter[str]()
    for name, count in counts.items():
        number = layer_of(name)
        layers["outside" if number is None else str(number)] += count
    dtypes = {dtype for name, dtype in delta.base_dtypes().items() if name not in delta.buffers}
    precise = " (stored as torch.float32)" if metadata.get("rounds_to") else ""
    parts = ", ".join(f"{part} {size:,}" for part, size in _bytes(delta).items() if size)
    lines = [
        f"base         {_base(metadata['base'])}",
        f"labels       {_labels(metadata['base'])}",
        f"method       {metadata['method'] or 'not said'}",
        f"budget       {k:,} of {total:,} weights{_percent(k, total)}, in {len(counts)} tensors, "
        f"{len(delta.dense)} of them whole",
        f"head         {_amount(delta.head, 'weights')}",
        f"modules      {', '.join(f'{count} x {kind}' for kind, count in small.items()) or 'none'}",
        f"buffers      {_amount(delta.buffers, 'numbers')}",
        f"dtypes       {', '.join(sorted(dtypes)) or 'none'}{precise}",
        f"in memory    {parts} bytes",
        f"encoding     {metadata['encoding']}{stored}",
        f"library      selective_lite {metadata['library']}",
    ]
    if counts:
        width = max(len(name) for _, name in shares[:tensors])
        lines += ["", "fullest tensors"]
        lines += [
            f"  {name:{width}}  {counts[name]:>11,} of {sizes[name]:>11,}  {share:8.3%}"
            for share, name in shares[:tensors]
        ]
        lines += ["", "layers"] + [
            f"  {layer:8}  {layers[layer]:>11,}  {layers[layer] / k:6.1%}"
            for layer in sorted(layers, key=_order)
        ]
    return "\n".join("".join(c if c.isprintable() else "?" for c in line) for line in lines)


def _base(base: Mapping[str, Any]) -> str:
    kind = ", ".join(str(base[key]) for key in ("class", "dtype") if key in base)
    commit = f", revision {base['revision']}" if "revision" in base else ""
    return f"{base.get('name_or_path', 'not said')} ({kind}){commit}"


def _labels(base: Mapping[str, Any]) -> str:
    names = [str(label) for label in base.get("id2label", {}).values()]
    more = f", ... ({len(names):,})" if len(names) > LABELS else ""
    return ", ".join(names[:LABELS]) + more or "none"


def _order(layer: str) -> tuple[int, str]:
    return len(layer), layer  # numbers by size, what is outside behind them


def _percent(k: int, total: int) -> str:
    return f" ({k / total:.3%})" if total > 0 else ""


def _amount(part: Mapping[str, Tensor], unit: str) -> str:
    count = sum(tensor.numel() for tensor in part.values())
    return f"{count:,} {unit}: {', '.join(sorted(part))}" if part else "none"


def _bytes(delta: Delta) -> dict[str, int]:
    """Bytes of each part."""
    found = dict.fromkeys(delta.parts, 0)
    for key, tensor in flat_names(delta.parts).items():
        found[key.partition("/")[0]] += tensor.numel() * tensor.element_size()
    found[STEPS] = sum(t.numel() * t.element_size() for t in delta.parts[STEPS].values())
    return found
