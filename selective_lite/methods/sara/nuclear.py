"""The nuclear norm of a matrix's selected weights, and its gradient, from and to their values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


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
