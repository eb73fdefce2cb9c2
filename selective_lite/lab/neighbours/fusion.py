"""AdapterFusion (Pfeiffer et al. 2021): attention over frozen adapters of several tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ...kernels.small import Adapter
from ...layers.small import attach_module, find_layers


class Fusion(nn.Module):
    """Behind one layer: frozen adapters, and an attention that weighs what they say.

    Parameters
    ----------
    adapters
        Of one layer and one base, two or more; frozen here.
    """

    def __init__(self, adapters: Sequence[Adapter]) -> None:
        super().__init__()
        self.adapters = nn.ModuleList(adapters).requires_grad_(requires_grad=False)
        first = adapters[0].up
        d = len(first)
        # A little off zero, so that query and key get gradients; the value begins as identity.
        self.query = nn.Parameter(0.02 * torch.eye(d).to(first))
        self.key = nn.Parameter(0.02 * torch.eye(d).to(first))
        self.value = nn.Parameter(torch.eye(d).to(first))

    def attention(self, y: Tensor, said: Tensor) -> Tensor:
        """Weights (..., adapters) of what adapters said (..., adapters, d) of y (..., d)."""
        query, keys = linear(y, self.query), linear(said, self.key)
        return (keys @ query.unsqueeze(-1)).squeeze(-1).softmax(-1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The layer's output y (..., d), and what the adapters say of it, weighed."""
        said = torch.stack([adapter(x, y) for adapter in self.adapters], -2)
        # (eq-fusion)  y' = sum_n softmax_n((Q y)^T K o_n) V o_n
        weights = self.attention(y, said)
        return (weights.unsqueeze(-1) * linear(said, self.value)).sum(-2)


def fuse(model: nn.Module, tasks: Sequence[Mapping[str, Adapter]]) -> dict[str, Fusion]:
    """Put a `Fusion` of several tasks' adapters behind the layers that they belong to.

    Parameters
    ----------
    model
        The base, without small modules; changed in place.
    tasks
        For each task its adapters, ``{weight name: adapter}``, all behind the same layers.

    Returns
    -------
    dict
        ``{weight name: fusion}``; queries, keys and values are to be trained.

    Raises
    ------
    ValueError
        With fewer than two tasks, adapters of different layers, or of a base of another size. The
        model is unchanged.
    """
    if len(tasks) < 2:
        raise ValueError(f"tasks has {len(tasks)} set of adapters: fusing takes two at least")
    names = list(tasks[0])
    for place, task in enumerate(tasks[1:], 1):
        if list(task) != names:
            raise ValueError(f"tasks[{place}] has adapters behind other layers than tasks[0]")
    found: dict[str, Any] = find_layers(model, dict.fromkeys(names, 1))
    for name, (_, _, d_out) in found.items():
        for place, task in enumerate(tasks):
            if len(task[name].up) != d_out:
                raise ValueError(
                    f"tasks[{place}] has an adapter of width {len(task[name].up)} for {name!r}, "
                    f"whose layer has {d_out}: it belongs to another base"
                )
    fused = {name: Fusion([task[name] for task in tasks]) for name in names}
    for name, (layers, *_) in found.items():
        attach_module(layers, fused[name])
    return fused
