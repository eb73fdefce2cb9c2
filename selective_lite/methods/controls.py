"""Controls: random selections, which whatever is said of a score must be measured against."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from math import prod

import torch
from torch import Tensor
from torch.nn import Module

from ..heads import Head
from ..params import Budget, weights
from ..scores import Scores, check_scores
from ..selection import Selection, select


class Uniform(Mapping):
    """Random numbers in (0, 1] in the tensors' shapes: a score of 0 would never be selected.

    Each tensor, float32 on CPU, is drawn when it is asked for, as `select` does pass by pass, so
    that no second copy of a model's size is held. What is drawn is a function of `seed` and of the
    shapes only.
    """

    def __init__(self, tensors: Mapping[str, Tensor], seed: int) -> None:
        self._shapes = {name: tensor.shape for name, tensor in tensors.items()}
        self._after = dict(pairwise(self._shapes))
        self._states = {}  # of the generator, before a tensor is drawn
        for name in [*self._shapes][:1]:
            self._states[name] = torch.Generator().manual_seed(seed).get_state()

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._shapes:
            raise KeyError(name)
        while name not in self._states:  # what is drawn before it moves the generator on
            self[[*self._states][-1]]
        generator = torch.Generator()
        generator.set_state(self._states[name])
        shape = self._shapes[name]
        drawn = torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu")
        if name in self._after:
            self._states.setdefault(self._after[name], generator.get_state())
        return drawn.neg_().add_(1)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def random_scores(model: Module, seed: int, head: Head = None) -> Scores:
    """The control: uniform random scores in (0, 1], float32 on CPU.

    They are a function of `seed` and of the candidates' shapes only.
    """
    return dict(Uniform(weights(model, head), seed))


def random(model: Module, budget: Budget, seed: int, head: Head = None) -> Selection:
    """The control: k weights, uniform over all candidates.

    Arguments and errors as in `select` and `weights`; the draw is a function of `seed` and of the
    candidates' shapes only.

    Examples
    --------
    >>> selection = random(model, 0.005, seed=0)
    """
    return replace(select(Uniform(weights(model, head), seed), budget), method="random")


def random_nonzero(scores: Mapping[str, Tensor], budget: Budget, seed: int) -> Selection:
    """The control: uniform random among the weights whose score is not zero.

    A BERT embeds few of its words, for one. Arguments and errors as in `select`; the draw is a
    function of `seed` and of where the scores are zero.
    """
    check_scores(scores)
    draws = Uniform(scores, seed)
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
