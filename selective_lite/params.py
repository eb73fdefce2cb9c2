"""Which weights count: the candidates of a selection, the task head beside them, and budgets."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

# Task classifiers by the names `transformers` gives them. A language-model head is pretrained, so
# it is a candidate.
HEADS = ("classifier", "score", "qa_outputs")


def owners(model: nn.Module) -> dict[str, list[tuple[nn.Module, str]]]:
    """Every place each parameter is registered at, by its canonical (first) name.

    A tied parameter has one canonical name and several places.

    Parameters
    ----------
    model
        Any module.

    Returns
    -------
    dict
        ``{name: [(module, attribute), ...]}`` in the order of ``model.named_parameters()``.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    places: dict[str, list[tuple[nn.Module, str]]] = {name: [] for name in names.values()}
    for module in model.modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                places[names[parameter]].append((module, attribute))
    return places


def is_under(name: str, prefixes: Sequence[str]) -> bool:
    """Whether a dotted `name` is one of `prefixes` or lies below one."""
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def check_prefixes(
    prefixes: str | Sequence[str], names: Collection[str], what: str
) -> tuple[str, ...]:
    """The prefixes as a tuple; raise a `ValueError` that names the first one under which there is none of `names`."""
    found = (prefixes,) if isinstance(prefixes, str) else tuple(prefixes)
    for prefix in found:
        if not any(is_under(name, (prefix,)) for name in names):
            known = next(iter(names), None)
            raise ValueError(
                f"{what}={prefix!r} names no parameter; give names or prefixes, such as {known!r}"
            )
    return found


def _head_prefixes(model: nn.Module, head: Sequence[str] | None) -> tuple[str, ...]:
    if head is None:
        return tuple(name for name, _ in model.named_children() if name in HEADS)
    return check_prefixes(head, dict(model.named_parameters()), "head")


def _floating(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in model.named_parameters() if p.is_floating_point())


def weights(model: nn.Module, head: Sequence[str] | None = None) -> dict[str, nn.Parameter]:
    """The candidates of a selection: unique floating-point parameters outside the task head.

    Parameters
    ----------
    model
        Any module. A tied parameter appears once, under its first name; buffers never appear.
    head
        Prefixes of the task head, always trained and outside the budget. ``None`` finds a top-level
        ``classifier``, ``score`` or ``qa_outputs``; ``()`` says that there is none.

    Returns
    -------
    dict
        ``{name: parameter}`` in model order.

    Raises
    ------
    ValueError
        If a prefix names nothing, or no candidate is left.
    """
    prefixes = _head_prefixes(model, head)
    found = {name: p for name, p in _floating(model) if not is_under(name, prefixes)}
    if not found:
        raise ValueError(
            f"model has no floating-point parameter outside its head {prefixes}; nothing can be selected"
        )
    return found


def head_weights(model: nn.Module, head: Sequence[str] | None = None) -> dict[str, nn.Parameter]:
    """The parameters of the task head, ``{name: parameter}``; arguments and errors as in `weights`."""
    prefixes = _head_prefixes(model, head)
    return {name: p for name, p in _floating(model) if is_under(name, prefixes)}


def resolve_budget(budget: int | float, total: int) -> int:
    """Turn a budget into a number of weights: k = round(budget * total) for a fraction, the count itself for an int.

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
        If `budget` is a ``bool`` or no number.
    ValueError
        If it lies outside its range, or rounds to no weight at all.
    """
    if isinstance(budget, bool):
        raise TypeError(
            f"budget={budget} is a bool; give a count (int) or a fraction in (0, 1] (float)"
        )
    if isinstance(budget, float):
        if not 0 < budget <= 1:
            raise ValueError(
                f"budget={budget} is outside (0, 1]; give a fraction, or an int to count weights"
            )
        k = round(budget * total)
        if k == 0:
            raise ValueError(
                f"budget={budget} of {total} weights rounds to none; give a larger fraction"
            )
        return k
    try:
        k = operator.index(budget)
    except TypeError:
        raise TypeError(
            f"budget={budget!r} is no number; give a count (int) or a fraction in (0, 1] (float)"
        ) from None
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
    """A block in which of a model's parameters exactly these require gradients; every flag is put back after it."""
    flags, chosen = [(p, p.requires_grad) for p in model.parameters()], set(parameters)
    try:
        for p, _ in flags:
            p.requires_grad_(p in chosen)
        yield
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A detached copy of every unique parameter, ``{name: tensor}``, on the parameter's device and dtype."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def check_names(given: Iterable[str], known: Collection[str], what: str) -> None:
    """Raise a `ValueError` that says the first of the names `given` that is no parameter among `known`."""
    unknown = [name for name in given if name not in known]
    if unknown:
        raise ValueError(
            f"{what} holds {unknown[0]!r}, which is no parameter of this model (or a tied one's second name)"
        )
