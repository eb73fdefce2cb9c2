"""The two plainest methods: train a fixed selection, or every weight (the baseline)."""

from __future__ import annotations

from collections.abc import Generator

from torch.nn import Module

from ..heads import Head
from ..layers.masked import MaskedTraining, check_selection
from ..params import head_weights, only_trainable, weights
from ..selection import Selection
from ..training import Phase, Phases, check_options, head_group


def fixed_mask(
    model: Module,
    selection: Selection,
    *,
    lr: float,
    epochs: int,
    lr_head: float | None = None,
    head: Head = None,
    weight_decay: float = 0.0,
    name: str = "",
) -> Phases:
    """A method: train a selection and the task head, on compact parameters.

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
        Decay of selected weights and head; it pulls values to zero.
    name
        The phase's name (default: the selection's method).

    Returns
    -------
    Phases
        A single phase. Afterwards the trained values are in the model's own tensors and the compact
        parameters are gone.

    Raises
    ------
    TypeError, ValueError
        For a bad option, or a selection that does not fit the model, which is unchanged.
    """
    name = name or selection.method or "fixed mask"
    check_options(name, epochs=epochs, lr=lr, lr_head=lr_head, weight_decay=weight_decay)
    check_selection(model, selection, head=head)

    def phases() -> Generator[Phase, None, None]:
        with MaskedTraining(model, selection, head=head) as training:
            own, dense = training.parameters(), training.dense_parameters()
            groups = [{"params": own, "lr": lr, "weight_decay": weight_decay}]
            groups += head_group(dense, lr, lr_head, weight_decay=weight_decay)
            yield Phase(name, groups, epochs, selection=selection)

    return Phases(phases())


def full_finetuning(
    model: Module,
    *,
    lr: float,
    epochs: int,
    lr_head: float | None = None,
    head: Head = None,
    weight_decay: float = 0.0,
    name: str = "dense",
) -> Phases:
    """A method, the baseline: train every candidate (see `weights`), and the head at `lr_head`.

    What the user froze (``requires_grad=False``) stays as it is. Arguments and errors as in
    `fixed_mask`.
    """
    check_options(name, epochs=epochs, lr=lr, lr_head=lr_head, weight_decay=weight_decay)
    body, heads = (list(found(model, head).values()) for found in (weights, head_weights))

    def phases() -> Generator[Phase, None, None]:
        groups = [{"params": body, "lr": lr, "weight_decay": weight_decay}]
        groups += head_group(heads, lr, lr_head, weight_decay=weight_decay)
        with only_trainable(model, [*body, *heads]):
            yield Phase(name, groups, epochs)

    return Phases(phases())
