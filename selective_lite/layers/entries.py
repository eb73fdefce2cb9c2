"""Entries: the selected entries of one tensor, a child module of every layer that the tensor is in.

The dense tensor stays where it is, frozen. The entries' values are a compact parameter, a leaf that
optimizers train. Whoever reads the tensor, be it the layer itself, its parent or an evaluation's
fast path, gets the dense tensor with the values written into it, and the gradient goes back to
them: sampled where the layer's own forward asks for it, else gathered from the dense gradient.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from ..kernels.functions import embedding, linear, scatter
from ..kernels.sampled import Index, precise, write
from ..kernels.sharded import LATE, Rows, is_sharded, rows_of, whole
from .attach import Attached, attach, detach, stand_in

TORCH = "torch.distributed."
CHILD = "{}_entries"  # the name of the child; the tensor keeps its own
EXPORTED = "leave masked training before the model is exported, traced or scripted"
REPLACED = f"cannot be replaced in masked training; {LATE}"


class Entries(nn.Module):
    """The selected entries of a tensor: values to train, their positions, and their footprint.

    Parameters
    ----------
    dense
        The tensor, any shape, floating point, sharded or not.
    index
        Flat row-major positions (k,), int32 where the tensor has fewer than 2^31 entries, else
        int64, on its device. ``None`` takes all of the
        tensor: then the values are a copy in more precision (a master of a half-precision tensor).
    rows, columns
        The `kernels.sampled.footprint` of the positions, or None.

    Attributes
    ----------
    values
        (k,), or the tensor's shape if `index` is None; float32, or float64 for a float64 tensor.
        Of a sharded tensor every process has all of them.
    here
        Which of them fall into the rows that this process holds of a sharded tensor.
    """

    index: Index
    rows: Index
    columns: Index
    here: Rows | None

    def __init__(
        self, dense: Tensor, index: Index, rows: Index = None, columns: Index = None
    ) -> None:
        super().__init__()
        own = whole(dense.detach())
        self.here = rows_of(dense, index) if is_sharded(dense) else None
        chosen = own.clone() if index is None else own.reshape(-1)[index]
        self.values = nn.Parameter(chosen.to(precise(own)))
        for name, buffer in (("index", index), ("rows", rows), ("columns", columns)):
            self.register_buffer(name, buffer, persistent=False)
        self.__dict__["leaf"] = self.values  # what optimizers train; not registered twice

    def write(self, dense: Tensor) -> None:
        """Copy the values into the dense tensor; into the rows that are here if it is sharded.

        Via ``.data``, so that the version counter does not change and tensors that autograd saved
        for a backward stay valid.
        """
        values = self._parameters["values"]
        compiling = torch.compiler.is_compiling()  # asking for more would break the graph
        if torch.compiler.is_exporting() or (not compiling and torch._C._is_tracing()):
            raise RuntimeError(EXPORTED)
        if not compiling and values is not self.__dict__["leaf"]:
            raise RuntimeError(f"the compact values of a tensor {REPLACED}")
        if is_sharded(dense):
            if self.here is None:
                raise RuntimeError(f"a tensor's dense values {REPLACED}")
            self.here.tensor = dense  # loading a state may replace it
            self.here.write(values.data, self.index)  # type: ignore[union-attr]
            return
        target, source = dense.data, values.data.to(dense.dtype)  # type: ignore[union-attr]
        if self.index is None:
            target.copy_(source)
        else:
            write(target, source, self.index)

    def take(self, dense: Tensor) -> None:
        """Set the values from the dense tensor, except where they agree with it already.

        A value of more precision than the tensor that rounds to what is there is kept.
        """
        values, own = self.values.data, whole(dense.detach())
        own = (own if self.index is None else own.reshape(-1)[self.index]).to(values.device)
        same = values.to(own.dtype) == own
        values.copy_(torch.where(same, values, own.to(values.dtype)))

    def read(self, dense: Tensor) -> Tensor:
        """The tensor as it is trained now; its gradient goes to the values."""
        self.write(dense)
        if self.index is None:
            return self.values.to(dense.dtype)
        return scatter(dense, self.values, self.index)

    def _apply(self, fn: Any, recurse: bool = True) -> Entries:
        """Move as the model does, but stay precise where the model becomes half precision."""
        before = self.values.data
        super()._apply(fn, recurse)
        if self.values.element_size() < 4:
            self.values.data = before.to(self.values.device)
        return self

    def _save_to_state_dict(self, *_: Any) -> None:
        """Nothing: the layer saves its tensor with the values in it."""

    def _load_from_state_dict(self, *_: Any) -> None:
        """Nothing: the layer loads its tensor and gives the values what is in it."""

    def extra_repr(self) -> str:
        """How many entries there are."""
        return f"{self.values.numel()} entries"


class Selected(Attached):
    """Mixin of the classes of layers with selected entries."""

    attributes: ClassVar[tuple[str, ...]]  # the tensors that have entries

    def __prepare_scriptable__(self) -> None:
        raise RuntimeError(EXPORTED)

    def _save_to_state_dict(self, *rest: Any) -> None:
        for attribute in self.attributes:
            current(self, attribute)
        super()._save_to_state_dict(*rest)  # type: ignore[misc]

    def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state, prefix, *rest)  # type: ignore[misc]
        for attribute in self.attributes:
            if prefix + attribute in state:
                entries_of(self, attribute).take(dense_of(self, attribute))


class LinearProduct(nn.Linear):
    """`nn.Linear` with the gradient of its weight at the selected entries only."""

    def forward(self, input: Tensor) -> Tensor:
        """As of `nn.Linear`."""
        return linear(input, product_operands(self), self.bias)


class EmbeddingRows(nn.Embedding):
    """`nn.Embedding` with the gradient of its table at the selected entries only."""

    def forward(self, input: Tensor) -> Tensor:
        """As of `nn.Embedding`."""
        dense, entries = current(self, "weight")
        return embedding(input, dense, entries.values, entries.index, self.padding_idx)


class Conv1DProduct(nn.Module):
    """Hugging Face's ``Conv1D``, a linear layer that holds W^T, with the gradient as above."""

    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        """As of ``Conv1D``."""
        return linear(x, product_operands(self), self.bias, True)


