"""Small modules beside a frozen matrix: LoRA (Hu et al. 2022) and the bottleneck Adapter (Houlsby et al. 2019).

A module sits inside the ``nn.Linear`` (or Hugging Face ``Conv1D``) that it belongs to, whose class
changes: no hook to lose in a `deepcopy`, and the layer's own weight and bias keep their names. A
new module changes nothing: it starts as zero. LoRA can be merged into the weight; either kind can
be taken out again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..params import check_names, owners, weights
from .attach import Attached, attach, detach
from .entries import Selected, is_conv1d

Kind = Literal["lora", "adapter"]
KINDS = ("lora", "adapter")


def part_shapes(kind: Kind, d_in: int, d_out: int, rank: int) -> dict[str, tuple[int, ...]]:
    """The tensors of a small module, ``{part: shape}``, for a layer from `d_in` to `d_out` features.

    Raises
    ------
    ValueError
        If `kind` is neither ``"lora"`` nor ``"adapter"``.
    """
    if kind == "lora":
        return {"A": (rank, d_in), "B": (d_out, rank)}
    if kind != "adapter":
        raise ValueError(f"kind={kind!r} is unknown; choose one of {KINDS}")
    return {"down": (rank, d_out), "down_bias": (rank,), "up": (d_out, rank), "up_bias": (d_out,)}


def adapter_size(kind: Kind, d_in: int, d_out: int, rank: int) -> int:
    """How many weights a small module trains: r (d_in + d_out) for LoRA, 2 r d_out + r + d_out for an Adapter."""
    return sum(prod(shape) for shape in part_shapes(kind, d_in, d_out, rank).values())


class LoRA(nn.Module):
    """A low-rank difference B A to a weight: A is uniform in +-1 / sqrt(d_in), B is zero.

    Parameters
    ----------
    d_in, d_out
        Features in and out of the layer.
    rank
        r, the rows of A (r, d_in) and the columns of B (d_out, r).
    generator
        A CPU generator that draws A.
    like
        A tensor whose dtype and device the weights get.
    """

    kind: Kind = "lora"

    def __init__(
        self, d_in: int, d_out: int, rank: int, *, generator: torch.Generator, like: Tensor
    ) -> None:
        super().__init__()
        self.rank = rank
        self.A = nn.Parameter(_uniform((rank, d_in), generator, like))
        self.B = nn.Parameter(torch.zeros(d_out, rank, dtype=like.dtype, device=like.device))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The layer's output y (..., d_out) with the difference's share of its input x (..., d_in) added."""
        # (eq-lora)  y = W x + b + B A x
        return y + functional.linear(functional.linear(x, self.A), self.B)

    def difference(self) -> Tensor:
        """B A, (d_out, d_in), in float32 or float64."""
        precise = torch.promote_types(self.A.dtype, torch.float32)
        return self.B.detach().to(precise) @ self.A.detach().to(precise)


class Adapter(nn.Module):
    """A bottleneck of width r behind a layer: down uniform in +-1 / sqrt(d_out), up and biases zero. As `LoRA`."""

    kind: Kind = "adapter"

    def __init__(
        self, d_in: int, d_out: int, rank: int, *, generator: torch.Generator, like: Tensor
    ) -> None:
        super().__init__()
        self.rank = rank
        self.down = nn.Parameter(_uniform((rank, d_out), generator, like))
        self.down_bias = nn.Parameter(torch.zeros(rank, dtype=like.dtype, device=like.device))
        self.up = nn.Parameter(torch.zeros(d_out, rank, dtype=like.dtype, device=like.device))
        self.up_bias = nn.Parameter(torch.zeros(d_out, dtype=like.dtype, device=like.device))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The layer's output y (..., d_out) and what the bottleneck makes of it; x is not used."""
        # (eq-adapter)  y' = y + U gelu(D y + d) + u
        hidden = functional.gelu(functional.linear(y, self.down, self.down_bias))
        return y + functional.linear(hidden, self.up, self.up_bias)


