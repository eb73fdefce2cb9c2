"""Masked training: only the selected weights move, and no needless dense gradient is formed.

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
from torch import Tensor
from torch.nn import Embedding, Module, Parameter
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from .. import params
from ..heads import Head, Names
from ..kernels import sharded
from ..kernels.sampled import Footprint, footprint, index_dtype, precise
from ..kernels.sharded import is_sharded
from ..selection import Selection
from .entries import Entries, attach_entries, dense_of, detach_entries, samples, why_refused

OPEN = "_masked_training"  # where a model in masked training holds it
Self = TypeVar("Self", bound="MaskedTraining")
STAMP = "selection"  # the key of an optimizer's group that says which selection it trains
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "sum")
Places = Sequence[params.Place]


class MaskedTraining:
    """Train only a selection, the task head, and some whole tensors; leaving restores the model.

    Inside, ``model.parameters()`` that require gradients are the compact parameters and the whole
    tensors, so that any optimizer, ``clip_grad_norm_``, ``zero_grad`` and a gradient scaler see
    them as usual. Selected weights of ``nn.Linear``, ``nn.Embedding``, Hugging Face's ``Conv1D``
    and of subclasses that keep their forward get sampled gradients. Those of any other tensor are
    gathered from its dense gradient, which lives for a moment in the backward. A tensor that is
    selected whole trains as it is. What is trained in half precision gets a float32 master, which a
    ``state_dict`` holds rounded, as the model's own tensor; `hf.SaveDelta` keeps masters.

    A model may be under `fully_shard` (FSDP2), with a selection that was made before: what is
    frozen stays sharded, and all that is trained, the head and whole tensors too, is replicated.
    Gradients are averaged at the end of every backward, in one exchange of as many values (and one
    more for each tensor), or divided by what FSDP's `set_gradient_divide_factor` was given for all
    modules; FSDP's settings of when gradients are exchanged change nothing. Every process makes
    the same calls.

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
        model: Module,
        selection: Selection,
        dense: Names = (),
        *,
        head: Head = None,
        shrinks: bool = False,
        sampled: bool = True,
        allow_unused: bool | None = None,
    ) -> None:
        self.head_names, also = check_selection(model, selection, dense, head, shrinks)
        self.model, self.selection, self.sampled = params.unwrap(model), selection, sampled
        self.total = sum(p.numel() for p in params.candidates(model, head).values())
        self.allow_unused = _skips(self.model) if allow_unused is None else allow_unused
        named, self._places = params.named_parameters(model), params.owners(model)
        self._flags = {name: p.requires_grad for name, p in named.items()}
        self._trained: dict[str, Parameter] = {}  # by name: compact, master, or as it is
        self._entries: dict[str, Entries] = {}
        self._final: dict[str, Tensor] | None = None
        for p in named.values():
            p.grad = None
            if p.requires_grad:  # a quantized tensor cannot be asked to
                p.requires_grad_(False)
        for name in (*selection.indices, *self.head_names, *also):
            index, p, places = selection.indices.get(name), named[name], self._places[name]
            if index is not None and len(index) == p.numel() and not shrinks:
                index = None
            if index is None and precise(p) == p.dtype and not is_sharded(p):
                p.requires_grad_(True)
                self._trained[name] = p
                continue
            at = None if index is None else index.to(p.device, index_dtype(p.numel()))
            parts = (None, None) if at is None or shrinks else footprint_of(at, p, places, sampled)
            self._entries[name] = entries = Entries(p, at, *parts)
            self._trained[name] = entries.values
            for module, attribute in places:
                product = sampled and at is not None and samples(module, attribute)
                attach_entries(module, attribute, entries, product)
        self._ids = {id(p) for p in self._trained.values()}
        self._buffers = list(params.named_buffers(model))
        self._mesh = sharded.mesh_of(self.model, named)
        self._start = self.values()
        self._checked = weakref.WeakSet[Optimizer]()
        own = weakref.ref(self)
        check = register_optimizer_step_pre_hook(lambda o, a, k: _check_step(own(), o))
        self._hooks = [check]
        if self._mesh is not None:
            both = self._entries.values(), self._trained.values()
            self._hooks += sharded.follow(self.model, *both, self._mesh)
        self.model.__dict__[OPEN] = _Held(self)

    @property
    def closed(self) -> bool:
        """Whether the model was restored."""
        return self._final is not None

    @property
    def gathered(self) -> list[str]:
        """Matrices and larger tensors whose selected gradients are gathered from dense ones."""
        partly = [n for n, entries in self._entries.items() if entries.index is not None]
        matrices = (n for n in partly if dense_of(*self._places[n][0]).dim() > 1)
        return [n for n in matrices if not self.sampled or gathers(self._places[n])]

    def parameters(self) -> list[Parameter]:
        """What the selection trains: a compact parameter, or a whole tensor, for each tensor."""
        return [self._trained[name] for name in self.selection.indices]

    def dense_parameters(self) -> list[Parameter]:
        """What is trained whole: the head, and what `dense` names."""
        return [p for name, p in self._trained.items() if name not in self.selection.indices]

    def head_parameters(self) -> list[Parameter]:
        """The task head."""
        return [self._trained[name] for name in self.head_names]

    def start(self) -> dict[str, Tensor]:
        """What it trains, and the buffers, as they were: ``{name: tensor}`` on the CPU.

        (k,) for a tensor that is selected in part, else its shape; in the model's dtypes.
        """
        return dict(self._start)

    def values(self, precise: bool = False) -> dict[str, Tensor]:
        """The same tensors as `start`, as they are now, or were when the training was closed.

        Parameters
        ----------
        precise
            Give float32 masters, where there are some, unrounded.
        """
        if self._final is not None:
            own = {n: t.to(self._start[n].dtype) for n, t in self._final.items()}
            return self._final if precise else own
        named = params.named_buffers(self.model)  # and no tensor is left gathered
        found: dict[str, Tensor] = {n: self._value(n, precise) for n in self._trained}
        found |= {name: named[name] for name in self._buffers if name in named}
        return {name: tensor.detach().cpu().clone() for name, tensor in found.items()}

    def _value(self, name: str, precise: bool) -> Tensor:
        p, entries = self._trained[name], self._entries.get(name)
        index, dense = self.selection.indices.get(name), dense_of(*self._places[name][0])
        size = dense.numel() if index is None else len(index)
        if is_sharded(dense) and self._mesh is None:
            raise RuntimeError(f"model's {name!r} was sharded in masked training; {sharded.LATE}")
        if entries is None or (precise and p.numel() == size):  # `shrink` drops some
            return p
        if is_sharded(dense):
            return p.to(dense.dtype)
        entries.write(dense)
        at = None if entries.index is None or index is None else index.to(dense.device)
        return dense if at is None else dense.reshape(-1)[at]

    def shrink(self, keep: Mapping[str, Tensor], optimizer: Optimizer) -> None:
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
                lack = f"keep names {name!r}, which has no compact parameter"
                raise ValueError(f"{lack}; give masked(..., shrinks=True)")
            found, own = tuple(kept.shape), tuple(self._trained[name].shape)
            if kept.dtype != torch.bool or found != own:
                what = f"keep[{name!r}] is {kept.dtype} of shape {found}"
                raise ValueError(f"{what}, not bool of {own}")
        for name, kept in keep.items():
            entries, values = self._entries[name], self._trained[name]
            entries.write(dense_of(*self._places[name][0]))
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
        for hook in self._hooks:
            hook.remove()
        self.model.__dict__.pop(OPEN, None)
        self._final = self.values(precise=True)
        unmask(self.model)
        for name, p in params.named_parameters(self.model).items():
            if name in self._flags and p.requires_grad != self._flags[name]:
                p.requires_grad_(self._flags[name])

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @cached_property
    def stamp(self) -> str:
        """A fingerprint of the selection, which optimizers carry in their state."""
        found = hashlib.sha256()
        for name, index in self.selection.indices.items():
            found.update(f"{name}\n".encode() + index.numpy().tobytes())
        return found.hexdigest()[:16]


