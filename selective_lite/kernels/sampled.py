"""Sampled products: a product's entries at some positions only, never the product as a whole.

A selected entry of a linear layer's gradient is a dot product over tokens, of a column of the
outgoing gradient and a column of the input. Most of the time goes into making those columns
contiguous; where they are few, only they are made so, and only they are kept of the input. On the
CPU, in float32, a C function does so tile by tile (see `native`); what follows is its reference,
and what runs elsewhere.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor

from . import native

Index = Tensor | None  # positions or features, int32 or int64; None for all of them
Footprint = tuple[Index, Index]  # rows and columns
BLOCK = 49152  # numbers that are transposed together, of 32 tokens at least
DENSE_ABOVE = {"C": 0.35, "torch": 0.08}  # of a matrix: then slices of the product are faster
GATHER_BELOW = 0.4  # of a matrix's rows or columns: gathering fewer is faster than transposing all


def precise(tensor: Tensor) -> torch.dtype:
    """The dtype that a tensor is summed and trained in: its own, or float32 for half precision."""
    return torch.promote_types(tensor.dtype, torch.float32)


def index_dtype(size: int) -> torch.dtype:
    """The dtype of positions in a tensor of this many values: int32 where it can be."""
    return torch.int32 if size < 2**31 else torch.int64


def write(dense: Tensor, values: Tensor, index: Tensor) -> None:
    """``dense.flatten()[index] = values``, in place; all on one device, in one dtype."""
    if dense.is_contiguous() and (loaded := native.fits(dense, values, index)):
        native.write(loaded, dense, values, index)
    elif dense.is_contiguous():
        dense.view(-1).index_copy_(0, index.long(), values)
    else:
        dense.put_(index.long(), values)


def sampled_product(
    left: Tensor, right: Tensor, index: Tensor, height: int, width: int, rows: Index, columns: Index
) -> Tensor:
    """Entries of a product over tokens, ``left.T @ right``, and not the others.

    Parameters
    ----------
    left, right
        (T, height) and (T, width), floating point; half precision is summed in float32. What
        `columns_as_rows` gives of them where `rows` or `columns` are given.
    index
        Flat row-major positions in (height, width), int32 or int64, strictly increasing, same
        device.
    height, width
        Of the product.
    rows, columns
        The `footprint` of `index`, or None.

    Returns
    -------
    Tensor
        One value a position, float32, or float64 for float64 operands.
    """
    left, right = left.to(precise(left)), right.to(precise(right))
    if rows is not None and columns is not None and (len(rows) == height or len(columns) == width):
        return (left @ right.t()).flatten()
    loaded = native.fits(left, right, index, *(at for at in (rows, columns) if at is not None))
    most = DENSE_ABOVE["C" if loaded else "torch"] * height * width
    if rows is None and columns is None and len(index) > most:
        return _by_slices(left, right, index, height, width)
    if loaded:
        return native.product(loaded, left, right, index, height, width, rows, columns)
    row, column = index.div(width, rounding_mode="floor"), index % width
    left, row = (by_feature(left), row) if rows is None else (left, torch.searchsorted(rows, row))
    if columns is None:
        right = by_feature(right)
    else:
        column = torch.searchsorted(columns, column)
    if left.device.type not in ("cpu", "cuda"):  # sampled_addmm has no kernel there
        pairs = zip(row.split(4096), column.split(4096), strict=True)
        return torch.cat([(left[r] * right[c]).sum(1) for r, c in pairs])
    _silence_sparse_warning()
    starts = torch.searchsorted(row, torch.arange(len(left) + 1, device=row.device).to(row.dtype))
    zeros, shape = left.new_zeros(len(index)), (len(left), len(right))
    pattern = torch.sparse_csr_tensor(
        starts.to(index.dtype), column.to(index.dtype), zeros, shape, check_invariants=False
    )
    return torch.sparse.sampled_addmm(pattern, left, right.t(), beta=0).values()


def _by_slices(left: Tensor, right: Tensor, index: Tensor, height: int, width: int) -> Tensor:
    """`sampled_product` out of some rows of the whole product at a time, a quarter at most."""
    rows = max(1, min(256, height // 4))
    bounds = torch.arange(0, height + rows, rows, device=index.device) * width
    cuts = torch.searchsorted(index, bounds.to(index.dtype)).diff().tolist()
    return torch.cat(
        [
            (left[:, first : first + rows].t() @ right).flatten()[own - first * width]
            for first, own in zip(range(0, height, rows), index.split(cuts), strict=True)
        ]
    )


def sampled_rows(
    grad: Tensor, ids: Tensor, index: Tensor, width: int, padding_idx: int | None
) -> Tensor:
    """Entries of an embedding table's gradient, out of the gradient of the rows looked up.

    Parameters
    ----------
    grad
        The gradient of the looked-up rows, (..., width), floating point; half precision is summed
        in float32.
    ids
        Which rows were looked up, (...), integers.
    index
        Flat row-major positions in the table, int32 or int64, strictly increasing.
    width
        Of the table.
    padding_idx
        A row that gets no gradient, or None.

    Returns
    -------
    Tensor
        One value a position, float32, or float64 for a float64 `grad`.
    """
    grad, ids = grad.reshape(-1, width).to(precise(grad)), ids.reshape(-1).to(index.dtype)
    first, end = (torch.searchsorted(index, row * width) for row in (ids, ids + 1))
    counts = end - first if padding_idx is None else (end - first) * (ids != padding_idx)
    token = torch.arange(len(ids), device=ids.device).repeat_interleave(counts)
    # Where a token's entries begin, less how many the tokens before it have.
    place = torch.arange(len(token), device=ids.device) + (first - counts.cumsum(0) + counts)[token]
    found = grad[token, index[place] % width]
    return grad.new_zeros(len(index)).index_add_(0, place, found)


def _operation(function: Any, schema: str) -> Any:
    """An operation of our own, with a schema and a shape, for one of the two functions above."""
    name = f"selective_lite::{function.__name__}"
    operation = torch.library.custom_op(name, function, mutates_args=(), schema=schema)

    def fake(first: Tensor, second: Tensor, index: Tensor, *_: Any) -> Tensor:
        return first.new_empty(len(index), dtype=precise(first))

    operation.register_fake(fake)
    return operation


product_operation = _operation(
    sampled_product,
    "(Tensor left, Tensor right, Tensor index, int height, int width, Tensor? rows, "
    "Tensor? columns) -> Tensor",
)
rows_operation = _operation(
    sampled_rows, "(Tensor grad, Tensor ids, Tensor index, int width, int? padding_idx) -> Tensor"
)


# While compiling: torch.compile takes each as one node, and finds no break inside.
def product(left: Tensor, right: Tensor, *at: Any) -> Tensor:
    """`sampled_product`, as one operation while a model is compiled."""
    found = product_operation if torch.compiler.is_compiling() else sampled_product
    return found(left, right, *at)


def rows(grad: Tensor, ids: Tensor, *at: Any) -> Tensor:
    """`sampled_rows`, as one operation while a model is compiled."""
    found = rows_operation if torch.compiler.is_compiling() else sampled_rows
    return found(grad, ids, *at)


def footprint(index: Tensor, height: int, width: int) -> Footprint:
    """The rows and the columns of a matrix that sorted positions lie in.

    None where they are too many to be gathered. Both, whatever their number, if the positions are
    all of some rows or columns (neurons, attention heads): then dense slices are multiplied.
    """
    rows, columns = index.div(width, rounding_mode="floor").unique(), (index % width).unique()
    if len(index) == len(rows) * len(columns) and (len(rows) == height or len(columns) == width):
        return rows, columns
    few_rows, few = len(rows) < GATHER_BELOW * height, len(columns) < GATHER_BELOW * width
    return rows if few_rows else None, columns if few else None


def columns_as_rows(operand: Tensor, features: Tensor | None) -> Tensor:
    """Some features of (T, D) as (features, T), contiguous; the operand as it is for None."""
    if features is None:
        return operand
    if operand.is_contiguous() and (loaded := native.fits(operand, features)):
        return native.gather(loaded, operand, features)
    return operand.t()[features]


def by_feature(operand: Tensor) -> Tensor:
    """(T, D) as (D, T), contiguous.

    Block by block, for a column's values lie so far apart that caches thrash.
    """
    tokens = max(32, BLOCK // operand.shape[1])
    return torch.cat([block.t() for block in operand.split(tokens)], 1)


@cache
def _silence_sparse_warning() -> None:
    """Torch warns once a process that CSR tensors are in beta; the first is made here, unheard."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        starts = torch.zeros(2, dtype=torch.int64, device="cpu")
        torch.sparse_csr_tensor(starts, starts[:0], starts[:0].float(), (1, 1))
