"""Batches: passes over a split, in a fixed order or a seeded one."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sized

from torch import Tensor


class Batches(ABC):
    """Dictionaries of tensors, `size` examples each, except the last.

    Parameters
    ----------
    split
        The examples.
    size
        Number of examples in a batch, at least 1.
    seed
        Seed of the order, which differs at every pass (training); None keeps the order of the split
        (evaluation).

    Raises
    ------
    ValueError
        If `size` is below 1.
    """

    def __init__(self, split: Sized, size: int, seed: int | None) -> None:
        if size < 1:
            raise ValueError(f"batch_size={size} must be at least 1")
        self.split, self.size = split, size
        self.order = None if seed is None else random.Random(seed)

    def __len__(self) -> int:
        return -(-len(self.split) // self.size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (self.batch(group) for group in self.indices())

    def indices(self) -> list[list[int]]:
        """The examples of each batch of one pass; with a seed, of the next pass."""
        examples = list(range(len(self.split)))
        if self.order:
            self.order.shuffle(examples)
        return self.groups(examples)

    def groups(self, examples: list[int]) -> list[list[int]]:
        """Examples, in the order of a pass, as batches."""
        return [examples[i : i + self.size] for i in range(0, len(examples), self.size)]

    @abstractmethod
    def batch(self, group: list[int]) -> dict[str, Tensor]:
        """The tensors of these examples."""
