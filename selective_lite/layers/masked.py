"""Masked training: the selected weights become compact parameters, and no dense weight gradient is ever formed.

The paper's line is ``P <- P - lr * (grad P * M)``. Zeroing gradients under a dense optimizer leaks
(weight decay, stale momentum, clipping) and saves no memory. Here the k selected weights of a
tensor are one vector, a leaf that lives in the module; the dense tensor stays in place, frozen, and
takes the vector's values before every forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..params import check_names, check_prefixes, is_under, owners
from ..selection import Selection
from .sampled import embedding, footprint, linear, scatter

SUFFIX = "_selected"  # a module's compact vector beside `weight` is `weight_selected`
INDEX = (
    "_index",
    "_rows",
    "_columns",
)  # behind it, buffers: flat positions, and the footprint of a sampled product


class masked:
    """Train only a selection (and some whole tensors); leaving restores an ordinary model.

    Inside, ``model.parameters()`` that require gradients are the compact vectors and the `dense`
    tensors, so that any optimizer, ``clip_grad_norm_``, ``zero_grad`` and a gradient scaler see
    them as usual. Selected weights of ``nn.Linear``, ``nn.Embedding`` and Hugging Face's ``Conv1D``
    get sampled gradients; a tensor selected whole trains as it is; selected entries of small
    tensors (vectors: biases, norms) gather theirs from the dense gradient.

    Parameters
    ----------
    model
        The model, changed in place until the context is left (or `close` is called).
    selection
        Which weights are trained.
    dense
        Names or prefixes of parameters that are trained whole beside it, such as the task head.
    shrinks
        Make compact vectors of tensors that are selected whole too, so that `shrink` can drop any
        of their entries.

    Raises
    ------
    ValueError
        If the selection names an unknown tensor or another shape, if `dense` names nothing or
        overlaps with the selection, or if a selected matrix belongs to a module without a sampled
        gradient. The model is unchanged.

    Examples
    --------
    >>> with masked(model, selection, dense=("classifier",)):
    ...     optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    ...     ...  # any training loop
    """

    def __init__(
        self,
        model: nn.Module,
        selection: Selection,
        dense: Sequence[str] = (),
        *,
        shrinks: bool = False,
    ) -> None:
        if any(compact_parameters(model)):
            raise ValueError("model is already in masked training; leave that first")
        named = dict(model.named_parameters())
        places = owners(model)
        prefixes = check_prefixes(dense, named, "dense")
        dense_names = [name for name in named if is_under(name, prefixes)]
        check_names(selection.indices, named, "selection")
        whole = {
            name
            for name, i in selection.indices.items()
            if len(i) == named[name].numel() and not shrinks
        }
        for name in selection.indices:
            if name in dense_names:
                raise ValueError(f"dense and selection both name {name!r}; train it one way")
            _check(name, name in whole, selection.shapes[name], named[name], places[name])

        self.model, self.selection = model, selection
        self._flags = {name: p.requires_grad for name, p in named.items()}
        self._places: dict[str, list[tuple[nn.Module, str]]] = {}
        self._compact: dict[str, nn.Parameter] = {}
        self._dense = [named[name] for name in dense_names]
        for name, parameter in named.items():
            parameter.requires_grad_(name in dense_names)
            parameter.grad = None
        for name, positions in selection.indices.items():
            if name in whole:  # it trains as it is
                named[name].requires_grad_(True)
                self._compact[name] = named[name]
                continue
            index = positions.to(named[name].device)
            parts = (None, None) if shrinks else footprint_of(index, named[name], places[name])
            values = named[name].detach().reshape(-1)[index]
            self._compact[name] = nn.Parameter(
                values.to(torch.promote_types(values.dtype, torch.float32))
            )
            self._places[name] = places[name]
            for module, attribute in places[name]:
                module.register_parameter(attribute + SUFFIX, self._compact[name])
                for part, tensor in zip(INDEX, (index, *parts), strict=True):
                    module.register_buffer(attribute + SUFFIX + part, tensor, persistent=False)
                module.__class__ = _masked_class(type(module), attribute)  # type: ignore[arg-type]

    def parameters(self) -> list[nn.Parameter]:
        """What the selection trains: a compact vector (or a whole tensor) for every tensor of the selection."""
        return list(self._compact.values())

    def dense_parameters(self) -> list[nn.Parameter]:
        """What is trained whole beside the selection."""
        return list(self._dense)

    def shrink(self, keep: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
        """Stop training a part of the selection: what is dropped stays at its value, survivors keep their moments.

        Parameters
        ----------
        keep
            ``{name: bool vector}``, one entry for every value of that tensor's compact vector.
        optimizer
            Whose state is shrunk along.

        Raises
        ------
        ValueError
            If `keep` names a tensor without a compact vector, or has another length. Nothing is
            changed.
        """
        for name, kept in keep.items():
            if name not in self._places:
                raise ValueError(
                    f"keep names {name!r}, which has no compact vector; give masked(..., shrinks=True)"
                )
            if kept.dtype != torch.bool or kept.shape != self._compact[name].shape:
                expected = tuple(self._compact[name].shape)
                raise ValueError(
                    f"keep[{name!r}] is {kept.dtype} of shape {tuple(kept.shape)}, not bool of {expected}"
                )
        for name, kept in keep.items():
            values = self._compact[name]
            for module, attribute in self._places[name]:
                write_selected(module, attribute)
            for key, state in optimizer.state.get(values, {}).items():
                if torch.is_tensor(state) and state.shape == values.shape:
                    optimizer.state[values][key] = state[kept]
            gradient, values.grad = values.grad, None
            for module, attribute in self._places[name]:
                index = attribute + SUFFIX + INDEX[0]
                setattr(module, index, getattr(module, index)[kept])
            kept_values = values.data[kept]
            # While the last loss lives, autograd has a node that expects the old length: a change
            # of dtype drops it.
            values.data = kept_values.half()
            values.data = kept_values
            values.grad = None if gradient is None else gradient[kept]

    def close(self) -> None:
        """Write the trained values into the weights and make the model an ordinary one again; twice does nothing."""
        for places in self._places.values():
            for module, attribute in places:
                write_selected(module, attribute)
                module.__class__ = type(module).masked_base  # type: ignore[attr-defined]
                delattr(module, attribute + SUFFIX)
                for part in INDEX:
                    delattr(module, attribute + SUFFIX + part)
        for name, parameter in self.model.named_parameters():
            if name in self._flags:
                parameter.requires_grad_(self._flags[name])
        self._places, self._flags = {}, {}

    def __enter__(self) -> masked:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _check(
    name: str,
    whole: bool,
    shape: tuple[int, ...],
    parameter: nn.Parameter,
    places: Sequence[tuple[nn.Module, str]],
) -> None:
    if tuple(parameter.shape) != tuple(shape):
        raise ValueError(
            f"selection[{name!r}] is for shape {tuple(shape)}, the model has {tuple(parameter.shape)}"
        )
    if parameter.is_meta:
        raise ValueError(
            f"selection[{name!r}] is on the meta device, which holds no values; load the model first"
        )
    if whole:
        return
    if not parameter.is_contiguous():
        raise ValueError(
            f"selection[{name!r}] is not contiguous in memory; set it to .contiguous() first"
        )
    for module, attribute in places:
        if "forward" in vars(module):
            raise ValueError(
                f"selection[{name!r}]: its module's forward was replaced (a hook?); remove that first"
            )
        reason = why_not_partly(module, attribute)
        if reason is not None:
            raise ValueError(f"selection[{name!r}] {reason}")


def why_not_partly(module: nn.Module, attribute: str) -> str | None:
    """Why a part of this module's tensor cannot be selected, in words that follow its name; None where it can."""
    tensor = module._parameters[attribute]
    if (
        tensor is not None
        and tensor.dim() > 1
        and not (attribute == "weight" and _product(type(module)) is not None)
    ):
        return (
            f"is part of a {type(module).__name__}, which has no sampled gradient; select it whole, or only weights of "
            "nn.Linear, nn.Embedding and Conv1D"
        )
    refused = [
        option
        for option in ("max_norm", "sparse", "scale_grad_by_freq")
        if getattr(module, option, None)
    ]
    return f"is an embedding with {refused[0]}; unset it" if refused else None


