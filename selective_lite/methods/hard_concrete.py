"""Hard-Concrete gates z in [0, 1]: exactly 0 or 1 with positive probability, with a gradient.

Source: Louizos, Welling and Kingma 2018, "Learning sparse neural networks through L0
regularization".
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

Stretch = tuple[float, float]
BETA, BOUNDS = 2 / 3, (-0.1, 1.1)  # the authors' temperature and stretch
EPS = 1e-6  # u is kept in [EPS, 1 - EPS], as in the authors' code: log u must be finite


def check_stretch(stretch: Stretch, beta: float = BETA) -> Stretch:
    """The stretch (gamma, zeta); a `ValueError` unless gamma < 0 and zeta > 1.

    Only then is a gate 0 or 1. And unless `beta` is positive.
    """
    if not (stretch[0] < 0 and stretch[1] > 1):
        raise ValueError(f"stretch={tuple(stretch)} must have gamma < 0 and zeta > 1")
    if not beta > 0:
        raise ValueError(f"beta={beta} must be positive; 2/3 is the authors' temperature")
    return stretch


def hard_concrete(
    log_alpha: Tensor, u: Tensor, *, beta: float = BETA, stretch: Stretch = BOUNDS, eps: float = EPS
) -> Tensor:
    """A sample of the gate (Louizos et al. 2018, eq. 10 and 11).

    Parameters
    ----------
    log_alpha
        Location, any shape, floating point.
    u
        Uniform noise in [0, 1], same shape; clamped to [eps, 1 - eps].
    beta
        Temperature, > 0; default 2/3. Diff Pruning uses 1.
    stretch
        (gamma, zeta) with gamma < 0 and zeta > 1; default (-0.1, 1.1). Diff Pruning uses
        (-1.5, 1.5).
    eps
        Bound on `u`; Diff Pruning's code uses 1e-4.

    Returns
    -------
    Tensor
        z in [0, 1], shape and dtype of `log_alpha`. Its gradient is zero where z is 0 or 1.

    Raises
    ------
    ValueError
        If `stretch` or `beta` is outside its range.
    """
    left, right = check_stretch(stretch, beta)
    # (eq-concrete)  c = sigmoid((log u - log(1 - u) + log_alpha) / beta)
    s = torch.sigmoid((torch.logit(u, eps) + log_alpha) / beta)
    # (eq-stretch)   c_bar = c (zeta - gamma) + gamma,   z = min(1, max(0, c_bar))
    return (s * (right - left) + left).clamp(0, 1)


def open_probability(log_alpha: Tensor, *, beta: float = BETA, stretch: Stretch = BOUNDS) -> Tensor:
    """P(z != 0), the expected L0 norm in closed form (Louizos et al. 2018, eq. 12).

    Arguments and errors as in `hard_concrete`.
    """
    left, right = check_stretch(stretch, beta)
    # (eq-open)  P(z != 0) = sigmoid(log_alpha - beta log(-gamma / zeta))
    return torch.sigmoid(log_alpha - beta * math.log(-left / right))


def deterministic_gate(log_alpha: Tensor, *, stretch: Stretch = BOUNDS) -> Tensor:
    """The gate at test time, without noise and without beta (Louizos et al. 2018, eq. 13)."""
    left, right = check_stretch(stretch)
    # (eq-deterministic)  z = min(1, max(0, sigmoid(log_alpha)(zeta - gamma) + gamma))
    return (torch.sigmoid(log_alpha) * (right - left) + left).clamp(0, 1)


class HardConcrete(nn.Module):
    """Gates with a trainable location: noisy in training mode, deterministic in evaluation mode.

    Parameters
    ----------
    shape
        Shape of the gates.
    beta, stretch, eps
        As in `hard_concrete`.
    log_alpha
        Initial location of every gate.
    dtype, device
        Dtype and device of `log_alpha`; default: torch's.

    Raises
    ------
    ValueError
        If `stretch` or `beta` is outside its range.

    Examples
    --------
    >>> gates = HardConcrete((2, 3), log_alpha=2.0).eval()
    >>> gates().shape
    torch.Size([2, 3])
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        beta: float = BETA,
        stretch: Stretch = BOUNDS,
        eps: float = EPS,
        log_alpha: float = 0.0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.beta, self.stretch, self.eps = beta, check_stretch(stretch, beta), eps
        start = torch.full(tuple(shape), float(log_alpha), dtype=dtype, device=device)
        self.log_alpha = nn.Parameter(start)

    def forward(self, generator: torch.Generator | None = None) -> Tensor:
        """The gates, a tensor like `log_alpha`; in training mode a sample.

        Parameters
        ----------
        generator
            CPU generator of the noise, so that a seed gives the same gates on every device;
            default: torch's own.
        """
        if not self.training:
            return deterministic_gate(self.log_alpha, stretch=self.stretch)
        u = torch.rand(self.log_alpha.shape, generator=generator, device="cpu").to(self.log_alpha)
        return hard_concrete(self.log_alpha, u, beta=self.beta, stretch=self.stretch, eps=self.eps)

    def open_probability(self) -> Tensor:
        """P(z != 0) of every gate; see the function of this name."""
        return open_probability(self.log_alpha, beta=self.beta, stretch=self.stretch)

    def expected_l0(self) -> Tensor:
        """The expected number of gates that are not zero, a scalar with gradient."""
        return self.open_probability().sum()
