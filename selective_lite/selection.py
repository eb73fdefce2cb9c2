"""Select: from scores and a budget to exactly k flat positions, a pure function of the scores."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .params import resolve_budget, weights
from .scores import ALL_ZERO, NOT_FINITE, check_scores, random_scores

CHUNK = 1 << 18  # scores per chunk; bounds the extra memory of `select`
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
        for name, positions in self.indices.items():
            if name not in self.shapes:
                raise ValueError(
                    f"indices names {name!r}, which has no shape; shapes must hold every candidate tensor"
                )
            size = prod(self.shapes[name])
            if (
                positions.dtype != torch.int64
                or positions.dim() != 1
                or positions.device.type != "cpu"
            ):
                raise ValueError(f"indices[{name!r}] must be a one-dimensional int64 tensor on CPU")
            if (
                len(positions) == 0
                or positions[0] < 0
                or positions[-1] >= size
                or (positions.diff() <= 0).any()
            ):
                raise ValueError(
                    f"indices[{name!r}] must be strictly increasing, within [0, {size}), and not empty"
                )

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
        found = {
            name: torch.zeros(shape, dtype=torch.bool, device="cpu")
            for name, shape in self.shapes.items()
        }
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
        narrow = {
            n: i.int() if prod(self.shapes[n]) < 2**31 else i for n, i in self.indices.items()
        }
        described = {"method": self.method, "shapes": self.shapes}
        save_file(narrow, path, {SAVED: json.dumps(described)})

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
        """Shared weights over the smaller count, in [0, 1]; two random selections share about ``other.fraction``."""
        both = self.indices.keys() & other.indices.keys()
        shared = sum(
            int(torch.isin(self.indices[n], other.indices[n], assume_unique=True).sum())
            for n in both
        )
        return shared / min(self.count, other.count)


def select(
    scores: Mapping[str, Tensor],
    budget: int | float,
    *,
    largest: bool = True,
    of: int | None = None,
) -> Selection:
    """The k weights with the largest (or smallest) scores, exactly k, ties broken by tensor order, then position.

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
        raise ValueError(
            f"budget={budget} asks for {k} weights, but only {n} scores are {what}; lower it"
        )

    cutoff, ties = _kth_key(scores, largest, wide, k, histogram)
    found = torch.empty(
        k, dtype=torch.int64, device="cpu"
    )  # preallocated: small results would fragment the memory that chunks free
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
        raise ValueError(
            f"scores changed from one pass to the next: {taken} of them, not {k}, were found"
        )
    pieces = zip(shapes, found.split([*counts.values()]), strict=True)
    return Selection({name: positions for name, positions in pieces if len(positions)}, shapes)


Keys = Iterator[tuple[str, tuple[int, ...], int, Tensor]]


def sort_keys(scores: Mapping[str, Tensor], largest: bool, wide: bool) -> Keys:
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
            raise ValueError(
                f"scores[{name!r}] has dtype {score.dtype} on {score.device}; give floats with values"
            )
        long = wide or score.dtype == torch.float64
        as_float, as_int, sign = (
            (torch.float64, torch.int64, 63) if long else (torch.float32, torch.int32, 31)
        )
        flat, shape = score.detach().reshape(-1), tuple(score.shape)
        for start in range(0, max(flat.numel(), 1), CHUNK):
            chunk = flat[start : start + CHUNK].cpu().to(as_float)
            # The sum makes -0.0 and 0.0 one score; a negative float's magnitude bits count
            # downwards.
            bits = (0.0 + chunk if largest else 0.0 - chunk).view(as_int)
            yield name, shape, start, bits ^ ((bits >> sign) & ((1 << sign) - 1))
        del score, flat, chunk


