"""Select: from scores and a budget to exactly k flat positions, a pure function of the scores."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .params import Budget, resolve_budget
from .scores import ALL_ZERO, NOT_FINITE

CHUNK = 1 << 18  # scores per chunk; bounds the extra memory of `select`
BUCKETS = 1 << 16  # of a histogram of 16 bits
SAVED = "selective_lite.selection"  # the key of a selection's metadata in its file


@dataclass(frozen=True, eq=False)
class Selection:
    """Which weights are trained: sorted flat row-major positions in each tensor.

    Attributes
    ----------
    indices
        ``{name: positions}``, int64 on CPU, strictly increasing; a tensor without a selected weight
        has no entry.
    shapes
        ``{name: shape}`` of every candidate tensor, in model order.
    method
        How it was made, for the reader of a file: ``"FISH"``.
    """

    indices: dict[str, Tensor]
    shapes: dict[str, tuple[int, ...]]
    method: str = ""

    def __post_init__(self) -> None:
        for name, at in self.indices.items():
            if name not in self.shapes:
                remedy = "shapes must hold every candidate tensor"
                raise ValueError(f"indices names {name!r}, which has no shape; {remedy}")
            what, size = f"indices[{name!r}] must be", prod(self.shapes[name])
            if at.dtype != torch.int64 or at.dim() != 1 or at.device.type != "cpu":
                raise ValueError(f"{what} a one-dimensional int64 tensor on CPU")
            if len(at) == 0 or at[0] < 0 or at[-1] >= size or (at.diff() <= 0).any():
                raise ValueError(f"{what} strictly increasing, within [0, {size}), and not empty")

    @property
    def count(self) -> int:
        """k, the number of selected weights."""
        return sum(len(positions) for positions in self.indices.values())

    @property
    def total(self) -> int:
        """N, the number of candidate weights."""
        return sum(prod(shape) for shape in self.shapes.values())

    @property
    def fraction(self) -> float:
        """k / N."""
        return self.count / self.total

    def per_tensor(self) -> Counter[str]:
        """How many weights are selected in every candidate tensor, zeros included; 0 elsewhere."""
        return Counter({name: len(self.indices.get(name, ())) for name in self.shapes})

    def masks(self) -> dict[str, Tensor]:
        """The same selection as boolean tensors in the weights' shapes, on CPU."""
        found = {n: torch.zeros(s, dtype=torch.bool, device="cpu") for n, s in self.shapes.items()}
        for name, positions in self.indices.items():
            found[name].view(-1)[positions] = True
        return found

    def save(self, path: str | os.PathLike) -> None:
        """Write the selection as safetensors: int32 positions (int64 where they need it).

        Examples
        --------
        >>> selection.save("fish.selection.safetensors")
        >>> again = Selection.load("fish.selection.safetensors")
        """
        small = {name for name, shape in self.shapes.items() if prod(shape) < 2**31}
        tensors = {name: at.int() if name in small else at for name, at in self.indices.items()}
        described = {"method": self.method, "shapes": self.shapes}
        save_file(tensors, path, {SAVED: json.dumps(described)})

    @classmethod
    def load(cls, path: str | os.PathLike) -> Selection:
        """Read what `save` wrote.

        Raises
        ------
        ValueError
            If the file holds something else, or is damaged.
        """
        try:
            with safe_open(path, "pt") as file:
                described = json.loads((file.metadata() or {})[SAVED])
                found = {name: file.get_tensor(name).long() for name in file.keys()}  # noqa: SIM118
            shapes = {name: tuple(shape) for name, shape in described["shapes"].items()}
            ordered = {name: found.pop(name) for name in shapes if name in found}
            return cls({**ordered, **found}, shapes, described["method"])
        except (SafetensorError, KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path} does not hold a selection: {error}") from None

    def overlap(self, other: Selection) -> float:
        """Shared weights over the smaller count, in [0, 1]; random ones share about a fraction."""
        both = [(at, other.indices[n]) for n, at in self.indices.items() if n in other.indices]
        shared = sum(int(torch.isin(a, b, assume_unique=True).sum()) for a, b in both)
        return shared / min(self.count, other.count)


def select(
    scores: Mapping[str, Tensor], budget: Budget, *, largest: bool = True, of: int | None = None
) -> Selection:
    """The k weights with the largest (or smallest) scores: exactly k.

    Ties are broken by the order of the tensors, then by position.

    Two passes of 16 bits over the scores' bit patterns find the k-th score (a radix selection), a
    third takes what is above it: linear time, and no second copy of the scores.

    Parameters
    ----------
    scores
        ``{name: tensor}``, floating point, any device. A mapping may also make its tensors when
        they are asked for, from files or from a seed: each is made once a pass, three times (six
        where a score is float64), and none is held while the next is made.
    budget
        A count (int) or a fraction of `of` (float in (0, 1]); see `resolve_budget`.
    largest
        Take the largest scores; ``False`` takes the smallest.
    of
        What a fraction refers to, where the scores cover only a part of the model; default: the
        number of scores.

    Returns
    -------
    Selection

    Raises
    ------
    TypeError, ValueError
        For a bad budget, an empty mapping, non-floating, non-finite or all-zero scores, fewer than
        k non-zero scores where the largest are wanted (zeros would be selected by position alone),
        or scores that change between passes.
    """
    if not scores:
        raise ValueError("scores is empty; give one tensor of scores for every candidate tensor")
    wide, shapes, nonzero, histogram = _survey(scores, largest)
    total = sum(map(prod, shapes.values()))
    k = resolve_budget(budget, total if of is None else of)
    if k > (n := nonzero if largest else total):
        what = "non-zero" if largest else "there"
        asks = f"budget={budget} asks for {k} weights"
        raise ValueError(f"{asks}, but only {n} scores are {what}; lower it")

    cutoff, ties = _kth_key(scores, largest, wide, k, histogram)
    # Preallocated: small results would fragment the memory that chunks free.
    found = torch.empty(k, dtype=torch.int64, device="cpu")
    taken, counts = 0, dict.fromkeys(shapes, 0)
    for name, _, start, key in sort_keys(scores, largest, wide):
        positions = (key >= cutoff).nonzero().squeeze(1)
        tied = key[positions] == cutoff
        positions = positions[~tied | (tied.cumsum(0) <= ties)]
        room = found[taken : taken + len(positions)]
        room.copy_(start + positions[: len(room)])
        taken, counts[name] = taken + len(positions), counts[name] + len(positions)
        ties -= int(tied.sum())
    if taken != k:
        what = f"{taken} of them, not {k}, were found"
        raise ValueError(f"scores changed from one pass to the next: {what}")
    pieces = zip(shapes, found.split([*counts.values()]), strict=True)
    return Selection({name: positions for name, positions in pieces if len(positions)}, shapes)


