"""Child-Tuning (Xu et al. 2021, EMNLP): update only a child network, drawn anew at each step (F) or chosen once (D).

F, task-free, keeps each entry of a gradient with probability p and divides by p: noise that
regularises fine-tuning, in which every weight moves sooner or later. D, task-driven, keeps the
fraction p of the weights with the most Fisher information, for the whole training: a fixed mask.
Their p is 0.2 to 0.4, far more than a small delta holds.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from typing import Literal

import torch
from torch import Tensor, nn

from ..scores import Batch, Loss, exclude, model_loss, squared_gradient
from ..selection import Selection, select
from ..training import Phase, fixed_mask, full_finetuning


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
) -> Generator[Phase, None, None]:
    """A method: train everything, the head too, on gradients of which a fresh random part is kept at every step.

    The optimizer's momentum still moves entries whose draw is 0, as in the authors' code. Gradients
    are clipped after they are masked; the authors clip before.

    Parameters
    ----------
    model
        Any module, trained in place.
    p
        Probability in (0, 1] that an entry is kept; 1 is full fine-tuning.
    lr, lr_head, epochs, head, weight_decay
        As in `dense`.
    seed
        Of the CPU generator that draws the masks.

    Yields
    ------
    Phase
        ``"Child-Tuning-F"``.

    Raises
    ------
    ValueError
        If `p` is outside (0, 1].
    """
    _check(p)
    generator = torch.Generator().manual_seed(seed)

    def before_step(progress: float, optimizer: torch.optim.Optimizer) -> None:
        for group in optimizer.param_groups:
            for q in group["params"]:
                if q.grad is not None:
                    # (eq-child-f)  g <- g * m / p,  m ~ Bernoulli(p)
                    q.grad.mul_(draw(q.shape, p, generator).to(q.device)).div_(p)

    everything = full_finetuning(
        model,
        lr=lr,
        epochs=epochs,
        lr_head=lr_head,
        head=head,
        weight_decay=weight_decay,
        name="Child-Tuning-F",
    )
    with closing(everything) as phases:
        for phase in phases:
            phase.before_step = before_step
            yield phase


def draw(shape: torch.Size, p: float, generator: torch.Generator) -> Tensor:
    """Ones with probability p and zeros, bool, on CPU."""
    return torch.rand(shape, generator=generator, device="cpu") < p  # half the time of `bernoulli_`


def child_network(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    p: float = 0.3,
    reduction: Literal["per_sample", "batch"] = "per_sample",
    loss: Loss = model_loss,
    head: Sequence[str] | None = None,
    frozen: Sequence[str] = (),
) -> Selection:
    """The fraction p of the candidates that has the most empirical Fisher information: exactly round(p N) weights.

    Parameters
    ----------
    model, batches, loss, head
        As in `squared_gradient`.
    p
        In (0, 1].
    reduction
        ``"per_sample"`` (the paper's Fisher information), or ``"batch"``: squares of the batches'
        mean gradients, as in the authors' code, which also clips each tensor's gradient to norm 1
        before it squares.
    frozen
        Names or prefixes of tensors that are not selected from.

    Raises
    ------
    ValueError
        If `p` is outside (0, 1], and as in `squared_gradient`, `exclude` and `select`.
    """
    _check(p)
    # (eq-child-d)  F_w = sum_i (d L_i / d w)^2;  M_w = 1 if F_w is among the p N largest, else 0
    scores = squared_gradient(model, batches, reduction=reduction, loss=loss, head=head)
    return select(exclude(scores, frozen), float(p))


def child_tuning_d(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    lr: float,
    epochs: int,
    p: float = 0.3,
    reduction: Literal["per_sample", "batch"] = "per_sample",
    loss: Loss = model_loss,
    lr_head: float | None = None,
    head: Sequence[str] | None = None,
    frozen: Sequence[str] = (),
    weight_decay: float = 0.0,
) -> Generator[Phase, None, None]:
    """A method: choose the child network once, on `batches`, and train it with the head.

    Parameters
    ----------
    model
        Any module, trained in place.
    batches, p, reduction, loss, frozen
        As in `child_network`.
    lr, lr_head, epochs, head, weight_decay
        As in `fixed_mask`; decay acts on the child network only (in the authors' code on every
        weight).

    Yields
    ------
    Phase
        ``"Child-Tuning-D"``. Exactly round(p N) weights are trained, beside the head.

    Raises
    ------
    ValueError
        As in `child_network` and `masked`; the model is then unchanged.
    """
    selection = child_network(
        model, batches, p=p, reduction=reduction, loss=loss, head=head, frozen=frozen
    )
    yield from fixed_mask(
        model,
        selection,
        lr=lr,
        epochs=epochs,
        lr_head=lr_head,
        head=head,
        weight_decay=weight_decay,
        name="Child-Tuning-D",
    )


def _check(p: float) -> None:
    if not 0 < p <= 1:
        raise ValueError(
            f"p={p} is outside (0, 1]; it is the share of the weights in the child network"
        )
