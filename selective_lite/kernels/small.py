"""Small modules as they compute: LoRA (Hu et al. 2022), bottleneck Adapter (Houlsby et al. 2019).

Where they are put, and how they are taken out or merged: `layers.small`.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear

from .checks import one_of
from .sampled import precise

Kind = Literal["lora", "adapter"]
KINDS = ("lora", "adapter")


def part_shapes(kind: Kind, d_in: int, d_out: int, rank: int) -> dict[str, tuple[int, ...]]:
    """The tensors of a small module, ``{part: shape}``, for a layer from `d_in` to `d_out`.

    Raises
    ------
    ValueError
        If `kind` is neither ``"lora"`` nor ``"adapter"``.
    """
    one_of("kind", kind, KINDS)
    if kind == "lora":
        return {"A": (rank, d_in), "B": (d_out, rank)}
    return {"down": (rank, d_out), "down_bias": (rank,), "up": (d_out, rank), "up_bias": (d_out,)}


class _Small(nn.Module):
    """Parts as `part_shapes` has them: the first is uniform, the others are zero.

    Parameters
    ----------
    d_in, d_out
        Features in and out of the layer.
    rank
        r.
    generator
        A CPU generator that draws the first part.
    like
        A tensor whose dtype and device the weights get.
    """

    kind: Kind

    def __init__(
        self, d_in: int, d_out: int, rank: int, *, generator: torch.Generator, like: Tensor
    ) -> None:
        super().__init__()
        self.rank = rank
        for part, shape in part_shapes(self.kind, d_in, d_out, rank).items():
            values = torch.zeros(shape, device="cpu")
            if not self._parameters:
                values = torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu")
                values = (2 * values - 1) / math.sqrt(shape[1])
            setattr(self, part, nn.Parameter(values.to(like.device, like.dtype)))


class LoRA(_Small):
    """A low-rank difference B A to a weight: A (r, d_in) uniform in +-1 / sqrt(d_in), B zero."""

    kind: Kind = "lora"
    A: nn.Parameter
    B: nn.Parameter

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The layer's output y (..., d_out), and the difference's of its input x (..., d_in)."""
        # (eq-lora)  y = W x + b + B A x
        return y + linear(linear(x, self.A), self.B)

    def difference(self) -> Tensor:
        """B A, (d_out, d_in), in float32 or float64."""
        return self.B.detach().to(precise(self.B)) @ self.A.detach().to(precise(self.A))


class Adapter(_Small):
    """A bottleneck of width r behind a layer: down uniform in +-1 / sqrt(d_out), all else zero."""

    kind: Kind = "adapter"
    down: nn.Parameter
    down_bias: nn.Parameter
    up: nn.Parameter
    up_bias: nn.Parameter

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The layer's output y (..., d_out) and what the bottleneck makes of it; x is not used."""
        # (eq-adapter)  y' = y + U gelu(D y + d) + u
        hidden = gelu(linear(y, self.down, self.down_bias))
        return y + linear(hidden, self.up, self.up_bias)
