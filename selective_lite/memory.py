"""Ledger: the bytes of training by kind, measured and predicted; what selecting saves, and what it does not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from .layers.masked import SUFFIX, compact_parameters, footprint_of
from .params import check_names, check_prefixes, is_under, owners, preserve_modes
from .scores import Loss, model_loss
from .selection import Selection


def ledger(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, int]:
    """Bytes that a model and its optimizer hold now; call it after a step, while gradients are there.

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
        (state tensors), ``index`` (positions of a selection). Tensors that share storage count
        once. A forward's activations are not held between steps: `activation_bytes` counts them.
    """
    weights: list[Tensor] = list(model.parameters())
    index: list[Tensor] = []
    for name, buffer in model.named_buffers():
        (index if SUFFIX + "_" in name else weights).append(buffer)
    state = [] if optimizer is None else [t for s in optimizer.state.values() for t in s.values()]
    return {
        "weights": _bytes(weights),
        "gradients": _bytes(p.grad for p in model.parameters() if p.grad is not None),
        "optimizer": _bytes(state),
        "index": _bytes(index),
    }


def predicted_ledger(
    model: nn.Module,
    selection: Selection | None = None,
    dense: Sequence[str] = (),
    *,
    beside: Iterable[Tensor] = (),
    optimizer: Callable[[Any], torch.optim.Optimizer] = torch.optim.AdamW,
) -> dict[str, int]:
    """What `ledger` will say after a step, to the byte, from shapes alone: nothing is trained, no memory is taken.

    Activations are not predicted: they follow from the batch and from what each layer's backward
    needs, not from the weights' shapes; `activation_bytes` measures them.

    Parameters
    ----------
    model
        An ordinary one; on the meta device too, so that a model that does not fit can be asked
        about.
    selection, dense
        As in `masked`. Without these two and with nothing beside, every floating-point weight is
        trained.
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
    if any(compact_parameters(model)):
        raise ValueError("model is in masked training: leave that first, or measure it with ledger")
    named = dict(model.named_parameters())
    indices, shapes = (selection.indices, selection.shapes) if selection else ({}, {})
    prefixes = check_prefixes(dense, named, "dense")
    check_names(indices, named, "selection")
    for name in indices:
        if shapes[name] != (shape := tuple(named[name].shape)) or is_under(name, prefixes):
            raise ValueError(
                f"selection[{name!r}] is for shape {shapes[name]}, not {shape}, or dense names it too"
            )
    partly = {name: index for name, index in indices.items() if len(index) < named[name].numel()}
    places = owners(model)
    parts = [footprint_of(index, named[name], places[name]) for name, index in partly.items()]
    precise = {name: torch.promote_types(named[name].dtype, torch.float32) for name in partly}
    added = [
        *beside,
        *(torch.empty(len(partly[name]), dtype=precise[name], device="meta") for name in partly),
    ]
    whole = {name for name in named if is_under(name, prefixes)} | (indices.keys() - partly.keys())
    if not added and not whole:
        whole = {name for name, p in named.items() if p.is_floating_point()}
    trained = [
        nn.Parameter(torch.empty_like(t, device="meta"))
        for t in (*added, *(named[name] for name in whole))
    ]
    for p in trained:
        p.grad = torch.empty_like(p)
    stepped = optimizer(trained)
    stepped.step()
    return {
        "weights": ledger(model)["weights"] + sum(t.nbytes for t in added),
        "gradients": sum(p.nbytes for p in trained),
        "optimizer": ledger(model, stepped)["optimizer"],
        "index": _bytes(chain(partly.values(), *parts)),
    }


def activation_bytes(model: nn.Module, batch: Any, loss: Loss = model_loss) -> int:
    """Bytes that autograd keeps for the backward of one training step, beside the model's own tensors and the batch.

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
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.setdefault(id(t), t), lambda t: t
    )
    with preserve_modes(model), torch.enable_grad(), hooks:
        model.train()
        loss(model, batch)
    own = [
        *model.parameters(),
        *model.buffers(),
        *(batch.values() if isinstance(batch, Mapping) else batch),
    ]
    return _bytes([*kept.values(), *own]) - _bytes(own)


def _bytes(values: Iterable[Any]) -> int:
    # Storages are told apart by their address in C++, not by the data's, which is 0 on the meta
    # device.
    return sum(
        {
            s._cdata: s.nbytes()
            for s in (t.untyped_storage() for t in filter(torch.is_tensor, values))
        }.values()
    )
