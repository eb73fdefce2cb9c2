"""SaRA (Hu et al. 2024, arXiv 2409.06633, ICLR 2025): the smallest weights do the least, so train those.

Selected is what lies below a threshold, |w| < t (or the k smallest). Half way, those that have
outgrown it stop training (*progressive re-selection*), and a *nuclear-norm* loss keeps the selected
matrix low in rank. Several tutorials call the method SARA and cite 2311.11696: that is SoRA, a
gated LoRA, and no relative (see `sora`).
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..layers.masked import masked
from ..params import head_weights, weights
from ..scores import magnitude
from ..selection import Selection, select
from ..training import Group, Phase, Schedule, cosine_decay, head_group

FEWEST = (
    100  # as in the authors' code, a matrix with no more selected entries has no nuclear-norm loss
)


def learning_rate(threshold: float) -> float:
    """The authors' rate for a threshold (code): the more small weights are trained, the slower; 4.97e-4 at 2e-3."""
    # (eq-sara-rate)  lr = 10^-3 exp(-350 t)
    return 1e-3 * math.exp(-350 * threshold)


def smaller_than(
    model: nn.Module, threshold: float, head: Sequence[str] | None = None
) -> Selection:
    """Every weight with |w| < threshold; how many these are depends on the scale of the weights, not on a budget.

    Parameters
    ----------
    model
        Any module.
    threshold
        t > 0; 2e-3 in the authors' README.
    head
        As in `weights`.

    Raises
    ------
    ValueError
        If no weight or every weight is below the threshold, or it is no positive number.
    """
    if not 0 < threshold < math.inf:
        raise ValueError(f"threshold={threshold} must be a positive number; the authors use 2e-3")
    candidates = weights(model, head)
    indices = {}
    for name, p in candidates.items():
        # (eq-sara-mask)  M = 1[|w| < t]
        positions = (p.detach().abs() < threshold).reshape(-1).nonzero().squeeze(1).cpu()
        if len(positions):
            indices[name] = positions
    selection = Selection(indices, {name: tuple(p.shape) for name, p in candidates.items()})
    if selection.count == 0:
        smallest = min(float(p.detach().abs().min()) for p in candidates.values())
        raise ValueError(
            f"threshold={threshold} selects no weight: the smallest |w| is {smallest:.3g}; raise it"
        )
    if selection.count == selection.total:
        raise ValueError(
            f"threshold={threshold} selects all {selection.total} weights; lower it, or use `dense`"
        )
    return selection


