"""SaRA's selections: the weights below a threshold, or the k smallest."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from torch import nn

from ...params import check_prefixes, is_under, named_parameters, resolve_budget, weights
from ...scores import magnitude
from ...selection import Selection, select


def learning_rate(threshold: float) -> float:
    """The rate for a threshold (authors' code): more weights train more slowly; 4.97e-4 at 2e-3."""
    # (eq-sara-rate)  lr = 10^-3 exp(-350 t)
    return 1e-3 * math.exp(-350 * threshold)


def smallest(
    model: nn.Module,
    budget: int | float,
    head: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
) -> Selection:
    """The k candidates with the smallest |w|.

    Parameters
    ----------
    model
        Any module.
    budget
        k, a count or a fraction of the candidates.
    head
        As in `weights`.
    exclude
        Names or prefixes of tensors that are not selected from; they still count in a fraction's
        total.

    Returns
    -------
    Selection
        Exactly k positions; its ``method`` is ``"SaRA"``.

    Raises
    ------
    TypeError, ValueError
        As in `select`, or if a name in `exclude` is unknown.

    Examples
    --------
    >>> records = fit(model, fixed_mask(model, smallest(model, 0.005), lr=1e-3, epochs=3), batches)
    """
    scores = magnitude(model, head)
    prefixes = check_prefixes(exclude, scores, "exclude")
    k = resolve_budget(budget, sum(s.numel() for s in scores.values()))
    # (eq-sara-smallest)  M = 1 where |w| is among the k smallest
    free = {name: s for name, s in scores.items() if not is_under(name, prefixes)}
    found = select(free, k, largest=False)
    return Selection(found.indices, {n: tuple(s.shape) for n, s in scores.items()}, method="SaRA")


def smaller_than(
    model: nn.Module,
    threshold: float,
    head: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
) -> Selection:
    """Every candidate with |w| < threshold; their number follows from the scale of the weights.

    Parameters
    ----------
    model
        Any module.
    threshold
        t > 0; 2e-3 in the authors' README.
    head, exclude
        As in `smallest`.

    Raises
    ------
    ValueError
        If no weight or every weight is below the threshold, or it is not a positive number.
    """
    if not 0 < threshold < math.inf:
        raise ValueError(f"threshold={threshold} must be a positive number; the authors use 2e-3")
    candidates = weights(model, head)
    prefixes = check_prefixes(exclude, candidates, "exclude")
    free = {name: p for name, p in candidates.items() if not is_under(name, prefixes)}
    indices = {}
    for name, p in free.items():
        # (eq-sara-mask)  M = 1[|w| < t]
        positions = (p.detach().abs() < threshold).reshape(-1).nonzero().squeeze(1).cpu()
        if len(positions):
            indices[name] = positions
    shapes = {name: tuple(p.shape) for name, p in candidates.items()}
    selection = Selection(indices, shapes, method="SaRA")
    if selection.count == 0:
        least = min((float(p.detach().abs().min()) for p in free.values()), default=math.nan)
        raise ValueError(
            f"threshold={threshold} selects no weight: the smallest |w| is {least:.3g}; raise it"
        )
    if selection.count == selection.total:
        raise ValueError(
            f"threshold={threshold} selects all {selection.total} weights; lower it, or use "
            "full_finetuning"
        )
    return selection


def just_above(model: nn.Module, selection: Selection) -> float:
    """The float32 number just above the largest selected |w|."""
    named = named_parameters(model)
    largest = max(
        float(named[name].detach().reshape(-1)[index.to(named[name].device)].abs().max())
        for name, index in selection.indices.items()
    )
    return float(np.nextafter(np.float32(largest), np.float32(np.inf)))
