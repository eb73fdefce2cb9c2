"""Diff Pruning (Guo, Rush and Kim 2021, ACL): learn a sparse difference to the pretrained weights.

theta = theta0 + z * w, with a Hard-Concrete gate z for every weight. The expected L0 norm of the
difference has a gradient and is penalised: *relax*. Then *project* on the k largest differences,
and train only those: *fix*. In the structured variant a second gate opens or closes a whole group;
a weight is active only if both gates are open.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

import torch
from torch import nn

from ...layers.masked import check_candidates
from ...params import head_weights, only_trainable, resolve_budget, unwrap, weights
from ...training import Group, Phase, Phases, check_options, constant, head_group
from ..fixed_mask import fixed_mask
from ..hard_concrete import Stretch
from .calibration import Calibration as Calibration
from .gated import Penalty, gated_weights
from .groups import Groups
from .relaxed import STRETCH, Relaxed
from .relaxed import U_EPS as U_EPS

__all__ = ["Relaxed", "diff_pruning"]


def diff_pruning(
    model: nn.Module,
    budget: int | float,
    *,
    lr_w: float,
    lr: float,
    epochs: tuple[int, int],
    lr_alpha: float = 0.3,
    lr_head: float | None = None,
    lam: float = 1e-7,
    groups: Groups = None,
    penalty: Penalty = "product",
    stretch: Stretch = STRETCH,
    seed: int = 0,
    head: Sequence[str] | None = None,
    exclude: str | Sequence[str] = (),
) -> Phases:
    """A method: relax, project to exactly k weights, train those.

    Parameters
    ----------
    model
        Any module, trained in place. Its weights stay theta0 until the projection.
    budget
        k, a count or a fraction of the candidates.
    lr_w, lr_alpha
        Learning rates of the differences w (linear decay), and of all gates (constant, as in the
        authors' code; they use 0.1 and thousands of steps, since log_alpha has to fall from 5 to
        below 0).
    lr, lr_head
        Learning rates of the selected weights in the fixed-mask phase, and of the head in both
        phases (default: `lr`).
    epochs
        Passes over the batches in the relaxed phase, and in the fixed-mask phase.
    lam
        Initial lambda; `Calibration` then controls it so that a little more than k gates end open.
    groups, penalty, stretch, seed, head, exclude
        As in `Relaxed`.

    Returns
    -------
    Phases
        ``"relaxed"``, whose ``model`` is the `Relaxed` wrapper and whose ``after_step`` is the
        calibration's; then ``"fixed mask"``. At the end exactly k weights differ, and the head.

    Raises
    ------
    TypeError, ValueError
        When called, for a bad budget or option, for a tensor that cannot be selected in part, or a
        model that does not fit the groups; while training, if fewer than k differences survive the
        relaxed phase (the weights stay theta0).

    Examples
    --------
    >>> method = diff_pruning(model, 0.005, lr_w=1e-3, lr=1e-3, epochs=(2, 1))
    >>> records = fit(model, method, batches)
    """
    theta, _ = gated_weights(model, groups, penalty, stretch, head, exclude)
    check_candidates(model, head, exclude)
    k = resolve_budget(budget, sum(p.numel() for p in weights(model, head).values()))
    if k > (most := sum(p.numel() for p in theta.values())):
        raise ValueError(
            f"budget={budget} asks for {k} weights, but only {most} are not excluded; lower it"
        )
    relaxed_epochs, fixed_epochs = _pair(epochs)
    rates = {"lr_w": lr_w, "lr_alpha": lr_alpha, "lr_head": lr_head}
    check_options("relaxed", epochs=relaxed_epochs, lam=lam, **rates)
    check_options("fixed mask", epochs=fixed_epochs, lr=lr)
    if lam == 0:
        raise ValueError("lam=0 must be positive: the calibration multiplies it; 1e-7 is usual")

    def phases() -> Generator[Phase, None, None]:
        relaxed = Relaxed(
            model,
            groups=groups,
            penalty=penalty,
            stretch=stretch,
            seed=seed,
            head=head,
            exclude=exclude,
        )
        calibration = Calibration(relaxed, k, lam)
        shared = relaxed.log_alpha_group
        alphas = [*relaxed.log_alpha, *([] if shared is None else [shared])]
        parts: list[Group] = [
            {"params": list(relaxed.w), "lr": lr_w, "weight_decay": 0.0},
            {"params": alphas, "lr": lr_alpha, "weight_decay": 0.0, "schedule": constant},
            *head_group(list(relaxed.head), lr, lr_head, weight_decay=0.0),
        ]
        # The head is trained even if all of the model was frozen.
        trained = [p for p in unwrap(model).parameters() if p.requires_grad]
        trained += head_weights(model, head).values()
        with only_trainable(unwrap(model), trained):
            yield Phase(
                "relaxed",
                parts,
                relaxed_epochs,
                penalty=calibration.penalty,
                after_step=calibration.update,
                model=relaxed,
            )
        selection, delta = relaxed.project(k)
        relaxed.store_head()
        # Gates and their gradients, four times the model, are freed before the second phase.
        del relaxed, calibration, shared, alphas, parts, trained
        with torch.no_grad():
            for name, index in selection.indices.items():
                # Not a flat view: a weight need not be contiguous.
                places = torch.unravel_index(index, theta[name].shape)
                at = tuple(place.to(theta[name].device) for place in places)
                theta[name][at] += delta[name][at].to(theta[name].dtype)
        del delta
        yield from fixed_mask(
            model,
            selection,
            lr=lr,
            epochs=fixed_epochs,
            lr_head=lr_head,
            head=head,
            name="fixed mask",
        )

    return Phases(phases())


def _pair(epochs: tuple[int, int]) -> tuple[int, int]:
    try:
        first, second = epochs
    except (TypeError, ValueError):
        raise ValueError(
            f"epochs={epochs!r} must be a pair, relaxed and fixed-mask epochs, such as (2, 1)"
        ) from None
    return first, second