def is_conv1d(cls: type) -> bool:
    """Whether a class is Hugging Face's ``Conv1D``, told without importing `transformers`."""
    return cls.__name__ == "Conv1D" and cls.__module__.startswith("transformers")


def product_of(cls: type[nn.Module]) -> type[nn.Module] | None:
    """The class whose forward samples the gradient of a layer's ``weight``, or None."""
    cls = next(c for c in cls.__mro__ if Attached not in c.__mro__)
    if issubclass(cls, nn.Linear):
        return LinearProduct
    if issubclass(cls, nn.Embedding):
        return EmbeddingRows
    return Conv1DProduct if is_conv1d(cls) else None


def samples(module: nn.Module, attribute: str) -> bool:
    """Whether a tensor's gradient is sampled, and never formed as a whole.

    True for the weight of `nn.Linear`, `nn.Embedding`, ``Conv1D``, and of subclasses whose forward
    is theirs, or calls it.
    """
    product = product_of(type(module)) if attribute == "weight" else None
    # An embedding that scales divides its gradient by how often a row is looked up.
    other = any(getattr(module, option, False) for option in ("sparse", "scale_grad_by_freq"))
    if product is None or other or "forward" in vars(module):
        return False
    plain = (nn.Linear.forward, nn.Embedding.forward, LinearProduct.forward, EmbeddingRows.forward)
    classes = (c for c in type(module).__mro__ if Attached not in c.__mro__)
    first = next(c for c in classes if "forward" in vars(c))
    own = vars(first)["forward"]
    calls = getattr(getattr(own, "__code__", None), "co_names", ())
    return own in plain or is_conv1d(first) or "super" in calls


def dense_of(module: Any, attribute: str) -> Tensor:
    """The dense tensor itself, as registered."""
    return module._parameters[attribute]


