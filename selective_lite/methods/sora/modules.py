"""SoRA's gated low-rank updates of a model's matrices: attach, export, merge."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...layers.small import attach_module, find_layers, linear_weights, merge_adapters
from ...params import head_weights, in_masked_training, named_parameters, unwrap


class GatedLowRank(nn.Module):
    """A small module (alpha/r) B (g * A x): A (r, d_in) as in LoRA, B zero, g (r,) from N(0, 1)."""

    kind = "sora"

    def __init__(
        self, d_in: int, d_out: int, rank: int, scaling: float, generator: torch.Generator
    ) -> None:
        super().__init__()
        bound = d_in**-0.5  # what kaiming_uniform_(a=sqrt(5)) gives
        a = torch.rand(rank, d_in, generator=generator, device="cpu")
        self.A = nn.Parameter((2 * a - 1) * bound)
        self.B = nn.Parameter(torch.zeros(d_out, rank, device="cpu"))
        self.gate = nn.Parameter(torch.randn(rank, generator=generator, device="cpu"))
        self.scaling = scaling

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The layer's output y (..., d_out) with the share of its input x (..., d_in) added."""
        # (eq-sora)  y = W0 x + (a/r) B (q * A x)
        update = self.scaling * functional.linear(
            self.gate * functional.linear(x.to(self.A.dtype), self.A), self.B
        )
        return y + update.to(y.dtype)

    def plain(self) -> tuple[Tensor, Tensor]:
        """A plain LoRA of scaling 1 without closed ranks: A' = (alpha/r) g A and B, detached."""
        opened = self.gate.detach() != 0
        gate = self.gate.detach()[opened, None]
        return self.scaling * gate * self.A.detach()[opened], self.B.detach()[:, opened]

    def difference(self) -> Tensor:
        """(alpha/r) B diag(g) A, (d_out, d_in)."""
        a, b = self.plain()
        return b @ a


class SoRA:
    """Gated low-rank updates of a model's matrices; leaving merges them into the weights.

    Inside, the parameters of the model that require gradients are the factors, the gates and the
    task head.

    Parameters
    ----------
    model
        The model, changed in place until the context is left (or `close` is called). Its own
        weights are frozen.
    rank
        Rank r of every update.
    alpha
        The updates are scaled by alpha / r.
    targets
        As in `linear_weights`: ends of module names, or None for all.
    head
        As in `weights`; trained as well.
    seed
        Seed of the CPU generator that draws A and the gates.

    Attributes
    ----------
    updates
        ``{name of the weight: GatedLowRank}``, in float32 (float64 for float64 weights), on the
        weight's device.
    closed
        Whether the updates were merged.

    Raises
    ------
    ValueError
        If a target names nothing or a layer that cannot have an update, the rank is not an int
        between 1 and a matrix's smaller side, or the model is already in masked or SoRA training.
        The model is unchanged.
    """

    def __init__(
        self,
        model: nn.Module,
        rank: int = 8,
        *,
        alpha: float = 16.0,
        targets: Sequence[str] | None = None,
        head: Sequence[str] | None = None,
        seed: int = 0,
    ) -> None:
        if in_masked_training(model) or any(
            isinstance(module, GatedLowRank) for module in model.modules()
        ):
            raise ValueError("model is already in masked or SoRA training; leave that first")
        places = find_layers(model, dict.fromkeys(linear_weights(model, targets, head), rank))
        heads = head_weights(model, head)
        self.model, self.closed = model, False
        self.updates: dict[str, GatedLowRank] = {}
        paths = {module: path for path, module in unwrap(model).named_modules()}
        self._paths = {
            name: [paths[layer] for layer in layers] for name, (layers, _, _) in places.items()
        }
        self._dense = list(heads.values())
        self._flags = [(p, p.requires_grad) for p in model.parameters()]
        for name, p in named_parameters(model).items():
            if p.requires_grad != (name in heads):  # quantized tensors cannot be asked to
                p.requires_grad_(name in heads)
            p.grad = None
        generator = torch.Generator().manual_seed(seed)
        for name, (layers, d_in, d_out) in places.items():
            weight = layers[0].weight
            update = GatedLowRank(d_in, d_out, rank, alpha / rank, generator)
            update.to(weight.device, torch.promote_types(weight.dtype, torch.float32))
            self.updates[name] = attach_module(layers, update)

    def gates(self) -> list[nn.Parameter]:
        """The gates, one vector an update."""
        return [update.gate for update in self.updates.values()]

    def factors(self) -> list[nn.Parameter]:
        """A and B of every update."""
        return [p for update in self.updates.values() for p in (update.A, update.B)]

    def dense_parameters(self) -> list[nn.Parameter]:
        """The task head."""
        return list(self._dense)

    def ranks(self) -> dict[str, int]:
        """How many ranks are open, by the name of the weight."""
        return {name: int(update.gate.count_nonzero()) for name, update in self.updates.items()}

    def prune(self) -> None:
        """Remove closed ranks; outputs stay the same. Prune last: a gate may open again."""
        for update in self.updates.values():
            opened = update.gate.detach() != 0
            update.A = nn.Parameter(update.A.detach()[opened])
            update.B = nn.Parameter(update.B.detach()[:, opened])
            update.gate = nn.Parameter(update.gate.detach()[opened])

    def export(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The update as a plain LoRA without closed ranks, in peft's names and without the head.

        It works after closing, too.

        Returns
        -------
        tensors
            ``base_model.model.<module>.lora_A.weight`` (r', inputs) and ``lora_B`` (outputs, r'),
            on CPU; gate and scaling are inside A.
        config
            For ``peft.LoraConfig(**config)``: every module's own rank, and scaling 1.

        Raises
        ------
        ValueError
            If every rank is closed.
        """
        tensors, ranks = {}, {}
        for weight, update in self.updates.items():
            a, b = update.plain()
            for path in self._paths[weight] if len(a) else ():
                tensors[f"base_model.model.{path}.lora_A.weight"] = a.cpu().clone()
                tensors[f"base_model.model.{path}.lora_B.weight"] = b.cpu().clone()
                ranks["^" + re.escape(path)] = len(a)
        if not ranks:
            raise ValueError("every rank is closed, nothing is left to export; lower lam")
        config: dict[str, Any] = {"r": max(ranks.values()), "lora_alpha": max(ranks.values())}
        pattern = "|".join(key.removeprefix("^") for key in ranks)
        return tensors, {
            **config,
            "rank_pattern": ranks,
            "alpha_pattern": dict(ranks),
            "target_modules": pattern,
        }

    def close(self) -> None:
        """Merge the updates into the weights and restore the flags; twice does nothing."""
        if self.closed:
            return
        self.closed = True
        # (eq-sora-merge)  W = W0 + (a/r) B diag(q) A
        merge_adapters(self.model, list(self.updates))
        for p, flag in self._flags:
            if p.requires_grad != flag:
                p.requires_grad_(flag)

    def __enter__(self) -> SoRA:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
