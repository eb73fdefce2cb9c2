"""What happens to a SaRA selection in training: a re-selection, and the nuclear-norm loss."""

from __future__ import annotations

import torch
from torch import Tensor

from ...layers.masked import MaskedTraining
from ...selection import Selection
from ...training import Step
from .nuclear import nuclear_norm

# As in the authors' code, a matrix with no more selected entries has no nuclear-norm loss.
FEWEST = 100


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
        # (eq-sara-progressive)  M' = M * 1[|theta| < threshold], with the weights of now
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
