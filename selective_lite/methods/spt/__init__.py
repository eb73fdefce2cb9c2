"""SPT, sensitivity-aware parameter-efficient tuning (He et al. 2023, ICCV).

It spends a budget where the loss is sensitive. A weight's sensitivity is its squared gradient,
summed over some hundred samples (`squared_gradient`). Take the tau most sensitive weights. A matrix
that has many of them gets a small module, LoRA or a bottleneck Adapter (*structured*); a vector
that has many is tuned whole; the rest is tuned weight by weight (*unstructured*). All of it counts,
and tau is the one at which the total size meets the budget.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

from torch import nn

from ...layers.masked import MaskedTraining, check_selection
from ...layers.small import (
    adapter_parameters,
    add_adapters,
    find_layers,
    merge_adapters,
    remove_adapters,
)
from ...params import named_parameters
from ...training import Group, Phase, Phases, check_options
from .allocation import Allocation, allocate

__all__ = ["Allocation", "allocate", "spt"]


def spt(
    model: nn.Module,
    allocation: Allocation,
    *,
    lr: float,
    epochs: int,
    lr_modules: float | None = None,
    lr_head: float | None = None,
    weight_decay: float = 0.0,
    merge: bool = False,
    seed: int = 0,
    head: Sequence[str] | None = None,
) -> Phases:
    """A method: train an allocation's small modules, vectors and single weights, and the head.

    All of it is in one optimizer. Afterwards the model computes what was trained: its own tensors
    keep their names and flags, and the small modules stay in their layers (`adapters`). `diff`
    ships all of it in one file; `remove_adapters` takes the modules out, `merge_adapters` adds LoRA
    to the weights. After an error the modules are out.

    An Adapter here takes its layer's output everywhere. The authors feed the Adapter of an
    attention block's projection the projection's input instead.

    Parameters
    ----------
    model, allocation
        The model and what `allocate` made for it.
    lr, lr_modules, lr_head
        Learning rates of vectors and single weights, of small modules, and of the head (default:
        `lr`).
    epochs
        Passes over the batches.
    weight_decay
        Decay of small modules and head; single weights and vectors are not decayed (as in the
        authors' code).
    merge
        Merge LoRA into the weights at the end: the model has exactly the base's tensors, the delta
        is larger.
    seed
        Seed of the generator that draws the small modules.
    head
        As in `weights`.

    Returns
    -------
    Phases
        One phase, ``"spt"``.

    Raises
    ------
    TypeError, ValueError
        For a bad option, if the allocation does not fit the model (which is unchanged), or if an
        Adapter is to be merged.
    """
    if merge and allocation.kind != "lora":
        raise ValueError(
            f"merge=True, but kind={allocation.kind!r} cannot be merged; keep the modules, or use "
            "'lora'"
        )
    check_options(
        "spt",
        epochs=epochs,
        lr=lr,
        lr_modules=lr_modules,
        lr_head=lr_head,
        weight_decay=weight_decay,
    )
    find_layers(model, dict.fromkeys(allocation.structured, allocation.rank))
    heads, _ = check_selection(model, allocation.selection, allocation.whole, head)

    def phases() -> Generator[Phase, None, None]:
        structured, done = allocation.structured, False
        add_adapters(model, structured, kind=allocation.kind, rank=allocation.rank, seed=seed)
        try:
            modules = adapter_parameters(model, structured)
            dense = (*allocation.whole, *modules)
            with MaskedTraining(model, allocation.selection, dense, head=heads) as training:
                named = [*heads, *(n for n in named_parameters(model) if n in dense)]
                trained = dict(zip(named, training.dense_parameters(), strict=True))
                whole = [trained[name] for name in allocation.whole]
                rates = (
                    ([*training.parameters(), *whole], lr, 0.0),
                    ([trained[name] for name in modules], lr_modules, weight_decay),
                    (training.head_parameters(), lr_head, weight_decay),
                )
                groups: list[Group] = [
                    {"params": p, "lr": lr if r is None else r, "weight_decay": d}
                    for p, r, d in rates
                    if p
                ]
                yield Phase("spt", groups, epochs, selection=allocation.selection)
            done = True
        finally:
            if not done:
                remove_adapters(model, structured)
            elif merge:
                merge_adapters(model, structured)

    return Phases(phases())
