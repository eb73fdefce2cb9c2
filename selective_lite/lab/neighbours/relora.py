"""ReLoRA (Lialin et al. 2023): a LoRA that is merged and begun anew, so that ranks add up."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ...kernels.small import LoRA
from ...layers.small import adapter_parameters, adapters, add_adapters
from ...params import owners
from ...training import Phase, Phases, Step, cosine_decay


def relora(
    model: nn.Module,
    names: Sequence[str],
    *,
    rank: int,
    lr: float,
    epochs: int,
    cycles: int,
    warmup: float = 0.1,
    kept: float = 0.1,
    seed: int = 0,
) -> Phases:
    """Train LoRAs in cycles; at the end of each but the last, merge them and begin anew.

    Parameters
    ----------
    model
        Gets LoRAs beside the layers of `names`, as `layers.small.add_adapters` puts them there.
    names
        Of weights, such as ``"encoder.0.query.weight"``.
    rank, lr, epochs
        Of every LoRA; learning rate at the top of a cycle; passes over the batches, all cycles.
    cycles
        How often a LoRA is trained; the difference can have ``cycles * rank`` ranks.
    warmup
        Share of a cycle in which the rate rises from zero; then it falls along half a cosine.
    kept
        Share of the optimizer's state, the largest entries, that survives a restart.
    seed
        Of the generator that draws the factors A.

    Raises
    ------
    ValueError
        If `cycles` is below 1, a share is outside [0, 1], or a rank does not fit.

    Notes
    -----
    The authors' code prunes 90 % or more of the state by magnitude, or all of it at random.
    """
    if isinstance(cycles, bool) or cycles < 1:
        raise ValueError(f"cycles={cycles} must be at least 1")
    for name, share in (("warmup", warmup), ("kept", kept)):
        if not 0 <= share <= 1:
            raise ValueError(f"{name}={share} must be in [0, 1]")
    add_adapters(model, names, rank=rank, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)

    def after_step(step: Step) -> None:
        here, before = (cycles * s // step.steps for s in (step.step, step.step - 1))
        if before < here < cycles:
            restart(model, generator)
            forget(step.optimizer, kept)

    def phases() -> Generator[Phase, None, None]:
        params = list(adapter_parameters(model).values())
        schedule = partial(jagged, cycles=cycles, warmup=warmup)
        group = {"params": params, "lr": lr, "weight_decay": 0.0, "schedule": schedule}
        yield Phase("ReLoRA", [group], epochs, after_step=after_step)

    return Phases(phases())


def jagged(progress: float, cycles: int, warmup: float) -> float:
    """The rate's multiplier: in each cycle a rise from zero, then half a cosine to zero."""
    within = progress * cycles % 1
    if within < warmup:
        return within / warmup
    return cosine_decay((within - warmup) / (1 - warmup))


@torch.no_grad()
def restart(model: nn.Module, generator: torch.Generator) -> None:
    """Add every LoRA to its weight, draw A anew, set B to zero: the model computes the same."""
    places = owners(model)
    for name, module in adapters(model).items():
        if isinstance(module, LoRA):
            (layer, attribute), *_ = places[name]
            weight: Tensor = getattr(layer, attribute)
            # (eq-relora)  W <- W + B A,  A ~ uniform,  B <- 0
            weight += module.difference().to(weight)
            bound = module.A.shape[1] ** -0.5
            drawn = torch.rand(module.A.shape, generator=generator, device="cpu")
            module.A.copy_((2 * drawn - 1) * bound)
            module.B.zero_()


@torch.no_grad()
def forget(optimizer: Optimizer, kept: float) -> None:
    """Zero an optimizer's running means but for the share of each with the largest entries."""
    for state in optimizer.state.values():
        for value in state.values():
            if _mean(value):
                count = round(kept * value.numel())
                rest = value.abs().flatten().argsort(descending=True)[count:]
                value.view(-1)[rest] = 0


def _mean(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0
