"""Sampled gradients: layers whose weight gradient is computed at the selected positions only, never as a whole.

A selected entry of a linear layer's gradient is a dot product over tokens, of a column of the outgoing gradient and a
column of the input. Most of the time goes into making those columns contiguous.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

BLOCK = 128  # tokens transposed together


class _Scatter(torch.autograd.Function):
    """A small dense tensor whose gradient goes to its selected entries."""

    @staticmethod
    def forward(ctx: Any, dense: Tensor, values: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(values, index)
        return dense.detach().clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        values, index = ctx.saved_tensors
        return None, grad.reshape(-1)[index].to(values.dtype), None


class _Linear(torch.autograd.Function):
    """y = x W^T + b (Conv1D: y = x W + b) with the gradient of W at its selected positions only."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, values: Tensor, index: Tensor, rows: Tensor | None, columns: Tensor | None,
        bias: Tensor | None, transposed: bool,
    ) -> Tensor:  # fmt: skip
        y = functional.linear(x, weight.t() if transposed else weight, bias)
        ctx.transposed, ctx.has_bias = transposed, bias is not None
        # Under autocast y has the compute dtype: keep x in it, as the dense product would. Saving `values` lets
        # autograd see an optimizer step between forward and backward.
        ctx.save_for_backward(x if x.dtype == y.dtype else x.to(y.dtype), weight, values, index, rows, columns)
        ctx.x_dtype = x.dtype
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, values, index, *block = ctx.saved_tensors
        grad_x = grad_values = grad_bias = None
        if ctx.needs_input_grad[0]:
            dense = weight.to(grad.dtype)
            grad_x = grad.matmul(dense.t() if ctx.transposed else dense).to(ctx.x_dtype)
        grad_rows, x_rows = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        if ctx.needs_input_grad[2]:
            left, right = (x_rows, grad_rows) if ctx.transposed else (grad_rows, x_rows)
            grad_values = sampled_product(left, right, index, *block).to(values.dtype)
        if ctx.has_bias and ctx.needs_input_grad[6]:
            grad_bias = grad_rows.sum(0)
        return grad_x, None, grad_values, None, None, None, grad_bias, None


class _Embedding(torch.autograd.Function):
    """Rows of a table, with the gradient of the table at its selected positions only."""

    @staticmethod
    def forward(
        ctx: Any, ids: Tensor, weight: Tensor, values: Tensor, index: Tensor, padding_idx: int | None
    ) -> Tensor:
        ctx.save_for_backward(ids, values, index)
        ctx.width, ctx.padding_idx = weight.shape[1], padding_idx
        return functional.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        ids, values, index = ctx.saved_tensors
        return None, None, sampled_rows(grad, ids, index, ctx.width, ctx.padding_idx).to(values.dtype), None, None


scatter = _Scatter.apply  # (dense, values, index)
linear = _Linear.apply  # (x, weight, values, index, rows, columns, bias, transposed)
embedding = _Embedding.apply  # (ids, weight, values, index, padding_idx)


# Operations of their own, with schemas and shapes: torch.compile takes each as one node, and finds no break inside.
@torch.library.custom_op(
    "selective_lite::sampled_product",
    mutates_args=(),
    schema="(Tensor left, Tensor right, Tensor index, Tensor? rows=None, Tensor? columns=None) -> Tensor",
)
def sampled_product(
    left: Tensor, right: Tensor, index: Tensor, rows: Tensor | None = None, columns: Tensor | None = None
) -> Tensor:
    """Entries of ``left.T @ right`` at sorted flat row-major positions, without the other entries.

    Parameters
    ----------
    left, right
        (T, rows) and (T, columns), floating point; half precision is summed in float32.
    index
        Positions in (rows, columns), int64, strictly increasing, on the same device.
    rows, columns
        What `as_block` finds in `index`: then dense slices are multiplied.

    Returns
    -------
    Tensor
        One value a position, float32, or float64 for float64 operands.
    """
    precise = torch.promote_types(left.dtype, torch.float32)
    left, right = left.to(precise), right.to(precise)
    if rows is not None:
        return (left[:, rows].t() @ right[:, columns]).flatten()
    height, width = left.shape[1], right.shape[1]
    row, column = index.div(width, rounding_mode="floor"), index % width
    if left.device.type not in ("cpu", "cuda"):  # sampled_addmm has no kernel there
        pairs = zip(row.split(4096), column.split(4096), strict=True)
        return torch.cat([(left[:, r] * right[:, c]).sum(0) for r, c in pairs])
    _silence_sparse_warning()
    left, right = (by_feature(operand) for operand in (left, right))
    starts = torch.searchsorted(row, torch.arange(height + 1, device=index.device))
    zeros = torch.zeros(len(index), dtype=precise, device=index.device)
    pattern = torch.sparse_csr_tensor(starts, column, zeros, (height, width), check_invariants=False)
    return torch.sparse.sampled_addmm(pattern, left, right.t(), beta=0).values()


