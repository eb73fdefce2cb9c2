"""Sharded: models under FSDP2 (`fully_shard`), of whose tensors every process holds some rows.

What is frozen stays sharded. What is trained is replicated: before FSDP gathers a tensor, every
process writes the values that fall into its rows; after a backward, gradients are averaged. Of
torch's sharded tensors nothing is imported here: they are known by what they have.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

ORDER = "call fully_shard (FSDP2) before masked, or use DistributedDataParallel"
LATE = f"{ORDER}; accelerate (Trainer) takes a sharded model with auto_wrap_policy NO_WRAP"


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is a `DTensor`: some rows of a larger one."""
    return hasattr(tensor, "device_mesh")


def whole(tensor: Any) -> Tensor:
    """A tensor as it is, or gathered if it is sharded: then every process has to ask for it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def fsdp_modules(model: nn.Module) -> list[Any]:
    """The modules that `fully_shard` was called for."""
    return [module for module in model.modules() if hasattr(type(module), "_get_fsdp_state")]


def _groups(model: nn.Module) -> list[Any]:
    """FSDP's own record of the tensors that it gathers together, and of how it was set."""
    states = [vars(module._get_fsdp_state()) for module in fsdp_modules(model)]
    # Older versions of torch have one, or None.
    held = [own.get("_fsdp_param_groups", [own.get("_fsdp_param_group")]) for own in states]
    return [group for groups in held for group in groups if group is not None]


def reshard(model: nn.Module) -> None:
    """Register the sharded tensors where a forward left gathered ones, as FSDP's root does."""
    for group in _groups(model):
        group._to_sharded()  # `reshard` does nothing after a forward that raised


def _divide_factor(model: nn.Module) -> float | None:
    """What FSDP divides sums of gradients by, if not by the number of processes.

    Raises
    ------
    ValueError
        If the model's modules do not agree, or it has a hook that FSDP alone would call.
    """
    groups = _groups(model)
    if any(group._all_reduce_hook is not None for group in groups):
        what = "set_all_reduce_hook was called, whose hook would not see what masked training sends"
        raise ValueError(f"{what}; give fully_shard a mesh of two dimensions to replicate over one")
    if len(found := {group.gradient_divide_factor for group in groups}) > 1:
        what = f"set_gradient_divide_factor was called with different factors, {found}"
        raise ValueError(f"{what}; call it alike for every module that was given to fully_shard")
    return found.pop() if found else None


def mesh_of(model: nn.Module, named: Mapping[str, Tensor]) -> Any:
    """The processes that a model is sharded over (a `DeviceMesh`), or None if it is not.

    Raises
    ------
    ValueError
        If they are not the same for all tensors, the model is not under FSDP2, or as
        `_divide_factor`.
    """
    tensors: list[Any] = [p for p in named.values() if is_sharded(p)]
    if len(meshes := {p.device_mesh for p in tensors}) > 1:
        raise ValueError(f"model is sharded over {len(meshes)} device meshes; use one for all")
    if meshes and not fsdp_modules(model):
        what = "model has sharded tensors, but is not under FSDP2 (tensor parallel?)"
        raise ValueError(f"{what}; shard it with fully_shard")
    _divide_factor(model)
    return meshes.pop() if meshes else None


def why_refused(tensor: Any) -> str | None:
    """Why a sharded tensor cannot be trained, in words after its name; None if it can."""
    if not is_sharded(tensor):
        return None
    *before, last = tensor.placements
    by_rows = type(last).__name__ == "Shard" and last.dim == 0
    if not by_rows or not all(placement.is_replicate() for placement in before):
        return f"is sharded as {tensor.placements}; shard rows only (fully_shard's default)"
    if tensor.device.type != tensor.device_mesh.device_type:
        return f"is offloaded to {tensor.device}; call fully_shard without an offload_policy"
    return None


@dataclass
class Rows:
    """The rows of a sharded tensor that this process holds, and the values that fall into them.

    Attributes
    ----------
    tensor
        The sharded tensor.
    first
        The flat position of its first entry here.
    chosen
        Which of the values are here; positions are sorted, so that these are neighbours.
    """

    tensor: Any
    first: int
    chosen: slice

    @torch.no_grad()
    def write(self, values: Tensor, index: Tensor | None) -> None:
        """Write the values that are here into the rows; their positions are `index`, or all."""
        local = self.tensor.to_local().data.view(-1)  # no new version of it, as in `Entries.write`
        own = values.reshape(-1)[self.chosen].to(local.dtype)
        if index is None:
            local.copy_(own)
        else:
            local.index_copy_(0, index[self.chosen].long() - self.first, own)


