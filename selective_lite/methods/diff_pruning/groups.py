"""Groups of weights for structured gates: by tensor, by attention head, by layer."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

# Projections whose rows, and whose columns, belong to attention heads, as `transformers` names
# them.
ROWS = re.compile(r"(^|\.)(query|key|value|q_proj|k_proj|v_proj|q_lin|k_lin|v_lin)\.(weight|bias)$")
COLUMNS = re.compile(
    r"(^|\.)(attention\.output\.dense|attention\.out_lin|self_attn\.(o_proj|out_proj))\.weight$"
)
LAYER = re.compile(r"^(.*?\.\d+)\.")
KEY_VALUE = re.compile(r"(^|\.)(k_proj|v_proj)\.")

Grouping = Callable[[nn.Module, Mapping[str, Tensor]], dict[str, Tensor]]


def by_tensor(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One group a tensor (the authors' choice): ``{name: id}``, an int64 tensor that broadcasts to the weight."""
    return {name: torch.tensor(i, device="cpu") for i, name in enumerate(weights)}


def by_layer(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One group a numbered block, such as ``encoder.layer.3``; a tensor outside every block is its own group."""
    ids: dict[str, int] = {}
    return {
        name: torch.tensor(ids.setdefault(_block(name), len(ids)), device="cpu") for name in weights
    }


def by_head(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One group an attention head (its rows of query, key and value, its columns of the output); else one a tensor.

    Raises
    ------
    ValueError
        If ``model.config`` does not say how many heads there are, or no projection has a known
        name.
    """
    heads = getattr(getattr(model, "config", None), "num_attention_heads", None)
    if not heads:
        raise ValueError(
            "groups='head' needs model.config.num_attention_heads; use 'tensor', 'layer' or a function"
        )
    shared = getattr(model.config, "num_key_value_heads", None) or heads
    ids: dict[tuple, int] = {}
    groups = {}
    for name, weight in weights.items():
        rows, columns = ROWS.search(name), COLUMNS.search(name)
        if not (rows or columns):
            groups[name] = torch.tensor(ids.setdefault((name,), len(ids)), device="cpu")
            continue
        # A key-value head that several query heads share belongs to the first of them.
        count, step = (shared, heads // shared) if KEY_VALUE.search(name) else (heads, 1)
        size = weight.shape[0] if rows else weight.shape[1]
        keys = [(_block(name), i * step) for i in range(count) for _ in range(size // count)]
        along = torch.tensor([ids.setdefault(key, len(ids)) for key in keys], device="cpu")
        groups[name] = along if weight.dim() == 1 or columns else along[:, None]
    if all(group.dim() == 0 for group in groups.values()):
        raise ValueError(
            "groups='head' found no query, key or value projection by a known name; give a function"
        )
    return groups


def _block(name: str) -> str:
    found = LAYER.match(name)
    return found.group(1) if found else name


GROUPINGS: dict[str, Grouping] = {"tensor": by_tensor, "head": by_head, "layer": by_layer}
