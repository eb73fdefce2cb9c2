"""Freezing and layer-wise learning rates (Howard and Ruder 2018, ULMFiT): rules over layers."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import replace

from torch import nn

from ..params import head_weights, layer_of, only_trainable, weights
from ..selection import Selection
from ..training import Group, Phase, Phases, check_options, head_group
from .rules import select_tensors


def depths(model: nn.Module, head: Sequence[str] | None = None) -> dict[str, int]:
    """The depth of every candidate tensor, ``{name: depth}``.

    0 for what comes before the first numbered block (embeddings), i + 1 for block i, and one more
    than the last block for what comes after it (a pooler, a final norm).

    Raises
    ------
    ValueError
        If no tensor lies in a numbered block, such as ``encoder.layer.3``.
    """
    layers = {name: layer_of(name) for name in weights(model, head)}
    numbers = [layer for layer in layers.values() if layer is not None]
    if not numbers:
        raise ValueError(
            "model has no numbered blocks, such as 'encoder.layer.3'; select tensors by a rule of "
            "your own with select_tensors"
        )
    depth, result = 0, {}
    for name, layer in layers.items():
        if layer is not None:
            depth = layer + 1
        elif depth:
            depth = max(numbers) + 2
        result[name] = depth
    return result


def last_layers(model: nn.Module, count: int, head: Sequence[str] | None = None) -> Selection:
    """The last `count` blocks and everything after them, as a selection of whole tensors.

    Parameters
    ----------
    model
        Any module with numbered blocks.
    count
        Number of blocks that are trained; those below are frozen.
    head
        As in `weights`.

    Returns
    -------
    Selection
        Whole tensors; its ``method`` says how many blocks.

    Raises
    ------
    ValueError
        If `count` is not between 1 and the number of blocks.
    """
    depth = depths(model, head)
    blocks = sorted({d for name, d in depth.items() if layer_of(name) is not None})
    if not 1 <= count <= len(blocks):
        raise ValueError(f"count={count} is outside [1, {len(blocks)}], the number of blocks")
    found = select_tensors(model, lambda name, _: depth[name] >= blocks[-count], head)
    return replace(found, method=f"last {count} layers")


def layerwise_rates(
    model: nn.Module,
    *,
    lr: float,
    decay: float,
    epochs: int,
    lr_head: float | None = None,
    head: Sequence[str] | None = None,
) -> Phases:
    """A method: train everything, each layer `decay` times as fast as the one above it.

    Parameters
    ----------
    model
        Any module with numbered blocks; what the user froze stays frozen.
    lr
        Learning rate of the deepest candidate tensors.
    decay
        Factor in (0, 1]; 1 is full fine-tuning. Howard and Ruder divide by 2.6 a layer, so
        decay = 1 / 2.6.
    epochs
        Passes over the batches.
    lr_head
        Learning rate of the head (default: `lr`).
    head
        As in `weights`.

    Returns
    -------
    Phases
        One phase, ``"layer-wise"``, with a parameter group (and a gradient norm to clip) a layer.

    Raises
    ------
    TypeError, ValueError
        If `decay` is outside (0, 1], or the model has no numbered blocks; and as in `fixed_mask`.
    """
    if not 0 < decay <= 1:
        raise ValueError(f"decay={decay} is outside (0, 1]; 1 gives every layer the same rate")
    check_options("layer-wise", epochs=epochs, lr=lr, lr_head=lr_head)
    candidates, depth = weights(model, head), depths(model, head)
    deepest = max(depth.values())
    groups: list[Group] = []
    for level in sorted(set(depth.values())):
        members = [p for name, p in candidates.items() if depth[name] == level]
        # (eq-layerwise)  lr_i = lr * decay^(D + 1 - D_i),  D_i: the layer of weight i
        groups.append(
            {"params": members, "lr": lr * decay ** (deepest - level), "weight_decay": 0.0}
        )
    groups += head_group(list(head_weights(model, head).values()), lr, lr_head, weight_decay=0.0)

    def phases() -> Generator[Phase, None, None]:
        with only_trainable(model, [p for group in groups for p in group["params"]]):
            yield Phase("layer-wise", groups, epochs)

    return Phases(phases())