def _uniform(shape: tuple[int, int], generator: torch.Generator, like: Tensor) -> Tensor:
    drawn = torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu")
    return ((2 * drawn - 1) / math.sqrt(shape[1])).to(like.device, like.dtype)


def linear_sizes(module: Any) -> tuple[int, int] | None:
    """(d_in, d_out) of exactly an ``nn.Linear`` or Hugging Face ``Conv1D``; None for every other module."""
    cls = type(module)
    if cls is nn.Linear:
        return module.in_features, module.out_features
    if is_conv1d(cls):
        return module.weight.shape[0], module.weight.shape[1]
    return None


def _plain(places: Sequence[tuple[nn.Module, str]]) -> bool:
    """Whether a parameter is the weight of linear layers alone, of one kind and with the forward of their class."""
    return len({type(layer) for layer, _ in places}) == 1 and all(
        attribute == "weight" and linear_sizes(layer) is not None and "forward" not in vars(layer)
        for layer, attribute in places
    )


def linear_weights(
    model: nn.Module, targets: Sequence[str] | None = None, head: Sequence[str] | None = None
) -> list[str]:
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
    places = owners(model)
    layers = {
        name: {layer for layer, _ in places[name]}
        for name in weights(model, head)
        if _plain(places[name])
    }
    if not layers:
        raise ValueError(
            "model has no nn.Linear or Conv1D outside its head that could have a small module"
        )
    plain = set().union(*layers.values())
    chosen = plain if targets is None else set()
    for target in (targets,) if isinstance(targets, str) else targets or ():
        meant = {
            module for path, module in model.named_modules() if ("." + path).endswith("." + target)
        }
        if not meant or not meant <= plain:
            raise ValueError(
                f"targets names {target!r}, which is no nn.Linear or Conv1D outside the head, or one that is tied to "
                "another kind of module; give ends of module names, such as ('query', 'value')"
            )
        chosen |= meant
    return [name for name in layers if layers[name] & chosen]


def find_layers(
    model: nn.Module, ranks: Mapping[str, int]
) -> dict[str, tuple[list[Any], int, int]]:
    """Where small modules of these ranks can go, ``{weight name: (layers, d_in, d_out)}``; raises as `add_adapters`."""
    places = owners(model)
    check_names(ranks, places, "names")
    found: dict[str, tuple[list[Any], int, int]] = {}
    for name, rank in ranks.items():
        layers: list[Any] = [layer for layer, _ in places[name]]
        for layer in layers:
            if isinstance(layer, Adapted):
                raise ValueError(
                    f"the layer of {name!r} has a small module already; merge or remove that first"
                )
            if isinstance(layer, Selected):
                raise ValueError(
                    f"the layer of {name!r} is in masked training; add small modules before it"
                )
            if "forward" in vars(layer):
                raise ValueError(
                    f"{name!r} is in a layer whose forward was replaced (a hook?); remove that first"
                )
        sizes = linear_sizes(layers[0])
        if sizes is None or not _plain(places[name]) or not layers[0].weight.is_floating_point():
            kinds = " and a ".join(dict.fromkeys(type(layer).__name__ for layer in layers))
            raise ValueError(
                f"{name!r} belongs to a {kinds}; only floating-point weights of nn.Linear or of Conv1D can have a "
                "small module"
            )
        if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= min(sizes):
            raise ValueError(
                f"rank={rank!r} does not fit {name!r}; give an int from 1 to {min(sizes)}"
            )
        found[name] = (layers, *sizes)
    return found


