"""Tuning: masked training that gives its delta from the values it started with, and resumes one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..heads import class_of
from ..kernels.sharded import is_sharded
from ..layers.masked import MaskedTraining
from ..layers.small import adapter_parameters, adapters
from ..params import candidates, head_weights, named_parameters
from ..selection import Selection
from .base import at, tensors_of
from .delta import Delta
from .diff import assemble
from .file import bits, body_of

_said: set[str] = set()  # what `masked` has said in this process


class Tuning(MaskedTraining):
    """`MaskedTraining` that ships what it trained, without a second copy of the model."""

    def __init__(
        self,
        model: nn.Module,
        selection: Selection,
        dense: str | Sequence[str] = (),
        *,
        head: Sequence[str] | None = None,
        **options: Any,
    ) -> None:
        own = adapter_parameters(model)
        if any(is_sharded(p) for name, p in named_parameters(model).items() if name in own):
            remedy = "give fully_shard(..., ignored_params=) theirs"
            raise ValueError(f"model's small modules are sharded; {remedy}")
        heads = [name for name in head_weights(model, head) if name not in own]
        total = sum(p.numel() for name, p in candidates(model, head).items() if name not in own)
        super().__init__(model, selection, dense, head=head, **options)
        self._heads, self.total = heads, total  # the whole head, however its tensors are trained

    def delta(self, method: str | None = None, precise: bool = False) -> Delta:
        """What training changed so far, or had changed when it was left.

        The file is, to the byte, the one of ``diff(snapshot(model), model, method=method)`` with
        the snapshot taken before, and the same `head`. Of a sharded model it is what one process
        would give; every process asks for it, and one of them saves it.

        Parameters
        ----------
        method
            How it was tuned, for the reader of the file; default: the selection's method.
        precise
            Store every selected weight, moved or not, and float32 values for half-precision
            weights: what training needs to `resume`. Applying rounds to the base's dtype.

        Returns
        -------
        Delta

        Raises
        ------
        ValueError
            If nothing changed, and there is no head.
        """
        start, own = self.start(), adapter_parameters(self.model)
        changed: dict[str, tuple[Tensor, Tensor]] = {}
        heads, buffers = dict[str, Tensor](), dict[str, Tensor]()
        for name, values in self.values(precise).items():
            moved = (bits(values) != bits(start[name].to(values.dtype))).reshape(-1)
            if name in self._heads:
                heads[name] = self._whole(name, values)
            elif name not in self._trained:
                buffers |= {name: values} if moved.any() else {}
            elif name not in own:
                kept = (moved | precise).nonzero().squeeze(1)
                index = self.selection.indices.get(name)
                where = kept if index is None else index[kept]
                changed[name] = where, values.reshape(-1)[kept]
        delta = assemble(
            self.model,
            self._before,
            changed,
            heads,
            buffers,
            method=self.selection.method if method is None else method,
            total=self.total,
            small=adapters(self.model),
        )
        if precise:
            delta.metadata["complete"] = True
        return delta

    @torch.no_grad()
    def resume(self, delta: Delta) -> None:
        """Continue from a delta: put its values into this training.

        ``delta(precise=True)`` has all that is needed. Selected weights that the delta lacks get
        the values that they started with.

        Parameters
        ----------
        delta
            Made from the same base, in training of the same selection.

        Raises
        ------
        ValueError
            If training was left or has shrunk, the delta is of another selection or head, or is not
            for this base (a `DeltaError`); it says what differs. Nothing is changed.
        """
        if self.closed:
            raise ValueError("masked training was left; resume inside of it")
        tensors, start, places = tensors_of(self.model), self.start(), delta.places()
        self._check_same(delta, tensors)
        self._check_selection(delta)
        body = body_of(delta.parts)
        found = {name: self._before(name, places[name]) for name in body if name in places}
        delta.check_base(self._before, found, {name: name for name in body})
        delta = delta.with_base(found)
        replaced = delta.replaced()

        for name, p in self._trained.items():
            flat = start[name].reshape(-1).to(p.dtype)
            if name in replaced:
                where, values = replaced[name]
                index = _everything(values) if where is None else where.long()
                own = self.selection.indices.get(name, _everything(tensors[name]))
                # A head's other values, where a selection takes a part of it, never move.
                kept = torch.isin(index, own)
                at_own = torch.searchsorted(own, index[kept])
                flat = flat.index_copy(0, at_own, values.reshape(-1)[kept].to(p.dtype))
            p.copy_(flat.reshape(p.shape))
        for name, tensor in tensors.items():
            if name in start and name not in self._trained:
                tensor.copy_(delta.buffers.get(name, start[name]))
        for name, module in adapters(self.model).items():
            module.load_state_dict(delta.modules[name])

    def _whole(self, name: str, values: Tensor) -> Tensor:
        """A tensor of the head, even if only a part of it was selected."""
        tensor = tensors_of(self.model)[name]
        if values.numel() == tensor.numel():
            return values.reshape(tensor.shape)
        flat = at(tensor).to(values.dtype)
        return flat.index_copy(0, self.selection.indices[name], values).reshape(tensor.shape)

    def _before(self, name: str, where: Tensor | None) -> Tensor:
        """The base's values at flat positions of a tensor, or all of them."""
        tensor, start = tensors_of(self.model)[name], self.start().get(name)
        index = self.selection.indices.get(name)
        if start is None or index is None:
            return at(tensor if start is None else start, where)
        where = _everything(tensor) if where is None else where.long()
        own = torch.searchsorted(index, where).clamp(max=len(index) - 1)
        known, trained = start.reshape(-1)[own], index[own] == where
        return known if trained.all() else torch.where(trained, known, at(tensor, where))

    def _check_same(self, delta: Delta, tensors: Mapping[str, Tensor]) -> None:
        for name, shape in delta.metadata["shapes"].items():
            if name not in tensors:
                raise ValueError(f"delta has {name!r}, the model in training has not")
            if (found := list(tensors[name].shape)) != shape:
                raise ValueError(
                    f"delta's {name!r} has shape {shape}, the model in training has {found}"
                )
        small = adapters(self.model)
        both: dict[str, tuple[Any, Any]] = {
            "head": (delta.head, self._heads),
            "small modules": (delta.modules, small),
        }
        for part, (theirs, ours) in both.items():
            if other := set(theirs) ^ set(ours):
                raise ValueError(
                    f"delta and training do not have the same {part}: only one has {min(other)!r}"
                )
        for name, p in self._trained.items():
            if p.numel() != self.start()[name].numel():
                raise ValueError(f"training of {name!r} has shrunk since it began; start it anew")

    def _check_selection(self, delta: Delta) -> None:
        remedy = "resume with the same selection: masked(model, delta.selection(model))"
        places, complete = delta.places(), delta.metadata.get("complete", False)
        small, named = adapter_parameters(self.model), named_parameters(self.model)
        trained = [name for name in self._trained if name not in (*self._heads, *small)]
        for name in (*delta.positions, *delta.dense):
            if name not in trained:
                raise ValueError(
                    f"delta is of another selection: {name!r} is not trained; {remedy}"
                )
        for name in trained:
            index = self.selection.indices.get(name, _everything(named[name]))
            where = places.get(name, index[:0])
            where = _everything(named[name]) if where is None else where.long()
            shared = int(torch.isin(index, where).sum())
            if shared < len(where) or (complete and shared < len(index)):
                raise ValueError(
                    f"delta is of another selection: it has {len(where):,} weights of {name!r}, "
                    f"training has {len(index):,}, they share {shared:,}; {remedy}"
                )


