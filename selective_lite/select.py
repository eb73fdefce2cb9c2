"""Select: from scores and a budget to exactly k flat positions, a pure function of the scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from .params import resolve_budget, weights
from .scores import check_scores

CHUNK = 1 << 20  # scores looked at together: what selecting holds beside the scores and the result


@dataclass(frozen=True, eq=False)
class Selection:
    """Which weights are trained: sorted flat row-major positions in each tensor.

    Attributes
    ----------
    indices
        ``{name: positions}``, int64 on CPU, strictly increasing; a tensor without a selected weight has no entry.
    shapes
        ``{name: shape}`` of every candidate tensor, in model order.
    """

    indices: dict[str, Tensor]
    shapes: dict[str, tuple[int, ...]]

    def __post_init__(self) -> None:
        for name, positions in self.indices.items():
            if name not in self.shapes:
                raise ValueError(f"indices names {name!r}, which has no shape; shapes must hold every candidate tensor")
            size = prod(self.shapes[name])
            if positions.dtype != torch.int64 or positions.dim() != 1 or positions.device.type != "cpu":
                raise ValueError(f"indices[{name!r}] must be a one-dimensional int64 tensor on CPU")
            if len(positions) == 0 or positions[0] < 0 or positions[-1] >= size or (positions.diff() <= 0).any():
                raise ValueError(f"indices[{name!r}] must be strictly increasing, within [0, {size}), and not empty")

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

    def per_tensor(self) -> dict[str, int]:
        """How many weights are selected in every candidate tensor, zeros included."""
        return {name: len(self.indices.get(name, ())) for name in self.shapes}

    def masks(self) -> dict[str, Tensor]:
        """The same selection as boolean tensors in the weights' shapes, on CPU."""
        found = {name: torch.zeros(shape, dtype=torch.bool, device="cpu") for name, shape in self.shapes.items()}
        for name, positions in self.indices.items():
            found[name].view(-1)[positions] = True
        return found

    def overlap(self, other: Selection) -> float:
        """Shared weights over the smaller count, in [0, 1]; two random selections share about ``other.fraction``."""
        shared = sum(
            int(torch.isin(positions, other.indices[name], assume_unique=True).sum())
            for name, positions in self.indices.items()
            if name in other.indices
        )
        return shared / min(self.count, other.count)


def select(
    scores: Mapping[str, Tensor], budget: int | float, *, largest: bool = True, of: int | None = None
) -> Selection:
    """The k weights with the largest (or smallest) scores, exactly k, ties broken by tensor order, then position.

    Two passes of 16 bits over the scores' bit patterns find the k-th score (a radix selection): linear time, and no
    second copy of the scores.

    Parameters
    ----------
    scores
        ``{name: tensor}``, floating point, any device.
    budget
        A count (int) or a fraction of `of` (float in (0, 1]); see `resolve_budget`.
    largest
        Take the largest scores; ``False`` takes the smallest.
    of
        What a fraction refers to, where the scores cover only a part of the model; default: the number of scores.

    Returns
    -------
    Selection

    Raises
    ------
    TypeError, ValueError
        For a bad budget, an empty mapping, non-floating or non-finite scores, or fewer than k non-zero scores where
        the largest are wanted (zeros would be selected by position alone).
    """
    if not scores:
        raise ValueError("scores is empty; give one tensor of scores for every candidate tensor")
    for name, score in scores.items():
        if not score.is_floating_point() or score.is_meta:
            raise ValueError(f"scores[{name!r}] has dtype {score.dtype} on {score.device}; give floats with values")
    total = sum(score.numel() for score in scores.values())
    k = resolve_budget(budget, total if of is None else of)
    if k > total:
        raise ValueError(f"budget={budget} asks for {k} weights, but scores holds only {total}")
    check_scores(scores)
    if largest:
        nonzero = sum(int(score.count_nonzero()) for score in scores.values())
        if nonzero < k:
            raise ValueError(f"budget={budget} asks for {k} weights, but only {nonzero} scores are non-zero; lower it")

    keys = sort_keys(scores, largest)
    cutoff, ties = _kth_key(keys, k, bits=64 if any(s.dtype == torch.float64 for s in scores.values()) else 32)
    indices: dict[str, list[Tensor]] = {}
    for name, start, key in keys():
        chosen = key > cutoff
        tied = (key == cutoff).nonzero().squeeze(1)[:ties]
        chosen[tied] = True
        ties -= len(tied)
        positions = chosen.nonzero().squeeze(1)
        if len(positions):
            indices.setdefault(name, []).append(positions + start)
    shapes = {name: tuple(score.shape) for name, score in scores.items()}
    return Selection({name: torch.cat(parts) for name, parts in indices.items()}, shapes)


