"""Sampled gradients: layers whose weight gradient is computed at the selected positions only, never as a whole.

A selected entry of a linear layer's gradient is a dot product over tokens, of a column of the
outgoing gradient and a column of the input. Most of the time goes into making those columns
contiguous; where they are few, only they are made so, and only they are kept of the input.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

BLOCK = 128  # tokens transposed together
GATHER_BELOW = 0.4  # of a matrix's rows or columns: gathering fewer is faster than transposing all


def precise(tensor: Tensor) -> torch.dtype:
    """The dtype that a tensor is summed and trained in: its own, or float32 for half precision."""
    return torch.promote_types(tensor.dtype, torch.float32)


class _Scatter(torch.autograd.Function):
    """A dense tensor whose gradient goes to its selected entries."""

    @staticmethod
    def forward(ctx: Any, dense: Tensor, values: Tensor, index: Tensor) -> Tensor:
        # Saving `values` lets autograd see an optimizer step between forward and backward.
        ctx.save_for_backward(values, index)
        own = dense.detach()
        # A matrix is not copied; a vector is, for a layer that is called again writes into it.
        return own if own.dim() > 1 else own.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        values, index = ctx.saved_tensors
        grad = grad.to_dense() if grad.is_sparse else grad
        return None, grad.reshape(-1)[index].to(values.dtype), None


def _refuse_second_derivatives() -> None:
    # In a backward, gradients are recorded only if second derivatives were asked for.
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "sampled gradients have no second derivatives (create_graph=True); train with "
            "masked(..., sampled=False), which gathers entries of dense gradients"
        )


class _Linear(torch.autograd.Function):
    """y = x W^T + b (Conv1D: y = x W + b) with the gradient of W at its selected positions only."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, values: Tensor, index: Tensor, rows: Tensor | None,
        columns: Tensor | None, bias: Tensor | None, transposed: bool,
    ) -> Tensor:  # fmt: skip
        y = functional.linear(x, weight.t() if transposed else weight, bias)
        ctx.transposed, ctx.has_bias, ctx.x_dtype = transposed, bias is not None, x.dtype
        # Keep only what the gradient will read of the input; under autocast in the compute dtype,
        # as the dense product would. Saving `values` lets autograd see an optimizer step between
        # forward and backward.
        kept = columns_as_rows(x, rows if transposed else columns)
        kept = kept if kept.dtype == y.dtype else kept.to(y.dtype)
        ctx.save_for_backward(kept, weight, values, index, rows, columns)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        _refuse_second_derivatives()
        kept, weight, values, index, rows, columns = ctx.saved_tensors
        grad_x = grad_values = grad_bias = None
        if ctx.needs_input_grad[0]:
            dense = weight.to(grad.dtype)
            grad_x = grad.matmul(dense.t() if ctx.transposed else dense).to(ctx.x_dtype)
        if ctx.needs_input_grad[2]:
            outer = columns_as_rows(grad, columns if ctx.transposed else rows)
            left, right = (kept, outer) if ctx.transposed else (outer, kept)
            product = product_operation if torch.compiler.is_compiling() else sampled_product
            height, width = weight.shape
            grad_values = product(left, right, index, height, width, rows, columns).to(values.dtype)
        if ctx.has_bias and ctx.needs_input_grad[6]:
            grad_bias = grad.sum(0)
        return grad_x, None, grad_values, None, None, None, grad_bias, None


class _Embedding(torch.autograd.Function):
    """Rows of a table, with the gradient of the table at its selected positions only."""

    @staticmethod
    def forward(
        ctx: Any,
        ids: Tensor,
        weight: Tensor,
        values: Tensor,
        index: Tensor,
        padding_idx: int | None,
    ) -> Tensor:
        ctx.save_for_backward(ids, values, index)
        ctx.width, ctx.padding_idx = weight.shape[1], padding_idx
        return functional.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        _refuse_second_derivatives()
        ids, values, index = ctx.saved_tensors
        rows = rows_operation if torch.compiler.is_compiling() else sampled_rows
        return (
            None,
            None,
            rows(grad, ids, index, ctx.width, ctx.padding_idx).to(values.dtype),
            None,
            None,
        )


scatter = _Scatter.apply  # (dense, values, index)


def linear(
    x: Tensor, weight: Tensor, values: Tensor, index: Tensor, rows: Tensor | None,
    columns: Tensor | None, bias: Tensor | None, transposed: bool = False,
) -> Tensor:  # fmt: skip
    """A linear layer whose weight gradient is sampled.

    The function sees (T, D): what it gives back is no view, so that an operation behind the layer
    may work in place, as it may behind `nn.Linear`.
    """
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    y = _Linear.apply(flat, weight, values, index, rows, columns, bias, transposed)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])


