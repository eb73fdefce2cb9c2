"""Models: a classifier with a new head, or a language model, from assets, a folder or the hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForSequenceClassification,
    BertModel,
)
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils import logging

from .data.assets import ASSETS, asset
from .device import device


class MeanPooled(BertForSequenceClassification):
    """A BERT that classifies by the mean of a text's token vectors, as MiniLM was pretrained to.

    BERT's own pooler, a layer behind the first token, would be untrained in such a model.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **inputs: Any,
    ) -> SequenceClassifierOutput:
        """Logits (B, classes) of token ids (B, T), and the mean cross entropy if there are labels.

        Where `attention_mask` (B, T) is 0 there is padding, which is left out of the mean.
        """
        hidden = self.bert(input_ids, attention_mask=attention_mask, **inputs).last_hidden_state
        kept = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        kept = kept.unsqueeze(-1).to(hidden.dtype)
        logits = self.classifier(self.dropout((hidden * kept).sum(1) / kept.sum(1)))
        loss = None if labels is None else cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def load_mean_classifier(
    source: str = "minilm", *, labels: int = 2, seed: int = 0
) -> tuple[MeanPooled, Any]:
    """As `load_classifier`, with a mean over tokens instead of BERT's pooler."""
    return _classifier(MeanPooled, source, labels, seed)


def load_classifier(source: str = "minilm", *, labels: int = 2, seed: int = 0) -> tuple[Any, Any]:
    """A sequence classifier with a head drawn from `seed`, and its tokenizer.

    Parameters
    ----------
    source
        Name of an asset, folder, or Hugging Face id (which needs the hub).
    labels
        Number of classes.
    seed
        Seed of the head's initial weights; the global generator is left as it was.

    Returns
    -------
    model, tokenizer
        The model in evaluation mode, float32, on `device`.
    """
    return _classifier(AutoModelForSequenceClassification, source, labels, seed)


def _classifier(cls: Any, source: str, labels: int, seed: int) -> tuple[Any, Any]:
    place = str(asset(source)) if source in ASSETS else source
    # the head is new, as it should be: no warning of missing keys
    with _quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cls.from_pretrained(place, num_labels=labels, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(place)
    return _named(model, source), tokenizer


def load_language_model(source: str = "smollm2") -> tuple[Any, Any]:
    """A causal language model and its tokenizer.

    Parameters
    ----------
    source
        Name of an asset, folder, or Hugging Face id (which needs the hub). An asset holds quantized
        weights (GGUF); they are read as the float32 numbers that they stand for, which needs the
        package gguf.

    Returns
    -------
    model, tokenizer
        The model in evaluation mode, float32, on `device`.
    """
    place, options = (
        (asset(source), {"gguf_file": "model.gguf"}) if source in ASSETS else (source, {})
    )
    with _quiet():
        model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, **options)
        tokenizer = AutoTokenizer.from_pretrained(place, **options)
    return _named(model, source), tokenizer


def _named(model: Any, source: str) -> Any:
    """The model, ready on `device`; its config says `source`, not the folder of a cache.

    A delta writes that down as its base.
    """
    model.config._name_or_path = source
    return model.to(device()).eval()


@contextmanager
def _quiet() -> Iterator[None]:
    """Transformers without warnings and progress bars."""
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
