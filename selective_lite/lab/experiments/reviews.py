"""The reviews: every method on one task, by the protocol of the second edition.

The model pools as it was pretrained to. Every run starts from the same head, a `probe` fitted on
the frozen model, which is the row *head only*. Rates are chosen by the mean of two seeds on the
validation split, from half decades that reach past the best on both sides; the test split is read
once, by a finished run of one of five seeds. What a model forgets is measured on something that it
was not tuned for: a probe, fitted before, tells which of three other domains a text is from. Run
this module (part of ``make results``) to run what is missing.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from ...training import Phases
from ..data.sentiment import DOMAINS, Split, Task, load_task
from ..models import load_mean_classifier
from . import movies, recipes, results
from .intervals import sentences
from .probes import Probe, correct, features, install, probe
from .recipes import Config, Recipe
from .run import Cell, Study, best, make

NAME, SECOND = "reviews", "reviews_second"
DATA = {"train": 1000, "validation": 1000, "test": 2000, "batch": 16, "epochs": 2, "samples": 1000}
TOLD_APART = {"train": 300, "validation": 150, "test": 200}  # texts of each of the other domains
SEEDS, TUNED_ON = (0, 1, 2, 3, 4), (0, 1)
BUDGETS = (0.00005, 0.0002, 0.001, 0.005, 0.02, 0.05)
# First guesses of a rate: sparser masks want larger ones (Xu and Zhang 2024), and masks that scores
# concentrate on few tensors bear less than spread ones.
SPREAD = dict(zip(BUDGETS, (1e-1, 1e-1, 3e-2, 1e-2, 3e-3, 3e-3), strict=True))
BETWEEN = dict(zip(BUDGETS, (3e-2, 3e-2, 1e-2, 3e-3, 1e-3, 1e-3), strict=True))
CONCENTRATED = dict(zip(BUDGETS, (1e-2, 3e-3, 3e-3, 1e-3, 1e-3, 3e-4), strict=True))
EVERYWHERE = {
    "random": SPREAD,
    "fish": CONCENTRATED,
    "fish_shuffled": BETWEEN,
    "sara": SPREAD,
    "lt_sft": BETWEEN,
}
TWO = (0.0002, 0.005)  # budgets of what is slow, and of what a chapter needs
AT_TWO = {
    "magnitude": BETWEEN,
    "unstructured": BETWEEN,
    "shuffled": BETWEEN,
    "structured": BETWEEN,
    "spt": BETWEEN,
    "child_tuning_d": CONCENTRATED,
}
LR_DENSE = 1e-4
LORA_BUDGETS = (0.005, 0.02)  # the least, rank 1 in every linear layer, is 0.18 %
CONTROLS = {"random": None, "full": 1.0, "head": 0.0}
# Methods of their own size, each with a random control of that size: first guesses of a rate.
OWN = {"bitfit": 3e-3, "last_layers": 3e-4, "sara_threshold": 1e-3, "child_tuning_f": 1e-4}

GRIDS: dict[Cell, float | tuple[float, ...]] = {
    ("head", 0.0): (),
    ("full", 1.0): 1e-4,
    **{(name, budget): rates[budget] for name, rates in EVERYWHERE.items() for budget in BUDGETS},
    **{(name, budget): rates[budget] for name, rates in AT_TWO.items() for budget in TWO},
    **{("lora_linear", budget): 1e-3 for budget in LORA_BUDGETS},
    **{("random", name): start for name, start in OWN.items()},
    **{(name, "own"): start for name, start in OWN.items()},
    ("sora", "own"): 1e-3,
    ("full", "child_tuning_f"): (),
}
# Adam divides Child-Tuning-F's gradients by sqrt(p) of the size that it multiplies them to, so at
# this rate full fine-tuning takes steps of the same size.
SCALED: dict[Cell, tuple[Cell, float]] = {
    ("full", "child_tuning_f"): (("child_tuning_f", "own"), recipes.P**0.5)
}


def lt_sft(model: Any, task: Task, config: Config, lr: float) -> Phases:
    """LT-SFT, whose dense phase has the rate that the sweep of full fine-tuning chose."""
    return recipes.rewound(model, config, lr, LR_DENSE)


# provenance: apart, each row names its own recipe
RECIPES: dict[str, Recipe] = {
    **recipes.RECIPES,
    "lt_sft": lt_sft,
    "head": recipes.head,
    "magnitude": recipes.magnitude,
    "lora_linear": recipes.lora_linear,
}


@dataclass(frozen=True)
class Reviews(Task):
    """A task, and texts of other domains, which a probe of the untuned model tells apart."""

    other: Split
    reader: Probe


def shorter(split: Split, size: int) -> Split:
    """The first examples of a split."""
    return replace(
        split,
        texts=split.texts[:size],
        labels=split.labels[:size],
        documents=split.documents[:size],
        tokens=split.tokens[:size],
    )


@cache
def prepared(task: str, train: int, validation: int, test: int) -> tuple[Any, Reviews]:
    """The model with its first head, and the data; made once in a process."""
    model, tokenizer = load_mean_classifier()
    device = next(model.parameters()).device
    own = load_task(task, tokenizer, train=train, validation=validation, device=device)
    sizes = {key: TOLD_APART[key] for key in ("train", "validation")}
    others = [
        load_task(name, tokenizer, **sizes, device=device) for name in DOMAINS if name != task
    ]
    train_, validation_, test_ = (_joined(others, part) for part in TOLD_APART)
    other = Task("domains", train_, validation_, test_, majority=1 / 3)
    reader = probe(model, other)
    install(model, probe(model, own))
    tested = shorter(own.test, test)
    positive = sum(tested.labels) / len(tested)
    majority = max(positive, 1 - positive)
    parts = (own.train, own.validation, tested)
    return model, Reviews(task, *parts, majority, other.test, reader)


def _joined(tasks: Sequence[Task], part: str) -> Split:
    """Texts of several domains, labelled by their domain."""
    splits = [shorter(getattr(task, part), TOLD_APART[part]) for task in tasks]
    labels = [label for label, split in enumerate(splits) for _ in range(len(split))]
    texts, documents, tokens = (
        [each for split in splits for each in getattr(split, name)]
        for name in ("texts", "documents", "tokens")
    )
    return replace(splits[0], texts=texts, labels=labels, documents=documents, tokens=tokens)


def start(config: Config) -> tuple[Any, Reviews]:
    """The model, with the head that was trained alone, and the data that a config names."""
    sizes = {part: config[part] for part in ("train", "validation", "test")}
    model, data = prepared(config["task"], **sizes)
    torch.manual_seed(config["seed"])  # dropout
    return copy.deepcopy(model), data


def measure(model: Any, data: Reviews) -> results.Row:
    """Accuracy and right answers on the test split, and how well domains are still told apart."""
    labels = torch.tensor(data.other.labels, device=data.reader.weight.device)
    left = correct(data.reader, features(model, data.other), labels)
    return {**movies.tested(model, data), "told_apart": float(left.float().mean())}


def seeds(method: str, budget: float | str) -> tuple[int, ...]:
    """Five seeds; the head alone has nothing to vary."""
    return SEEDS[:1] if method == "head" else SEEDS


def rate(sweep: Mapping[str, Any]) -> float:
    """The rate with the best mean validation accuracy."""
    return best(sweep)


STUDY = Study(
    NAME,
    data=({"task": "movies", **DATA},),
    recipes=RECIPES,
    start=start,
    validate=movies.validate,
    measure=measure,
    grids=GRIDS,
    seeds=seeds,
    choose=rate,
    late=movies.shuffles,
    tuned_on=TUNED_ON,
    scaled=SCALED,
)
# What chapters lean on, once more on another task.
AGAIN = ("random", "fish", "fish_shuffled", "lt_sft")
SECOND_STUDY = replace(
    STUDY,
    name=SECOND,
    data=({"task": "tweets", **DATA},),
    grids={
        cell: start
        for cell, start in GRIDS.items()
        if cell in (("head", 0.0), ("full", 1.0))
        or cell == ("lora_linear", 0.005)
        or (cell[0] in AGAIN and cell[1] in TWO)
    },
)

if __name__ == "__main__":
    for study in (STUDY, SECOND_STUDY):
        make(study)
        print(sentences(results.read(study.name), CONTROLS))
