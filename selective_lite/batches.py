"""Batches: their samples, their device, and the loss of a model on them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .params import device_of

Batch = Any  # a mapping of tensors, or a tuple or list of them
Loss = Callable[[nn.Module, Any], Tensor]
IGNORED = -100  # the label that torch's and transformers' losses leave out


def model_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The mean loss that a Hugging Face model computes itself, a scalar: ``model(**batch).loss``.

    Raises
    ------
    TypeError
        If the batch is not a mapping.
    ValueError
        If the model returns no loss, as without labels.
    """
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"batches holds a {type(batch).__name__}, and model(**batch) takes mappings; give "
            "loss=, a function of model and batch"
        )
    loss = getattr(model(**batch), "loss", None)
    if loss is None:
        raise ValueError(
            f"model returned no loss for a batch with {list(batch)}; add 'labels' to the batches, "
            "or give loss=, a function of model and batch"
        )
    return loss


def check_loss(loss: Tensor, batch: Batch, where: str) -> None:
    """Raise a `ValueError` that names the likely cause if a loss is not finite."""
    if torch.isfinite(loss).all():
        return
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if torch.is_tensor(labels) and bool((labels == IGNORED).all()):
        raise ValueError(
            f"loss is {loss.item()} {where}: every label of this batch is {IGNORED}, so that no "
            "token counts (a prompt that was cut before its answer?); leave such samples out"
        )
    raise ValueError(f"loss is {loss.item()} {where}; lower the learning rate, or check this batch")


def to_device(batch: Batch, model: nn.Module) -> Batch:
    """A batch with its tensors on the model's device; as it is if the model is on several."""
    device = device_of(model)
    if device is None or device.type == "meta":
        return batch
    return _each(batch, lambda value: value.to(device) if torch.is_tensor(value) else value)


def batch_size(batch: Batch) -> int:
    """The number of samples in a batch: the first dimension of its tensors.

    Raises
    ------
    TypeError
        If it is not a mapping, tuple or list.
    ValueError
        If a tensor's first dimension is not the sample, or there is no tensor.
    """
    items = batch.items() if isinstance(batch, Mapping) else enumerate(_sequence(batch))
    sizes = {key: len(value) for key, value in items if torch.is_tensor(value) and value.dim()}
    if not sizes:
        raise ValueError(f"batch holds no tensor with a sample dimension, only {_kinds(batch)}")
    size = sizes.get("labels") or Counter(sizes.values()).most_common(1)[0][0]
    for key, own in sizes.items():
        if own != size:
            raise ValueError(
                f"batch[{key!r}] has {own} in its first dimension, where the others have {size} "
                "samples; give it a sample dimension (expand it), or score with reduction='batch'"
            )
    return size


def take(batch: Batch, start: int, stop: int) -> Batch:
    """The samples from `start` to `stop` of a batch; what has no sample dimension is kept."""
    size = batch_size(batch)

    def part(value: Any) -> Any:
        if torch.is_tensor(value):
            return value[start:stop] if value.dim() else value
        return value[start:stop] if isinstance(value, list) and len(value) == size else value

    return _each(batch, part)


def samples_of(batch: Batch) -> Iterator[Batch]:
    """The samples of a batch, one by one, each as a batch."""
    return (take(batch, i, i + 1) for i in range(batch_size(batch)))


def _each(batch: Batch, function: Callable[[Any], Any]) -> Batch:
    if isinstance(batch, Mapping):
        return {key: function(value) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        parts = [function(value) for value in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return function(batch)


def _sequence(batch: Batch) -> Any:
    if not isinstance(batch, (tuple, list)):
        raise TypeError(
            f"batches holds a {type(batch).__name__}; per-sample scores take mappings, tuples or "
            "lists of tensors"
        )
    return batch


def _kinds(batch: Batch) -> list[str]:
    values = batch.values() if isinstance(batch, Mapping) else batch
    return sorted({type(value).__name__ for value in values})
