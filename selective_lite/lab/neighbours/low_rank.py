"""Low rank: a matrix cut to its largest singular values, and how many of them it takes."""

from __future__ import annotations

import torch
from torch import Tensor


def truncated(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors of the nearest matrix of a rank (Eckart and Young 1936): ``B @ A``.

    Parameters
    ----------
    weight
        A matrix (d_out, d_in).
    rank
        r, from 1 to the smaller side.

    Returns
    -------
    A, B
        (r, d_in) and (d_out, r); the singular values are shared between them by their root.

    Raises
    ------
    ValueError
        If `weight` is no matrix, or `rank` is over its sides or below 1.

    Examples
    --------
    >>> A, B = truncated(torch.outer(torch.ones(2), torch.arange(3.0)), 1)
    >>> torch.allclose(B @ A, torch.outer(torch.ones(2), torch.arange(3.0)), atol=1e-6)
    True
    """
    if weight.dim() != 2:
        raise ValueError(f"weight must be a matrix; it has shape {tuple(weight.shape)}")
    if isinstance(rank, bool) or not 1 <= rank <= min(weight.shape):
        raise ValueError(f"rank={rank} must be from 1 to {min(weight.shape)}, the smaller side")
    # (eq-eckart-young)  W_r = sum over the r largest of varsigma_i u_i v_i^T
    left, values, right = torch.linalg.svd(weight.detach(), full_matrices=False)
    root = values[:rank].sqrt()
    return root[:, None] * right[:rank], left[:, :rank] * root


def rank_for(weight: Tensor, share: float = 0.9) -> int:
    """How many of the largest singular values hold a share of the sum of their squares.

    Parameters
    ----------
    weight
        A matrix.
    share
        In (0, 1].

    Raises
    ------
    ValueError
        If `share` is not in (0, 1], `weight` is no matrix, or all of it is zero.
    """
    if weight.dim() != 2 or not weight.any():
        raise ValueError(f"weight must be a matrix that is not zero; shape {tuple(weight.shape)}")
    return _needed(torch.linalg.svdvals(weight.detach().double()).square(), share)


def entries_for(weight: Tensor, share: float = 0.9) -> int:
    """How many of the largest entries hold a share of the sum of their squares, as `rank_for`.

    Raises
    ------
    ValueError
        If `share` is not in (0, 1], or all of the weight is zero.
    """
    if not weight.any():
        raise ValueError("weight must not be zero")
    squares = weight.detach().double().flatten().square()
    return _needed(squares.sort(descending=True).values, share)


def _needed(squares: Tensor, share: float) -> int:
    """How many of these, the largest first, hold a share of their sum."""
    if not 0 < share <= 1:
        raise ValueError(f"share={share} must be in (0, 1]")
    held = squares.cumsum(0) / squares.sum()
    # the last may be a rounding error below one
    return int((held < share - 1e-12).sum()) + 1