def entries_of(module: Any, attribute: str) -> Entries:
    """The entries of a layer's tensor, if it has any."""
    return module._modules.get(CHILD.format(attribute))


def current(module: Any, attribute: str) -> tuple[Tensor, Entries]:
    """The dense tensor with the values of now in it, and its entries."""
    dense, entries = dense_of(module, attribute), entries_of(module, attribute)
    entries.write(dense)
    return dense, entries


def product_operands(module: Any) -> tuple[Tensor, Tensor, Any, Any, Any]:
    """What `functions.linear` takes between the input and the bias."""
    dense, own = current(module, "weight")
    return dense, own.values, own.index, own.rows, own.columns


def _reading(attribute: str) -> property:
    def read(module: Any) -> Tensor:
        dense, entries = dense_of(module, attribute), entries_of(module, attribute)
        # FSDP looks whether the sharded parameter is still the one that it has made.
        asks = sys._getframe(1).f_globals["__name__"] if is_sharded(dense) else ""
        return current(module, attribute)[0] if asks.startswith(TORCH) else entries.read(dense)

    def replace(module: Any, value: Any) -> None:
        raise RuntimeError(f"{attribute!r} {REPLACED}")

    return property(read, replace)


def _flat_weights(module: Any) -> list[Tensor | None]:
    return [getattr(module, name, None) for name in module._flat_weights_names]


@cache
def selected_class(cls: type[nn.Module], attributes: tuple[str, ...], sampled: bool) -> Any:
    """A subclass of `cls` that reads these tensors through their entries.

    Parameters
    ----------
    cls
        The layer's class.
    attributes
        Names of the tensors that have entries.
    sampled
        Whether the forward samples the gradient of ``weight``. The class that does so stands
        between `cls` and `nn.Linear` or `nn.Embedding`: a subclass's forward that calls theirs,
        as Gemma's and BART's embeddings do, finds it there.
    """
    product = product_of(cls) if sampled else None
    bases: tuple[type, ...] = (Selected, cls)
    members: dict[str, Any] = {name: _reading(name) for name in attributes}
    if product is Conv1DProduct:
        members["forward"] = Conv1DProduct.forward
    elif product is not None:
        bases = (Selected, product) if cls in product.__bases__ else (Selected, cls, product)
    if issubclass(cls, nn.RNNBase):  # its forward reads a list of its weights
        members["_flat_weights"] = property(_flat_weights, lambda module, value: None)
    members["attributes"] = attributes
    return stand_in(cls, bases, (selected_class, (attributes, sampled)), members)


def attach_entries(module: nn.Module, attribute: str, entries: Entries, sampled: bool) -> None:
    """Make a layer read one of its tensors through entries; `detach_entries` undoes it."""
    attributes: tuple[str, ...] = ()
    if isinstance(module, Selected):
        attributes, sampled_before = type(module).made_by[1]
        sampled = sampled or sampled_before
        detach(module)
    module.add_module(CHILD.format(attribute), entries)
    attach(module, selected_class, tuple(sorted((*attributes, attribute))), sampled)


def detach_entries(module: nn.Module) -> None:
    """Write the values of a layer's entries into its tensors, and restore its class."""
    if isinstance(module, Selected):
        for attribute in type(module).attributes:
            current(module, attribute)
            del module._modules[CHILD.format(attribute)]
        detach(module)


def why_refused(module: nn.Module, attribute: str) -> str | None:
    """Why a layer's tensor cannot be selected in part, in words after its name; None if it can."""
    containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    if isinstance(module, containers) and not isinstance(module, ParametrizationList):
        return f"belongs to a {type(module).__name__} itself, whose children are what it runs"
    if isinstance(module, torch.jit.ScriptModule):
        return "belongs to a scripted module, whose code is fixed"
    if getattr(module, "max_norm", None):
        return "is an embedding with max_norm, which changes weights in its forward"
    if hasattr(module, CHILD.format(attribute)):
        return f"belongs to a layer that has a {CHILD.format(attribute)!r} of its own"
    return None
