"""Small modules in layers: LoRA and the bottleneck Adapter (see `kernels.small`).

A module sits inside the ``nn.Linear`` (or Hugging Face ``Conv1D``) that it belongs to, whose class
changes: no hook to lose in a `deepcopy`, and the layer's own weight and bias keep their names. A
new module changes nothing: it starts as zero. LoRA can be merged into the weight; either kind can
be taken out again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ..heads import Head, Names
from ..kernels.checks import one_of
from ..kernels.small import KINDS, Adapter, Kind, LoRA
from ..params import Parameters, Place, check_names, owners, weights
from .attach import Attached, attach, detach, stand_in
from .entries import Selected, is_conv1d

NO_MODULE = "only floating-point weights of nn.Linear or of Conv1D can have a small module"


def linear_sizes(module: Any) -> tuple[int, int] | None:
    """(d_in, d_out) of exactly an ``nn.Linear`` or Hugging Face ``Conv1D``; else None."""
    if type(module) is nn.Linear:
        return module.in_features, module.out_features
    return tuple(module.weight.shape) if is_conv1d(type(module)) else None


def _plain(places: Sequence[Place]) -> bool:
    """Whether a parameter is the weight of linear layers alone, of one kind and its forward."""
    return len({type(layer) for layer, _ in places}) == 1 and all(
        attribute == "weight" and linear_sizes(layer) is not None and "forward" not in vars(layer)
        for layer, attribute in places
    )


def linear_weights(model: nn.Module, targets: Head = None, head: Head = None) -> list[str]:
    """Names of the weights outside the head that can have a small module, in model order.

    Parameters
    ----------
    model
        Any module.
    targets
        Ends of module names, such as ``("query", "value")``; None takes every ``nn.Linear`` and
        Hugging Face ``Conv1D``, except those tied to another kind of module, such as an embedding.
    head
        As in `weights`.

    Raises
    ------
    ValueError
        If there is none, or a target names none, or one that cannot have a small module.
    """
    places, candidates = owners(model), weights(model, head)
    layers = {n: {at[0] for at in places[n]} for n in candidates if _plain(places[n])}
    if not layers:
        raise ValueError("model has no nn.Linear or Conv1D outside its head for a small module")
    plain, named = set().union(*layers.values()), [*model.named_modules()]
    chosen = plain if targets is None else set()
    for target in (targets,) if isinstance(targets, str) else targets or ():
        meant = {module for path, module in named if f".{path}".endswith(f".{target}")}
        if not meant or not meant <= plain:
            what = f"targets names {target!r}, which is no nn.Linear or Conv1D outside the head"
            remedy = "give ends of module names, such as ('query', 'value')"
            raise ValueError(f"{what}, or is tied to another; {remedy}")
        chosen |= meant
    return [name for name in layers if layers[name] & chosen]


Found = dict[str, tuple[list[Any], int, int]]


def find_layers(model: nn.Module, ranks: Mapping[str, int]) -> Found:
    """Where small modules of these ranks can go, ``{weight name: (layers, d_in, d_out)}``.

    Raises as `add_adapters`.
    """
    places, found = owners(model), Found()
    check_names(ranks, places, "names")
    for name, rank in ranks.items():
        layers: list[Any] = [layer for layer, _ in places[name]]
        sizes = linear_sizes(layers[0])
        if any(isinstance(layer, Adapted) for layer in layers):
            why = f"the layer of {name!r} has a small module already; merge or remove that first"
        elif any(isinstance(layer, Selected) for layer in layers):
            why = f"the layer of {name!r} is in masked training; add small modules before it"
        elif any("forward" in vars(layer) for layer in layers):
            why = f"{name!r} is in a layer whose forward was replaced (a hook?); remove that first"
        elif not (sizes and _plain(places[name]) and layers[0].weight.is_floating_point()):
            kinds = " and a ".join(dict.fromkeys(type(layer).__name__ for layer in layers))
            why = f"{name!r} belongs to a {kinds}; {NO_MODULE}"
        elif isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= min(sizes):
            why = f"rank={rank!r} does not fit {name!r}; give an int from 1 to {min(sizes)}"
        else:
            found[name] = (layers, *sizes)
            continue
        raise ValueError(why)
    return found


def add_adapters(
    model: nn.Module, names: Names, *, kind: Kind = "lora", rank: int = 8, seed: int = 0
) -> dict[str, LoRA | Adapter]:
    """Put a small module into the layers of these weights; until trained, it changes nothing.

    Parameters
    ----------
    model
        Changed in place: a layer gets a child module ``adapter``, its weight and bias keep their
        names.
    names
        Of weights of ``nn.Linear`` or Hugging Face's ``Conv1D``, such as
        ``"encoder.0.query.weight"``; `linear_weights` finds them. Layers that share a weight share
        its module.
    kind
        ``"lora"``, or ``"adapter"``, the bottleneck.
    rank
        r; the module gets the weight's dtype and device.
    seed
        Of the CPU generator that draws what does not start at zero.

    Returns
    -------
    dict
        ``{weight name: module}``.

    Raises
    ------
    ValueError
        For an unknown kind or name, a rank outside [1, min(d_in, d_out)], a weight of another layer
        than those two (or tied to one), or a layer that has a small module or is in masked
        training. The model is unchanged.
    """
    one_of("kind", kind, KINDS)
    found = find_layers(model, dict.fromkeys(_names(names), rank))
    generator, make = torch.Generator().manual_seed(seed), LoRA if kind == "lora" else Adapter
    modules: dict[str, LoRA | Adapter] = {}
    for name, (layers, d_in, d_out) in found.items():
        module = make(d_in, d_out, rank, generator=generator, like=layers[0].weight)
        modules[name] = attach_module(layers, module)
    return modules


def attach_module(layers: Sequence[Any], module: Any) -> Any:
    """Put one small module, ``module(x, y) -> y'``, behind layers that `find_layers` found."""
    for layer in layers:
        layer.adapter = module.train(layer.training)
        attach(layer, adapted_class)
    return module