Named = Mapping[str, Tensor]
Keys = Iterator[tuple[str, tuple[int, ...], int, Tensor]]


def sort_keys(scores: Named, largest: bool, wide: bool) -> Keys:
    """Go through the scores in chunks, as integers of the same order.

    Parameters
    ----------
    scores
        ``{name: tensor}``, floating point, any device. None is held while the next is made.
    largest
        Whether the largest score has the largest key, or the smallest.
    wide
        Whether every key is int64. If not, only a float64 tensor's are, which cannot be compared
        with the others.

    Yields
    ------
    tuple
        (tensor name, its shape, first flat position, keys), in the order of the scores, at least
        one a tensor; keys are on CPU, int32 or int64. Scores are equal if and only if their keys
        are; the key of zero is 0.
    """
    for name in scores:  # not items(), which would hold a tensor while the next is made
        score = scores[name]
        if not score.is_floating_point() or score.is_meta:
            what = f"scores[{name!r}] has dtype {score.dtype} on {score.device}"
            raise ValueError(f"{what}; give floats with values")
        double, single = (torch.float64, torch.int64, 63), (torch.float32, torch.int32, 31)
        as_float, as_int, sign = double if wide or score.dtype == torch.float64 else single
        flat, shape = score.detach().reshape(-1), tuple(score.shape)
        for start in range(0, max(flat.numel(), 1), CHUNK):
            chunk = flat[start : start + CHUNK].cpu().to(as_float)
            # The sum makes -0.0 and 0.0 one score; a negative float's magnitude bits count
            # downwards.
            bits = (0.0 + chunk if largest else 0.0 - chunk).view(as_int)
            yield name, shape, start, bits ^ ((bits >> sign) & ((1 << sign) - 1))
        del score, flat, chunk


def histogram_of(key: Tensor, shift: int, prefix: int = 0) -> Tensor:
    """How many keys have each value of the 16 bits from `shift` on, the lowest value first.

    Of the keys whose higher bits are `prefix` only, unless these are the highest ones: then the
    sign is among them, and negative keys come first.
    """
    if shift == torch.iinfo(key.dtype).bits - 16:
        digit = (key >> shift) + BUCKETS // 2
    else:
        digit = (key[(key >> (shift + 16)) == prefix] >> shift) & (BUCKETS - 1)
    return torch.bincount(digit, minlength=BUCKETS)


def _survey(scores: Named, largest: bool, wide: bool = False) -> tuple[bool, dict, int, Tensor]:
    """The first pass over the scores.

    Whether any tensor is float64, every shape, the number of non-zero scores, and a histogram of
    the keys' top 16 bits.
    """
    shapes, nonzero, histogram = {}, 0, torch.zeros(BUCKETS, dtype=torch.int64, device="cpu")
    # This many buckets at each end can only hold inf or NaN.
    shift, edge = (48, 16) if wide else (16, 128)
    for name, shape, _, key in sort_keys(scores, largest, wide):
        if key.dtype == torch.int64 and not wide:
            break
        counts = histogram_of(key, shift)
        if counts[:edge].any() or counts[-edge:].any():
            raise ValueError(NOT_FINITE.format(name))
        shapes[name], nonzero = shape, nonzero + int(key.count_nonzero())
        histogram += counts
    else:
        if nonzero == 0:
            raise ValueError(ALL_ZERO)
        return wide, shapes, nonzero, histogram
    return _survey(scores, largest, wide=True)  # behind the loop, which holds a tensor


def _kth_key(scores: Named, largest: bool, wide: bool, k: int, counts: Tensor) -> tuple[int, int]:
    """The k-th largest key, and how many of the keys equal to it are among the k."""
    prefix, top = 0, 48 if wide else 16
    for shift in range(top, -1, -16):
        if shift < top:
            counts = torch.zeros_like(counts)
            for *_, key in sort_keys(scores, largest, wide):
                counts += histogram_of(key, shift, prefix)
        above = counts.flip(0).cumsum(0)
        passed = int((above < k).sum())
        k -= int(above[passed] - counts[-1 - passed])
        prefix = (prefix << 16) + BUCKETS - 1 - passed - (BUCKETS // 2 if shift == top else 0)
    return prefix, k
