"""Train: a method is an iterable of phases; `fit` runs them with any optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from itertools import chain, repeat
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .layers.masked import masked
from .params import head_weights, only_trainable, preserve_modes
from .scores import Loss, model_loss
from .selection import Selection

Schedule = Callable[[float], float]
Group = dict[str, Any]
Action = Callable[[float, torch.optim.Optimizer], None]


def constant(progress: float) -> float:
    """A schedule: the group's learning rate throughout."""
    return 1.0


def linear_decay(progress: float) -> float:
    """A schedule: from the group's learning rate to zero, linear in progress through the phase (0 to 1)."""
    return 1.0 - progress


def cosine_decay(progress: float) -> float:
    """A schedule: from the group's learning rate to zero along half a cosine."""
    return (1 + math.cos(math.pi * progress)) / 2


@dataclass
class Phase:
    """One stretch of training: what is trainable, for how long, and what happens around a step.

    Attributes
    ----------
    name
        Shown in the history.
    groups
        Parameter groups as ``torch.optim`` takes them; each may hold a ``"schedule"``, progress in
        [0, 1) -> multiplier of its learning rate (default `linear_decay`).
    epochs
        Passes over the batches.
    penalty
        Added to the loss at every step, a scalar tensor with gradient.
    before_step, after_step
        Called between backward and clipping (to change gradients), and after the optimizer's step.
        Both get the fraction of the phase that is done with this step, in (0, 1], and the
        optimizer, whose groups still have the learning rates of this step (SoRA needs one).
    model
        Called in place of the model, where a phase wraps it (Diff Pruning's gates).
    clip
        Largest gradient norm of each group, or None.
    selection
        The weights that the phase trains, where they are a fixed selection.
    """

    name: str
    groups: Sequence[Group]
    epochs: int
    penalty: Callable[[], Tensor] | None = None
    before_step: Action | None = None
    after_step: Action | None = None
    model: nn.Module | None = None
    clip: float | None = 1.0
    selection: Selection | None = None

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ValueError(f"epochs={self.epochs} of phase {self.name!r} must be at least 1")


class Batches(Sized, Protocol):
    """What `fit` trains on: a length, and a new pass at every iteration."""

    def __iter__(self) -> Iterator[Any]: ...


def fit(
    model: nn.Module,
    phases: Iterable[Phase],
    batches: Batches,
    *,
    loss: Loss = model_loss,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
    on_step: Callable[[dict[str, Any]], None] | None = None,
) -> list[dict[str, Any]]:
    """Run every phase of a method; the model is trained in place.

    Parameters
    ----------
    model
        The model that the phases were made for; put in training mode during a phase, and back after
        it.
    phases
        A method, such as ``fixed_mask(...)`` or ``diff_pruning(...)``: it may prepare the next
        phase from the last.
    batches
        Sized and iterable again for every epoch.
    loss
        ``(model, batch) -> scalar``.
    optimizer
        Called with a phase's groups; a new one for every phase.
    on_step
        Called with each step's record, e.g. to show progress.

    Returns
    -------
    list of dict
        One record a step: ``phase``, ``step`` (within the phase), ``loss``, ``penalty`` (0.0 where
        there is none).

    Raises
    ------
    ValueError
        If there is no batch, or the loss is not finite (the phase's step is named; nothing of that
        step is applied).
    """
    if len(batches) == 0:
        raise ValueError("batches is empty; give at least one batch")
    records: list[dict[str, Any]] = []
    try:
        for phase in phases:
            with preserve_modes(phase.model or model):
                for record in _steps(phase, phase.model or model, batches, loss, optimizer):
                    records.append(record)
                    if on_step:
                        on_step(record)
    finally:
        if isinstance(phases, Generator):
            phases.close()  # after an error too the model is an ordinary one at once
    return records


def _steps(
    phase: Phase,
    model: nn.Module,
    batches: Batches,
    loss: Loss,
    optimizer: Callable[..., torch.optim.Optimizer],
) -> Iterator[dict[str, Any]]:
    """Train one phase, a record a step."""
    opt = optimizer([{k: v for k, v in group.items() if k != "schedule"} for group in phase.groups])
    steps = phase.epochs * len(batches)
    schedules = [_per_step(group.get("schedule", linear_decay), steps) for group in phase.groups]
    rates = torch.optim.lr_scheduler.LambdaLR(opt, schedules)
    model.train()
    passes = chain.from_iterable(repeat(batches, phase.epochs))
    for step, batch in enumerate(passes, 1):
        task = loss(model, batch)
        penalty = phase.penalty() if phase.penalty else torch.zeros_like(task)
        total = task + penalty
        if not torch.isfinite(total):
            raise ValueError(
                f"loss is {total.item()} in phase {phase.name!r}, step {step}; lower the learning rate"
            )
        opt.zero_grad()
        total.backward()
        if phase.before_step:
            phase.before_step(step / steps, opt)
        if phase.clip is not None:
            for group in opt.param_groups:
                nn.utils.clip_grad_norm_(group["params"], phase.clip)
        opt.step()
        if phase.after_step:
            phase.after_step(step / steps, opt)
        rates.step()
        yield {"phase": phase.name, "step": step, "loss": task.item(), "penalty": penalty.item()}


def _per_step(schedule: Schedule, steps: int) -> Callable[[int], float]:
    return lambda step: schedule(min(step / steps, 1.0))


def head_group(
    parameters: Sequence[nn.Parameter], lr: float, lr_head: float | None, **options: Any
) -> list[Group]:
    """The parameter group of the task head, at `lr_head` or, if that is None, at `lr`; none where there is no head."""
    return (
        [{"params": list(parameters), "lr": lr if lr_head is None else lr_head, **options}]
        if parameters
        else []
    )


def fixed_mask(
    model: nn.Module,
    selection: Selection,
    *,
    lr: float,
    epochs: int,
    lr_head: float | None = None,
    head: Sequence[str] | None = None,
    weight_decay: float = 0.0,
    name: str = "fixed mask",
) -> Generator[Phase, None, None]:
    """A method: train a selection, and the task head beside it, on compact parameters.

    Parameters
    ----------
    model, selection
        As in `masked`.
    lr, lr_head
        Learning rates of the selected weights and of the head (default: the same).
    epochs
        Passes over the batches.
    head
        As in `weights`.
    weight_decay
        Of selected weights and head; it pulls values to zero.

    Yields
    ------
    Phase
        One; the model is an ordinary one again when the iteration ends.
    """
    with masked(model, selection, dense=tuple(head_weights(model, head))) as training:
        groups: list[Group] = [
            {"params": training.parameters(), "lr": lr, "weight_decay": weight_decay}
        ]
        groups += head_group(training.dense_parameters(), lr, lr_head, weight_decay=weight_decay)
        yield Phase(name, groups, epochs, selection=selection)


def full_finetuning(
    model: nn.Module,
    *,
    lr: float,
    epochs: int,
    lr_head: float | None = None,
    head: Sequence[str] | None = None,
    weight_decay: float = 0.0,
    name: str = "dense",
) -> Generator[Phase, None, None]:
    """A method, the baseline: train every parameter (full fine-tuning), the head at `lr_head`; see `fixed_mask`."""
    heads = head_weights(model, head)
    body = [p for n, p in model.named_parameters() if n not in heads and p.is_floating_point()]
    groups: list[Group] = [{"params": body, "lr": lr, "weight_decay": weight_decay}]
    groups += head_group(list(heads.values()), lr, lr_head, weight_decay=weight_decay)
    with only_trainable(model, [*body, *heads.values()]):
        yield Phase(name, groups, epochs)
