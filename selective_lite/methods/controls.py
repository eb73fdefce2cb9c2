"""Controls: random selections, which whatever is said of a score must be measured against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from math import prod

import torch
from torch import Tensor
from torch.nn import Module

from ..heads import Head
from ..params import Budget, weights
from ..scores import Scores, check_scores
from ..selection import Selection, select


def random_scores(model: Module, seed: int, head: Head = None) -> Scores:
    """The control: uniform random scores in (0, 1), float32 on CPU.

    They are a function of `seed` and of the candidates' shapes only.
    """
    return uniform(weights(model, head), seed)


def uniform(tensors: Mapping[str, Tensor], seed: int) -> Scores:
    """Random numbers in (0, 1] in the tensors' shapes: a score of 0 would never be selected."""
    draw = partial(torch.rand, generator=torch.Generator().manual_seed(seed), device="cpu")
    return {n: 1 - draw(t.shape, dtype=torch.float32) for n, t in tensors.items()}


def random(model: Module, budget: Budget, seed: int, head: Head = None) -> Selection:
    """The control: k weights, uniform over all candidates.

    Arguments and errors as in `select` and `weights`; the draw is a function of `seed` and of the
    candidates' shapes only.

    Examples
    --------
    >>> selection = random(model, 0.005, seed=0)
    """
    return replace(select(random_scores(model, seed, head), budget), method="random")


def random_nonzero(scores: Mapping[str, Tensor], budget: Budget, seed: int) -> Selection:
    """The control: uniform random among the weights whose score is not zero.

    A BERT embeds few of its words, for one. Arguments and errors as in `select`; the draw is a
    function of `seed` and of where the scores are zero.
    """
    check_scores(scores)
    draws = uniform(scores, seed)
    return select({name: u * (scores[name] != 0).cpu() for name, u in draws.items()}, budget)


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
