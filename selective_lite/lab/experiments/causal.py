"""Causal: SmolLM2 tuned as a language model on tweets, by the protocol of the second edition.

A hundred steps, three seeds; rates by the mean of two seeds on the validation split, from half
decades that reach past the best on both sides. What a model forgets is what other texts cost it:
sentences of newspapers, of which it saw none. Run this module (part of ``make results``) to run
what is missing.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from ...methods.controls import shuffled as shuffled_selection
from ...methods.fish import fish as fish_selection
from ...methods.fixed_mask import fixed_mask, full_finetuning
from ...training import Phases
from ..data.tweets import Sequences, Texts, bits, load_texts
from . import results, tweets
from .intervals import sentences
from .recipes import Config, Recipe, nearest_lora
from .run import Cell, Study, best, make

NAME = "causal"
DATA = {
    "task": "tweets",
    "train": 400,
    "validation": 100,
    "test": 300,
    "other": 100,
    "batch": 4,
    "epochs": 1,
    "samples": 128,
}
OTHER = "editorials"
SEEDS, TUNED_ON = (0, 1, 2), (0, 1)
CONTROLS = {"random": None, "full": 1.0, "untouched": 0.0}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GRIDS: dict[Cell, float | tuple[float, ...]] = {
    ("untouched", 0.0): (),
    ("full", 1.0): 3e-5,
    ("fish", 0.005): 3e-3,
    ("fish_shuffled", 0.005): 3e-3,
    ("random", 0.005): 1e-2,
    ("lora", 0.005): 1e-3,
    ("fish", 0.0002): 1e-2,
    ("fish_shuffled", 0.0002): 1e-2,
    ("random", 0.0002): 3e-1,
}


@dataclass(frozen=True)
class Tweets(Texts):
    """Texts to tune on, and others that a tuned model should still be able to read."""

    other: Sequences


@cache
def prepared(task: str, **sizes: int) -> tuple[Any, Tweets]:
    """The model and the texts; made once in a process, for reading the model takes a while."""
    model, tokenizer = tweets.loaded()
    rest = sizes.pop("other")
    own = load_texts(task, tokenizer, **sizes, device=model.device)
    other = load_texts(OTHER, tokenizer, train=100, validation=100, test=rest, device=model.device)
    return model, Tweets(own.train, own.validation, own.test, other.test)


def start(config: Config) -> tuple[Any, Tweets]:
    """The model and the texts that a config names."""
    sizes = {part: config[part] for part in ("train", "validation", "test", "other")}
    model, texts = prepared(config["task"], **sizes)
    torch.manual_seed(config["seed"])
    return copy.deepcopy(model), texts


def full(model: Any, texts: Texts, config: Config, lr: float) -> Phases:
    """Full fine-tuning."""
    return full_finetuning(model, lr=lr, epochs=config["epochs"])


def fish_shuffled(model: Any, texts: Texts, config: Config, lr: float) -> Phases:
    """The control: random positions, as many in every tensor as FISH."""
    batches = texts.train.batches(config["batch"], seed=config["seed"])
    chosen = fish_selection(model, batches, config["budget"], samples=config["samples"])
    selection = shuffled_selection(chosen, config["seed"])
    return fixed_mask(model, selection, lr=lr, epochs=config["epochs"])


def lora(model: Any, texts: Texts, config: Config, lr: float) -> Phases:
    """peft's LoRA on every linear layer, of the rank that is nearest the budget."""
    return nearest_lora(model, config, lr, LINEAR)


# provenance: apart
RECIPES: dict[str, Recipe] = {
    **tweets.RECIPES,
    **{recipe.__name__: recipe for recipe in (full, fish_shuffled, lora)},
}


def measure(model: Any, texts: Tweets) -> results.Row:
    """Bits and tokens of every test text; bits per token there, on validation, on other texts."""
    cost, tokens = bits(model, texts.other)
    return {**tweets.measure(model, texts), "other": float(cost.sum() / tokens.sum())}


def seeds(method: str, budget: float | str) -> tuple[int, ...]:
    """Three seeds; the untouched model has none to vary."""
    return SEEDS[:1] if method == "untouched" else SEEDS


def rate(sweep: Mapping[str, Any]) -> float:
    """The rate with the fewest validation bits in the mean, the smallest of equals."""
    return best(sweep, lower=True)


STUDY = Study(
    NAME,
    data=(DATA,),
    recipes=RECIPES,
    start=start,
    validate=tweets.validate,
    measure=measure,
    grids=GRIDS,
    seeds=seeds,
    choose=rate,
    lower=True,
    tuned_on=TUNED_ON,
)

if __name__ == "__main__":
    make(STUDY)
    print(sentences(results.read(NAME), CONTROLS))