def footprint_of(
    index: Tensor, parameter: Tensor, places: Sequence[tuple[nn.Module, str]]
) -> tuple[Tensor | None, Tensor | None]:
    """The footprint of a matrix's positions, where one of the modules that it belongs to makes a sampled product."""
    product = parameter.dim() == 2 and any(
        not isinstance(module, nn.Embedding) for module, _ in places
    )
    return footprint(index, *parameter.shape) if product else (None, None)


def write_selected(module: nn.Module, attribute: str) -> None:
    """Copy the compact vector into its dense tensor. `.data` keeps autograd's version of a weight that was saved."""
    dense = module._parameters[attribute].data  # type: ignore[union-attr]
    values = module._parameters[attribute + SUFFIX].data  # type: ignore[union-attr]
    dense.view(-1).index_copy_(
        0, getattr(module, attribute + SUFFIX + INDEX[0]), values.to(dense.dtype)
    )


def _product(cls: type[nn.Module]) -> Callable[[Any, Tensor], Tensor] | None:
    """The forward with a sampled weight gradient for a module class, or None where there is none."""
    cls = vars(cls).get("masked_base", cls)
    if cls is nn.Linear:
        return lambda module, input: linear(
            input, *_selected(module, "weight", *INDEX), module.bias, False
        )
    if cls is nn.Embedding:
        return lambda module, input: embedding(
            input, *_selected(module, "weight", INDEX[0]), module.padding_idx
        )
    if cls.__name__ == "Conv1D" and cls.__module__.startswith("transformers"):
        return lambda module, x: linear(x, *_selected(module, "weight", *INDEX), module.bias, True)
    return None


