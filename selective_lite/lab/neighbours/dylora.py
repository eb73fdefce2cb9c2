"""DyLoRA (Valipour et al. 2023): one LoRA trained so that its first ranks work without the rest."""

from __future__ import annotations

from collections.abc import Generator, Iterable

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ...kernels.small import LoRA
from ...layers.small import adapter_parameters, adapters, attach_module, find_layers
from ...training import Phase, Phases, Step


class DyLoRA(LoRA):
    """A LoRA of which the first `used` ranks compute; the rest wait."""

    used: int

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The layer's output y (..., d_out), and the used ranks' of its input x (..., d_in)."""
        # (eq-dylora)  y = W x + b + B[:, :u] A[:u] x
        return y + linear(linear(x, self.A[: self.used]), self.B[:, : self.used])

    def difference(self) -> Tensor:
        """The used ranks' part of B A, (d_out, d_in)."""
        u = self.used
        return self.B.detach()[:, :u] @ self.A.detach()[:u]


def dylora(
    model: nn.Module, names: Iterable[str], *, rank: int, lr: float, epochs: int, seed: int = 0
) -> Phases:
    """Train LoRAs of which each step uses the first few ranks, a number drawn anew each time.

    Parameters
    ----------
    model
        Gets a `DyLoRA` beside the layers of `names`.
    names
        Of weights, such as ``"encoder.0.query.weight"``.
    rank, lr, epochs
        The most ranks; learning rate; passes over the batches.
    seed
        Of the generators that draw the factors A, and how many ranks a step uses.

    Raises
    ------
    ValueError
        As `layers.small.add_adapters`.

    Notes
    -----
    All used ranks are trained, as in the paper's main runs; its other variant trains the last of
    them alone. After training all ranks are used; `use` sets fewer.
    """
    found = find_layers(model, dict.fromkeys(names, rank))
    generator = torch.Generator().manual_seed(seed)
    for layers, d_in, d_out in found.values():
        like = layers[0].weight
        module = DyLoRA(d_in, d_out, rank, generator=generator, like=like)
        module.used = rank
        attach_module(layers, module)

    def draw() -> None:
        use(model, int(torch.randint(1, rank + 1, (), generator=generator, device="cpu")))

    def after_step(step: Step) -> None:
        draw() if step.step < step.steps else use(model, rank)

    def phases() -> Generator[Phase, None, None]:
        draw()
        group = {"params": list(adapter_parameters(model).values()), "lr": lr, "weight_decay": 0.0}
        yield Phase("DyLoRA", [group], epochs, after_step=after_step)

    return Phases(phases())


def use(model: nn.Module, ranks: int) -> None:
    """Let every `DyLoRA` of a model compute with its first ranks.

    Raises
    ------
    ValueError
        If the model has none, or `ranks` is below 1 or over what one has.
    """
    found = [module for module in adapters(model).values() if isinstance(module, DyLoRA)]
    if not found:
        raise ValueError("model has no DyLoRA; train one with dylora")
    most = min(module.rank for module in found)
    if isinstance(ranks, bool) or not 1 <= ranks <= most:
        raise ValueError(f"ranks={ranks} must be from 1 to {most}")
    for module in found:
        module.used = ranks
