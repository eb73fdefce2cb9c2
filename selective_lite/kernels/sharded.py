"""Sharded: models under FSDP2 (`fully_shard`), of whose tensors every process holds some rows.

What is frozen stays sharded. What is trained is replicated: before FSDP gathers a tensor, every
process writes the values that fall into its rows; after a backward, gradients are averaged. Of
torch's sharded tensors nothing is imported here: they are known by what they have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

ORDER = "call fully_shard (FSDP2) before masked, or use DistributedDataParallel"


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
    found: list[Any] = []
    for module in fsdp_modules(model):
        own = vars(module._get_fsdp_state())  # older versions of torch have one, or None
        found += own.get("_fsdp_param_groups", [own.get("_fsdp_param_group")])
    return [group for group in found if group is not None]


def reshard(model: nn.Module) -> None:
    """Register the sharded tensors where a forward left gathered ones, as FSDP's root does."""
    for group in _groups(model):
        group._to_sharded()  # `reshard` does nothing after a forward that raised


def mesh_of(model: nn.Module, named: Mapping[str, Tensor]) -> Any:
    """The processes that a model is sharded over (a `DeviceMesh`), or None if it is not.

    Raises
    ------
    ValueError
        If they are not the same for all tensors, or the model is not under FSDP2.
    """
    tensors: list[Any] = [p for p in named.values() if is_sharded(p)]
    if len(meshes := {p.device_mesh for p in tensors}) > 1:
        raise ValueError(f"model is sharded over {len(meshes)} device meshes; use one for all")
    if meshes and not fsdp_modules(model):
        what = "model has sharded tensors, but is not under FSDP2 (tensor parallel?)"
        raise ValueError(f"{what}; shard it with fully_shard")
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
    own, hooks = set(entries), []
    # Each of FSDP's modules, for one may be called alone; and ours first, for FSDP gathers in such
    # a hook, in streams that wait for what was done before the outermost one.
    for module in {model, *fsdp_modules(model)}:
        below = [child for child in module.modules() if child in own and child.here is not None]
        hooks.append(module.register_forward_pre_hook(partial(_write, below), prepend=True))
    average = _averaging(list(trained), mesh)
    hooks += [p.register_post_accumulate_grad_hook(average) for p in trained]
    return hooks


def _write(entries: list[Any], *_: Any) -> None:
    for each in entries:
        each.write(each.here.tensor)


def _averaging(trained: list[Any], mesh: Any) -> Callable[[Tensor], None]:
    """A hook for every parameter, which has all gradients averaged at the end of a backward.

    Once for all, whichever of them a process has a gradient for: processes that skip different
    layers send the same number of values, and the sums meet.
    """
    last = -1

    def seen(_: Tensor) -> None:
        nonlocal last
        if (backward := torch._C._current_graph_task_id()) != last:
            last = backward
            engine: Any = torch.autograd.Variable._execution_engine
            engine.queue_callback(average)

    @torch.no_grad()
    def average() -> None:
        for dtype in dict.fromkeys(p.dtype for p in trained):
            own = [p for p in trained if p.dtype == dtype]
            has = torch.tensor([p.grad is not None for p in own], device=own[0].device)
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in own]
            flat = torch.cat([*(grad.reshape(-1) for grad in grads), has.to(dtype)])
            for dim in range(mesh.ndim):
                torch.distributed.all_reduce(flat, group=mesh.get_group(dim))
            *means, has = flat.div_(mesh.size()).split([*(p.numel() for p in own), len(own)])
            for number, (p, mean) in enumerate(zip(own, means, strict=True)):
                if p.grad is not None:
                    p.grad.copy_(mean.view_as(p))
                elif has[number] > 0:  # another process has one
                    p.grad = mean.view_as(p).clone()

    return seen
