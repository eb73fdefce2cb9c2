"""Tweets: texts as sequences to predict, and their cost to a language model, in bits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...params import preserve_modes
from .sentiment import Split, TextBatches, load_task

IGNORED = -100  # the label that no loss counts, in torch and transformers


class SequenceBatches(TextBatches):
    """As `TextBatches`, with the tokens themselves as ``labels`` (B, T), `IGNORED` at padding."""

    def batch(self, group: list[int]) -> dict[str, Tensor]:
        """The padded tokens, their mask and labels; a language model shifts the labels itself."""
        batch = super().batch(group)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
        return {**batch, "labels": labels}


@dataclass(frozen=True)
class Sequences(Split):
    """Texts of one split, each behind the token that starts a text."""

    def batches(self, batch_size: int, seed: int | None = None) -> SequenceBatches:
        """As of `Split`."""
        return SequenceBatches(self, batch_size, seed)


@dataclass(frozen=True)
class Texts:
    """A domain's texts in three fixed splits."""

    train: Sequences
    validation: Sequences
    test: Sequences


def load_texts(
    name: str,
    tokenizer: Any,
    *,
    train: int,
    validation: int,
    test: int,
    seed: int = 0,
    max_length: int = 48,
    device: torch.device | str = "cpu",
) -> Texts:
    """The texts of a domain, in the splits of `load_task`, the test split cut to a number of texts.

    Parameters
    ----------
    name, train, validation, seed, max_length, device
        As in `load_task`; lengths do not count the token that starts a text.
    tokenizer
        Tokenizer of a language model.
    test
        Number of test texts.

    Raises
    ------
    ValueError
        As in `load_task`; if fewer than `test` texts remain, or if the tokenizer has no token that
        starts a text.
    """
    start = tokenizer.bos_token_id
    if start is None:
        raise ValueError(
            "tokenizer has no bos_token, which starts a text; "
            "give that of a language model, or set it"
        )
    task = load_task(
        name,
        tokenizer,
        train=train,
        validation=validation,
        seed=seed,
        max_length=max_length,
        device=device,
    )
    if not 1 <= test <= len(task.test):
        raise ValueError(
            f"test={test} must be from 1 to {len(task.test)}, "
            f"what train and validation leave of {name}"
        )

    def behind(split: Split, count: int) -> Sequences:
        tokens = [[start, *text] for text in split.tokens[:count]]
        parts = (split.texts[:count], split.labels[:count], split.documents[:count])
        return Sequences(*parts, tokens, split.padding, split.device)

    splits = (
        (task.train, len(task.train)),
        (task.validation, len(task.validation)),
        (task.test, test),
    )
    return Texts(*(behind(split, count) for split, count in splits))


@torch.no_grad()
def bits(model: nn.Module, split: Sequences, batch_size: int = 8) -> tuple[Tensor, Tensor]:
    """Cost of each text: its negative log-likelihood under the model, in evaluation mode.

    Returns
    -------
    cost
        Bits, float64 of shape (texts,), on CPU, in the split's order: the sum of -log2 p(token |
        those before).
    tokens
        How many were predicted, int64 of shape (texts,): all but the start.
    """
    batches = split.batches(batch_size)
    cost = torch.zeros(len(split), dtype=torch.float64, device="cpu")
    tokens = torch.zeros(len(split), dtype=torch.int64, device="cpu")
    with preserve_modes(model):
        model.eval()
        for group, batch in zip(batches.indices(), batches, strict=True):
            labels = batch.pop("labels")[:, 1:]
            logits = model(**batch).logits[:, :-1].float()
            # (eq-bits)  bits(x) = - sum_t log2 p(x_t | x_<t)
            nats = functional.cross_entropy(
                logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none"
            )
            cost[group] = nats.double().sum(1).cpu() / math.log(2)
            tokens[group] = (labels != IGNORED).sum(1).cpu()
    return cost, tokens