def rows_of(tensor: Any, index: Tensor | None) -> Rows:
    """What a process holds of a sharded tensor, and of the values at sorted flat positions."""
    processes, rank = tensor.device_mesh.shape[-1], tensor.device_mesh.get_coordinate()[-1]
    height = -(-tensor.shape[0] // processes)  # FSDP cuts as `torch.chunk` does
    first = min(rank * height, tensor.shape[0]) * prod(tensor.shape[1:])
    ends = torch.tensor([first, first + tensor.to_local().numel()], device="cpu")
    if index is not None:
        ends = torch.searchsorted(index, ends.to(index))
    return Rows(tensor, first, slice(*ends.tolist()))


def follow(model: nn.Module, entries: Iterable[Any], trained: Iterable[Tensor], mesh: Any) -> list:
    """Hooks that keep a sharded model and replicated values together.

    Parameters
    ----------
    model
        The model.
    entries
        The `Entries` of its tensors.
    trained
        What is trained, the same in every process.
    mesh
        The processes.

    Returns
    -------
    list
        The hooks' handles.
    """
    both, own = _Together(model, list(trained), mesh), set(entries)
    hooks = [p.register_hook(both.arrive) for p in both.trained]
    # Each of FSDP's modules, for one may be called alone; and ours first, for FSDP gathers in such
    # a hook, in streams that wait for what was done before the outermost one.
    for module in {model, *fsdp_modules(model)}:
        if any(p.requires_grad for p in module.parameters()):
            below = [child for child in module.modules() if child in own and child.here is not None]
            hooks.append(module.register_forward_pre_hook(partial(both.enter, below), prepend=True))
            hooks.append(module.register_forward_hook(both.leave, prepend=True, always_call=True))
    return hooks


class _Together:
    """What is done around the forwards and the backwards of a sharded model."""

    def __init__(self, model: nn.Module, trained: list[Any], mesh: Any) -> None:
        self.model, self.trained, self.mesh = model, trained, mesh
        self.outermost: nn.Module | None = None  # the module whose forward is under way
        self.scale = 1.0
        self.queued: Callable[[], Any] = lambda: None

    def enter(self, below: list[Any], module: nn.Module, _: Any) -> None:
        """Before a forward: write the values, once for all modules in it."""
        if self.outermost in (None, module):
            self.outermost = module
            for each in below:
                each.write(each.here.tensor)

    def leave(self, module: nn.Module, _: Any, output: Any) -> None:
        """After a forward, which may have raised: have every process meet in the backward.

        The output of a module that trains has a gradient even where this process's batch missed
        all that is trained: its backward, too, gathers tensors, and averages in the end.
        """
        self.outermost = None if self.outermost is module else self.outermost
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            leaves = _pytree.tree_leaves((output, getattr(output, "__dict__", {})))
            tensors = [t for t in leaves if torch.is_tensor(t) and t.is_floating_point()]
            with_gradient = [t for t in tensors if t.requires_grad]
            for tensor in with_gradient or [t.requires_grad_() for t in tensors]:
                tensor.register_hook(self.begin)

    def begin(self, _: Tensor) -> None:
        """At the first gradient of a backward: have all of them averaged at its end, once."""
        if self.queued() is None:
            self.scale = self.mesh.size() / (_divide_factor(self.model) or self.mesh.size())
            average = partial(self.average)  # lives as long as this backward
            self.queued = weakref.ref(average)
            engine: Any = torch.autograd.Variable._execution_engine
            engine.queue_callback(average)

    def arrive(self, grad: Tensor) -> Tensor:
        """At a gradient of what is trained, before it is added to those of other backwards."""
        self.begin(grad)
        return grad if self.scale == 1 else grad * self.scale

    @torch.no_grad()
    def average(self) -> None:
        """At the end of a backward: the mean over the processes of every gradient.

        Of all of them, whichever of them a process has a gradient for: processes that skip
        different layers send the same number of values, and the sums meet.
        """
        for dtype in dict.fromkeys(p.dtype for p in self.trained):
            own = [p for p in self.trained if p.dtype == dtype]
            has = torch.tensor([p.grad is not None for p in own], device=own[0].device)
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in own]
            flat = torch.cat([*(grad.reshape(-1) for grad in grads), has.to(dtype)])
            for dim in range(self.mesh.ndim):
                torch.distributed.all_reduce(flat, group=self.mesh.get_group(dim))
            *means, has = flat.div_(self.mesh.size()).split([*(p.numel() for p in own), len(own)])
            for number, (p, mean) in enumerate(zip(own, means, strict=True)):
                if p.grad is not None:
                    p.grad.copy_(mean.view_as(p))
                elif has[number] > 0:  # another process has one
                    p.grad = mean.view_as(p).clone()
