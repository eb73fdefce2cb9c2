"""Calibration: find Diff Pruning's lambda in training, so that a little over k gates end open."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ...training import Step

# At most this many gates are inspected per step; larger models are subsampled.
SAMPLE = 1 << 20


class Gates(Protocol):
    """A gated model that can be calibrated, such as `Relaxed`, which describes the attributes."""

    group_ids: list[Tensor]
    threshold: float

    @property
    def log_alpha(self) -> Sequence[Tensor]: ...  # noqa: D102
    @property
    def log_alpha_group(self) -> Tensor | None: ...  # noqa: D102
    def expected_l0(self) -> Tensor: ...  # noqa: D102
    def count_open(self) -> int: ...  # noqa: D102


class Calibration:
    """Control lambda with the marginal gate, the m-th largest log_alpha, with m = slack * k.

    The number of open gates is a poor guide. Under a common penalty most gates have almost the same
    log_alpha, so a count that stays at N for half of the phase can fall below k within a step. The
    marginal gate's log_alpha falls smoothly, and its distance from closing is known at every step.
    It is led along a straight line, from its start to `margin` above the point at which a
    deterministic gate closes: then m gates are open at the end. In the structured variant the
    smaller of a weight's log_alpha and its group's counts, since both gates must be open.

    lambda = lam * exp(gain * error + memory * (sum of errors, per unit of progress)). The error is
    measured where momentum will carry log_alpha, `horizon` steps ahead (Adam with beta1 = 0.9: 9),
    and clamped to [-3, 1.5].

    Parameters
    ----------
    gates
        The gated model, such as `Relaxed`.
    k
        The number of weights that the projection will keep.
    lam
        Initial lambda, positive.
    slack
        m / k: more gates than k stay open, because some of their w are zero.
    margin
        Distance of the marginal gate above the threshold at the end.
    gain, memory
        Proportional and integral gain of the controller.
    horizon
        Number of steps to look ahead.

    Attributes
    ----------
    lam
        lambda now.
    path
        One dict per step: ``lambda``, ``expected_l0``, ``open`` (the number of open gates),
        ``log_alpha`` (the marginal gate's), ``target``.
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
        """The m-th largest log_alpha; a weight's is its group's if that is smaller."""
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
        """Target of the marginal log_alpha after the fraction `progress` of the phase."""
        # (eq-calibration)  target(phi) = start + phi (threshold + margin - start)
        return self.start + progress * (self.gates.threshold + self.margin - self.start)

    def penalty(self) -> Tensor:
        """lambda * E[L0], a scalar with gradient."""
        l0 = self.gates.expected_l0()
        self.expected = float(l0.detach())
        return self.lam * l0

    def update(self, step: Step) -> None:
        """Set lambda for the next step: a phase's ``after_step``."""
        before, self.log_alpha = self.log_alpha, self.marginal_log_alpha()
        target = self.target(step.progress)
        self.path.append(
            {
                "lambda": self.lam,
                "expected_l0": self.expected,
                "open": float(self.gates.count_open()),
                "log_alpha": self.log_alpha,
                "target": target,
            }
        )
        # (eq-steer)  error = log_alpha_k' + horizon * (last step of log_alpha_k') - target
        error = self.log_alpha + self.horizon * (self.log_alpha - before) - target
        error = max(-3.0, min(1.5, error))
        self.errors += error * (step.progress - self.progress)
        self.progress = step.progress
        self.lam = self.start_lam * math.exp(self.gain * error + self.memory * self.errors)
