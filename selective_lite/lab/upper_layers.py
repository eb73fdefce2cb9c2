"""Upper layers: the last layers of a BERT classifier, on the output of the frozen ones below."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..params import preserve_modes


class UpperLayers(nn.Module):
    """The last layers of a BERT classifier, its pooler and its head.

    The pooler reads the first token only, so the last layer computes only that one: the logits are
    the model's own.

    Parameters
    ----------
    model
        Model of class ``BertForSequenceClassification``, whose layers are shared.
    count
        Number of layers, at least 1.
    """

    def __init__(self, model: Any, count: int = 1) -> None:
        super().__init__()
        layers, self.config = model.bert.encoder.layer, model.config
        if not 1 <= count <= len(layers):
            raise ValueError(
                f"count={count} must be from 1 to {len(layers)}, the number of layers in the model"
            )
        self.layer = nn.ModuleDict(
            {str(i): layers[i] for i in range(len(layers) - count, len(layers))}
        )
        self.pooler, self.dropout, self.classifier = (
            model.bert.pooler,
            model.dropout,
            model.classifier,
        )

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Logits (..., B, classes) of states (..., B, T, D); `mask` (B, 1, 1, T) marks tokens."""
        layers: list[Any] = list(self.layer.values())
        for block in layers[:-1]:
            hidden = block(hidden, mask)
        attended = self._attention(layers[-1].attention, hidden, mask)
        first = layers[-1].output(layers[-1].intermediate(attended), attended)[..., 0, :]
        return self.classifier(self.dropout(self.pooler.activation(self.pooler.dense(first))))

    def _attention(self, attention: Any, hidden: Tensor, mask: Tensor) -> Tensor:
        own, first = attention.self, hidden[..., :1, :]
        query, key, value = (
            part.unflatten(-1, (own.num_attention_heads, -1)).transpose(-3, -2)
            for part in (own.query(first), own.key(hidden), own.value(hidden))
        )
        weight = (
            (own.scaling * query @ key.transpose(-1, -2)).masked_fill(~mask, -math.inf).softmax(-1)
        )
        return attention.output((own.dropout(weight) @ value).transpose(-3, -2).flatten(-2), first)


@torch.no_grad()
def hidden_below(
    model: Any, batches: Iterable[Mapping[str, Tensor]], count: int = 1
) -> list[dict[str, Tensor]]:
    """Output of all layers except the last `count`.

    A dictionary for each batch: ``hidden`` (B, T, D), ``mask`` (B, 1, 1, T) and ``labels`` (B,).
    """
    found = []
    for batch in batches:
        mask, hidden = (
            batch["attention_mask"].bool()[:, None, None],
            model.bert.embeddings(batch["input_ids"]),
        )
        for block in model.bert.encoder.layer[:-count]:
            hidden = block(hidden, mask)
        found.append({"hidden": hidden, "mask": mask, "labels": batch["labels"]})
    return found


def loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Mean cross entropy of a batch of `hidden_below`."""
    return functional.cross_entropy(model(batch["hidden"], batch["mask"]), batch["labels"])


@torch.no_grad()
def correct(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> Tensor:
    """Which texts are answered right, in evaluation mode: bool, on CPU."""
    with preserve_modes(model):
        model.eval()
        return torch.cat(
            [model(b["hidden"], b["mask"]).argmax(-1) == b["labels"] for b in batches]
        ).cpu()


def accuracy(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> float:
    """The share of texts that are answered right, in [0, 1]."""
    return correct(model, batches).float().mean().item()
