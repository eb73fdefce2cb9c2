"""SaRA in training: the nuclear norm of the selected matrices, and one re-selection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...layers.masked import MaskedTraining
from ...selection import Selection
from ...training import Step

# As in the authors' code, a matrix with no more selected entries has no nuclear-norm loss.
FEWEST = 100


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
    """||W * M||_* of a matrix that is zero except for `values`, with its gradient U V^T at these.

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


def ranked(selection: Selection, min_side: int = 64) -> list[str]:
    """The matrices whose nuclear norm may be drawn: those with both sides over `min_side`."""
    shapes = selection.shapes
    return [n for n in selection.indices if len(shapes[n]) == 2 and min(shapes[n]) > min_side]


class SaRASchedule:
    """What happens to a SaRA selection in training: a re-selection, and the nuclear-norm loss.

    Parameters
    ----------
    training
        Masked training that shrinks.
    threshold, reselect, lam, min_side, seed
        As in `sara`.

    Attributes
    ----------
    counts
        How many weights were trained before and (once it took place) after the re-selection.
    """

    def __init__(
        self,
        training: MaskedTraining,
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
        self.counts = [training.selection.count]
        self.due: int | None = None
        self.matrices = ranked(training.selection, min_side)

    @property
    def selection(self) -> Selection:
        """The weights that are trained now."""
        positions = {name: i for name, i in self.positions.items() if len(i)}
        return Selection(positions, dict(self.shapes), method="SaRA")

    def penalty(self) -> Tensor:
        """lambda ||W * M||_* of one random matrix, a scalar; zero if few weights of it are left."""
        drawn = torch.randint(len(self.matrices), (), generator=self.generator, device="cpu")
        name = self.matrices[int(drawn)]
        values = self.values[name].reshape(-1)
        if len(values) <= FEWEST:
            return values.new_zeros(())
        index = self.positions[name].to(values.device)
        return self.lam * nuclear_norm(values, index, self.shapes[name])

    def find_step(self, step: Step) -> None:
        """Before each step: find at which one the re-selection is due.

        Raises
        ------
        ValueError
            If the phase ends before that; at the first step, so nothing has been trained.
        """
        self.due = (
            max(1, round(self.reselect * step.steps))
            if isinstance(self.reselect, float)
            else self.reselect
        )
        if self.due is not None and self.due >= step.steps:
            raise ValueError(
                f"reselect={self.reselect} is not before the end of a phase of {step.steps} steps; "
                "lower it"
            )

    @torch.no_grad()
    def update(self, step: Step) -> None:
        """After the step of the re-selection, train only weights still below the threshold.

        Raises
        ------
        ValueError
            If no selected weight is below the threshold any more.
        """
        if step.step != self.due:
            return
        # (eq-sara-progressive)  M' = M * 1[|w| < t], with the weights of now
        keep = {name: values.abs() < self.threshold for name, values in self.values.items()}
        if not any(kept.any() for kept in keep.values()):
            raise ValueError(
                f"no selected weight is below {self.threshold:.3g} after step {step.step}; lower lr"
            )
        self.training.shrink(keep, step.optimizer)
        for name, kept in keep.items():
            self.positions[name] = self.positions[name][kept.reshape(-1).cpu()]
        self.values = dict(zip(self.positions, self.training.parameters(), strict=True))
        self.counts.append(sum(len(positions) for positions in self.positions.values()))