def _survey(
    scores: Mapping[str, Tensor], largest: bool, wide: bool = False
) -> tuple[bool, dict, int, Tensor]:
    """The first pass over the scores.

    Whether any tensor is float64, every shape, the number of non-zero scores, and a histogram of
    the keys' top 16 bits.
    """
    shapes, nonzero, histogram = {}, 0, torch.zeros(1 << 16, dtype=torch.int64, device="cpu")
    bits, edge = (
        (64, 16) if wide else (32, 128)
    )  # this many buckets at each end can only hold inf or NaN
    for name, shape, _, key in sort_keys(scores, largest, wide):
        if key.dtype == torch.int64 and not wide:
            break
        counts = torch.bincount(
            (key >> (bits - 16)) + (1 << 15), minlength=1 << 16
        )  # negative keys come first
        if counts[:edge].any() or counts[-edge:].any():
            raise ValueError(NOT_FINITE.format(name))
        shapes[name], nonzero, histogram = (
            shape,
            nonzero + int(key.count_nonzero()),
            histogram + counts,
        )
    else:
        if nonzero == 0:
            raise ValueError(ALL_ZERO)
        return wide, shapes, nonzero, histogram
    return _survey(scores, largest, wide=True)


def _kth_key(
    scores: Mapping[str, Tensor], largest: bool, wide: bool, k: int, histogram: Tensor
) -> tuple[int, int]:
    """The k-th largest key, and how many of the keys equal to it are among the k."""
    bits, prefix, wanted, first = 64 if wide else 32, 0, k, -(1 << 15)
    for shift in range(bits - 16, -1, -16):
        if shift < bits - 16:
            histogram, first = torch.zeros_like(histogram), 0
            for *_, key in sort_keys(scores, largest, wide):
                digit = (key[(key >> (shift + 16)) == prefix] >> shift) & 0xFFFF
                histogram += torch.bincount(digit, minlength=1 << 16)
        above = histogram.flip(0).cumsum(0)
        passed = int((above < wanted).sum())
        wanted -= int(above[passed] - histogram[-1 - passed])
        prefix = (prefix << 16) + first + (1 << 16) - 1 - passed
    return prefix, wanted


def random(
    model: nn.Module, budget: int | float, seed: int, head: Sequence[str] | None = None
) -> Selection:
    """The control: k weights, uniform over all candidates.

    Arguments and errors as in `select` and `weights`; the draw is a function of `seed` and of the
    candidates' shapes only.

    Examples
    --------
    >>> selection = random(model, 0.005, seed=0)
    """
    return replace(select(random_scores(model, seed, head), budget), method="random")


def random_nonzero(scores: Mapping[str, Tensor], budget: int | float, seed: int) -> Selection:
    """The control: uniform random among the weights whose score is not zero (a BERT embeds few of its words).

    Arguments and errors as in `select`; the draw is a function of `seed` and of where the scores
    are zero.
    """
    check_scores(scores)
    generator = torch.Generator().manual_seed(seed)
    draws = {
        name: (1 - torch.rand(score.shape, generator=generator, dtype=torch.float32, device="cpu"))
        * (score != 0).cpu()
        for name, score in scores.items()
    }
    return select(draws, budget)


def shuffled(selection: Selection, seed: int) -> Selection:
    """The control: as many weights in every tensor as `selection` has, at random positions.

    It separates *which tensor* from *which entry*.
    """
    generator = torch.Generator().manual_seed(seed)
    indices = {}
    for name, positions in selection.indices.items():
        drawn = torch.randperm(prod(selection.shapes[name]), generator=generator, device="cpu")
        indices[name] = drawn[: len(positions)].sort().values
    return Selection(indices, dict(selection.shapes))


def select_tensors(
    model: nn.Module,
    predicate: Callable[[str, nn.Parameter], bool],
    head: Sequence[str] | None = None,
) -> Selection:
    """Every weight of every candidate tensor for which `predicate(name, parameter)` holds; a rule sizes itself.

    Raises
    ------
    ValueError
        If no tensor satisfies the rule.
    """
    candidates = weights(model, head)
    indices = {
        name: torch.arange(p.numel(), device="cpu")
        for name, p in candidates.items()
        if predicate(name, p)
    }
    if not indices:
        raise ValueError(
            "predicate holds for no candidate tensor; print(list(weights(model))) shows their names"
        )
    return Selection(indices, {name: tuple(p.shape) for name, p in candidates.items()})
