"""Functions: layers as autograd functions that give selected entries their gradient.

A layer whose product is known gets its weight's gradient at the selected positions only; any other
one has them gathered from a dense gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from . import sampled
from .sharded import whole

Index = sampled.Index
Operands = tuple[Tensor, Tensor, Index, Index, Index]  # weight, values, index, rows, columns
SECOND = "no second derivatives (create_graph=True) of sampled gradients; give sampled=False"


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
        grad = grad.to_dense() if grad.is_sparse else whole(grad)
        return None, grad.reshape(-1)[index].to(values.dtype), None


def _refuse_second_derivatives() -> None:
    # In a backward, gradients are recorded only if second derivatives were asked for.
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(SECOND)


class _Linear(torch.autograd.Function):
    """y = x W^T + b (Conv1D: y = x W + b) with the gradient of W at its selected positions only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *operands: Any) -> Tensor:
        weight, values, index, rows, columns, bias, transposed = operands
        y = functional.linear(x, weight.t() if transposed else weight, bias)
        ctx.transposed, ctx.has_bias, ctx.x_dtype = transposed, bias is not None, x.dtype
        # Keep only what the gradient will read of the input; under autocast in the compute dtype,
        # as the dense product would. Saving `values` lets autograd see an optimizer step between
        # forward and backward.
        kept = sampled.columns_as_rows(x.reshape(-1, x.shape[-1]), rows if transposed else columns)
        kept = kept if kept.dtype == y.dtype else kept.to(y.dtype)
        ctx.save_for_backward(kept, weight, values, index, rows, columns)
        # Not a view, so that an operation behind the layer may work in place, as it may behind
        # `nn.Linear`. The product takes x in its own shape: another kernel would round otherwise.
        return torch.ops.aten._unsafe_view(y, y.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        _refuse_second_derivatives()
        kept, weight, values, index, rows, columns = ctx.saved_tensors
        grad_x = grad_values = grad_bias = None
        shape, grad = grad.shape, grad.reshape(-1, grad.shape[-1])
        if ctx.needs_input_grad[0]:
            dense = weight.to(grad.dtype)
            grad_x = (grad @ (dense.t() if ctx.transposed else dense)).to(ctx.x_dtype)
            grad_x = grad_x.view(*shape[:-1], grad_x.shape[-1])
        if ctx.needs_input_grad[2]:
            outer = sampled.columns_as_rows(grad, columns if ctx.transposed else rows)
            left, right = (kept, outer) if ctx.transposed else (outer, kept)
            at = (index, *weight.shape, rows, columns)
            grad_values = sampled.product(left, right, *at).to(values.dtype)
        if ctx.has_bias and ctx.needs_input_grad[6]:
            grad_bias = grad.sum(0)
        return grad_x, None, grad_values, None, None, None, grad_bias, None


class _Embedding(torch.autograd.Function):
    """Rows of a table, with the gradient of the table at its selected positions only."""

    @staticmethod
    def forward(
        ctx: Any, ids: Tensor, weight: Tensor, values: Tensor, index: Tensor, padding: int | None
    ) -> Tensor:
        ctx.save_for_backward(ids, values, index)
        ctx.width, ctx.padding = weight.shape[1], padding
        return functional.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        _refuse_second_derivatives()
        ids, values, index = ctx.saved_tensors
        found = sampled.rows(grad, ids, index, ctx.width, ctx.padding)
        return None, None, found.to(values.dtype), None, None


scatter = _Scatter.apply  # (dense, values, index)


def linear(x: Tensor, operands: Operands, bias: Index, transposed: bool = False) -> Tensor:
    """A linear layer whose weight gradient is sampled; its output is `functional.linear`'s."""
    return _Linear.apply(x, *operands, bias, transposed)


embedding = _Embedding.apply  # (ids, weight, values, index, padding_idx)
