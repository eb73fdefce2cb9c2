"""Positions: as one compressed stream of their gaps, some 4 % longer than their entropy."""

from __future__ import annotations

import lzma
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

# A raw stream with fixed settings: no header could ask the decoder for a larger dictionary than
# this one. Gaps have no context to model (lc, lp, pb); what repeats, as in whole rows, repeats
# nearby.
FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": 1 << 16, "lc": 0, "lp": 0, "pb": 0}]
GAP = "<i8"


def squeeze(numbers: np.ndarray) -> Tensor:
    """One stream, uint8 (bytes,), of whole numbers: every one's lowest byte, then the next.

    Nearly all of the upper ones are zero, and cost nothing.
    """
    planes = numbers.view(np.uint8).reshape(-1, numbers.itemsize).T
    stream = lzma.compress(planes.tobytes(), lzma.FORMAT_RAW, filters=FILTERS)
    return torch.frombuffer(bytearray(stream), dtype=torch.uint8)


def expand(stream: Tensor, dtype: str, count: int, what: str) -> np.ndarray:
    """The `count` numbers that `squeeze` was given; it never makes more than they need.

    Raises
    ------
    ValueError
        If the stream is damaged, or holds fewer or more numbers; `what` says which ones.
    """
    width = np.dtype(dtype).itemsize
    size = width * count
    decoder = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=FILTERS)
    try:
        # one more, to see the end
        planes = decoder.decompress(stream.numpy().tobytes(), max_length=size + 1)
    except lzma.LZMAError as error:
        raise ValueError(f"the stream of {what} is damaged: {error}") from None
    if len(planes) != size or not decoder.eof or decoder.unused_data:
        raise ValueError(f"the stream of {what} does not hold {count} {what}")
    bytewise = np.frombuffer(planes, np.uint8).reshape(width, -1).T
    return np.ascontiguousarray(bytewise).view(dtype).reshape(-1)


def pack(positions: Sequence[Tensor]) -> Tensor:
    """One stream, uint8 (bytes,), of sorted positions, as gaps."""
    gaps = [np.diff(index.numpy().astype(GAP), prepend=-1) for index in positions]
    return squeeze(np.concatenate([*gaps, np.empty(0, GAP)]))


def unpack(stream: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """The int64 vectors of these lengths that `pack` was given.

    It never makes more than these lengths need. The positions of a forged stream can be anything:
    see `increasing`.

    Raises
    ------
    ValueError
        If the stream is damaged, or holds fewer or more gaps than `counts` say.
    """
    gaps = expand(stream, GAP, sum(counts), "gaps")
    parts = np.split(gaps, np.cumsum(counts)[:-1]) if len(counts) else []
    return [torch.from_numpy(np.cumsum(part) - 1) for part in parts]


def increasing(index: Tensor, size: int) -> bool:
    """Whether positions are some, strictly increasing, and within [0, size)."""
    # Compared, not subtracted: a difference could overflow.
    return len(index) > 0 and bool(
        index[0] >= 0 and index[-1] < size and (index[1:] > index[:-1]).all()
    )
