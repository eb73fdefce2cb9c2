"""SoRA (Ding et al. 2023, arXiv 2311.11696, EMNLP): LoRA with a gate on every rank.

y = W0 x + (alpha/r) B (g * A x), and a proximal step drives gates to zero. It adds a low-rank
update and selects among *its* ranks, not among the model's own weights: the book has it as a
contrast, and because tutorials cite its number for SaRA.
"""

from __future__ import annotations

from collections.abc import Generator

from ...training import Phase, Phases, Schedule, check_options, constant, head_group
from .modules import GatedLowRank, SoRA
from .proximal import Proximal, soft_threshold, staircase

__all__ = ["GatedLowRank", "Proximal", "SoRA", "soft_threshold", "sora", "staircase"]


def sora(
    update: SoRA,
    *,
    lr: float = 8e-4,
    epochs: int,
    lr_head: float | None = None,
    lam: float = 0.375,
    lam_schedule: Schedule = constant,
    xi: float | None = None,
    weight_decay: float = 0.1,
    clip: float | None = 0.1,
) -> Phases:
    """A method: train factors and gates, with a proximal step on the gates; prune and merge.

    Parameters
    ----------
    update
        The updates of a model, ``SoRA(model, ...)``; closed when training ends. Its `export` works
        after that.
    lr, lr_head
        Learning rates of factors and gates, and of the head (default: the same).
    epochs
        Passes over the batches.
    lam
        lambda of the penalty lambda |g|_1. The default gives the authors' xi = 3e-4 at their rate
        of 8e-4.
    lam_schedule
        Progress in (0, 1] -> multiplier of lambda (or of xi), such as ``staircase(0.0, 7)``.
    xi
        A fixed threshold in place of lr * lambda, whatever the rate, as in the authors' code.
    weight_decay
        Decay of factors and head, not of gates.
    clip
        As in `Phase`.

    Returns
    -------
    Phases
        One phase, ``"SoRA"``, whose ``after_step`` is `Proximal.after_step`.

    Raises
    ------
    TypeError, ValueError
        If `update` was closed before; for a bad option, after which it is closed.
    """
    if update.closed:
        raise ValueError("update is closed, merged into its model; make a new SoRA(model, ...)")
    try:
        if not lam >= 0 or (xi is not None and not xi >= 0):
            raise ValueError(f"lam={lam} and xi={xi} must not be negative")
        check_options("SoRA", epochs=epochs, lr=lr, lr_head=lr_head, weight_decay=weight_decay)
    except (TypeError, ValueError):
        update.close()  # so that sora(SoRA(model), ...) leaves the model as it was
        raise
    proximal = Proximal(update.gates(), lam, lam_schedule, xi)

    def phases() -> Generator[Phase, None, None]:
        with update:
            groups = [
                {"params": update.factors(), "lr": lr, "weight_decay": weight_decay},
                {"params": update.gates(), "lr": lr, "weight_decay": 0.0},
                *head_group(update.dense_parameters(), lr, lr_head, weight_decay=weight_decay),
            ]
            yield Phase("SoRA", groups, epochs, after_step=proximal.after_step, clip=clip)
            update.prune()

    return Phases(phases())
