"""Parameters: their names, places and ties, the candidates of a selection, and budgets."""

from __future__ import annotations

import operator
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .heads import Head, Names, find_head
from .kernels.sharded import ORDER, is_sharded, reshard
from .layers.entries import Entries

Budget = int | float
Parameters = dict[str, nn.Parameter]
Registered = Iterator[tuple[str, nn.Module, str, Any]]  # name, and place of a tensor
Place = tuple[nn.Module, str]  # where a parameter is registered: a module, and the attribute's name
# Modules that hold the real one as a child, and put their own word into every name.
WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module")
FSDP1 = "_fsdp_wrapped_module"


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside ``torch.compile`` and ``DistributedDataParallel``; any other one as it is.

    Raises
    ------
    TypeError
        For ``nn.DataParallel``, whose copies of the model would train nothing.
    """
    if isinstance(model, nn.DataParallel):
        remedy = "use DistributedDataParallel (torchrun), or one GPU"
        raise TypeError(f"nn.DataParallel's replicas cannot train a selection of model; {remedy}")
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return unwrap(model.module)
    compiled = type(model).__name__ == "OptimizedModule"
    inner = model._modules.get("_orig_mod") if compiled else None
    return model if inner is None else unwrap(inner)


def clean(name: str) -> str:
    """A dotted name without the words that wrappers put into it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPED)


def _registered(model: nn.Module, kind: str = "_parameters", every: bool = False) -> Registered:
    """Every place (`every`: name) of every tensor, but for masked training's compact values."""
    model = unwrap(model)
    reshard(model)
    for path, module in model.named_modules(remove_duplicate=not every):
        held = {} if isinstance(module, Entries) else getattr(module, kind)
        for attribute, tensor in held.items():
            if tensor is not None:
                if FSDP1 in path or hasattr(tensor, "ds_id"):
                    by = "FullyShardedDataParallel (FSDP1)" if FSDP1 in path else "DeepSpeed ZeRO-3"
                    raise TypeError(f"model is sharded by {by}; {ORDER}")
                yield clean(f"{path}.{attribute}".lstrip(".")), module, attribute, tensor


def named_parameters(model: nn.Module) -> Parameters:
    """Every unique parameter by its canonical (first) name, in model order.

    Wrappers leave no trace in the names, and the compact values of masked training are left out.
    """
    return _unique(_registered(model))


def named_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Every unique buffer that a ``state_dict`` holds, by its first name, in model order."""
    places = _registered(model, "_buffers")
    return _unique(at for at in places if at[2] not in at[1]._non_persistent_buffers_set)


def _unique(places: Registered) -> dict[str, Any]:
    first: dict[int, tuple[str, Any]] = {}
    for name, _, _, tensor in places:
        first.setdefault(id(tensor), (name, tensor))
    return dict(first.values())


def owners(model: nn.Module) -> dict[str, list[Place]]:
    """Every place each parameter is registered at, by its canonical (first) name.

    A tied parameter has one canonical name and several places.

    Parameters
    ----------
    model
        Any module.

    Returns
    -------
    dict
        ``{name: [(module, attribute), ...]}`` in model order.
    """
    found: dict[int, tuple[str, list[Place]]] = {}
    for name, module, attribute, p in _registered(model):
        found.setdefault(id(p), (name, []))[1].append((module, attribute))
    return dict(found.values())


def ties(model: nn.Module) -> dict[str, list[str]]:
    """The other names of every tied parameter, ``{canonical name: [other names]}``."""
    names = {id(p): name for name, p in named_parameters(model).items()}
    found: dict[str, list[str]] = {}
    for name, _, _, p in _registered(model, every=True):
        if name != (canonical := names[id(p)]):
            found.setdefault(canonical, []).append(name)
    return found


def layer_of(name: str) -> int | None:
    """The number of the layer that a weight is in: the first number in its name, else None.

    Examples
    --------
    >>> layer_of("bert.encoder.layer.3.output.dense.weight")
    3
    """
    found = re.search(r"(?:^|\.)(\d+)\.", name)
    return int(found[1]) if found else None


def is_under(name: str, prefixes: Sequence[str]) -> bool:
    """Whether a dotted `name` is one of `prefixes` or lies below one."""
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def check_prefixes(prefixes: Names, names: Collection[str], argument: str) -> tuple[str, ...]:
    """The prefixes as a tuple; a `ValueError` says the first that fits none of `names`."""
    found = (prefixes,) if isinstance(prefixes, str) else tuple(prefixes)
    for prefix in found:
        if not any(is_under(name, (prefix,)) for name in names):
            remedy = f"give names or prefixes, such as {next(iter(names), None)!r}"
            raise ValueError(f"{argument}={prefix!r} names no parameter; {remedy}")
    return found


def names_under(prefixes: Names, names: Collection[str], argument: str) -> list[str]:
    """Those of `names` that are one of `prefixes` or lie below one; raises as `check_prefixes`."""
    found = check_prefixes(prefixes, names, argument)
    return [name for name in names if is_under(name, found)]


def _head_prefixes(model: nn.Module, head: Head) -> tuple[str, ...]:
    if head is None:
        return tuple(map(clean, find_head(unwrap(model))))
    return check_prefixes(head, named_parameters(model), "head")


def holds_codes(tensor: Tensor) -> bool:
    """Whether a tensor is of a class that is read by dequantizing it, as torchao's are."""
    own = (cls for cls in type(tensor).__mro__ if issubclass(cls, Tensor) and cls is not Tensor)
    return any("dequantize" in vars(cls) for cls in own)


