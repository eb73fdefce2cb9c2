"""Sentiment: four domains rated by people, split once by seed, batched by length."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...params import preserve_modes
from .assets import asset
from .batches import Batches

DOMAINS = ("movies", "tweets", "products", "editorials")
# their rows are sentences of documents: `document_sentence`
BY_DOCUMENT = ("products", "editorials")
THRESHOLD = 0.5  # on the mean human rating, -4 to 4; weaker ratings are left out as undecided


@dataclass(frozen=True)
class Split:
    """Examples of one split: texts, labels (1 is positive), documents, and token ids."""

    texts: list[str]
    labels: list[int]
    documents: list[str]
    tokens: list[list[int]]
    padding: int
    device: torch.device

    def __len__(self) -> int:
        return len(self.texts)

    def batches(self, batch_size: int, seed: int | None = None) -> TextBatches:
        """Batches of similar length; with a seed, in another order at every pass (training)."""
        return TextBatches(self, batch_size, seed)


class TextBatches(Batches):
    """Dictionaries of ``input_ids``, ``attention_mask`` (B, T) and ``labels`` (B,), int64.

    They are padded to the longest. Texts of one length meet in a batch; with a seed, which of them
    meet, and when, is drawn at every pass.
    """

    split: Split

    def groups(self, examples: list[int]) -> list[list[int]]:
        """Batches of one length, as far as there are enough."""
        groups = super().groups(sorted(examples, key=lambda i: len(self.split.tokens[i])))
        if self.order:
            self.order.shuffle(groups)
        return groups

    def batch(self, group: list[int]) -> dict[str, Tensor]:
        """The padded tokens, their mask and the labels of these texts."""
        rows = [self.split.tokens[i] for i in group]
        width = max(map(len, rows))
        ids = torch.tensor([row + [self.split.padding] * (width - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        labels = torch.tensor([self.split.labels[i] for i in group])
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        return {name: tensor.to(self.split.device) for name, tensor in batch.items()}


@dataclass(frozen=True)
class Task:
    """A domain with fixed splits; `majority` is the majority class's share of the test split."""

    name: str
    train: Split
    validation: Split
    test: Split
    majority: float


def load_task(
    name: str,
    tokenizer: Any,
    *,
    train: int = 2000,
    validation: int = 500,
    seed: int = 0,
    max_length: int = 48,
    device: torch.device | str = "cpu",
) -> Task:
    """A domain of Hutto and Gilbert (2014) as binary sentiment, abs(mean rating) >= 0.5.

    Duplicated texts are kept once, so none crosses splits. Where rows are sentences of documents,
    whole documents go to one split, and the sizes are reached to within the last document.

    Parameters
    ----------
    name
        Name of the domain, one of `DOMAINS`.
    tokenizer
        Hugging Face tokenizer.
    train, validation
        Number of examples; the test split is all that remains.
    seed
        Seed of the split.
    max_length
        Largest number of tokens; longer texts are cut.
    device
        Device of the batches.

    Raises
    ------
    ValueError
        If the name is unknown, or a split would be empty.
    """
    if name not in DOMAINS:
        raise ValueError(f"name={name!r} is not a task; choose one of {DOMAINS}")
    if train < 1 or validation < 1:
        raise ValueError(f"train={train} and validation={validation} must both be at least 1")
    rows = _rows(name)
    documents = sorted({document for document, _, _ in rows})
    random.Random(seed).shuffle(documents)
    place = {document: i for i, document in enumerate(documents)}
    rows.sort(key=lambda row: place[row[0]])
    cuts = [_cut(rows, train), _cut(rows, train + validation)]
    parts = [rows[: cuts[0]], rows[cuts[0] : cuts[1]], rows[cuts[1] :]]
    for split, part in zip(("train", "validation", "test"), parts, strict=True):
        if not part:
            raise ValueError(
                f"{split} is empty: {name} has {len(rows)} examples; "
                f"lower train={train} or validation={validation}"
            )
    first, second, third = (
        _split(part, tokenizer, max_length, torch.device(device)) for part in parts
    )
    positive = sum(third.labels) / len(third)
    return Task(name, first, second, third, majority=max(positive, 1 - positive))


def _rows(name: str) -> list[tuple[str, int, str]]:
    """(document, label, text) of every decided example, in file order, each text once."""
    lines = (asset("sentiment") / f"{name}.txt").read_text(encoding="latin-1").splitlines()
    seen: set[str] = set()
    rows = []
    for line in lines:
        identity, rating, text = line.split("\t", 2)
        key = " ".join(text.lower().split())
        if abs(float(rating)) >= THRESHOLD and key not in seen:
            seen.add(key)
            document = identity.split("_")[0] if name in BY_DOCUMENT else identity
            rows.append((document, int(float(rating) > 0), text))
    return rows


def _cut(rows: list[tuple[str, int, str]], size: int) -> int:
    """The first place at or after `size` where a document ends."""
    while 0 < size < len(rows) and rows[size][0] == rows[size - 1][0]:
        size += 1
    return min(size, len(rows))


def _split(
    rows: list[tuple[str, int, str]], tokenizer: Any, max_length: int, place: torch.device
) -> Split:
    texts = [text for _, _, text in rows]
    tokens = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
    labels = [label for _, label, _ in rows]
    return Split(
        texts,
        labels,
        [document for document, _, _ in rows],
        tokens,
        tokenizer.pad_token_id or 0,
        place,
    )


@torch.no_grad()
def evaluate(model: nn.Module, split: Split, batch_size: int = 128) -> dict[str, Any]:
    """Accuracy, mean loss and per-example correctness, in evaluation mode.

    Returns
    -------
    dict
        ``accuracy`` (float in [0, 1]), ``loss`` (float, nats), ``correct`` (bool tensor, CPU, in
        the split's order).
    """
    batches = split.batches(batch_size)
    correct = torch.zeros(len(split), dtype=torch.bool)
    total = 0.0
    with preserve_modes(model):
        model.eval()
        for group, batch in zip(batches.indices(), batches, strict=True):
            output = model(**batch)
            total += float(output.loss) * len(group)
            correct[group] = (output.logits.argmax(-1) == batch["labels"]).cpu()
    return {
        "accuracy": correct.float().mean().item(),
        "loss": total / len(split),
        "correct": correct,
    }
