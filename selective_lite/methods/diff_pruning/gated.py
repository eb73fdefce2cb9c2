"""Which weights get a gate, in which groups; models and options that Diff Pruning refuses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from ...kernels.checks import one_of
from ...params import check_prefixes, in_masked_training, is_under, unwrap, weights
from ..hard_concrete import Stretch, check_stretch
from .groups import Groups, group_ids

Penalty = Literal["product", "sum"]


def gated_weights(
    model: nn.Module,
    groups: Groups,
    penalty: str,
    stretch: Stretch,
    head: Sequence[str] | None,
    exclude: str | Sequence[str],
) -> tuple[dict[str, nn.Parameter], dict[str, Tensor] | None]:
    """The weights to gate and the groups of `group_ids`; arguments as in `Relaxed`.

    Nothing large is made, so that a method can check its arguments when it is called.

    Raises
    ------
    ValueError
        If the model is in masked training, in several processes or without values; for an option
        outside its range, an exclusion that leaves nothing, groups that do not fit the model, or
        grouped weights of several dtypes or devices.
    """
    wrapped = isinstance(model, nn.parallel.DistributedDataParallel)
    if wrapped and torch.distributed.get_world_size() > 1:
        raise ValueError(
            "model is wrapped in DistributedDataParallel, which would not average the gradients of "
            "differences and gates; train it in one process"
        )
    if in_masked_training(model):
        raise ValueError("model is already in masked training; leave that first")
    check_stretch(stretch)
    one_of("penalty", penalty, ("product", "sum"))
    candidates = weights(model, head)
    prefixes = check_prefixes(exclude, candidates, "exclude")
    theta = {name: p for name, p in candidates.items() if not is_under(name, prefixes)}
    if not theta:
        raise ValueError(f"exclude={exclude!r} leaves no weight to gate")
    if lost := [name for name, p in theta.items() if p.is_meta]:
        raise ValueError(
            f"{lost[0]!r} is on the meta device, which holds no values (offloaded?); load the "
            "whole model first"
        )
    ids = group_ids(unwrap(model), theta, groups)
    kinds = {f"{trained_dtype(p)} on {p.device}" for p in theta.values()}
    if ids is not None and len(kinds) > 1:
        raise ValueError(
            f"model has weights of {sorted(kinds)}; gates of groups need one dtype and one device"
        )
    return theta, ids


def trained_dtype(p: Tensor) -> torch.dtype:
    """The dtype in which a tensor is trained: in half precision small steps would be lost."""
    return torch.promote_types(p.dtype, torch.float32)
