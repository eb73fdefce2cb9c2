"""SHiRA (Bhardwaj et al. 2024): a delta as the sparse adapter that peft loads, if it fits."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..params import owners, unwrap
from .delta import Delta


def to_shira(delta: Delta, base: nn.Module, folder: str | os.PathLike) -> None:
    """Write a folder that ``peft.PeftModel.from_pretrained(base, folder)`` loads.

    peft itself is not needed for it. What fits: single positions in weights of ``nn.Linear`` that
    belong to one layer each, and heads of whole modules. peft knows one r, and in every layer
    exactly r (d_in + d_out) entries: r is what the fullest layer needs, and the others are filled
    up with zeros. peft adds differences, so that weights agree to rounding, not to the bit.

    Parameters
    ----------
    delta
        Delta without dense tensors, buffers and small modules.
    base
        The model that it was made from; it is not changed.
    folder
        Gets ``adapter_config.json`` and ``adapter_model.safetensors``; it is made if it is not
        there.

    Raises
    ------
    DeltaError
        If the delta is not for this base.
    ValueError
        If something does not fit, says what; nothing is written.
    """
    if delta.dense or delta.modules or delta.buffers or not delta.positions:
        what = [*delta.dense, *delta.modules, *delta.buffers]
        raise ValueError(
            "SHiRA holds single weights of nn.Linear only; this delta has "
            f"{what[0] if what else 'none'!r}"
        )
    base = unwrap(base)
    names, original = delta.check(base)
    delta = delta.with_base(original)
    own, places, named = names.found, owners(base), dict(base.named_modules())
    paths = {module: path for path, module in named.items()}
    layers: dict[str, tuple[str, nn.Linear]] = {}
    for name in delta.values:
        layer, attribute = places[own[name]][0]
        if len(places[own[name]]) > 1 or attribute != "weight" or type(layer) is not nn.Linear:
            kinds = " and a ".join(type(owner).__name__ for owner, _ in places[own[name]])
            raise ValueError(
                f"SHiRA holds weights of one nn.Linear each; {name!r} is {attribute} of a {kinds}"
            )
        layers[name] = paths[layer], layer
    sizes = {name: layer.in_features + layer.out_features for name, (_, layer) in layers.items()}
    r = max(-(-len(values) // sizes[name]) for name, values in delta.values.items())
    tensors: dict[str, Tensor] = {}
    for name, (path, layer) in layers.items():
        count = r * sizes[name]
        if count > layer.weight.numel():
            raise ValueError(
                f"SHiRA's r is one for all layers, and the fullest one needs r={r}: {count} "
                f"entries in {name!r}, which has {layer.weight.numel()}"
            )
        index, difference = _filled(
            delta.positions[name].long(),
            delta.values[name].to(original[name].dtype) - original[name],
            count,
            layer,
        )
        rows = torch.stack([index // layer.in_features, index % layer.in_features]).int()
        tensors |= {
            f"base_model.model.{path}.shira_weight": difference,
            f"base_model.model.{path}.shira_indices": rows,
        }
    head = {own[name]: tensor for name, tensor in delta.head.items() if name in own}
    heads = sorted({name.rpartition(".")[0] for name in head})
    for path in heads:
        _check_head(path, named, head)
    tensors |= {f"base_model.model.{name}": tensor for name, tensor in head.items()}
    config = {
        "peft_type": "SHIRA",
        "r": r,
        # a list would match ends of paths
        "target_modules": "|".join(sorted(re.escape(path) for path, _ in layers.values())),
        "modules_to_save": heads or None,
        "inference_mode": True,
    }
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file(tensors, Path(folder) / "adapter_model.safetensors", {"format": "pt"})
    (Path(folder) / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _filled(
    index: Tensor, difference: Tensor, count: int, layer: nn.Linear
) -> tuple[Tensor, Tensor]:
    """Positions and differences, filled up to `count` with the first free positions and zeros."""
    free = torch.ones(layer.weight.numel(), dtype=torch.bool)
    free[index] = False
    more = free.nonzero().squeeze(1)[: count - len(index)]
    return torch.cat([index, more]), torch.cat([difference, difference.new_zeros(len(more))])


def _check_head(path: str, named: dict[str, nn.Module], head: Collection[str]) -> None:
    # peft saves whole modules, and finds them by the end of their path.
    whole = (
        {f"{path}.{name}" for name, _ in named[path].named_parameters()} if path in named else set()
    )
    others = [other for other in named if other.endswith(path) and other != path]
    if not path or others or not whole <= set(head):
        raise ValueError(
            f"SHiRA's modules_to_save are whole modules with a path of their own; {path!r} is none"
        )
