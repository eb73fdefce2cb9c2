"""Train: a method returns phases, and `fit` runs them with any optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from functools import partial
from itertools import chain, repeat
from numbers import Integral, Real
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from .batches import Loss, check_loss, model_loss, to_device
from .params import preserve_modes
from .selection import Selection

Schedule = Callable[[float], float]
Group = dict[str, Any]
Record = dict[str, Any]
Maker = Callable[..., Optimizer]  # of a phase's groups
FUSED_ADAMW: Maker = partial(AdamW, fused=True)  # one call for all tensors, not some for each


@dataclass(frozen=True)
class Step:
    """Where training is, for the actions of a `Phase`.

    Attributes
    ----------
    step, steps
        The number of this step, from 1, and the number of steps of the phase.
    optimizer
        The phase's optimizer; its groups have the learning rates of this step.
    """

    step: int
    steps: int
    optimizer: Optimizer

    @property
    def progress(self) -> float:
        """The fraction of the phase that is done with this step, in (0, 1]."""
        return self.step / self.steps


Action = Callable[[Step], None]


def constant(progress: float) -> float:
    """A schedule: the group's learning rate throughout."""
    return 1.0


def linear_decay(progress: float) -> float:
    """A schedule: linear decay to zero, with progress through the phase from 0 to 1."""
    return 1.0 - progress


def cosine_decay(progress: float) -> float:
    """A schedule: decay to zero along half a cosine."""
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
        Called with a `Step` between backward and clipping (to change gradients), and after the
        optimizer's step.
    model
        Called in place of the model if a phase wraps it (Diff Pruning's gates).
    clip
        Largest gradient norm of a group, or None. Every group is clipped by itself, so the task
        head, which has a group of its own, does not scale the other gradients down. Several
        authors clip all that they train to one joint norm; for that, put it in one group.
    selection
        The weights that the phase trains, if they are a fixed selection.
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
        check_options(self.name, epochs=self.epochs)


def check_options(phase: str, *, epochs: int, **numbers: float | None) -> None:
    """Check what a phase is trained with, long before it is.

    Parameters
    ----------
    phase
        Its name, for the message.
    epochs
        An int, at least 1.
    numbers
        Learning rates, weight decay and the like by name: finite and not negative, or None.

    Raises
    ------
    TypeError, ValueError
        For the first option that is not as it should be.
    """
    if isinstance(epochs, bool) or not isinstance(epochs, Integral):
        raise TypeError(f"epochs={epochs!r} of phase {phase!r} must be an int, such as 3")
    if epochs < 1:
        raise ValueError(f"epochs={epochs} of phase {phase!r} must be at least 1")
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, Real | Tensor | None):
            raise TypeError(f"{name}={number!r} of phase {phase!r} must be a number, such as 1e-3")
        if number is not None and not 0 <= number < math.inf:
            raise ValueError(f"{name}={number} of phase {phase!r} must be finite and not negative")


class Phases:
    """The phases of a method, an iterable that is used once: what ``diff_pruning(...)`` returns.

    The next phase follows from how the last one was trained, so phases are made while `fit` runs
    them, not before. Leaving early (an error, `close`) restores the model's structure at once.

    Parameters
    ----------
    phases
        A generator of phases. Whatever can be checked is checked before it is made.

    Raises
    ------
    ValueError
        When it is iterated for the second time.
    """

    def __init__(self, phases: Generator[Phase, None, None]) -> None:
        self._phases, self._used = phases, False

    def __iter__(self) -> Generator[Phase, None, None]:
        if self._used:
            raise ValueError("phases were used already, and a method trains once; call it again")
        self._used = True
        return self._phases

    def close(self) -> None:
        """End the phase that is being trained; twice does nothing."""
        self._used = True
        self._phases.close()


class Batches(Sized, Protocol):
    """What `fit` trains on: a length, and a new pass at every iteration."""

    def __iter__(self) -> Iterator[Any]: ...


