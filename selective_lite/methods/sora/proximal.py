"""SoRA's proximal step, which drives gates to zero, and how its strength grows in training."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...training import Schedule, Step


def soft_threshold(x: Tensor, xi: float) -> Tensor:
    """The proximal operator of xi |x|_1 (the paper's; the authors' code zeroes all |x| < 2 xi)."""
    # (eq-prox)  prox(x) = sign(x) max(|x| - xi, 0)
    return x.sign() * (x.abs() - xi).clamp(min=0)


def staircase(start: float, stages: int) -> Schedule:
    """A schedule for lambda: from the fraction `start` to 1 in equal stages (authors: 0 and 7)."""
    if not 0 <= start <= 1 or stages < 2:
        raise ValueError(f"start={start} must be in [0, 1] and stages={stages} at least 2")
    return lambda progress: (
        start + (1 - start) * max(0, math.ceil(progress * stages) - 1) / (stages - 1)
    )


class Proximal:
    """The proximal step on the gates, after the optimizer's.

    Parameters
    ----------
    gates
        Vectors of one parameter group.
    lam, schedule, xi
        As in `sora`.

    Attributes
    ----------
    path
        ``xi`` and the number of ``open`` ranks after every step.
    """

    def __init__(
        self, gates: Sequence[nn.Parameter], lam: float, schedule: Schedule, xi: float | None
    ) -> None:
        self.gates, self.lam, self.schedule, self.xi = gates, lam, schedule, xi
        self.path: list[dict[str, float]] = []

    @torch.no_grad()
    def after_step(self, step: Step) -> None:
        """Shrink every gate, by lr * lambda, or by the fixed xi."""
        groups = step.optimizer.param_groups
        lr = next(g["lr"] for g in groups if any(p is self.gates[0] for p in g["params"]))
        # (eq-sora-step)  q <- prox_{xi |.|_1}(q - lr * grad),   xi = lr * lambda
        xi = (float(lr) * self.lam if self.xi is None else self.xi) * self.schedule(step.progress)
        for gate in self.gates:
            gate.copy_(soft_threshold(gate, xi))
        self.path.append(
            {"xi": xi, "open": float(sum(int(gate.count_nonzero()) for gate in self.gates))}
        )
