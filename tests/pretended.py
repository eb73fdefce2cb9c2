"""A pretended accelerator: its tensors refuse to meet tensors that are on the CPU.

They keep their numbers there all the same.

CI has no GPU. On this one a tensor that was made on the wrong device, or was left on the CPU, fails
as on a real one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

NAME = "pretended"
aten = torch.ops.aten
MOVES = {aten.copy_, aten._to_copy}  # from device to device
# positions may lie on the CPU
INDEXES = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}


@contextmanager
def accelerator() -> Iterator[str]:
    """Inside, the device of this name is there."""
    with Made(), Computed(), torch.autograd.set_multithreading_enabled(False):
        yield NAME


class Pretended(Tensor):
    """A tensor on the accelerator; `held` is the one on the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Pretended:
        strides = held.stride() if held.layout == torch.strided else None
        made = Tensor._make_wrapper_subclass(
            cls, held.shape, strides=strides, dtype=held.dtype, device=f"{NAME}:0"
        )
        made.held = held
        return made

    # Having these two makes `module.to` replace a parameter by one of this class.
    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], context: None, size: Any, stride: Any
    ) -> Pretended:
        return Pretended(inner["held"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})

    @property
    def data(self) -> Tensor:
        return Tensor.data.__get__(self)

    @data.setter
    def data(self, value: Pretended) -> None:
        Tensor.data.__set__(self, value)
        self.held = value.held

    def tolist(self) -> list[Any]:
        return self.held.tolist()

    def __repr__(self) -> str:
        return f"{NAME}({self.held})"


class Computed(TorchDispatchMode):
    """Operations that make or take tensors of the accelerator."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})


class Made(TorchFunctionMode):
    """`torch.tensor`, which no dispatch mode sees."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.tensor and _is_here(kwargs.get("device")):
            return torch.tensor(*args, **{**kwargs, "device": "cpu"}).to(NAME)
        return func(*args, **kwargs)


def computed(func: Any, args: Any, kwargs: Any) -> Any:
    """An operation's result, if all its tensors are on one device."""
    given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    here = {id(t.held): t for t in given if isinstance(t, Pretended)}
    packet = func.overloadpacket
    if here and packet not in MOVES:
        for t in (args[0], *args[2:]) if packet in INDEXES else given:
            if isinstance(t, Tensor) and not isinstance(t, Pretended) and t.dim() > 0:
                raise RuntimeError(
                    f"{func} takes tensors of one device, and found {NAME}:0 and {t.device}"
                )
    if kwargs.get("device") is not None:
        stays = _is_here(kwargs["device"])
        kwargs = {**kwargs, "device": "cpu"} if stays else kwargs
    else:
        stays = isinstance(args[0], Pretended) if packet is aten.copy_ else bool(here)
    found = func(*_held(args), **_held(kwargs))
    # What was changed in place is given back as the tensor that was given.
    return (
        tree_map_only(Tensor, lambda t: here[id(t)] if id(t) in here else Pretended(t), found)
        if stays
        else found
    )


def _held(tree: Any) -> Any:
    return tree_map_only(Pretended, lambda t: t.held, tree)


def _is_here(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


class _Module(_DummyBackendModule):
    """`torch.pretended`: as torch's example of one, and its random numbers are the CPU's."""

    def get_rng_state(self, device: Any) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_rng_state(self, state: Tensor, device: Any) -> None:
        pass


_setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