def fit(
    model: nn.Module,
    phases: Iterable[Phase],
    batches: Batches,
    *,
    loss: Loss = model_loss,
    optimizer: Maker = FUSED_ADAMW,
    on_step: Callable[[Record], None] | None = None,
) -> list[Record]:
    """Run every phase of a method; the model is trained in place.

    Parameters
    ----------
    model
        The model that the phases were made for. It is in training mode during a phase; every
        module's mode is restored after it.
    phases
        A method, such as ``fixed_mask(...)`` or ``diff_pruning(...)``, or a list of `Phase`.
    batches
        Sized and iterable again for every epoch; moved to the model's device one by one.
    loss
        ``(model, batch) -> scalar``.
    optimizer
        Called with a phase's groups; a new one for every phase. The default is
        ``AdamW(fused=True)``; give ``AdamW`` on a device that has no such kernel.
    on_step
        Called with each step's record, e.g. to show progress.

    Returns
    -------
    list of dict
        One record a step: ``phase``, ``step`` (within the phase), ``loss``, ``penalty`` (0.0 if
        there is none).

    Raises
    ------
    TypeError
        If `batches` has no length, or `phases` is a selection; nothing is trained.
    ValueError
        If there is no batch; if a phase trains a parameter that is frozen or not the model's
        (phases of another model, or ``list(method)``); if the loss is not finite (the phase's step
        is named; nothing of that step is applied).

    Examples
    --------
    >>> records = fit(model, fixed_mask(model, selection, lr=1e-3, epochs=3), batches)
    """
    if isinstance(phases, Selection):
        raise TypeError("phases is a Selection; give fixed_mask(model, selection, lr=..., ...)")
    records: list[Record] = []
    try:
        _check_batches(batches)
        for phase in phases:
            called = phase.model or model
            if {id(p) for p in model.parameters()}.isdisjoint(map(id, called.parameters())):
                raise ValueError(f"phase {phase.name!r} was made for another model; make it anew")
            with preserve_modes(called), torch.enable_grad():
                for record in _steps(phase, called, batches, loss, optimizer):
                    records.append(record)
                    if on_step:
                        on_step(record)
    finally:
        if isinstance(phases, Phases | Generator):
            phases.close()  # restore the model's structure immediately, also after an error
    return records


def _check_batches(batches: Any) -> None:
    if isinstance(batches, Mapping | Tensor):
        raise TypeError("batches is one batch; give a list of batches, such as [batch]")
    try:
        empty = len(batches) == 0
    except TypeError:
        what = f"batches is a {type(batches).__name__} without a length, which schedules need"
        raise TypeError(f"{what}; give a list: list(itertools.islice(batches, 100))") from None
    if empty:
        raise ValueError("batches is empty; give at least one batch")


def _checked_groups(phase: Phase, model: nn.Module) -> list[Group]:
    """The phase's groups with lists of parameters, all of them the model's."""
    own, groups = {id(p) for p in model.parameters()}, []
    for group in phase.groups:
        given = group["params"]
        groups.append({**group, "params": [given] if isinstance(given, Tensor) else [*given]})
        for p in groups[-1]["params"]:
            if id(p) in own and p.requires_grad:
                continue
            why = "frozen; set its requires_grad" if id(p) in own else "not one of the model's"
            what = f"phase {phase.name!r} trains a parameter of shape {(*p.shape,)} that is {why}"
            raise ValueError(f"{what}, or give fit the method itself, made for this model")
    return groups


def _steps(
    phase: Phase, model: nn.Module, batches: Batches, loss: Loss, optimizer: Maker
) -> Iterator[Record]:
    """Train one phase, a record a step."""
    groups, steps = _checked_groups(phase, model), phase.epochs * len(batches)
    opt = optimizer([{k: v for k, v in group.items() if k != "schedule"} for group in groups])
    schedules = [_per_step(group.get("schedule", linear_decay), steps) for group in groups]
    rates = torch.optim.lr_scheduler.LambdaLR(opt, schedules)
    model.train()
    for number, batch in enumerate(chain.from_iterable(repeat(batches, phase.epochs)), 1):
        batch, step = to_device(batch, model), Step(number, steps, opt)
        task, where = loss(model, batch), f"at step {number} of phase {phase.name!r}"
        check_loss(task, batch, where)
        penalty = phase.penalty() if phase.penalty else torch.zeros_like(task)
        check_loss(total := task + penalty, batch, where)
        opt.zero_grad()
        total.backward()
        if phase.before_step:
            phase.before_step(step)
        if phase.clip is not None:
            for group in opt.param_groups:
                nn.utils.clip_grad_norm_(group["params"], phase.clip)
        opt.step()
        if phase.after_step:
            phase.after_step(step)
        rates.step()
        yield {"phase": phase.name, "step": number, "loss": task.item(), "penalty": penalty.item()}


def _per_step(schedule: Schedule, steps: int) -> Callable[[int], float]:
    return lambda step: schedule(min(step / steps, 1.0))


def head_group(
    parameters: Sequence[nn.Parameter], lr: float, lr_head: float | None, **options: Any
) -> list[Group]:
    """The task head's parameter group, at `lr_head` or else `lr`; empty if there is no head."""
    rate = lr if lr_head is None else lr_head
    return [{"params": list(parameters), "lr": rate, **options}] if parameters else []