def add_adapters(
    model: nn.Module, names: Sequence[str], *, kind: Kind = "lora", rank: int = 8, seed: int = 0
) -> dict[str, LoRA | Adapter]:
    """Put a small module into the layers of these weights; the model computes what it did until they are trained.

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
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is unknown; choose one of {KINDS}")
    places = find_layers(model, dict.fromkeys((names,) if isinstance(names, str) else names, rank))
    generator = torch.Generator().manual_seed(seed)
    make = LoRA if kind == "lora" else Adapter
    return {
        name: attach_module(
            layers, make(d_in, d_out, rank, generator=generator, like=layers[0].weight)
        )
        for name, (layers, d_in, d_out) in places.items()
    }


def attach_module(layers: Sequence[Any], module: Any) -> Any:
    """Put one small module, ``module(x, y) -> y'``, behind layers that `find_layers` found."""
    for layer in layers:
        layer.adapter = module.train(layer.training)
        attach(layer, adapted_class)
    return module


class Adapted(Attached):
    """Mixin of the classes of layers that have a small module."""


@cache
def adapted_class(cls: type[nn.Module]) -> type[nn.Module]:
    """A subclass of `cls` with a small module behind its forward."""

    def forward(layer: Any, x: Tensor) -> Tensor:
        # Whatever comes next: masked training puts a forward of its own between the two.
        return layer.adapter(x, super(adapted, layer).forward(x))

    members = {"base": cls, "made_by": (adapted_class, ()), "forward": forward}
    members |= {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    adapted: Any = type(cls.__name__, (Adapted, cls), members)
    return adapted


def _layers(model: nn.Module) -> dict[str, list[Any]]:
    """The layers that have a small module, by the name of their weight."""
    places = owners(model).items()
    found = {
        n: [m for m, part in at if part == "weight" and isinstance(m, Adapted)] for n, at in places
    }
    return {name: layers for name, layers in found.items() if layers}


def adapters(model: nn.Module) -> dict[str, Any]:
    """The small modules that a model has, ``{weight name: module}``, in model order: `LoRA`, `Adapter`, or SoRA's."""
    return {name: layers[0].adapter for name, layers in _layers(model).items()}


def adapter_parameters(
    model: nn.Module, names: Sequence[str] | None = None
) -> dict[str, nn.Parameter]:
    """The weights of small modules, by their names in the model, such as ``"encoder.0.query.adapter.A"``.

    `names` of the layers' weights, default all; a name without a small module has no entry.
    """
    found = (
        (n.removesuffix("weight") + "adapter.", m)
        for n, m in adapters(model).items()
        if names is None or n in names
    )
    return {prefix + part: p for prefix, module in found for part, p in module.named_parameters()}


def _chosen(model: nn.Module, names: Sequence[str] | None) -> dict[str, list[Any]]:
    found = _layers(model)
    names = list(found) if names is None else (names,) if isinstance(names, str) else names
    for name in names:
        if name not in found:
            raise ValueError(
                f"names holds {name!r}, which has no small module; print(list(adapters(model)))"
            )
        if any(isinstance(layer, Selected) for layer in found[name]):
            raise ValueError(f"the layer of {name!r} is in masked training; leave that first")
    return {name: found[name] for name in names}


def remove_adapters(model: nn.Module, names: Sequence[str] | None = None) -> None:
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
def merge_adapters(model: nn.Module, names: Sequence[str] | None = None) -> None:
    """Add every LoRA's difference to its weight and take the module out: W <- W + B A; `names` as `remove_adapters`.

    The sum is rounded to the weight's dtype: this cannot be undone to the bit.

    Raises
    ------
    ValueError
        As `remove_adapters`, and for a bottleneck Adapter, which is no difference of a weight. The
        model is unchanged.
    """
    chosen = _chosen(model, names)
    for name, (layer, *_) in chosen.items():
        if not hasattr(layer.adapter, "difference"):
            raise ValueError(
                f"the small module of {name!r} is a bottleneck Adapter, which cannot be merged; keep it"
            )
    for layer, *_ in chosen.values():
        difference, weight = layer.adapter.difference(), layer.weight
        oriented = (
            difference if isinstance(layer, nn.Linear) else difference.t()
        )  # Conv1D holds W^T
        # (eq-merge)  W <- W + B A
        weight.copy_(weight.to(difference.dtype) + oriented)
    remove_adapters(model, list(chosen))
