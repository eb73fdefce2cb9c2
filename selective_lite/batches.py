"""Batches: their samples, their device, and the loss of a model on them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Batch = Any  # a mapping of tensors, or a tuple or list of them
Batches = Iterable[Batch]
Loss = Callable[[nn.Module, Any], Tensor]
IGNORED = -100  # the label that torch's and transformers' losses leave out
OWN_LOSS = "give loss=, a function of model and batch"


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
        kind = type(batch).__name__
        raise TypeError(f"batches holds a {kind}, and model(**batch) takes mappings; {OWN_LOSS}")
    loss = getattr(model(**batch), "loss", None)
    if loss is None:
        lack = f"model returned no loss for a batch with {list(batch)}"
        raise ValueError(f"{lack}; add 'labels' to the batches, or {OWN_LOSS}")
    return loss


def check_loss(loss: Any, batch: Batch, where: str) -> None:
    """Raise an error that names the likely cause unless a loss is one finite number to train on."""
    tensor = torch.is_tensor(loss)
    if not tensor or loss.numel() != 1:
        got = f"of shape {tuple(loss.shape)}" if tensor else f"a {type(loss).__name__}"
        raise TypeError(f"loss is {got} {where}; it must be a tensor of one number, the mean")
    if not loss.requires_grad:
        why = "it was detached, or no trained weight is in it"
        raise ValueError(f"loss has no gradient {where}: {why}")
    if torch.isfinite(loss):
        return
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    why = "; lower the learning rate, or check this batch"
    if torch.is_tensor(labels) and bool((labels == IGNORED).all()):
        why = f": every label of this batch is {IGNORED} (no room for an answer?); leave it out"
    raise ValueError(f"loss is {loss.item()} {where}{why}")


def to_device(batch: Batch, model: nn.Module) -> Batch:
    """A batch with its tensors on the model's device; as it is if the model is on several."""
    devices = {p.device for p in model.parameters()}
    if len(devices) != 1 or (device := devices.pop()).type == "meta":
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
    if not isinstance(batch, (Mapping, tuple, list)):
        kind = type(batch).__name__
        raise TypeError(f"batches holds a {kind}; per-sample scores take mappings, tuples or lists")
    items = dict(batch if isinstance(batch, Mapping) else enumerate(batch))
    sizes = {k: len(value) for k, value in items.items() if torch.is_tensor(value) and value.dim()}
    if not sizes:
        kinds = sorted({type(value).__name__ for value in items.values()})
        raise ValueError(f"batch holds no tensor with a sample dimension, only {kinds}")
    size = sizes.get("labels") or Counter(sizes.values()).most_common(1)[0][0]
    for key, own in sizes.items():
        if own != size:
            what = f"batch[{key!r}] has {own} in its first dimension, others have {size} samples"
            raise ValueError(f"{what}; expand it to one a sample, or score with reduction='batch'")
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


def tensors_of(batch: Batch) -> list[Tensor] | None:
    """The tensors of a batch that have samples; None if a list has samples, too."""
    size, found = batch_size(batch), list[Any]()
    _each(batch, found.append)
    if any(isinstance(value, list) and len(value) == size for value in found):
        return None
    return [value for value in found if torch.is_tensor(value) and value.dim()]


def with_tensors(batch: Batch, tensors: Iterable[Tensor]) -> Batch:
    """A batch with others in the places of its `tensors_of`."""
    left = iter(tensors)
    return _each(batch, lambda own: next(left) if torch.is_tensor(own) and own.dim() else own)


def _each(batch: Batch, function: Callable[[Any], Any]) -> Batch:
    if isinstance(batch, Mapping):
        return {key: function(value) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        parts = [function(value) for value in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return function(batch)