class _Held:
    """Keeps an open training as long as its model; a copy of the model has none."""

    def __init__(self, training: MaskedTraining | None = None) -> None:
        self.training = training

    def __reduce__(self) -> tuple:
        return _Held, ()


def training_of(model: Module) -> MaskedTraining | None:
    """The masked training that a model is in, None if it is in none (or is a copy)."""
    held = params.unwrap(model).__dict__.get(OPEN)
    return held.training if held is not None else None


def unmask(model: Module) -> None:
    """Write all compact values into the weights and restore every layer's class.

    For copies of a model that were made inside masked training; `MaskedTraining.close` calls it.
    """
    for module in params.unwrap(model).modules():
        detach_entries(module)


def check_selection(
    model: Module, selection: Selection, dense: Names = (), head: Head = None, shrinks: bool = False
) -> tuple[list[str], list[str]]:
    """Raise as `MaskedTraining` would; else give the names of the head and of the dense tensors."""
    if params.in_masked_training(model):
        raise ValueError("model is already in masked training; leave that first")
    if isinstance(model, DistributedDataParallel):
        why = "which has noted the parameters that it had; wrap it inside masked training"
        raise ValueError(f"model is wrapped in DistributedDataParallel, {why}")
    named, places, indices = params.named_parameters(model), params.owners(model), selection.indices
    params.check_names(indices, named, "selection")
    also = params.names_under(dense, named, "dense")
    # A head that is found, not asked for: a selection may take a part of it.
    taken = also if head is not None else {*also, *indices}
    heads = [name for name in params.head_weights(model, head) if name not in taken]
    for argument, names in (("dense", also), ("head", heads)):
        if both := [name for name in names if name in indices]:
            raise ValueError(f"{argument} and selection both name {both[0]!r}; train it one way")
    partly = dict[str, Places]()
    for name, index in indices.items():
        p, shape, own = named[name], tuple(selection.shapes[name]), tuple(named[name].shape)
        if own != shape:
            raise ValueError(f"selection[{name!r}] is for shape {shape}, the model has {own}")
        if shrinks or is_sharded(p) or len(index) < p.numel() or p.element_size() < 4:
            partly[name] = places[name]
    _check_places("selection", partly)
    if sharded.mesh_of(params.unwrap(model), named) is not None and shrinks:
        raise ValueError("shrinks=True is not for sharded models; train in one process, or in DDP")
    for name in (*indices, *also, *heads):
        if named[name].is_meta:
            why = "is on the meta device, which holds no values (offloaded?)"
            raise ValueError(f"{name!r} {why}; load the whole model first")
        if (reason := sharded.why_refused(named[name])) is not None:
            raise ValueError(f"model's {name!r} {reason}")
        if not named[name].is_floating_point():
            raise ValueError(f"{name!r} is {named[name].dtype}; only floating-point tensors train")
    return heads, also


