"""Tweets: what a text costs in bits, against a model whose probabilities are known."""

import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from selective_lite.lab import load_task
from selective_lite.lab.data.tweets import IGNORED, Sequences, bits, load_texts


class Words:
    """A tokenizer whose tokens are the lengths of the words."""

    pad_token_id, bos_token_id = 99, 77

    def __call__(self, texts, truncation, max_length):
        return {"input_ids": [[len(word) for word in text.split()][:max_length] for text in texts]}


class Table(nn.Module):
    """A language model that knows one table, the logits after each token; with dropout."""

    def __init__(self, logits):
        super().__init__()
        self.logits, self.dropout = nn.Parameter(logits), nn.Dropout(0.5)

    def forward(self, input_ids, attention_mask):
        return SimpleNamespace(logits=self.dropout(self.logits[input_ids]))


def split(*tokens):
    texts = ["" for _ in tokens]
    return Sequences(
        texts, [0] * len(texts), texts, list(map(list, tokens)), 0, torch.device("cpu")
    )


def test_a_text_costs_the_logarithm_of_its_probability():
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    probability = table.softmax(-1)
    # 0 is padding too, and a token like any other where it is no padding
    texts = (1, 2, 3), (1, 4), (1, 0, 0, 2)
    cost, tokens = bits(Table(table), split(*texts), batch_size=2)
    expected = [math.prod(float(probability[a, b]) for a, b in pairwise(t)) for t in texts]
    assert cost.tolist() == pytest.approx([-math.log2(p) for p in expected], rel=1e-6)
    assert tokens.tolist() == [2, 1, 3]


def test_bits_do_not_depend_on_the_batch_and_leave_the_model_in_its_mode():
    model = Table(torch.randn(6, 6)).train()
    texts = split((1, 2), (1, 2, 3, 4, 5), (1, 5, 5))
    one, three = bits(model, texts, 1), bits(model, texts, 3)
    torch.testing.assert_close(one, three)
    assert model.training


def test_labels_are_the_tokens_and_nothing_at_padding():
    (batch,) = split((1, 2, 3), (1, 0)).batches(2)
    assert batch["input_ids"].tolist() == [[1, 0, 0], [1, 2, 3]]
    assert batch["labels"].tolist() == [[1, 0, IGNORED], [1, 2, 3]]


def test_texts_start_with_the_start_and_share_nothing_between_splits():
    texts = load_texts("tweets", Words(), train=100, validation=50, test=60)
    assert [len(part) for part in (texts.train, texts.validation, texts.test)] == [100, 50, 60]
    for part in (texts.train, texts.validation, texts.test):
        assert all(tokens[0] == Words.bos_token_id for tokens in part.tokens)
    every = [t for part in (texts.train, texts.validation, texts.test) for t in part.texts]
    assert len(set(every)) == len(every)
    assert texts.train.texts == load_task("tweets", Words(), train=100, validation=50).train.texts


@pytest.mark.parametrize(
    ("change", "sizes", "message"),
    [
        ({"bos_token_id": None}, {}, "tokenizer has no bos_token"),
        ({}, {"test": 10**6}, r"test=1000000 must be from 1 to \d+"),
        ({}, {"test": 0}, r"test=0 must be from 1 to \d+"),
        ({}, {"train": 0}, "train=0"),
    ],
)
def test_bad_input_is_named(change, sizes, message):
    tokenizer = Words()
    vars(tokenizer).update(change)
    with pytest.raises(ValueError, match=message):
        load_texts("tweets", tokenizer, **{"train": 100, "validation": 50, "test": 60, **sizes})
