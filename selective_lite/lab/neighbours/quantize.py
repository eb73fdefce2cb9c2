"""Quantization: weights on a symmetric grid of some bits, with one scale a tensor or one a row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from ...params import check_names, weights

Per = Literal["tensor", "row"]
LEAST, MOST = 2, 16


class Quantized(NamedTuple):
    """Whole numbers and their scale: the weight is ``codes * scale``.

    Attributes
    ----------
    codes
        int16, in the weight's shape, from ``-(2 ** (bits - 1) - 1)`` to the same above zero.
    scale
        The grid's step, in the weight's dtype: a number, or one for each row, of shape (rows, 1).
    bits
        Bits of a code.
    """

    codes: Tensor
    scale: Tensor
    bits: int

    @property
    def values(self) -> Tensor:
        """The weight on the grid."""
        return self.codes.to(self.scale.dtype) * self.scale

    @property
    def bytes(self) -> float:
        """Bytes of the codes, packed, and of the scales."""
        return self.codes.numel() * self.bits / 8 + self.scale.numel() * self.scale.element_size()


def quantize(weight: Tensor, bits: int, per: Per = "tensor") -> Quantized:
    """The nearest point of a symmetric grid to each weight; an error is half a step at most.

    Parameters
    ----------
    weight
        Floating point, finite; at least two dimensions for ``per="row"``.
    bits
        From 2 to 16. The grid has ``2 ** bits - 1`` points, zero among them.
    per
        ``"tensor"``: one scale, by the largest weight; ``"row"``: one for each first index.

    Raises
    ------
    ValueError
        If `bits` or `per` is none of these, a weight is not finite, or there are no rows.

    Examples
    --------
    >>> quantize(torch.tensor([[-1.0, 0.2], [0.1, 0.05]]), 3, "row").codes.tolist()
    [[-3, 1], [3, 2]]
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or not LEAST <= bits <= MOST:
        raise ValueError(f"bits={bits!r}: give a whole number from {LEAST} to {MOST}")
    if per not in ("tensor", "row"):
        raise ValueError(f"per={per!r}: choose 'tensor' or 'row'")
    if per == "row" and weight.dim() < 2:
        raise ValueError(f"per='row' needs rows; weight has shape {tuple(weight.shape)}")
    if not weight.is_floating_point() or not weight.isfinite().all():
        raise ValueError("weight must be floating point and finite")
    most = 2 ** (bits - 1) - 1
    size = weight.detach().abs()
    largest = size.max() if per == "tensor" else size.flatten(1).amax(1)
    # (eq-grid)  scale = max |theta| / (2^(bits - 1) - 1);  code = round(theta / scale)
    scale = largest / most
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))  # a row of zeros has any scale
    if per == "row":
        scale = scale.view(-1, *[1] * (weight.dim() - 1))
    codes = (weight.detach() / scale).round().clamp(-most, most).to(torch.int16)
    return Quantized(codes, scale, bits)


@torch.no_grad()
def quantize_model(
    model: nn.Module, bits: int, per: Per = "row", names: list[str] | None = None
) -> Mapping[str, Quantized]:
    """Put a model's matrices on the grid, in place.

    Parameters
    ----------
    model
        Any module.
    bits, per
        As in `quantize`.
    names
        Which weights; by default every candidate of two dimensions or more.

    Returns
    -------
    dict
        ``{name: Quantized}``; the model computes with their values.

    Raises
    ------
    ValueError
        As `quantize`, before any weight is changed; or if a name is no candidate.
    """
    candidates = weights(model)
    if names is not None:
        check_names(names, candidates, "names")
    chosen = [name for name, p in candidates.items() if p.dim() > 1] if names is None else names
    found = {name: quantize(candidates[name], bits, per) for name in chosen}
    for name, one in found.items():
        candidates[name].copy_(one.values)
    return found
