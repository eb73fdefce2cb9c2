"""LT-SFT, lottery-ticket sparse fine-tuning (Ansell et al. 2022, ACL): train all, keep what moved most, start again.

A dense phase fine-tunes every weight. The k weights that it moved farthest are the ticket. Then
every parameter, the head too, is rewound to where the phase began, and the ticket alone is trained,
with a fresh optimizer.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..params import resolve_budget, snapshot, weights
from ..scores import Scores, exclude, movement
from ..selection import Selection, select
from ..training import Phase, fixed_mask, full_finetuning


@torch.no_grad()
def rewind(model: nn.Module, start: Mapping[str, Tensor]) -> None:
    """Put every parameter, the head's too, back to its value in a `snapshot`, bit by bit."""
    for name, p in model.named_parameters():
        p.copy_(start[name])


def most_moved(scores: Scores, count: int, chosen: Selection | None = None) -> Selection:
    """`chosen` and the `count` largest scores outside it: exactly so many, where the authors' >= takes every tie.

    Parameters
    ----------
    scores
        `movement` of every candidate; set to zero where `chosen` is.
    count
        How many weights are added.
    chosen
        The ticket so far, which keeps its place.

    Raises
    ------
    ValueError
        If fewer than `count` other weights moved.
    """
    if chosen is None:
        return select(scores, count)
    masks = chosen.masks()
    for name in chosen.indices:
        scores[name].masked_fill_(masks[name].to(scores[name].device), 0.0)
    added = select(scores, count)
    indices = {
        name: torch.cat([part.indices[name] for part in (chosen, added) if name in part.indices])
        .sort()
        .values
        for name in scores
        if name in chosen.indices or name in added.indices
    }
    return Selection(indices, added.shapes)


def l1_penalty(weight: float, pairs: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """`weight` times the sum of |theta - theta0| over pairs of tensors, a scalar with gradient."""
    # (eq-lt-sft-l1)  lambda / N * sum |theta - theta0|
    return (
        weight
        * torch.stack(
            [(theta.reshape(-1) - theta0.reshape(-1)).abs().sum() for theta, theta0 in pairs]
        ).sum()
    )


def lt_sft(
    model: nn.Module,
    budget: int | float,
    *,
    lr: float,
    epochs: tuple[int, int],
    iterations: int = 1,
    l1: float = 0.0,
    lr_dense: float | None = None,
    lr_head: float | None = None,
    head: Sequence[str] | None = None,
    frozen: Sequence[str] = (),
    weight_decay: float = 0.0,
) -> Generator[Phase, None, None]:
    """A method: a dense phase, the k weights that moved most, rewind, a masked phase; all of it `iterations` times.

    Parameters
    ----------
    model
        Any module, trained in place. Where a dense phase is interrupted, the model is where that
        phase began.
    budget
        k, a count or a fraction of the candidates; an iteration adds k / iterations of them to the
        ticket.
    lr, lr_dense, lr_head
        Of the weights in the masked phase; in the dense phase (default `lr`, as in the authors'
        code, but a sparse mask wants a larger rate than dense training); and of the head in both
        (default: that of the weights).
    epochs
        Of the dense phase, and of the masked phase.
    iterations
        The authors' default is 1. A later one starts from the weights that the last one trained.
    l1
        lambda of the penalty lambda / N * sum |theta - theta0|, in both phases; it draws weights to
        theta0.
    head
        As in `weights`.
    frozen
        Names or prefixes of tensors that neither phase trains (the authors: every LayerNorm).
    weight_decay
        As in `dense` and `fixed_mask`. In the dense phase it moves weights that have no gradient,
        too.

    Yields
    ------
    Phase
        ``"dense"`` and ``"masked"`` in turn. Exactly k weights are trained in the end, beside the
        head.

    Raises
    ------
    ValueError
        For a bad budget or option, or if fewer weights moved than are to be chosen (the model is
        then rewound).
    """
    theta = weights(model, head)
    free = [name for name, kept in exclude(theta, frozen).items() if kept is theta[name]]
    total = sum(p.numel() for p in theta.values())
    k, most = resolve_budget(budget, total), sum(theta[name].numel() for name in free)
    if k > most:
        raise ValueError(
            f"budget={budget} asks for {k} weights, but only {most} are not frozen; lower it"
        )
    if not 1 <= iterations <= k:
        raise ValueError(
            f"iterations={iterations} is outside [1, {k}], the number of weights that are selected"
        )
    if not l1 >= 0:
        raise ValueError(f"l1={l1} must be 0 or more; it weighs a penalty")
    theta0 = snapshot(model) if l1 else {}
    rate_dense = lr if lr_dense is None else lr_dense
    common: dict[str, Any] = {"lr_head": lr_head, "head": head, "weight_decay": weight_decay}
    chosen: Selection | None = None
    for i in range(iterations):
        start = snapshot(model)
        try:
            with closing(
                full_finetuning(model, lr=rate_dense, epochs=epochs[0], **common)
            ) as phases:
                for phase in phases:
                    phase.groups[0]["params"] = [theta[name] for name in free]
                    if l1:
                        phase.penalty = partial(
                            l1_penalty, l1 / total, [(theta[name], theta0[name]) for name in free]
                        )
                    yield phase
            # (eq-lt-sft)  M_w = 1 if |theta_w - theta0_w| is among the k largest, else 0
            moved = movement(
                model, start, head
            )  # 0 for what is frozen, and `select` never takes a 0
        finally:
            rewind(model, start)
        chosen = most_moved(moved, k * (i + 1) // iterations - k * i // iterations, chosen)
        del moved, start  # each as large as the model
        with closing(
            fixed_mask(model, chosen, lr=lr, epochs=epochs[1], name="masked", **common)
        ) as phases:
            for phase in phases:
                if l1:
                    origin = [
                        theta0[name].reshape(-1)[index.to(theta0[name].device)]
                        for name, index in chosen.indices.items()
                    ]
                    pairs = zip(phase.groups[0]["params"], origin, strict=True)
                    phase.penalty = partial(l1_penalty, l1 / total, list(pairs))
                yield phase
