"""Models: a pretrained encoder with a fresh task head, from the assets, a folder, or a Hugging Face id."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

from .assets import ASSETS, asset
from .device import device


def load_classifier(source: str = "minilm", *, labels: int = 2, seed: int = 0) -> tuple[Any, Any]:
    """A sequence classifier with a head drawn from `seed`, and its tokenizer.

    Parameters
    ----------
    source
        An asset's name, a folder, or a Hugging Face id (which needs the hub).
    labels
        Number of classes.
    seed
        Seed of the head's initial weights; the global generator is left as it was.

    Returns
    -------
    model, tokenizer
        The model in evaluation mode, float32, on `device`.
    """
    place = str(asset(source)) if source in ASSETS else source
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # the head is new, as it should be: no warning about missing keys
    logging.disable_progress_bar()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModelForSequenceClassification.from_pretrained(place, num_labels=labels, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(place)
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
    return model.to(device()).eval(), tokenizer