@sampled_product.register_fake
def _(left: Tensor, right: Tensor, index: Tensor, rows: Tensor | None = None, columns: Tensor | None = None) -> Tensor:
    return left.new_empty(len(index), dtype=torch.promote_types(left.dtype, torch.float32))


@torch.library.custom_op(
    "selective_lite::sampled_rows",
    mutates_args=(),
    schema="(Tensor grad, Tensor ids, Tensor index, int width, int? padding_idx) -> Tensor",
)
def sampled_rows(grad: Tensor, ids: Tensor, index: Tensor, width: int, padding_idx: int | None) -> Tensor:
    """Entries of an embedding table's gradient at sorted flat row-major positions, out of the rows looked up.

    Parameters
    ----------
    grad
        The gradient of the looked-up rows, (..., width), floating point; half precision is summed in float32.
    ids
        Which rows were looked up, (...), integers.
    index
        Positions in the table, int64, strictly increasing.
    width
        Of the table.
    padding_idx
        A row that gets no gradient, or None.

    Returns
    -------
    Tensor
        One value a position, float32, or float64 for a float64 `grad`.
    """
    grad = grad.reshape(-1, width).to(torch.promote_types(grad.dtype, torch.float32))
    if ids.numel() == 0:
        return grad.new_zeros(len(index))
    seen, slot = ids.reshape(-1).unique(return_inverse=True)
    rows = grad.new_zeros(len(seen), width).index_add_(0, slot, grad)
    if padding_idx is not None:
        rows[seen == padding_idx] = 0
    row = index.div(width, rounding_mode="floor")
    place = torch.searchsorted(seen, row).clamp_(max=len(seen) - 1)
    return rows[place, index % width] * (seen[place] == row)


@sampled_rows.register_fake
def _(grad: Tensor, ids: Tensor, index: Tensor, width: int, padding_idx: int | None) -> Tensor:
    return grad.new_empty(len(index), dtype=torch.promote_types(grad.dtype, torch.float32))


def as_block(index: Tensor, height: int, width: int) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """The rows and columns of a matrix whose crossings are exactly these sorted positions; Nones if there are none.

    Only of whole rows or whole columns (neurons, attention heads): dense slices instead of single entries.
    """
    row, column = index.div(width, rounding_mode="floor"), index % width
    across = int((row == row[0]).sum())
    rows, columns = row[::across].clone(), column[:across].clone()
    crossings = (rows[:, None] * width + columns).flatten()
    whole = across == width or len(rows) == height
    return (rows, columns) if whole and torch.equal(crossings, index) else (None, None)


def by_feature(operand: Tensor) -> Tensor:
    """(T, D) as (D, T), contiguous. Block by block, for a column's values lie so far apart that caches thrash."""
    return torch.cat([block.t() for block in operand.split(BLOCK)], 1)


@cache
def _silence_sparse_warning() -> None:
    """Torch warns once a process that CSR tensors are in beta; the first one is made here, unheard."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        empty = torch.zeros(0, dtype=torch.int64, device="cpu")
        starts = torch.zeros(2, dtype=torch.int64, device="cpu")
        torch.sparse_csr_tensor(starts, empty, empty.float(), (1, 1), check_invariants=False)