def _selected(module: nn.Module, attribute: str, *parts: str) -> Iterator[Any]:
    """The dense tensor, once it has taken the vector's values, the vector, and these parts of its index."""
    write_selected(module, attribute)
    own = (module._parameters[attribute], module._parameters[attribute + SUFFIX])
    return chain(own, (module._buffers[attribute + SUFFIX + part] for part in parts))


@cache
def _masked_class(cls: type[nn.Module], attribute: str) -> type[nn.Module]:
    """A subclass of `cls` whose `attribute` is partly selected. A class, unlike a hook, survives `deepcopy`."""
    save, load = _state(cls, attribute)
    members = {"masked_base": cls, "__module__": cls.__module__}
    members |= {"_save_to_state_dict": save, "_load_from_state_dict": load}
    product = _product(cls)
    if attribute == "weight" and product is not None:
        members["forward"] = product
    else:
        members[attribute] = property(
            lambda module: scatter(*_selected(module, attribute, INDEX[0]))
        )
    return type("Masked" + cls.__name__.removeprefix("Masked"), (cls,), members)


def _state(cls: type[nn.Module], attribute: str) -> tuple[Callable[..., None], Callable[..., None]]:
    """How a state is saved and loaded inside: as the ordinary model's, so that either takes the other's."""

    def save(module: Any, state: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        write_selected(module, attribute)
        cls._save_to_state_dict(module, state, prefix, keep_vars)
        if module._parameters[attribute].dtype == module._parameters[attribute + SUFFIX].dtype:
            del state[
                prefix + attribute + SUFFIX
            ]  # a vector of more precision than its weight stays

    def load(module: Any, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        values, dense = module._parameters[attribute + SUFFIX], state.get(prefix + attribute)
        if dense is not None and dense.shape == module._parameters[attribute].shape:
            index = getattr(module, attribute + SUFFIX + INDEX[0])
            values = dense.reshape(-1)[index.to(dense.device)].to(values.dtype)
        state.setdefault(prefix + attribute + SUFFIX, values)
        cls._load_from_state_dict(module, state, prefix, *rest)

    return save, load


def compact_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The compact vectors of a model in masked training, ``(name, vector)``, each once."""
    return ((name, p) for name, p in model.named_parameters() if name.endswith(SUFFIX))
