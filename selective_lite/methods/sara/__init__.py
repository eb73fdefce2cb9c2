"""SaRA (Hu et al. 2024, arXiv 2409.06633, ICLR 2025): train the smallest weights.

They do the least as they are. The selection is every weight below a threshold, |w| < t (or the k
smallest). Half way, those that have outgrown it stop training (*progressive re-selection*), and a
*nuclear-norm* loss keeps the selected matrix low in rank. Several tutorials call the method SARA
and cite 2311.11696: that is SoRA, a gated LoRA, which is unrelated (see `sora`).
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence

import numpy as np
from torch import nn

from ...layers.masked import MaskedTraining, check_selection
from ...params import check_prefixes, is_under, named_parameters, resolve_budget, weights
from ...scores import magnitude
from ...selection import Selection, select
from ...training import Group, Phase, Phases, Schedule, check_options, cosine_decay, head_group
from .nuclear import nuclear_norm
from .schedule import FEWEST, SaRASchedule, ranked

__all__ = [
    "FEWEST",
    "SaRASchedule",
    "learning_rate",
    "nuclear_norm",
    "ranked",
    "sara",
    "smaller_than",
    "smallest",
]


def learning_rate(threshold: float) -> float:
    """The rate for a threshold (authors' code): more weights train more slowly; 4.97e-4 at 2e-3."""
    # (eq-sara-rate)  lr = 10^-3 exp(-350 threshold)
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
    # (eq-sara-smallest)  M = 1 where |theta| is among the k smallest
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
        # (eq-sara-mask)  M = 1[|theta| < threshold]
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


def sara(
    model: nn.Module,
    *,
    threshold: float | None = None,
    budget: int | float | None = None,
    epochs: int,
    lr: float | None = None,
    lr_head: float | None = None,
    lam: float = 5e-4,
    reselect: int | float | None = 0.5,
    min_side: int = 64,
    schedule: Schedule = cosine_decay,
    weight_decay: float = 1e-2,
    head: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    seed: int = 0,
) -> Phases:
    """A method: train the small weights, re-select once, keep the selected matrices low in rank.

    Parameters
    ----------
    model
        As in `masked`.
    threshold, budget
        One of them: select |w| < threshold (`smaller_than`), or exactly the k smallest |w|
        (`smallest`), whose threshold is just above the k-th.
    epochs
        Passes over the batches.
    lr, lr_head
        Learning rates of the selected weights (default: `learning_rate` of the threshold) and of
        the head (default: the same).
    lam
        Weight of the nuclear norm, 0 for none. It costs an SVD a step.
    reselect
        When the weights that have outgrown the threshold stop training: after a step (int) or a
        fraction of the phase (float in (0, 1)); None for never. They keep the value they have then;
        the others keep their moments.
    min_side
        The nuclear norm is that of a matrix with both sides over this.
    schedule
        Schedule of both rates; half a cosine is the authors' choice.
    weight_decay
        Decay of selected weights and head; it pulls values to zero.
    head, exclude
        As in `smallest`.
    seed
        Seed of the CPU generator that draws one matrix a step.

    Returns
    -------
    Phases
        One phase, ``"SaRA"``; its ``after_step`` is `SaRASchedule.update`.

    Raises
    ------
    TypeError, ValueError
        At the call for a bad option or selection (the model is unchanged); from the phase, as
        `SaRASchedule.find_step` and `SaRASchedule.update` do.
    """
    allowed = 0 < reselect < 1 if isinstance(reselect, float) else reselect is None or reselect >= 1
    if isinstance(reselect, bool) or not allowed:
        raise ValueError(
            f"reselect={reselect} must be a step (int), a fraction in (0, 1) (float), or None"
        )
    if not lam >= 0:
        raise ValueError(f"lam={lam} must not be negative; 0 leaves the nuclear norm out")
    if threshold is not None and budget is None:
        bound, selection = threshold, smaller_than(model, threshold, head, exclude)
    elif budget is not None and threshold is None:
        selection = smallest(model, budget, head, exclude)
        bound = _above(model, selection)
    else:
        raise ValueError("give one of threshold (|w| below it) and budget (the k smallest)")
    rate = learning_rate(bound) if lr is None else lr
    check_options("SaRA", epochs=epochs, lr=rate, lr_head=lr_head, weight_decay=weight_decay)
    check_selection(model, selection, head=head)
    if lam and not any(len(selection.indices[n]) > FEWEST for n in ranked(selection, min_side)):
        raise ValueError(
            f"lam={lam} weighs the nuclear norm of a matrix, but none has more than {FEWEST} "
            f"selected weights and both sides over {min_side}; lower min_side, or give lam=0"
        )

    def phases() -> Generator[Phase, None, None]:
        with MaskedTraining(model, selection, head=head, shrinks=reselect is not None) as training:
            state = SaRASchedule(
                training, bound, reselect=reselect, lam=lam, min_side=min_side, seed=seed
            )
            common: Group = {"weight_decay": weight_decay, "schedule": schedule}
            groups: list[Group] = [{"params": training.parameters(), "lr": rate, **common}]
            groups += head_group(training.dense_parameters(), rate, lr_head, **common)
            yield Phase(
                "SaRA",
                groups,
                epochs,
                penalty=state.penalty if lam else None,
                before_step=state.find_step,
                after_step=state.update,
                selection=selection if reselect is None else None,
            )

    return Phases(phases())


def _above(model: nn.Module, selection: Selection) -> float:
    """The float32 number just above the largest selected |w|."""
    named = named_parameters(model)
    largest = max(
        float(named[name].detach().reshape(-1)[index.to(named[name].device)].abs().max())
        for name, index in selection.indices.items()
    )
    return float(np.nextafter(np.float32(largest), np.float32(np.inf)))