def _everything(tensor: Tensor) -> Tensor:
    return torch.arange(tensor.numel(), device="cpu")


def masked(
    model: nn.Module,
    selection: Selection,
    dense: str | Sequence[str] = (),
    *,
    head: Sequence[str] | None = None,
    shrinks: bool = False,
    sampled: bool = True,
    allow_unused: bool | None = None,
) -> Tuning:
    """Train only a selection and the task head.

    It prints, once for each kind of model, which head it found, and which tensors have no sampled
    gradients, so that a dense one is formed for a moment. Arguments and errors as of
    `MaskedTraining`.

    Returns
    -------
    Tuning
        A context manager: leaving it restores an ordinary model. ``tuning.delta()`` is what to
        ship, inside or after.

    Examples
    --------
    >>> selection = select(squared_gradient(model, batches), 0.005)
    >>> with masked(model, selection) as tuning:
    ...     trainer.train()
    >>> tuning.delta().save("task.safetensors")
    """
    options = {"shrinks": shrinks, "sampled": sampled, "allow_unused": allow_unused}
    tuning = Tuning(model, selection, dense, head=head, **options)
    if (what := _what(tuning)) not in _said:
        _said.add(what)
        count = f"{tuning.selection.count:,} of {tuning.total:,} weights"
        print(f"selective_lite trains {count} of this {what}", flush=True)
    return tuning


def _what(tuning: Tuning) -> str:
    """What is worth saying once of a kind of model."""
    named, heads, gathered = named_parameters(tuning.model), tuning._heads, tuning.gathered
    size = sum(named[name].numel() for name in heads)
    head = f"its head whole ({', '.join(heads)}: {size:,} weights)" if heads else "no head"
    dense = f"; dense gradients are gathered for {', '.join(gathered)}" if gathered else ""
    return f"{class_of(tuning.model).__name__}, and {head}{dense}"
