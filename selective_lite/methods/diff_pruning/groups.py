"""Groups of weights for structured gates: by tensor, by attention head, by layer."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

# Projections whose rows, and whose columns, belong to attention heads, as `transformers` names
# them.
ROWS = re.compile(r"(^|\.)(query|key|value|q_proj|k_proj|v_proj|q_lin|k_lin|v_lin)\.(weight|bias)$")
COLUMNS = re.compile(
    r"(^|\.)(attention\.output\.dense|attention\.out_lin|self_attn\.(o_proj|out_proj))\.weight$"
)
KEY_VALUE = re.compile(r"(^|\.)(k_proj|v_proj)\.")

Grouping = Callable[[nn.Module, Mapping[str, Tensor]], Mapping[str, Tensor]]
Groups = Literal["tensor", "head", "layer"] | Grouping | None


def block_of(name: str) -> str | None:
    """The numbered block that a weight is in, such as ``"encoder.layer.3"``, else None."""
    found = re.match(r"((?:.*?\.)?\d+)\.", name)
    return found[1] if found else None


def group_ids(
    model: nn.Module, weights: Mapping[str, Tensor], groups: Groups
) -> dict[str, Tensor] | None:
    """The group of every weight.

    Parameters
    ----------
    model
        The module that the weights belong to.
    weights
        The candidates, as from `selective_lite.weights`.
    groups
        ``"tensor"``, ``"head"``, ``"layer"``, a function of model and weights that returns what
        `by_tensor` returns, or ``None`` for no groups.

    Returns
    -------
    dict or None
        ``{name: ids}``, int64, each broadcasts to its weight; ``None`` for no groups.

    Raises
    ------
    ValueError
        If the name of a grouping is unknown, or the model does not fit it; if a function leaves
        out a weight, or returns ids that are no whole numbers, negative, or of another shape.

    Examples
    --------
    >>> layer = nn.Linear(2, 3)
    >>> group_ids(layer, dict(layer.named_parameters()), "tensor")
    {'weight': tensor(0), 'bias': tensor(1)}
    """
    if groups is None:
        return None
    if not callable(groups) and groups not in GROUPINGS:
        raise ValueError(
            f"groups={groups!r} is unknown; choose one of {tuple(GROUPINGS)}, None or a function"
        )
    found = (groups if callable(groups) else GROUPINGS[groups])(model, weights)
    for name, weight in weights.items():
        ids = found.get(name)
        if not isinstance(ids, Tensor) or ids.dtype != torch.int64 or bool((ids < 0).any()):
            raise ValueError(
                f"groups gave {ids!r} for {name!r}; it must give an int64 tensor of group numbers "
                "from 0 for every weight"
            )
        try:
            ids.expand(weight.shape)
        except RuntimeError:
            raise ValueError(
                f"groups gave ids of shape {tuple(ids.shape)} for {name!r}, which do not "
                f"broadcast to its shape {tuple(weight.shape)}"
            ) from None
    return {name: found[name] for name in weights}


def by_tensor(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One group for each tensor, the authors' choice.

    Returns
    -------
    dict
        ``{name: id}``, an int64 tensor that broadcasts to the weight.
    """
    return {name: torch.tensor(i, device="cpu") for i, name in enumerate(weights)}


def by_layer(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One group for each numbered block, such as ``encoder.layer.3``, and for each other tensor.

    Returns
    -------
    dict
        As `by_tensor`.
    """
    ids: dict[str, int] = {}
    return {
        name: torch.tensor(ids.setdefault(block_of(name) or name, len(ids)), device="cpu")
        for name in weights
    }


def by_head(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One group for each attention head, and for each tensor that has no part in attention heads.

    A head is its rows of query, key and value and its columns of the output projection.

    Returns
    -------
    dict
        As `by_tensor`.

    Raises
    ------
    ValueError
        If ``model.config`` does not say how many heads there are, or no projection has a known
        name.
    """
    heads = getattr(getattr(model, "config", None), "num_attention_heads", None)
    if not heads:
        raise ValueError(
            "groups='head' needs model.config.num_attention_heads; use 'tensor', 'layer' or a "
            "function"
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
        keys = [(block_of(name), i * step) for i in range(count) for _ in range(size // count)]
        along = torch.tensor([ids.setdefault(key, len(ids)) for key in keys], device="cpu")
        groups[name] = along if weight.dim() == 1 or columns else along[:, None]
    if all(group.dim() == 0 for group in groups.values()):
        raise ValueError(
            "groups='head' found no query, key or value projection by a known name; give a function"
        )
    return groups


GROUPINGS: dict[str, Grouping] = {"tensor": by_tensor, "head": by_head, "layer": by_layer}
