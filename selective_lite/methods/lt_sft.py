"""LT-SFT, lottery-ticket sparse fine-tuning (Ansell et al. 2022, ACL): train all, keep the ticket.

A dense phase fine-tunes every weight. The k weights that it moved farthest are the ticket. Then
every parameter and buffer, the head's too, is rewound to where the phase began, and only the ticket
is trained, with a fresh optimizer.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..heads import Head
from ..layers.masked import check_candidates
from ..params import (
    check_prefixes,
    is_under,
    named_buffers,
    named_parameters,
    resolve_budget,
    snapshot,
    weights,
)
from ..scores import Scores
from ..scores import exclude as without
from ..selection import Selection, select
from ..training import Phase, Phases, check_options
from .fixed_mask import fixed_mask, full_finetuning


@torch.no_grad()
def rewind(model: nn.Module, start: Mapping[str, Tensor]) -> None:
    """Restore every parameter and persistent buffer from a `snapshot`, bit by bit."""
    for name, tensor in {**named_parameters(model), **named_buffers(model)}.items():
        tensor.copy_(start[name])


def most_moved(scores: Scores, count: int, chosen: Selection | None = None) -> Selection:
    """`chosen` and the `count` largest scores outside it; the authors' >= takes every tie.

    Parameters
    ----------
    scores
        `movement` of every candidate; set to zero in place at the positions of `chosen`.
    count
        Number of weights to add.
    chosen
        The ticket so far, which keeps its place.

    Raises
    ------
    ValueError
        If fewer than `count` other weights moved.
    """
    if chosen is None:
        return replace(select(scores, count), method="LT-SFT")
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
    return Selection(indices, added.shapes, method="LT-SFT")


def l1_penalty(weight: float, pairs: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """`weight` times the sum of |theta - theta0| over pairs of tensors, a scalar with gradient.

    The authors divide lambda by the number of all parameters and penalise the head as well; here N
    counts the candidates and the head is free (2.7 and 7.1 % of the gradient in a small example).
    """
    # (eq-lt-sft-l1)  lambda / N * sum |theta - theta0|
    return (
        weight
        * torch.stack(
            [(theta.reshape(-1) - theta0.reshape(-1)).abs().sum() for theta, theta0 in pairs]
        ).sum()
    )


def movement(model: nn.Module, start: Mapping[str, Tensor], head: Head = None) -> Scores:
    """|theta - theta0|, how far training moved each weight (Ansell et al. 2022, LT-SFT).

    Parameters
    ----------
    model
        The trained model, theta.
    start
        Its `snapshot` before training, theta0.
    head
        As in `weights`.

    Raises
    ------
    ValueError
        If `start` lacks a candidate, or holds it in another shape.
    """
    candidates = weights(model, head)
    for name, p in candidates.items():
        if name not in start or start[name].shape != p.shape:
            lack = f"start has no {name!r} of shape {tuple(p.shape)}"
            raise ValueError(f"{lack}; give a snapshot of this model")
    return {name: (p.detach() - start[name]).abs() for name, p in candidates.items()}


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
    exclude: Sequence[str] = (),
    weight_decay: float = 0.0,
) -> Phases:
    """A method: a dense phase, the k weights that moved most, rewind, a masked phase; repeated.

    Parameters
    ----------
    model
        Any module, trained in place. If a dense phase is interrupted, the model is where that
        phase began.
    budget
        k, a count or a fraction of the candidates; an iteration adds k / iterations of them to the
        ticket.
    lr, lr_dense, lr_head
        Learning rates of the weights in the masked phase, of the weights in the dense phase
        (default `lr`, as in the authors' code, but a sparse mask wants a larger rate than dense
        training), and of the head in both (default: that of the weights).
    epochs
        Epochs of the dense phase and of the masked phase.
    iterations
        How often the two phases are repeated (authors: once). A later iteration starts from the
        weights that the last one trained.
    l1
        lambda of the penalty lambda / N * sum |theta - theta0|, in both phases; see `l1_penalty`.
    head
        As in `weights`.
    exclude
        Names or prefixes of tensors that neither phase trains (the authors: every LayerNorm).
    weight_decay
        As in `full_finetuning` and `fixed_mask`. In the dense phase it also moves weights that have
        no gradient.

    Returns
    -------
    Phases
        ``"dense"`` and ``"masked"`` in turn. In the end exactly k weights are trained, and the
        head.

    Raises
    ------
    TypeError, ValueError
        At the call for a bad budget or option, or a tensor that cannot be selected in part; from
        the phases if fewer weights moved than are to be chosen (the model is then rewound).
    """
    theta = weights(model, head)
    prefixes = check_prefixes(exclude, theta, "exclude")
    free = [name for name in theta if not is_under(name, prefixes)]
    total = sum(p.numel() for p in theta.values())
    k, most = resolve_budget(budget, total), sum(theta[name].numel() for name in free)
    if k > most:
        raise ValueError(
            f"budget={budget} asks for {k} weights, but only {most} are not excluded; lower it"
        )
    if isinstance(iterations, bool) or not isinstance(iterations, int):
        raise TypeError(f"iterations={iterations!r} must be an int")
    if not 1 <= iterations <= k:
        raise ValueError(
            f"iterations={iterations} is outside [1, {k}], the number of weights that are selected"
        )
    if not l1 >= 0:
        raise ValueError(f"l1={l1} must be 0 or more; it weighs a penalty")
    if isinstance(epochs, int) or len(epochs) != 2:
        raise ValueError(f"epochs={epochs!r} must be two: of the dense and of the masked phase")
    rate_dense = lr if lr_dense is None else lr_dense
    common: dict[str, Any] = {"lr_head": lr_head, "weight_decay": weight_decay}
    check_options("dense", epochs=epochs[0], lr_dense=rate_dense, **common)
    check_options("masked", epochs=epochs[1], lr=lr, **common)
    # The dense phase decides which weights are trained, so a mask must be able to train any.
    check_candidates(model, head, exclude)

    def phases() -> Generator[Phase, None, None]:
        theta0 = snapshot(model) if l1 else {}
        chosen: Selection | None = None
        for i in range(iterations):
            start = snapshot(model)
            try:
                everything = full_finetuning(
                    model, lr=rate_dense, epochs=epochs[0], head=head, **common
                )
                with closing(everything):
                    for phase in everything:
                        phase.groups[0]["params"] = [theta[name] for name in free]
                        if l1:
                            pairs = [(theta[name], theta0[name]) for name in free]
                            phase.penalty = partial(l1_penalty, l1 / total, pairs)
                        yield phase
                # (eq-lt-sft)  m_i = 1 if |theta_i - theta0_i| is among the k largest, else 0
                # An excluded embedding with max_norm moves in its forward: leave it out by name.
                moved = without(movement(model, start, head), exclude)
                if not any(score.any() for score in moved.values()):
                    raise ValueError(
                        "no weight moved in the dense phase: give fit the method itself, not "
                        "list(method), or raise lr_dense"
                    )
            finally:
                rewind(model, start)
            chosen = most_moved(moved, k * (i + 1) // iterations - k * i // iterations, chosen)
            del moved, start  # each as large as the model
            masked = fixed_mask(
                model, chosen, lr=lr, epochs=epochs[1], head=head, name="masked", **common
            )
            with closing(masked):
                for phase in masked:
                    if l1:
                        origin = [
                            theta0[name].reshape(-1)[index.to(theta0[name].device)]
                            for name, index in chosen.indices.items()
                        ]
                        pairs = list(zip(phase.groups[0]["params"], origin, strict=True))
                        phase.penalty = partial(l1_penalty, l1 / total, pairs)
                    yield phase

    return Phases(phases())