embedding = _Embedding.apply  # (ids, weight, values, index, padding_idx)


def sampled_product(
    left: Tensor,
    right: Tensor,
    index: Tensor,
    height: int,
    width: int,
    rows: Tensor | None,
    columns: Tensor | None,
) -> Tensor:
    """Entries of a product over tokens, ``left.T @ right``, at sorted flat row-major positions, without the others.

    Parameters
    ----------
    left, right
        (T, height) and (T, width), floating point; half precision is summed in float32. What
        `gather` gives of them where `rows` or `columns` are given.
    index
        Positions in (height, width), int64, strictly increasing, on the same device.
    height, width
        Of the product.
    rows, columns
        The `footprint` of `index`, or None.

    Returns
    -------
    Tensor
        One value a position, float32, or float64 for float64 operands.
    """
    precise = torch.promote_types(left.dtype, torch.float32)
    left, right = left.to(precise), right.to(precise)
    if rows is not None and columns is not None and (len(rows) == height or len(columns) == width):
        return (left @ right.t()).flatten()
    row, column = index.div(width, rounding_mode="floor"), index % width
    left, row = (by_feature(left), row) if rows is None else (left, torch.searchsorted(rows, row))
    right, column = (
        (by_feature(right), column)
        if columns is None
        else (right, torch.searchsorted(columns, column))
    )
    if left.device.type not in ("cpu", "cuda"):  # sampled_addmm has no kernel there
        pairs = zip(row.split(4096), column.split(4096), strict=True)
        return torch.cat([(left[r] * right[c]).sum(1) for r, c in pairs])
    _silence_sparse_warning()
    starts = torch.searchsorted(row, torch.arange(len(left) + 1, device=index.device))
    zeros = torch.zeros(len(index), dtype=precise, device=index.device)
    pattern = torch.sparse_csr_tensor(
        starts, column, zeros, (len(left), len(right)), check_invariants=False
    )
    return torch.sparse.sampled_addmm(pattern, left, right.t(), beta=0).values()


def sampled_rows(
    grad: Tensor, ids: Tensor, index: Tensor, width: int, padding_idx: int | None
) -> Tensor:
    """Entries of an embedding table's gradient at sorted flat row-major positions, out of the rows looked up.

    Parameters
    ----------
    grad
        The gradient of the looked-up rows, (..., width), floating point; half precision is summed
        in float32.
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


# While compiling, operations of their own, with schemas and shapes: torch.compile takes each as one
# node, and finds no break inside. A step that is not compiled calls the functions.
product_operation = torch.library.custom_op(
    "selective_lite::sampled_product",
    sampled_product,
    mutates_args=(),
    schema="(Tensor left, Tensor right, Tensor index, int height, int width, Tensor? rows, Tensor? columns) -> Tensor",
)
rows_operation = torch.library.custom_op(
    "selective_lite::sampled_rows",
    sampled_rows,
    mutates_args=(),
    schema="(Tensor grad, Tensor ids, Tensor index, int width, int? padding_idx) -> Tensor",
)


@product_operation.register_fake
def _(
    left: Tensor,
    right: Tensor,
    index: Tensor,
    height: int,
    width: int,
    rows: Tensor | None,
    columns: Tensor | None,
) -> Tensor:
    return left.new_empty(len(index), dtype=torch.promote_types(left.dtype, torch.float32))


@rows_operation.register_fake
def _(grad: Tensor, ids: Tensor, index: Tensor, width: int, padding_idx: int | None) -> Tensor:
    return grad.new_empty(len(index), dtype=torch.promote_types(grad.dtype, torch.float32))


def footprint(index: Tensor, height: int, width: int) -> tuple[Tensor | None, Tensor | None]:
    """The rows and the columns of a matrix that sorted positions lie in; None where they are too many to be gathered.

    Both, whatever their number, if the positions are all of some rows or of some columns (neurons,
    attention heads): then dense slices are multiplied.
    """
    rows, columns = index.div(width, rounding_mode="floor").unique(), (index % width).unique()
    if len(index) == len(rows) * len(columns) and (len(rows) == height or len(columns) == width):
        return rows, columns
    return rows if len(rows) < GATHER_BELOW * height else None, columns if len(
        columns
    ) < GATHER_BELOW * width else None


def columns_as_rows(operand: Tensor, features: Tensor | None) -> Tensor:
    """Some features of (T, D) as (features, T), contiguous; the operand as it is for None."""
    return operand if features is None else operand.t()[features]


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
