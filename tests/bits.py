"""What a model holds, bit by bit: to tell that nothing of it has changed."""

import torch

import selective_lite as sl
from selective_lite.ship.file import bits


def state(model):
    """The bits of every parameter and persistent buffer, by name."""
    return {name: bits(t.cpu()).clone() for name, t in sl.snapshot(model).items()}


def same(one, other):
    """Whether two states have the same names and bits."""
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)