def check_candidates(model: Module, head: Head = None, exclude: Names = ()) -> None:
    """Raise a `ValueError` that names every candidate that cannot be selected in part.

    Methods call it before they score. Arguments as in `weights` and `scores.exclude`.
    """
    places, candidates = params.owners(model), params.weights(model, head)
    excluded = params.names_under(exclude, candidates, "exclude")
    _check_places("model", {name: places[name] for name in candidates if name not in excluded})


def _check_places(argument: str, places: Mapping[str, Places]) -> None:
    every = {n: [why for at in places[n] if (why := why_refused(*at))] for n in places}
    refused = {name: reasons[0] for name, reasons in every.items() if reasons}
    if refused:
        what = f"{argument} holds {len(refused)} tensor(s) that cannot be selected in part"
        lines = "; ".join(f"{name!r} {reason}" for name, reason in refused.items())
        remedy = f"exclude={tuple(refused)}, or sl.exclude(scores, {tuple(refused)})"
        raise ValueError(f"{what}: {lines}. Exclude them: {remedy}")


def gathers(places: Places, sampled: bool = True) -> bool:
    """Whether a tensor's selected gradients come from a dense one, at one of its places."""
    return not (sampled and all(samples(*place) for place in places))


def footprint_of(index: Tensor, own: Tensor, places: Places, sampled: bool = True) -> Footprint:
    """Footprint of the positions, or (None, None) unless one of its layers samples a product."""
    product = any(samples(*at) and not isinstance(at[0], Embedding) for at in places)
    wanted = sampled and product and own.dim() == 2
    return footprint(index, *own.shape) if wanted else (None, None)


