"""Ledger: the bytes of training by kind, measured and predicted; what selecting saves, or not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from .batches import Loss, model_loss
from .heads import Head, Names
from .kernels.sampled import index_dtype, precise
from .layers.entries import Entries, dense_of, entries_of
from .layers.masked import check_selection, footprint_of, gathers
from .params import in_masked_training, named_parameters, names_under, owners, preserve_modes
from .selection import Selection


def ledger(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, int]:
    """Bytes that a model and its optimizer hold now; call it after a step, before ``zero_grad``.

    Parameters
    ----------
    model
        In masked training or not.
    optimizer
        Whose state is counted.

    Returns
    -------
    dict
        Bytes by kind: ``weights`` (every unique parameter and buffer), ``gradients``, ``optimizer``
        (state tensors), ``index`` (positions of a selection), ``passing`` (dense gradients that
        every backward forms, and frees, to gather selected entries from them: of tensors that have
        no sampled gradients). Tensors that share storage count once. A forward's activations are
        not held between steps: `activation_bytes` counts them.
    """
    entries = [module for module in model.modules() if isinstance(module, Entries)]
    index = [buffer for module in entries for buffer in module.buffers()]
    ours = {id(buffer) for buffer in index}
    weights = [*model.parameters(), *(b for b in model.buffers() if id(b) not in ours)]
    places = owners(model).values()
    partly = [at for at in places if getattr(entries_of(*at[0]), "index", None) is not None]
    state = [] if optimizer is None else [t for s in optimizer.state.values() for t in s.values()]
    return {
        "weights": _bytes(weights),
        "gradients": _bytes(p.grad for p in model.parameters() if p.grad is not None),
        "optimizer": _bytes(state),
        "index": _bytes(index),
        "passing": _bytes(dense_of(*at[0]) for at in partly if gathers(at)),
    }


def predicted_ledger(
    model: nn.Module,
    selection: Selection | None = None,
    dense: Names = (),
    *,
    head: Head = None,
    beside: Iterable[Tensor] = (),
    optimizer: Callable[[Any], torch.optim.Optimizer] = torch.optim.AdamW,
) -> dict[str, int]:
    """What `ledger` will say after a step, to the byte, from shapes alone.

    Nothing is trained, and no memory is taken.

    Activations are not predicted: they follow from the batch and from what each layer's backward
    needs, not from the weights' shapes; `activation_bytes` measures them.

    Parameters
    ----------
    model
        An ordinary one; on the meta device too, so that a model that does not fit can be asked
        about.
    selection, dense, head
        As in `masked`; the head is trained with a selection only. Without the first two and with
        nothing beside, every floating-point weight is trained.
    beside
        Tensors that will be added and trained, such as a LoRA's or gates; only their shapes and
        dtypes count.
    optimizer
        Makes an optimizer of parameters, such as ``functools.partial(torch.optim.SGD,
        momentum=0.9)``. It takes one step on the meta device; ``fused=True``, which cannot, would
        change no byte.

    Returns
    -------
    dict
        Bytes by kind, as from `ledger`.

    Raises
    ------
    ValueError
        If the model is in masked training, or `selection` or `dense` do not fit it or each other
        (as in `masked`).
    """
    if in_masked_training(model):
        raise ValueError("model is in masked training: leave that first, or measure it with ledger")
    named, places = named_parameters(model), owners(model)
    indices = selection.indices if selection else {}
    also = names_under(dense, named, "dense")
    if selection is not None:
        also = [*chain(*check_selection(model, selection, dense, head))]
    sizes = {name: named[name].numel() for name in indices}
    partly = {n: at.to(index_dtype(sizes[n])) for n, at in indices.items() if len(at) < sizes[n]}
    parts = [footprint_of(index, named[name], places[name]) for name, index in partly.items()]
    added = [*beside, *(_like(named[n], (len(index),)) for n, index in partly.items())]
    whole = [*also, *(name for name in indices if name not in partly)]
    halves = {name for name in whole if named[name].element_size() < 4} if selection else set()
    added += [_like(named[name], named[name].shape) for name in whole if name in halves]
    if not added and not whole:
        whole = [name for name, p in named.items() if p.is_floating_point()]
    added_and_own = (*added, *(named[name] for name in whole if name not in halves))
    trained = [nn.Parameter(torch.empty_like(t, device="meta")) for t in added_and_own]
    for p in trained:
        p.grad = torch.empty_like(p)
    stepped = optimizer(trained)
    stepped.step()
    return {
        "weights": ledger(model)["weights"] + sum(t.nbytes for t in added),
        "gradients": sum(p.nbytes for p in trained),
        "optimizer": ledger(model, stepped)["optimizer"],
        "index": _bytes(chain(partly.values(), *parts)),
        "passing": sum(named[name].nbytes for name in partly if gathers(places[name])),
    }


def _like(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """A compact parameter or master of a tensor, on the meta device."""
    return torch.empty(*shape, dtype=precise(tensor), device="meta")


def activation_bytes(model: nn.Module, batch: Any, loss: Loss = model_loss) -> int:
    """Bytes that autograd keeps for the backward of one step, without the model and the batch.

    Selecting saves few of them: a layer's input is kept wherever one of its weights is trained
    (where these are few, only the features that they read), and most other layers need theirs for
    the gradient of what lies below. Copies of weights are counted: gates make one of every weight,
    autocast of matrices, masked training of vectors that are selected in part.

    Parameters
    ----------
    model
        Called once in training mode, as a step would; its modes are put back, its weights and
        gradients not touched.
    batch
        What `loss` takes; its tensors are not counted.
    loss
        ``(model, batch) -> scalar``.
    """
    kept: dict[int, Tensor] = {}
    keep = saved_tensors_hooks(lambda t: kept.setdefault(id(t), t), lambda t: t)
    with preserve_modes(model), torch.enable_grad(), keep:
        model.train()
        loss(model, batch)
    inputs = batch.values() if isinstance(batch, Mapping) else batch
    own = [*model.parameters(), *model.buffers(), *inputs]
    return _bytes([*kept.values(), *own]) - _bytes(own)


def _bytes(values: Iterable[Any]) -> int:
    # Storages are told apart by their address in C++, not by the data's, which is 0 on the meta
    # device.
    storages = (value.untyped_storage() for value in values if torch.is_tensor(value))
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())
