"""Uses of weights: what a pass over many samples keeps to form the gradient of each sample.

Samples are the first dimension, then their tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear

Add = Callable[[Tensor, Tensor], Any]  # add to a sum what is asked of a gradient, entry by entry


@dataclass
class Product:
    """Gradients that are products over tokens, (samples, tokens, rows) by (..., columns)."""

    left: Tensor
    right: Tensor
    order = 0  # of uses that are added up

    def __len__(self) -> int:
        return len(self.left)

    def added(self, to: Tensor | None, sample: int) -> Tensor:
        """A sample's gradient, added to what other uses gave."""
        left, right = self.left[sample].T, self.right[sample]
        return left @ right if to is None else to.addmm_(left, right)


@dataclass
class Dense:
    """Gradients as they are, (samples, *shape)."""

    each: Tensor
    order = 1

    def __len__(self) -> int:
        return len(self.each)

    def added(self, to: Tensor | None, sample: int) -> Tensor:
        """As `Product.added`."""
        return self.each[sample] if to is None else to + self.each[sample]


@dataclass
class Rows:
    """Gradients of a few rows: their numbers (samples, tokens), and what each token adds."""

    numbers: Tensor
    each: Tensor
    order = 2

    def __len__(self) -> int:
        return len(self.each)

    def added(self, to: Tensor | None, sample: int) -> Tensor:
        """As `Product.added`, after others."""
        assert to is not None
        return to.index_add_(0, self.numbers[sample], self.each[sample])


Part = Product | Dense | Rows


@torch.no_grad()
def accumulate(total: Tensor, parts: Sequence[Part], add: Add) -> None:
    """Form each sample's gradient of one weight from its uses, and add it to a sum."""
    rows = [part for part in parts if isinstance(part, Rows)]
    if len(rows) == len(parts):
        if rows:
            _accumulate_rows(total, rows, add)
        return
    ordered = sorted(parts, key=lambda part: part.order)
    for sample in range(len(ordered[0])):
        gradient = None
        for part in ordered:
            gradient = part.added(gradient, sample)
        assert gradient is not None
        add(total, gradient.to(total.dtype))


def _accumulate_rows(total: Tensor, parts: Sequence[Rows], add: Add) -> None:
    """The same where nothing but rows has a gradient; only these are formed."""
    numbers = torch.cat([part.numbers for part in parts], 1)
    each = torch.cat([part.each for part in parts], 1).flatten(0, 1)
    samples = torch.arange(len(numbers), device=numbers.device)[:, None]
    keys, which = (numbers + len(total) * samples).unique(return_inverse=True)
    gradients = each.new_zeros(len(keys), each.shape[-1]).index_add_(0, which.flatten(), each)
    found = gradients.new_zeros(gradients.shape, dtype=total.dtype)
    add(found, gradients.to(total.dtype))
    total.index_add_(0, keys % len(total), found)


@dataclass
class Linear:
    """x W^T + b, as `torch.nn.Linear` has it."""

    weight: Tensor
    bias: Tensor | None
    width = 1  # dimensions of x that are not tokens

    def forward(self, x: Tensor) -> Tensor:
        """What comes out."""
        return linear(x, self.weight, self.bias)

    def backward(self, g: Tensor) -> Tensor:
        """The gradient of x, for that of what came out."""
        return g @ self.weight

    def parts(self, x: Tensor, g: Tensor) -> list[tuple[Tensor, Part]]:
        """The gradients of the weight and of the bias."""
        found: list[tuple[Tensor, Part]] = [(self.weight, Product(g, x))]
        return found if self.bias is None else [*found, (self.bias, Dense(g.sum(1)))]


class Conv1D(Linear):
    """x W + b, as the layer of GPT-2 has it."""

    def forward(self, x: Tensor) -> Tensor:
        """As `Linear.forward`."""
        return linear(x, self.weight.T, self.bias)

    def backward(self, g: Tensor) -> Tensor:
        """As `Linear.backward`."""
        return g @ self.weight.T

    def parts(self, x: Tensor, g: Tensor) -> list[tuple[Tensor, Part]]:
        """As `Linear.parts`."""
        (_, product), *bias = super().parts(x, g)
        assert isinstance(product, Product)
        return [(self.weight, Product(product.right, product.left)), *bias]


@dataclass
class LookUp:
    """Rows of a table by their numbers; the one of `padding` gets no gradient."""

    weight: Tensor
    padding: int | None
    bias = None
    width = 0

    def forward(self, numbers: Tensor) -> Tensor:
        """What comes out."""
        return embedding(numbers, self.weight)

    def backward(self, g: Tensor) -> Tensor:
        """Numbers have no gradient."""
        raise NotImplementedError

    def parts(self, numbers: Tensor, g: Tensor) -> list[tuple[Tensor, Part]]:
        """The gradient of the table."""
        if self.padding is not None:
            g = g.masked_fill((numbers == self.padding % len(self.weight)).unsqueeze(-1), 0)
        return [(self.weight, Rows(numbers, g))]


Use = Linear | LookUp