class _NuclearNorm(torch.autograd.Function):
    """The sum of singular values, from and to the compact vector."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, index: Tensor, width: int) -> Tensor:
        # Rows and columns without a selected weight add nothing to any singular value: leave them
        # out.
        rows, row = index.div(width, rounding_mode="floor").unique(return_inverse=True)
        columns, column = (index % width).unique(return_inverse=True)
        selected = values.new_zeros(len(rows), len(columns))
        selected[row, column] = values
        u, s, vh = torch.linalg.svd(selected, full_matrices=False)
        # Singular vectors of a zero value are arbitrary: without them the gradient is the
        # subgradient of least norm.
        nonzero = s > s[:1] * max(selected.shape) * torch.finfo(s.dtype).eps
        # (eq-sara-nuclear-gradient)  d||W * M||_* / dW = U V^T * M
        ctx.save_for_backward((u[:, nonzero] @ vh[nonzero])[row, column])
        # (eq-sara-nuclear)  ||W * M||_* = sum of the singular values of W * M
        return s.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        return grad * gradient, None, None


def nuclear_norm(values: Tensor, index: Tensor, shape: Sequence[int]) -> Tensor:
    """||W * M||_* of a matrix that is zero except for `values`, with its gradient U V^T at these entries.

    It forms the dense matrix of the rows and columns that hold a selected weight, and its SVD: the
    one place where a masked method pays for a whole matrix.

    Parameters
    ----------
    values
        (k,), float32 or float64, the selected weights.
    index
        (k,), int64, their flat row-major positions, on the same device.
    shape
        (rows, columns) of the matrix.

    Returns
    -------
    Tensor
        A scalar with gradient. For singular values of zero, U V^T leaves out their vectors.
    """
    return _NuclearNorm.apply(values, index, shape[1])


class SaRASchedule:
    """What happens to a SaRA selection while it is trained: one re-selection, and the nuclear-norm loss.

    Attributes
    ----------
    counts
        How many weights were trained before and (once it took place) after the re-selection.
    """

    def __init__(
        self,
        training: masked,
        threshold: float,
        *,
        reselect: int | float | None,
        lam: float,
        min_side: int = 64,
        seed: int = 0,
    ) -> None:
        self.training, self.threshold, self.reselect, self.lam = training, threshold, reselect, lam
        self.positions, self.shapes = dict(training.selection.indices), training.selection.shapes
        self.values = dict(zip(self.positions, training.parameters(), strict=True))
        self.generator = torch.Generator().manual_seed(seed)
        self.counts, self.step = [training.selection.count], 0
        self.matrices = [
            n for n in self.values if len(self.shapes[n]) == 2 and min(self.shapes[n]) > min_side
        ]
        if lam and not any(len(self.positions[name]) > FEWEST for name in self.matrices):
            raise ValueError(
                f"lam={lam} weighs the nuclear norm of no matrix: none has more than {FEWEST} selected weights and "
                f"both sides over {min_side}; lower min_side, or give lam=0"
            )

    @property
    def selection(self) -> Selection:
        """The weights that are trained now."""
        return Selection(
            {name: i for name, i in self.positions.items() if len(i)}, dict(self.shapes)
        )

    def penalty(self) -> Tensor:
        """lambda ||W * M||_* of one random matrix, a scalar with gradient; zero if few of its weights are selected."""
        name = self.matrices[
            int(torch.randint(len(self.matrices), (), generator=self.generator, device="cpu"))
        ]
        values = self.values[name].reshape(-1)
        if len(values) <= FEWEST:
            return values.new_zeros(())
        return self.lam * nuclear_norm(
            values, self.positions[name].to(values.device), self.shapes[name]
        )

    def check(self, progress: float, optimizer: torch.optim.Optimizer) -> None:
        """Before each step: raise a `ValueError`, at the first, if the phase ends before the re-selection."""
        self.step += 1
        steps = round(self.step / progress)
        self.due = (
            max(1, round(self.reselect * steps))
            if isinstance(self.reselect, float)
            else self.reselect
        )
        if self.due is not None and self.due >= steps:
            raise ValueError(
                f"reselect={self.reselect} is not before the end of a phase of {steps} steps; lower it"
            )

    @torch.no_grad()
    def update(self, progress: float, optimizer: torch.optim.Optimizer) -> None:
        """After each step; at that of the re-selection, go on with the weights still below the threshold alone.

        Raises
        ------
        ValueError
            If no selected weight is below the threshold any more.
        """
        if self.step != self.due:
            return
        # (eq-sara-progressive)  M' = M * 1[|w| < t], with the weights of now
        keep = {name: values.abs() < self.threshold for name, values in self.values.items()}
        if not any(kept.any() for kept in keep.values()):
            raise ValueError(
                f"no selected weight is below {self.threshold:.3g} after step {self.step}; lower lr"
            )
        self.training.shrink(keep, optimizer)
        for name, kept in keep.items():
            self.positions[name] = self.positions[name][kept.cpu()]
        self.counts.append(sum(len(positions) for positions in self.positions.values()))


def sara(
    model: nn.Module,
    *,
    threshold: float | None = None,
    budget: int | float | None = None,
    epochs: int,
    lr: float | None = None,
    lr_head: float | None = None,
    lam: float = 5e-4,
    reselect: int | float | None = 0.5,
    min_side: int = 64,
    schedule: Schedule = cosine_decay,
    weight_decay: float = 1e-2,
    head: Sequence[str] | None = None,
    seed: int = 0,
) -> Generator[Phase, None, None]:
    """A method: train the small weights, re-select once, and keep the selected matrices low in rank.

    Parameters
    ----------
    model
        As in `masked`.
    threshold, budget
        One of them: select |w| < threshold, or exactly the k smallest |w| (a budget as in
        `select`), whose threshold is just above the k-th.
    epochs
        Passes over the batches.
    lr, lr_head
        Of the selected weights (default: `learning_rate` of the threshold) and of the head
        (default: the same).
    lam
        Weight of the nuclear norm, 0 for none. It costs an SVD a step.
    reselect
        When the weights that have outgrown the threshold stop training: after a step (int) or a
        fraction of the phase (float in (0, 1)); None for never. They keep the value they have then;
        the others keep their moments.
    min_side
        The nuclear norm is that of a matrix with both sides over this.
    schedule
        Of both rates; half a cosine is the authors' choice.
    weight_decay
        Of selected weights and head; it pulls values to zero.
    head
        As in `weights`.
    seed
        Of the CPU generator that draws one matrix a step.

    Yields
    ------
    Phase
        One; its ``after_step`` is `Progressive.update`.

    Raises
    ------
    ValueError, TypeError
        For a bad option or selection (the model is unchanged); from the phase, as
        `Progressive.check` and `Progressive.update` do.
    """
    if (threshold is None) is (budget is None):
        raise ValueError("give one of threshold (|w| below it) and budget (the k smallest)")
    allowed = 0 < reselect < 1 if isinstance(reselect, float) else reselect is None or reselect >= 1
    if isinstance(reselect, bool) or not allowed:
        raise ValueError(
            f"reselect={reselect} must be a step (int), a fraction in (0, 1) (float), or None"
        )
    if not lam >= 0:
        raise ValueError(f"lam={lam} must not be negative; 0 leaves the nuclear norm out")
    if budget is not None:
        selection = select(magnitude(model, head), budget, largest=False)
    elif threshold is not None:
        selection = smaller_than(model, threshold, head)
    heads = tuple(head_weights(model, head))
    with masked(model, selection, dense=heads, shrinks=reselect is not None) as training:
        if threshold is None:  # just above the k-th
            largest = max(float(values.detach().abs().max()) for values in training.parameters())
            threshold = float(np.nextafter(np.float32(largest), np.float32(np.inf)))
        state = SaRASchedule(
            training, threshold, reselect=reselect, lam=lam, min_side=min_side, seed=seed
        )
        rate = learning_rate(threshold) if lr is None else lr
        common: Group = {"weight_decay": weight_decay, "schedule": schedule}
        groups: list[Group] = [{"params": training.parameters(), "lr": rate, **common}]
        groups += head_group(training.dense_parameters(), rate, lr_head, **common)
        yield Phase(
            "SaRA",
            groups,
            epochs,
            penalty=state.penalty if lam else None,
            before_step=state.check,
            after_step=state.update,
            selection=selection if reselect is None else None,
        )
