"""Child-Tuning (Xu et al. 2021, EMNLP): update only a child network.

F, task-free, draws it anew at each step: it keeps each entry of a gradient with probability p and
divides by p, noise that regularises fine-tuning, in which every weight moves sooner or later. D,
task-driven, chooses it once: the fraction p of the weights with the most Fisher information, a
fixed mask. Their p is 0.2 to 0.4, far more than a small delta holds.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from ..batches import Batch, Loss, model_loss
from ..layers.masked import check_candidates
from ..params import resolve_budget, weights
from ..scores import exclude as without
from ..scores import squared_gradient
from ..selection import Selection, select
from ..training import Phase, Phases, Step
from .fixed_mask import full_finetuning


def child_tuning_f(
    model: nn.Module,
    *,
    lr: float,
    epochs: int,
    p: float = 0.3,
    lr_head: float | None = None,
    head: Sequence[str] | None = None,
    weight_decay: float = 0.0,
    seed: int = 0,
) -> Phases:
    """A method: train every candidate and the head on randomly masked gradients.

    A fresh mask is drawn at every step. The optimizer's momentum still moves entries whose draw is
    0, as in the authors' code. Gradients are clipped after they are masked, each group by itself;
    the authors clip before, all parameters together.

    Parameters
    ----------
    model
        Any module, trained in place; what the user froze stays frozen.
    p
        Probability in (0, 1] that an entry is kept; 1 is full fine-tuning.
    lr, lr_head, epochs, head, weight_decay
        As in `full_finetuning`.
    seed
        Seed of the CPU generator that draws the masks.

    Returns
    -------
    Phases
        One phase, ``"Child-Tuning-F"``.

    Raises
    ------
    TypeError, ValueError
        If `p` is outside (0, 1], and as in `full_finetuning`.
    """
    if not 0 < p <= 1:
        raise ValueError(f"p={p} is outside (0, 1]; it is the share of entries that is kept")
    everything = full_finetuning(
        model,
        lr=lr,
        epochs=epochs,
        lr_head=lr_head,
        head=head,
        weight_decay=weight_decay,
        name="Child-Tuning-F",
    )
    generator = torch.Generator().manual_seed(seed)

    def before_step(step: Step) -> None:
        for group in step.optimizer.param_groups:
            for q in group["params"]:
                if q.grad is not None:
                    # (eq-child-f)  g <- g * m / p,  m ~ Bernoulli(p)
                    q.grad.mul_(draw(q.shape, p, generator).to(q.device)).div_(p)

    def phases() -> Generator[Phase, None, None]:
        with closing(everything):
            for phase in everything:
                yield replace(phase, before_step=before_step)

    return Phases(phases())


def draw(shape: torch.Size, p: float, generator: torch.Generator) -> Tensor:
    """Ones with probability p and zeros, bool, on CPU."""
    return torch.rand(shape, generator=generator, device="cpu") < p  # half the time of `bernoulli_`


def child_tuning(
    model: nn.Module,
    batches: Iterable[Batch],
    budget: int | float = 0.3,
    *,
    reduction: Literal["per_sample", "batch"] = "per_sample",
    loss: Loss = model_loss,
    head: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
) -> Selection:
    """Child-Tuning-D's child network: the candidates with the most empirical Fisher information.

    Train it with `fixed_mask`, whose weight decay acts on the child network only; in the authors'
    code decay moves every weight.

    Parameters
    ----------
    model, batches, loss, head
        As in `squared_gradient`.
    budget
        k, a count or a fraction p of the candidates (authors: 0.3).
    reduction
        ``"per_sample"`` (the paper's Fisher information), or ``"batch"``: squares of the batches'
        mean gradients, as in the authors' code, which also clips each tensor's gradient to norm 1
        before it squares.
    exclude
        Names or prefixes of tensors that are not selected from; they still count in a fraction's
        total.

    Returns
    -------
    Selection
        Exactly k positions; its ``method`` is ``"Child-Tuning-D"``.

    Raises
    ------
    TypeError, ValueError
        For a bad option, or tensors that cannot be selected in part (all of them are named),
        before anything is scored; and as in `squared_gradient` and `select`.

    Examples
    --------
    >>> child = child_tuning(model, batches, 0.3)
    >>> records = fit(model, fixed_mask(model, child, lr=1e-4, epochs=3), batches)
    """
    candidates = weights(model, head)
    resolve_budget(budget, sum(p.numel() for p in candidates.values()))
    check_candidates(model, head, exclude)
    # (eq-child-d)  F_i = sum_j (d L_j / d theta_i)^2;  m_i = 1 if F_i is among the p N largest
    scores = squared_gradient(model, batches, reduction=reduction, loss=loss, head=head)
    return replace(select(without(scores, exclude), budget), method="Child-Tuning-D")
