"""Masked training: only the selected weights move, and no dense gradient is formed that is not needed.

The paper's line is ``P <- P - lr * (grad P * M)``. Zeroing gradients under a dense optimizer leaks
(weight decay, stale momentum, clipping) and saves no memory. Here the k selected weights of a
tensor become one compact parameter, a leaf that lives in the model (see `entries`).
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..params import (
    check_names,
    check_prefixes,
    head_weights,
    in_masked_training,
    is_under,
    named_buffers,
    named_parameters,
    owners,
    unwrap,
    weights,
)
from ..selection import Selection
from .entries import (
    Entries,
    attach_entries,
    current,
    dense_of,
    detach_entries,
    samples,
    why_refused,
)
from .sampled import footprint

OPEN = "_masked_training"  # where a model in masked training holds it
STAMP = "selection"  # the key of an optimizer's group that says which selection it trains
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "sum")
Self = TypeVar("Self", bound="MaskedTraining")
Places = Sequence[tuple[nn.Module, str]]


class MaskedTraining:
    """Train only a selection, the task head, and some whole tensors; leaving restores the model.

    Inside, ``model.parameters()`` that require gradients are the compact parameters and the whole
    tensors, so that any optimizer, ``clip_grad_norm_``, ``zero_grad`` and a gradient scaler see
    them as usual. Selected weights of ``nn.Linear``, ``nn.Embedding``, Hugging Face's ``Conv1D``
    and of subclasses that keep their forward get sampled gradients. Those of any other tensor are
    gathered from its dense gradient, which lives for a moment in the backward. A tensor that is
    selected whole trains as it is. What is trained in half precision gets a float32 master, which a
    ``state_dict`` holds rounded, as the model's own tensor; `hf.SaveDelta` keeps masters.

    Parameters
    ----------
    model
        The model, changed in place until the context is left (or `close` is called).
    selection
        Which weights are trained.
    dense
        Names or prefixes of parameters that are trained whole as well.
    head
        The task head, which is trained whole: as in `weights`. ``()`` trains none.
    shrinks
        Use compact parameters even for tensors that are selected whole, so that `shrink` can drop
        any of their entries.
    sampled
        Sample gradients where a layer can. ``False`` gathers all of them from dense gradients,
        which takes more time and memory, and has second derivatives.
    allow_unused
        Whether a selected tensor may be without a gradient at an optimizer's first step. ``None``
        allows it for models that skip layers at random or hold experts in modules of their own.

    Raises
    ------
    ValueError
        If the selection names an unknown tensor or another shape, a name of `dense` or `head` is
        wrong or selected too, or a tensor cannot be selected in part; all of them are named. The
        model is unchanged. Later, from an optimizer's step: if it was made before the masking, its
        state is of another selection, or a selected tensor got no gradient.

    Examples
    --------
    >>> with MaskedTraining(model, selection):
    ...     optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    ...     ...  # any training loop
    """

    def __init__(
        self,
        model: nn.Module,
        selection: Selection,
        dense: str | Sequence[str] = (),
        *,
        head: Sequence[str] | None = None,
        shrinks: bool = False,
        sampled: bool = True,
        allow_unused: bool | None = None,
    ) -> None:
        heads, also = check_selection(model, selection, dense, head, shrinks=shrinks)
        self.model, self.selection, self.sampled = unwrap(model), selection, sampled
        self.head_names = heads
        self.total = sum(p.numel() for p in weights(model, head).values())
        self.allow_unused = _skips(self.model) if allow_unused is None else allow_unused
        named, self._places = named_parameters(model), owners(model)
        self._flags = {name: p.requires_grad for name, p in named.items()}
        self._trained: dict[str, nn.Parameter] = {}  # by name: compact, master, or as it is
        self._entries: dict[str, Entries] = {}
        self._final: dict[str, Tensor] | None = None
        for parameter in named.values():
            parameter.grad = None
            if parameter.requires_grad:  # a quantized tensor cannot be asked to
                parameter.requires_grad_(False)
        for name in (*selection.indices, *heads, *also):
            index = selection.indices.get(name)
            p, places = named[name], self._places[name]
            whole = index is None or (len(index) == p.numel() and not shrinks)
            precise = torch.promote_types(p.dtype, torch.float32) == p.dtype
            if whole and precise:
                p.requires_grad_(True)
                self._trained[name] = p
                continue
            at = None if whole or index is None else index.to(p.device)
            parts = (None, None) if at is None or shrinks else footprint_of(at, p, places, sampled)
            self._entries[name] = entries = Entries(p, at, *parts)
            self._trained[name] = entries.values
            for module, attribute in places:
                product = sampled and at is not None and samples(module, attribute)
                attach_entries(module, attribute, entries, product)
        self._buffers = {n: b.detach().cpu().clone() for n, b in named_buffers(model).items()}
        self._start = self._now(precise=False)
        self._checked = weakref.WeakSet[torch.optim.Optimizer]()
        own = weakref.ref(self)
        self._hook = register_optimizer_step_pre_hook(lambda o, a, k: _check_step(own(), o))
        self.model.__dict__[OPEN] = _Held(self)

    @property
    def closed(self) -> bool:
        """Whether the model was restored."""
        return self._final is not None

    @property
    def gathered(self) -> list[str]:
        """Matrices and larger tensors whose selected gradients are gathered from dense ones."""
        return [
            name
            for name, entries in self._entries.items()
            if entries.index is not None
            and dense_of(*self._places[name][0]).dim() > 1
            and gathers(self._places[name], self.sampled)
        ]

    def parameters(self) -> list[nn.Parameter]:
        """What the selection trains: a compact parameter, or a whole tensor, for each tensor."""
        return [self._trained[name] for name in self.selection.indices]

    def dense_parameters(self) -> list[nn.Parameter]:
        """What is trained whole: the head, and what `dense` names."""
        return [p for name, p in self._trained.items() if name not in self.selection.indices]

    def head_parameters(self) -> list[nn.Parameter]:
        """The task head."""
        return [self._trained[name] for name in self.head_names]

    def start(self) -> dict[str, Tensor]:
        """What it trains, and the buffers, as they were: ``{name: tensor}`` on the CPU.

        (k,) for a tensor that is selected in part, else its shape; in the model's dtypes.
        """
        return {**self._start, **self._buffers}

    def values(self, precise: bool = False) -> dict[str, Tensor]:
        """The same tensors as `start`, as they are now, or were when the training was closed.

        Parameters
        ----------
        precise
            Give float32 masters, where there are some, unrounded.
        """
        if self._final is not None:
            return (
                self._final
                if precise
                else {n: t.to(self._dtypes[n]) for n, t in self._final.items()}
            )
        named = named_buffers(self.model)
        buffers = {n: named[n].detach().cpu().clone() for n in self._buffers if n in named}
        return {**self._now(precise), **buffers}

    @cached_property
    def _dtypes(self) -> dict[str, torch.dtype]:
        dtypes = {name: dense_of(*self._places[name][0]).dtype for name in self._trained}
        return {**dtypes, **{name: b.dtype for name, b in self._buffers.items()}}

    def _now(self, precise: bool) -> dict[str, Tensor]:
        found = {}
        for name, p in self._trained.items():
            index = self.selection.indices.get(name)
            entries = self._entries.get(name)
            if entries is not None and not (precise and len(p.reshape(-1)) == self._size(name)):
                dense, _ = current(*self._places[name][0])
                flat = dense.detach().reshape(-1)
                p = dense if entries.index is None else flat[index.to(flat.device)]  # type: ignore
            found[name] = p.detach().cpu().clone()
        return found

    def _size(self, name: str) -> int:
        """How many values a tensor's entries had at the start; `shrink` drops some."""
        index = self.selection.indices.get(name)
        return dense_of(*self._places[name][0]).numel() if index is None else len(index)

    def shrink(self, keep: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
        """Stop training a part of the selection: dropped entries stay as they are.

        Parameters
        ----------
        keep
            ``{name: bool vector}``, one entry for every value of that tensor's compact parameter.
        optimizer
            Its state shrinks along: survivors keep their moments.

        Raises
        ------
        ValueError
            If `keep` names a tensor without a compact parameter, or has another length. Nothing is
            changed.
        """
        for name, kept in keep.items():
            if name not in self._entries or self._entries[name].index is None:
                raise ValueError(
                    f"keep names {name!r}, which has no compact parameter; give "
                    "masked(..., shrinks=True)"
                )
            expected = tuple(self._trained[name].shape)
            if kept.dtype != torch.bool or kept.shape != expected:
                raise ValueError(
                    f"keep[{name!r}] is {kept.dtype} of shape {tuple(kept.shape)}, not bool of "
                    f"{expected}"
                )
        for name, kept in keep.items():
            entries, values = self._entries[name], self._trained[name]
            for module, attribute in self._places[name]:
                current(module, attribute)
            for key, state in optimizer.state.get(values, {}).items():
                if torch.is_tensor(state) and state.shape == values.shape:
                    optimizer.state[values][key] = state[kept]
            gradient, values.grad = values.grad, None
            entries.index = entries.index[kept]  # type: ignore[index]
            kept_values = values.data[kept]
            # While the last loss is alive, the parameter's AccumulateGrad node expects the old
            # shape; assigning data of another dtype makes autograd discard the node.
            values.data = kept_values.half()
            values.data = kept_values
            values.grad = None if gradient is None else gradient[kept]

    def close(self) -> None:
        """Write the trained values into the weights and restore the model; twice does nothing."""
        if self.closed:
            return
        self._hook.remove()
        self.model.__dict__.pop(OPEN, None)
        self._final = self.values(precise=True)
        unmask(self.model)
        for name, parameter in named_parameters(self.model).items():
            if name in self._flags and parameter.requires_grad != self._flags[name]:
                parameter.requires_grad_(self._flags[name])

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @cached_property
    def stamp(self) -> str:
        """A fingerprint of the selection, which optimizers carry in their state."""
        found = hashlib.sha256()
        for name, index in self.selection.indices.items():
            found.update(f"{name}\n".encode())
            found.update(index.numpy().tobytes())
        return found.hexdigest()[:16]


class _Held:
    """Keeps an open training as long as its model; a copy of the model has none."""

    def __init__(self, training: MaskedTraining | None = None) -> None:
        self.training = training

    def __reduce__(self) -> tuple:
        return _Held, ()


def training_of(model: nn.Module) -> MaskedTraining | None:
    """The masked training that a model is in, None if it is in none (or is a copy)."""
    held = unwrap(model).__dict__.get(OPEN)
    return held.training if held is not None else None


def unmask(model: nn.Module) -> None:
    """Write all compact values into the weights and restore every layer's class.

    For copies of a model that were made inside masked training; `MaskedTraining.close` calls it.
    """
    for module in unwrap(model).modules():
        detach_entries(module)


def check_selection(
    model: nn.Module,
    selection: Selection,
    dense: str | Sequence[str] = (),
    head: Sequence[str] | None = None,
    *,
    shrinks: bool = False,
) -> tuple[list[str], list[str]]:
    """Raise as `MaskedTraining` would; else give the names of the head and of the dense tensors."""
    if in_masked_training(model):
        raise ValueError("model is already in masked training; leave that first")
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError(
            "model is wrapped in DistributedDataParallel, which has taken note of the parameters "
            "that it had; wrap it inside masked training"
        )
    named, places = named_parameters(model), owners(model)
    check_names(selection.indices, named, "selection")
    prefixes = check_prefixes(dense, named, "dense")
    also = [name for name in named if is_under(name, prefixes)]
    heads = [name for name in head_weights(model, head) if name not in also]
    if head is None:  # found, not asked for: a selection may take a part of it
        heads = [name for name in heads if name not in selection.indices]
    for argument, names in (("dense", also), ("head", heads)):
        if both := [name for name in names if name in selection.indices]:
            raise ValueError(f"{argument} and selection both name {both[0]!r}; train it one way")
    refused = dict[str, str]()
    for name, index in selection.indices.items():
        p, shape = named[name], tuple(selection.shapes[name])
        if tuple(p.shape) != shape:
            raise ValueError(
                f"selection[{name!r}] is for shape {shape}, the model has {tuple(p.shape)}"
            )
        partly = shrinks or len(index) < p.numel() or p.element_size() < 4
        if partly and (reason := _why_refused(places[name])):
            refused[name] = reason
    if refused:
        _refuse("selection", refused)
    for name in (*selection.indices, *also, *heads):
        if named[name].is_meta:
            raise ValueError(
                f"{name!r} is on the meta device, which holds no values (offloaded?); load the "
                "whole model first"
            )
        if not named[name].is_floating_point():
            raise ValueError(f"{name!r} is {named[name].dtype}; only floating-point tensors train")
    return heads, also


def check_candidates(
    model: nn.Module, head: Sequence[str] | None = None, exclude: str | Sequence[str] = ()
) -> None:
    """Raise a `ValueError` that names every candidate that cannot be selected in part.

    Methods call it before they score. Arguments as in `weights` and `scores.exclude`.
    """
    places, candidates = owners(model), weights(model, head)
    prefixes = check_prefixes(exclude, candidates, "exclude")
    reasons = {n: _why_refused(places[n]) for n in candidates if not is_under(n, prefixes)}
    if refused := {name: reason for name, reason in reasons.items() if reason}:
        _refuse("model", refused)


def _why_refused(places: Places) -> str | None:
    return next((reason for place in places if (reason := why_refused(*place))), None)


def _refuse(argument: str, refused: Mapping[str, str]) -> None:
    lines = "; ".join(f"{name!r} {reason}" for name, reason in refused.items())
    raise ValueError(
        f"{argument} holds {len(refused)} tensor(s) that cannot be selected in part: {lines}. "
        f"Exclude them: exclude={tuple(refused)}, or sl.exclude(scores, {tuple(refused)})"
    )


def gathers(places: Places, sampled: bool = True) -> bool:
    """Whether a tensor's selected gradients come from a dense one, at one of its places."""
    return not (sampled and all(samples(*place) for place in places))


def footprint_of(
    index: Tensor, parameter: Tensor, places: Places, sampled: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    """Footprint of the positions, or (None, None) unless one of its layers samples a product."""
    product = any(samples(*at) and not isinstance(at[0], nn.Embedding) for at in places)
    wanted = sampled and product and parameter.dim() == 2
    return footprint(index, *parameter.shape) if wanted else (None, None)


def _skips(model: nn.Module) -> bool:
    """Whether a model may leave layers out of a step: LayerDrop, experts that no token chose."""
    config = getattr(model, "config", None)
    named = {**vars(config), **getattr(config, "__dict__", {})} if config is not None else {}
    if any("layerdrop" in key and value for key, value in named.items()):
        return True
    experts = (m for name, m in model.named_modules() if name.rpartition(".")[2] == "experts")
    return any(len(list(m.children())) > 1 for m in experts) or any(
        getattr(module, "layerdrop", 0) for module in model.modules()
    )


def _check_step(training: MaskedTraining | None, optimizer: torch.optim.Optimizer) -> None:
    """Before every optimizer's step, while a training is open: raise unless it can train that."""
    if training is None or training.closed:
        return
    ours = {id(p): name for name, p in training._trained.items()}
    groups = [g for g in optimizer.param_groups if any(id(p) in ours for p in g["params"])]
    if optimizer not in training._checked:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        _check_made_inside(training, held)
        if groups:
            _check_gradients(training, held)
            training._checked.add(optimizer)
    for group in groups:
        stamp = group.setdefault(STAMP, training.stamp)
        misfit = (_of_another_size(optimizer.state.get(p, {}), p) for p in group["params"])
        if stamp != training.stamp or any(misfit):
            raise ValueError(
                "optimizer's state was saved in masked training of another selection; resume with "
                "the selection of the checkpoint (Selection.load, or Delta.selection of its file)"
            )


def _of_another_size(state: Mapping[str, Any], p: Tensor) -> bool:
    moments = (state[key] for key in MOMENTS if torch.is_tensor(state.get(key)))
    return any(moment.shape != p.shape for moment in moments)


def _check_made_inside(training: MaskedTraining, held: set[int]) -> None:
    for name, entries in training._entries.items():
        module, attribute = training._places[name][0]
        dense = module._parameters.get(attribute)  # None where a wrapper took it away
        if id(dense) in held and id(entries.values) not in held:
            raise ValueError(
                f"optimizer was made before masked training: it holds {name!r} itself, which is "
                "frozen now; make the optimizer inside"
            )


def _check_gradients(training: MaskedTraining, held: set[int]) -> None:
    trained = training._trained
    without = [
        n for n in training.selection.indices if id(trained[n]) in held and trained[n].grad is None
    ]
    if without and not training.allow_unused:
        raise ValueError(
            f"{len(without)} selected tensor(s) got no gradient, {', '.join(map(repr, without))}: "
            "the loss does not use them. Exclude them (sl.exclude(scores, ...)), or give "
            "masked(..., allow_unused=True) if a step may leave them out"
        )
