"""Calibration: Diff Pruning's penalty weight lambda, found while training so that just above k gates end open."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor, nn

SAMPLE = 1 << 20  # gates looked at in a step; of a larger model every n-th


class Gates(Protocol):
    """What is calibrated, such as `Relaxed`: gates, their groups if any, and two counts."""

    log_alpha: nn.ParameterList
    log_alpha_group: nn.Parameter | None
    group_ids: list[Tensor]
    threshold: float

    def expected_l0(self) -> Tensor: ...  # noqa: D102
    def count_open(self) -> int: ...  # noqa: D102


class Calibration:
    """Steer lambda by the gate on which the budget hangs: the m-th largest log_alpha, with m = slack * k.

    A count is a poor guide. Under a common penalty most gates fall side by side, and a count that
    stood at N for half of the phase passes k within a step. The m-th gate's log_alpha falls
    smoothly, and it is known at every moment how far it is from closing. It is led along a straight
    line, from where all gates start to `margin` above the point where a deterministic gate closes:
    then m gates are open at the end. In the structured variant the smaller of a weight's log_alpha
    and its group's counts, since both must be open.

    lambda = lam * exp(gain * error + memory * (sum of errors, per unit of progress)). The error is
    the distance to the line of the place where the gate would come to rest: an optimizer with
    momentum carries it on for `horizon` more steps (Adam with beta1 = 0.9: 9).

    Attributes
    ----------
    lam
        lambda now.
    path
        A dict a step: ``lambda``, ``expected_l0``, ``open`` (gates), ``log_alpha`` (of the m-th
        gate), ``target``.
    """

    def __init__(
        self,
        gates: Gates,
        k: int,
        lam: float,
        *,
        slack: float = 1.2,
        margin: float = 1.0,
        gain: float = 2.0,
        memory: float = 10.0,
        horizon: float = 9.0,
    ) -> None:
        self.gates, self.k, self.lam, self.start_lam = gates, k, lam, lam
        self.slack, self.margin, self.gain, self.memory, self.horizon = (
            slack,
            margin,
            gain,
            memory,
            horizon,
        )
        self.start = self.log_alpha = self.marginal_log_alpha()
        self.expected, self.progress, self.errors = math.nan, 0.0, 0.0
        self.path: list[dict[str, float]] = []

    @torch.no_grad()
    def marginal_log_alpha(self) -> float:
        """The m-th largest log_alpha, a weight's or its group's, whichever is smaller."""
        group, alphas = self.gates.log_alpha_group, list(self.gates.log_alpha)
        if group is not None:
            alphas = [
                torch.minimum(a, group[ids])
                for a, ids in zip(alphas, self.gates.group_ids, strict=True)
            ]
        total = sum(a.numel() for a in alphas)
        stride = -(-total // SAMPLE)
        sample = torch.cat([a.reshape(-1)[::stride] for a in alphas]).float()
        m = max(1, min(len(sample), round(self.slack * self.k / total * len(sample))))
        return float(sample.kthvalue(len(sample) - m + 1).values)

    def target(self, progress: float) -> float:
        """Where the m-th gate's log_alpha should be when the fraction `progress` of the phase is done."""
        # (eq-calibration)  target(t) = start + t (threshold + margin - start)
        return self.start + progress * (self.gates.threshold + self.margin - self.start)

    def penalty(self) -> Tensor:
        """lambda * E[L0], a scalar with gradient."""
        l0 = self.gates.expected_l0()
        self.expected = float(l0.detach())
        return self.lam * l0

    def update(self, progress: float, optimizer: torch.optim.Optimizer | None = None) -> None:
        """One step of lambda, after the optimizer's; an error counts as -3 at least and 1.5 at most."""
        before, self.log_alpha = self.log_alpha, self.marginal_log_alpha()
        target = self.target(progress)
        self.path.append(
            {
                "lambda": self.lam,
                "expected_l0": self.expected,
                "open": float(self.gates.count_open()),
                "log_alpha": self.log_alpha,
                "target": target,
            }
        )
        # (eq-steering)  error = log_alpha_m + horizon * (last step of log_alpha_m) - target
        error = self.log_alpha + self.horizon * (self.log_alpha - before) - target
        error = max(-3.0, min(1.5, error))
        self.errors += error * (progress - self.progress)
        self.progress = progress
        self.lam = self.start_lam * math.exp(self.gain * error + self.memory * self.errors)
