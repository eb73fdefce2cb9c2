"""Attach: how a layer's class is replaced by a subclass of it, and restored.

A class, unlike a hook, survives `deepcopy` and ``load_state_dict(assign=True)``, and the layer's
own tensors keep their names. Classes that are made at run time cannot be found by their name, so
an attached layer says how its class is made again: it copies and pickles as any other one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import nn


class Attached:
    """Mixin of every class that stands in for a layer's own one."""

    base: ClassVar[type[nn.Module]]  # the class that the layer had
    made_by: ClassVar[tuple[Callable[..., type], tuple]]  # a function, and its arguments after base

    def __reduce_ex__(self, protocol: Any) -> tuple:
        """How `pickle` and `deepcopy` make the layer again."""
        cls = type(self)
        get = getattr(super(), "__getstate__", None)  # Python 3.10 has none
        return _new, (cls.base, *cls.made_by), get() if get else self.__dict__


def _new(base: type[nn.Module], make: Callable[..., type], arguments: tuple) -> Any:
    cls: Any = make(base, *arguments)
    return cls.__new__(cls)


def stand_in(
    cls: type[nn.Module], bases: tuple[type, ...], made_by: tuple, members: dict[str, Any]
) -> Any:
    """A subclass that stands in for `cls`; the name stays, for `save_pretrained` looks at it."""
    kept = {key: getattr(cls, key) for key in ("__module__", "__qualname__", "__doc__")}
    return type(cls.__name__, bases, {**kept, "base": cls, "made_by": made_by, **members})


def attach(layer: nn.Module, make: Callable[..., type], *arguments: Any) -> None:
    """Give a layer the class ``make(its class, *arguments)``, a subclass with `Attached` in it."""
    layer.__class__ = make(type(layer), *arguments)


def detach(layer: nn.Module) -> None:
    """Give a layer back the class that it had before the last `attach`."""
    layer.__class__ = type(layer).base  # type: ignore[attr-defined]
