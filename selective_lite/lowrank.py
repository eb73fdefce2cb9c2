"""Low rank: a small module beside a matrix, whose output is added to that of the layer; y = W x + update(x).

The layer's class changes while the update is attached; its own parameters and their names do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from .params import owners, weights

ATTRIBUTE = "low_rank"  # the update's name in its layer


def update_sites(
    model: nn.Module, targets: Sequence[str] | None = None, head: Sequence[str] | None = None
) -> dict[str, list[nn.Module]]:
    """The matrices that can have an update, and the layers that hold each (several where it is tied).

    Parameters
    ----------
    model
        Any module.
    targets
        Ends of module names, such as ``("query", "value")``; None takes every `nn.Linear` and Hugging Face ``Conv1D``
        outside the head, except those tied to another kind of module, such as an embedding.
    head
        As in `weights`.

    Returns
    -------
    dict
        ``{weight's canonical name: [layer, ...]}`` in model order.

    Raises
    ------
    ValueError
        If there is none, or a target names none, or one that cannot have an update.
    """
    places = owners(model)
    sites = {name: [layer for layer, _ in places[name]] for name in weights(model, head) if _fits(places[name])}
    if targets is None:
        if not sites:
            raise ValueError("model has no nn.Linear or Conv1D outside its head that could have a low-rank update")
        return sites
    chosen: set[str] = set()
    for target in (targets,) if isinstance(targets, str) else targets:
        meant = [module for name, module in model.named_modules() if ("." + name).endswith("." + target)]
        found = {name for name, layers in sites.items() if any(layer in meant for layer in layers)}
        fitted = [layer for name in found for layer in sites[name]]
        if not meant or not all(module in fitted for module in meant):
            raise ValueError(
                f"targets names {target!r}, which is no nn.Linear or Conv1D outside the head, or one that is tied to "
                "another kind of module; give ends of module names, such as ('query', 'value')"
            )
        chosen |= found
    return {name: layers for name, layers in sites.items() if name in chosen}


def _fits(places: Sequence[tuple[nn.Module, str]]) -> bool:
    """Whether a parameter is the weight of plain layers, all of one kind."""
    kinds = {type(module) for module, _ in places}
    cls = kinds.pop()
    conv1d = cls.__name__ == "Conv1D" and cls.__module__.startswith("transformers")
    plain = all(attribute == "weight" and "forward" not in vars(module) for module, attribute in places)
    return (cls is nn.Linear or conv1d) and not kinds and plain


def sides(layer: nn.Module) -> tuple[int, int]:
    """Outputs and inputs of an `nn.Linear` or ``Conv1D``."""
    outputs, inputs = layer.weight.shape if isinstance(layer, nn.Linear) else layer.weight.shape[::-1]  # type: ignore
    return outputs, inputs


def attach(layers: Sequence[nn.Module], update: nn.Module) -> None:
    """Add `update`'s output to that of every layer. A class, unlike a hook, survives `deepcopy`."""
    for layer in layers:
        layer.register_module(ATTRIBUTE, update)
        layer.__class__ = _updated_class(type(layer))  # type: ignore[arg-type]


@torch.no_grad()
def detach(layers: Sequence[nn.Module], difference: Tensor) -> None:
    """Remove an update, and add ``difference`` (outputs, inputs) to the matrix that the layers share."""
    for layer in layers:
        layer.__class__ = type(layer).plain_layer  # type: ignore[attr-defined]
        delattr(layer, ATTRIBUTE)
    weight: Any = layers[0].weight
    weight.copy_(weight.to(difference.dtype) + (difference if isinstance(layers[0], nn.Linear) else difference.t()))


@cache
def _updated_class(cls: type[nn.Module]) -> type[nn.Module]:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = cls.forward(self, x)
        return y + getattr(self, ATTRIBUTE)(x).to(y.dtype)

    return type(
        "Updated" + cls.__name__, (cls,), {"forward": forward, "plain_layer": cls, "__module__": cls.__module__}
    )