Keys = Callable[[], Iterator[tuple[str, int, Tensor]]]


def sort_keys(scores: Mapping[str, Tensor], largest: bool) -> Keys:
    """Scores as integers of the same order: a function that goes through them in chunks, as often as it is called.

    Parameters
    ----------
    scores
        ``{name: tensor}``, floating point, any device.
    largest
        Whether the largest score has the largest key, or the smallest.

    Returns
    -------
    callable
        ``() -> iterator`` over (tensor name, first flat position, keys), in the order of the scores; keys are on CPU,
        int32, or int64 where a score is float64. Scores are equal if and only if their keys are.
    """
    wide = any(score.dtype == torch.float64 for score in scores.values())
    as_float, as_int, low = (
        (torch.float64, torch.int64, (1 << 63) - 1) if wide else (torch.float32, torch.int32, (1 << 31) - 1)
    )

    def chunks() -> Iterator[tuple[str, int, Tensor]]:
        for name, score in scores.items():
            flat = score.detach().reshape(-1)
            for start in range(0, flat.numel(), CHUNK):
                # + 0.0 makes -0.0 and 0.0 one score; a negative float's magnitude bits count downwards.
                bits = (flat[start : start + CHUNK].cpu().to(as_float) + 0.0).view(as_int)
                key = torch.where(bits < 0, bits ^ low, bits)
                yield name, start, key if largest else ~key

    return chunks


def _kth_key(keys: Keys, k: int, bits: int) -> tuple[int, int]:
    """The k-th largest key, and how many of the keys equal to it are among the k."""
    prefix, wanted = 0, k
    for shift in range(bits - 16, -1, -16):
        histogram = torch.zeros(1 << 16, dtype=torch.int64, device="cpu")
        for _, _, key in keys():
            if shift == bits - 16:
                digit = (key >> shift) + (1 << 15)  # the sign bit: negative keys come first
            else:
                digit = (key[(key >> (shift + 16)) == prefix] >> shift) & 0xFFFF
            histogram += torch.bincount(digit, minlength=1 << 16)
        above = histogram.flip(0).cumsum(0)
        bucket = (1 << 16) - 1 - int((above < wanted).sum())
        wanted -= int(above[(1 << 16) - 1 - bucket] - histogram[bucket])
        prefix = bucket - (1 << 15) if shift == bits - 16 else (prefix << 16) | bucket
    return prefix, wanted


def random_nonzero(scores: Mapping[str, Tensor], budget: int | float, seed: int) -> Selection:
    """The control: uniform random among the weights whose score is not zero (a BERT embeds few of its words).

    Arguments and errors as in `select`; the draw is a function of `seed` and of where the scores are zero.
    """
    check_scores(scores)
    generator = torch.Generator().manual_seed(seed)
    draws = {
        name: (1 - torch.rand(score.shape, generator=generator, dtype=torch.float32, device="cpu")) * (score != 0).cpu()
        for name, score in scores.items()
    }
    return select(draws, budget)


def shuffled(selection: Selection, seed: int) -> Selection:
    """The control: as many weights in every tensor as `selection` has, at random positions.

    It separates *which tensor* from *which entry*.
    """
    generator = torch.Generator().manual_seed(seed)
    indices = {
        name: torch.randperm(prod(selection.shapes[name]), generator=generator, device="cpu")[: len(positions)]
        .sort()
        .values
        for name, positions in selection.indices.items()
    }
    return Selection(indices, dict(selection.shapes))


def rule(
    model: nn.Module, predicate: Callable[[str, nn.Parameter], bool], head: Sequence[str] | None = None
) -> Selection:
    """Every weight of every candidate tensor for which `predicate(name, parameter)` holds; a rule sizes itself.

    Raises
    ------
    ValueError
        If no tensor satisfies the rule.
    """
    candidates = weights(model, head)
    indices = {name: torch.arange(p.numel(), device="cpu") for name, p in candidates.items() if predicate(name, p)}
    if not indices:
        raise ValueError("predicate holds for no candidate tensor; print(list(weights(model))) shows their names")
    return Selection(indices, {name: tuple(p.shape) for name, p in candidates.items()})