class Adapted(Attached):
    """Mixin of the classes of layers that have a small module."""


@cache
def adapted_class(cls: type[nn.Module]) -> Any:
    """A subclass of `cls` with a small module behind its forward."""

    def forward(layer: Any, x: Tensor) -> Tensor:
        # Whatever comes next: masked training puts a forward of its own between the two.
        return layer.adapter(x, super(adapted, layer).forward(x))

    adapted = stand_in(cls, (Adapted, cls), (adapted_class, ()), {"forward": forward})
    return adapted


def _names(names: Names) -> Iterable[str]:
    return (names,) if isinstance(names, str) else names


def _layers(model: nn.Module) -> dict[str, list[Any]]:
    """The layers that have a small module, by the name of their weight."""
    own = {n: [m for m, part in at if part == "weight"] for n, at in owners(model).items()}
    found = {n: [m for m in layers if isinstance(m, Adapted)] for n, layers in own.items()}
    return {name: layers for name, layers in found.items() if layers}


def adapters(model: nn.Module) -> dict[str, Any]:
    """The small modules that a model has, ``{weight name: module}``, in model order.

    `LoRA`, `Adapter`, or SoRA's.
    """
    return {name: layers[0].adapter for name, layers in _layers(model).items()}


def adapter_parameters(model: nn.Module, names: Sequence[str] | None = None) -> Parameters:
    """The weights of small modules by their names in it, such as ``"0.query.adapter.A"``.

    `names` of the layers' weights, default all; a name without a small module has no entry.
    """
    found = {n: m for n, m in adapters(model).items() if names is None or n in names}
    own = [(n.removesuffix("weight") + "adapter", m.named_parameters()) for n, m in found.items()]
    return {f"{path}.{part}": p for path, parts in own for part, p in parts}


def _chosen(model: nn.Module, names: Names | None) -> dict[str, list[Any]]:
    found = _layers(model)
    chosen = list(found if names is None else _names(names))
    for name in chosen:
        if name not in found:
            why = "which has no small module; print(list(adapters(model)))"
            raise ValueError(f"names holds {name!r}, {why}")
        if any(isinstance(layer, Selected) for layer in found[name]):
            raise ValueError(f"the layer of {name!r} is in masked training; leave that first")
    return {name: found[name] for name in chosen}


def remove_adapters(model: nn.Module, names: Names | None = None) -> None:
    """Take small modules out, and with them what they learned; `names` of weights, default all.

    Raises
    ------
    ValueError
        If a name has no small module, or its layer is in masked training. The model is unchanged.
    """
    for layers in _chosen(model, names).values():
        for layer in layers:
            del layer.adapter
            detach(layer)


@torch.no_grad()
def merge_adapters(model: nn.Module, names: Names | None = None) -> None:
    """Add every LoRA's difference to its weight and take the module out: W <- W + B A.

    `names` as `remove_adapters`. The sum is rounded to the weight's dtype: this cannot be undone to
    the bit.

    Raises
    ------
    ValueError
        As `remove_adapters`, and for a bottleneck Adapter, which is no difference of a weight. The
        model is unchanged.
    """
    chosen = _chosen(model, names)
    for name, (layer, *_) in chosen.items():
        if not hasattr(layer.adapter, "difference"):
            what = f"the small module of {name!r} is a bottleneck Adapter"
            raise ValueError(f"{what}, which cannot be merged; keep it")
    for layer, *_ in chosen.values():
        difference, weight = layer.adapter.difference(), layer.weight
        if not isinstance(layer, nn.Linear):  # Conv1D holds W^T
            difference = difference.t()
        # (eq-merge)  W <- W + B A
        weight.copy_(weight.to(difference.dtype) + difference)
    remove_adapters(model, list(chosen))