def _trainable_type(parameter: nn.Parameter) -> bool:
    """Whether a parameter holds plain numbers of at least 16 bits; quantized ones do not."""
    plain = not holds_codes(parameter)
    return plain and parameter.is_floating_point() and parameter.element_size() >= 2


def weights(model: nn.Module, head: Head = None, *, with_frozen: bool = False) -> Parameters:
    """The candidates of a selection: unique floating-point parameters outside the task head.

    Parameters
    ----------
    model
        Any module. A tied parameter appears once, under its first name; buffers and quantized
        tensors never appear.
    head
        Names or prefixes of the task head, always trained and outside the budget. ``None`` finds
        it (see `heads.find_head`); ``()`` says that there is none.
    with_frozen
        Include parameters with ``requires_grad=False``. They stay frozen otherwise, unless all
        candidates are frozen.

    Returns
    -------
    dict
        ``{name: parameter}`` in model order.

    Raises
    ------
    ValueError
        If a prefix names nothing, no candidate is left, or a parameter is sharded.
    """
    found = candidates(model, head, with_frozen=with_frozen)
    for name in (name for name, p in found.items() if is_sharded(p)):
        remedy = "score and select before sharding (Selection.save, load), ship by tuning.delta()"
        raise ValueError(f"model's {name!r} is sharded; {remedy}")
    return found


def candidates(model: nn.Module, head: Head = None, *, with_frozen: bool = False) -> Parameters:
    """`weights` that may be sharded: masked training of given positions needs no whole ones."""
    prefixes, named = _head_prefixes(model, head), named_parameters(model).items()
    found = {n: p for n, p in named if not is_under(n, prefixes) and _trainable_type(p)}
    if not found:
        lack = f"model has no floating-point parameter outside its head {prefixes}"
        raise ValueError(f"{lack}, so nothing can be selected (quantized tensors cannot)")
    free = {name: p for name, p in found.items() if p.requires_grad}
    return free if free and not with_frozen and not in_masked_training(model) else found


def head_weights(model: nn.Module, head: Head = None) -> Parameters:
    """The parameters of the task head, ``{name: parameter}``; arguments, errors as `weights`."""
    prefixes, named = _head_prefixes(model, head), named_parameters(model).items()
    return {n: p for n, p in named if is_under(n, prefixes) and _trainable_type(p)}


def in_masked_training(model: nn.Module) -> bool:
    """Whether a layer of the model trains selected entries now."""
    return any(isinstance(module, Entries) for module in unwrap(model).modules())


def resolve_budget(budget: Budget, total: int) -> int:
    """Turn a budget into a number of weights: a count itself, or round(fraction * total).

    Parameters
    ----------
    budget
        An ``int`` counts weights, a ``float`` in (0, 1] is a fraction of `total`.
    total
        Number of candidate weights N.

    Returns
    -------
    int
        k with 1 <= k <= total.

    Raises
    ------
    TypeError
        If `budget` is a ``bool`` or not a number.
    ValueError
        If it lies outside its range, or rounds to no weight at all.
    """
    kinds = "give a count (int) or a fraction in (0, 1] (float)"
    if isinstance(budget, bool):
        raise TypeError(f"budget={budget} is a bool; {kinds}")
    if isinstance(budget, float) and not 0 < budget <= 1:
        raise ValueError(f"budget={budget} is outside (0, 1]; {kinds}")
    try:
        k = round(budget * total) if isinstance(budget, float) else operator.index(budget)
    except TypeError:
        raise TypeError(f"budget={budget!r} is not a number; {kinds}") from None
    if k == 0 and isinstance(budget, float):
        raise ValueError(f"budget={budget} of {total} weights rounds to none; give a larger one")
    if not 1 <= k <= total:
        raise ValueError(f"budget={k} is outside [1, {total}], the number of candidate weights")
    return k


@contextmanager
def preserve_modes(model: nn.Module) -> Iterator[None]:
    """A block after which every module is in training or evaluation mode as it was before."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def only_trainable(model: nn.Module, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """A block in which exactly these of a model's parameters require gradients."""
    flags, chosen = [(p, p.requires_grad) for p in model.parameters()], set(parameters)
    try:
        for p, _ in flags:
            if (p in chosen) != p.requires_grad:  # quantized tensors cannot be asked to
                p.requires_grad_(p in chosen)
        yield
    finally:
        for p, flag in flags:
            if p.requires_grad != flag:
                p.requires_grad_(flag)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A detached copy of every unique parameter and persistent buffer, ``{name: tensor}``.

    Copies are on the tensor's device, in its dtype.
    """
    tensors: dict[str, Any] = {**named_parameters(model), **named_buffers(model)}
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def check_names(given: Iterable[str], known: Collection[str], argument: str) -> None:
    """Raise a `ValueError` that says the first of the names `given` that is not in `known`."""
    for name in given:
        if name not in known:
            why = "is not a parameter of this model (or is the second name of a tied one)"
            raise ValueError(f"{argument} holds {name!r}, which {why}")
