"""Freezing and layer-wise learning rates (Howard and Ruder 2018, ULMFiT): selecting by a rule over layers."""

from __future__ import annotations

import re
from collections.abc import Generator, Sequence

from torch import nn

from ..params import head_weights, only_trainable, weights
from ..selection import Selection, select_tensors
from ..training import Group, Phase, head_group

BLOCK = re.compile(r"^(.*?)\.(\d+)\.")


def depths(model: nn.Module, head: Sequence[str] | None = None) -> dict[str, int]:
    """The depth of every candidate tensor, ``{name: depth}``.

    0 for what comes before the first numbered block (embeddings), i + 1 for block i, and one more
    than the last block for what comes after it (a pooler, a final norm).

    Raises
    ------
    ValueError
        If no tensor lies in a numbered block, such as ``encoder.layer.3``.
    """
    names = list(weights(model, head))
    found = {name: match for name in names if (match := BLOCK.match(name))}
    if not found:
        raise ValueError(
            "model has no numbered blocks, such as 'encoder.layer.3'; give a rule of your own to `rule`"
        )
    last = 1 + max(int(match.group(2)) for match in found.values())
    depth, result = 0, {}
    for name in names:
        if name in found:
            depth = int(found[name].group(2)) + 1
        elif depth:
            depth = last + 1
        result[name] = depth
    return result


def last_layers(model: nn.Module, count: int, head: Sequence[str] | None = None) -> Selection:
    """Freeze all but the last `count` blocks and what comes after them, as a selection of whole tensors.

    Raises
    ------
    ValueError
        If `count` is not between 1 and the number of blocks.
    """
    depth = depths(model, head)
    blocks = len({d for name, d in depth.items() if BLOCK.match(name)})
    if not 1 <= count <= blocks:
        raise ValueError(f"count={count} is outside [1, {blocks}], the number of blocks")
    return select_tensors(model, lambda name, _: depth[name] > blocks - count, head)


def layerwise_rates(
    model: nn.Module,
    *,
    lr: float,
    decay: float,
    epochs: int,
    lr_head: float | None = None,
    head: Sequence[str] | None = None,
) -> Generator[Phase, None, None]:
    """A method: train everything, each layer below the top `decay` times slower than the one above it.

    Parameters
    ----------
    model
        Any module with numbered blocks.
    lr
        Of the deepest candidate tensors; Howard and Ruder divide by 2.6 a layer, decay = 1 / 2.6.
    decay
        In (0, 1]; 1 is full fine-tuning.
    epochs
        Passes over the batches.
    lr_head
        Of the head (default: `lr`).
    head
        As in `weights`.

    Raises
    ------
    ValueError
        If `decay` is outside (0, 1], or the model has no numbered blocks.
    """
    if not 0 < decay <= 1:
        raise ValueError(f"decay={decay} is outside (0, 1]; 1 gives every layer the same rate")
    depth = depths(model, head)
    deepest = max(depth.values())
    groups: list[Group] = []
    for level in sorted(set(depth.values())):
        members = [p for name, p in weights(model, head).items() if depth[name] == level]
        # (eq-layerwise)  lr_l = lr * decay^(L - l)
        groups.append(
            {"params": members, "lr": lr * decay ** (deepest - level), "weight_decay": 0.0}
        )
    groups += head_group(list(head_weights(model, head).values()), lr, lr_head, weight_decay=0.0)
    with only_trainable(model, [p for group in groups for p in group["params"]]):
        yield Phase("layer-wise", groups, epochs)
