"""Steps: half-precision values as whole steps from the base's, nearly always one up or one down.

All numbers of a half-precision dtype stand in one order, in which the next larger one is a step
away: zeros of both signs, infinities and NaNs have their places too, so that no bit is lost. What
a step of training does to a weight is then one bit, its direction, and a length that is mostly 1.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .positions import expand, squeeze

HALVES = (torch.float16, torch.bfloat16)
LENGTH = "<u2"


def steps_between(base: Tensor, values: Tensor) -> Tensor:
    """How many steps every value is above the base's, int16 (k,); more than half the way wraps.

    They are in the order of the base's magnitudes: an optimizer moves all weights about as far,
    which is many steps among small numbers and one among large ones, so that in this order lengths
    hardly vary from one to the next.

    Parameters
    ----------
    base, values
        Vectors of one half-precision dtype.
    """
    return (_ranked(values.view(torch.int16)) - _ranked(base.view(torch.int16)))[_order(base)]


def stepped(base: Tensor, steps: Tensor) -> Tensor:
    """The values that `steps_between` was given, to the bit."""
    places = _ranked(base.view(torch.int16))
    places[_order(base)] += steps
    return _ranked(places).view(base.dtype)


def _ranked(bits: Tensor) -> Tensor:
    """The places of numbers among all of their dtype by their int16 bits, or bits by places."""
    # Bits are a sign and a magnitude; places are two's complement, in which -0.0 is -1.
    return torch.where(bits < 0, bits ^ 0x7FFF, bits)


def _order(base: Tensor) -> Tensor:
    return torch.argsort(base.view(torch.int16) & 0x7FFF, stable=True)


def pack_steps(steps: Tensor) -> tuple[Tensor, Tensor]:
    """Directions, a bit each, and one stream of lengths, both uint8, of int16 steps (k,).

    The bits are stored as they are: nothing compresses them, and so a file of k steps has at least
    k / 8 bytes, however it was forged.
    """
    wide = steps.numpy().astype(np.int32)
    return torch.from_numpy(np.packbits(wide < 0)), squeeze(np.abs(wide).astype(LENGTH))


def unpack_steps(down: Tensor, lengths: Tensor, count: int) -> Tensor:
    """The int16 steps (count,) that `pack_steps` was given.

    Raises
    ------
    ValueError
        If the directions or the stream of lengths are not of `count` steps, or it is damaged.
    """
    if len(down) != -(-count // 8):
        raise ValueError(f"the {len(down)} bytes of directions are not of {count} steps")
    wide = expand(lengths, LENGTH, count, "lengths").astype(np.int32)
    signs = np.unpackbits(down.numpy(), count=count).astype(bool)
    return torch.from_numpy(np.where(signs, -wide, wide).astype(np.int16))
