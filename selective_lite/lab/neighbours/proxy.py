"""Proxy-tuning (Liu et al. 2024): a small tuned model steers a larger one by its logits alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class ProxyTuned(nn.Module):
    """A large model, moved by the difference of a small model's logits after and before tuning.

    The large model's weights are not read: that it answers with logits is enough.

    Parameters
    ----------
    large, tuned, untuned
        Models with ``model(input_ids=...).logits``, (batch, tokens, vocabulary).
    scale
        Times the difference; 1 in the paper.

    Raises
    ------
    ValueError
        If their vocabularies differ in size.
    """

    def __init__(self, large: Any, tuned: Any, untuned: Any, scale: float = 1.0) -> None:
        super().__init__()
        models = {"large": large, "tuned": tuned, "untuned": untuned}
        sizes = {name: model.config.vocab_size for name, model in models.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(
                f"vocabularies differ: {sizes}; logits can be added only token by token"
            )
        self.large, self.tuned, self.untuned, self.scale = large, tuned, untuned, scale

    @torch.no_grad()
    def forward(self, input_ids: Tensor, **inputs: Tensor) -> Tensor:
        """Logits (batch, tokens, vocabulary), in float32."""
        large, tuned, untuned = (
            model(input_ids=input_ids, **inputs).logits.float()
            for model in (self.large, self.tuned, self.untuned)
        )
        # (eq-proxy)  logits = large + scale (tuned - untuned)
        return large + self.scale * (tuned - untuned)

    def generate(self, input_ids: Tensor, tokens: int) -> Tensor:
        """The most likely next tokens, one after another: (batch, length + tokens).

        Raises
        ------
        ValueError
            If `tokens` is below 1.
        """
        if tokens < 1:
            raise ValueError(f"tokens={tokens} must be at least 1")
        for _ in range(tokens):
            following = self(input_ids)[:, -1].argmax(-1, keepdim=True)
            input_ids = torch.cat([input_ids, following], 1)
        return input_ids