def _skips(model: Module) -> bool:
    """Whether a model may leave layers out of a step: LayerDrop, experts that no token chose."""
    options = getattr(getattr(model, "config", None), "__dict__", {})
    if any("layerdrop" in key and value for key, value in options.items()):
        return True
    experts = [m for name, m in model.named_modules() if name.rpartition(".")[2] == "experts"]
    own = any(getattr(module, "layerdrop", 0) for module in model.modules())
    return own or any(len(list(module.children())) > 1 for module in experts)


def _check_step(training: MaskedTraining | None, optimizer: Optimizer) -> None:
    """Before every optimizer's step, while a training is open: raise unless it can train that."""
    if training is None or training.closed:
        return
    groups = [g for g in optimizer.param_groups if training._ids & {id(p) for p in g["params"]}]
    if optimizer not in training._checked:
        _check_first_step(training, {id(p) for g in optimizer.param_groups for p in g["params"]})
        if groups:
            training._checked.add(optimizer)
    for group in groups:
        stamp = group.setdefault(STAMP, training.stamp)
        misfit = (_of_another_size(optimizer.state.get(p, {}), p) for p in group["params"])
        if stamp != training.stamp or any(misfit):
            what = "optimizer's state was saved in masked training of another selection"
            remedy = "resume with that one: Selection.load, or Delta.selection of its file"
            raise ValueError(f"{what}; {remedy}")


def _of_another_size(state: Mapping[str, Any], p: Tensor) -> bool:
    moments = (state[key] for key in MOMENTS if torch.is_tensor(state.get(key)))
    return any(moment.shape != p.shape for moment in moments)


def _check_first_step(training: MaskedTraining, held: set[int]) -> None:
    """Raise if the optimizer that holds these was made too early, or a gradient is missing."""
    trained, now = training._trained, list(training.model.parameters())
    known = {*training._ids, *map(id, now)}
    if training._mesh is None and held & known and any(map(is_sharded, now)):
        raise ValueError(f"model was sharded in masked training; {sharded.LATE}")
    for name, entries in training._entries.items():
        module, attribute = training._places[name][0]
        dense = module._parameters.get(attribute)  # None where a wrapper took it away
        if id(dense) in held and id(entries.values) not in held:
            what = f"it holds {name!r} itself, which is frozen now; make the optimizer inside"
            raise ValueError(f"optimizer was made before masked training: {what}")
    ours = [name for name in training.selection.indices if id(trained[name]) in held]
    without = [name for name in ours if trained[name].grad is None]
    if without and not training.allow_unused:
        names = ", ".join(map(repr, without))
        what = f"{len(without)} selected tensor(s) got no gradient, {names}: the loss does not use"
        remedy = "masked(..., allow_unused=True) if a step may leave them out"
        raise ValueError(f"{what} them. Exclude them (sl.exclude(scores, ...)), or give {remedy}")
