"""Sentiment: splits share no text and no document, batches are by length, answers in order."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from selective_lite.lab import evaluate, load_task
from selective_lite.lab.data.sentiment import BY_DOCUMENT, DOMAINS, Split


class Words:
    """A tokenizer whose tokens are the lengths of the words."""

    pad_token_id = 99

    def __call__(self, texts, truncation, max_length):
        return {"input_ids": [[len(word) for word in text.split()][:max_length] for text in texts]}


def load(name, **options):
    return load_task(name, Words(), **{"train": 300, "validation": 100, **options})


def splits(task):
    return task.train, task.validation, task.test


def key(text):
    return " ".join(text.lower().split())


@pytest.mark.parametrize("name", DOMAINS)
def test_no_text_is_in_two_splits_or_twice_in_one(name):
    texts = [key(text) for split in splits(load(name)) for text in split.texts]
    assert len(texts) > 1000
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("name", BY_DOCUMENT)
def test_no_document_is_in_two_splits(name):
    documents = [set(split.documents) for split in splits(load(name))]
    assert max(Counter(load(name).train.documents).values()) > 1
    assert not documents[0] & documents[1]
    assert not (documents[0] | documents[1]) & documents[2]


@pytest.mark.parametrize(
    ("name", "slack"), [("movies", 0), ("tweets", 0), ("products", 60), ("editorials", 60)]
)
def test_sizes_are_as_asked_to_within_the_last_document(name, slack):
    task = load(name)
    assert 300 <= len(task.train) <= 300 + slack
    assert 100 - slack <= len(task.validation) <= 100 + slack
    assert all(len(split.texts) == len(split.labels) == len(split.tokens) for split in splits(task))


def test_a_split_is_a_function_of_the_seed():
    one, same, other = load("movies"), load("movies"), load("movies", seed=1)
    assert [s.texts for s in splits(one)] == [s.texts for s in splits(same)]
    assert one.test.labels == same.test.labels
    shared = set(one.train.texts) & set(other.train.texts)
    assert len(shared) < 50  # 300 of 9,000 or so: 10 by chance


def test_a_larger_training_split_takes_nothing_from_elsewhere_but_the_rest():
    small, large = load("movies"), load("movies", train=500)
    assert large.train.texts[:300] == small.train.texts


def test_labels_are_the_sign_of_a_decided_rating():
    task = load("movies")
    labels = [label for split in splits(task) for label in split.labels]
    assert set(labels) == {0, 1}
    by_text = {
        text: label
        for split in splits(task)
        for text, label in zip(split.texts, split.labels, strict=True)
    }
    words = {"dull": 0, "awful": 0, "wonderful": 1, "delightful": 1}
    for word, label in words.items():
        found = [by_text[text] for text in by_text if word in text.lower().split()]
        assert sum(value == label for value in found) > 0.6 * len(found) > 3


@pytest.mark.parametrize("name", ["movies", "tweets"])
def test_majority_is_the_accuracy_of_the_commoner_label_on_the_test_split(name):
    task = load(name)
    count = Counter(task.test.labels)
    assert task.majority == max(count.values()) / len(task.test)
    assert 0.5 <= task.majority < 0.8


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("films", {}, "name='films' is not a task; choose one of"),
        ("movies", {"train": 0}, "train=0 and validation=100 must both be at least 1"),
        (
            "movies",
            {"train": 20_000},
            "validation is empty: movies has .*; lower train=20000 or validation=100",
        ),
        ("tweets", {"train": 3000, "validation": 3000}, "test is empty: tweets has"),
    ],
)
def test_an_unknown_or_empty_task_is_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        load(name, **options)


@pytest.fixture
def split():
    lengths = [5, 2, 9, 2, 7, 3, 3, 8, 1, 4]
    return Split(
        texts=[f"text {i}" for i in range(10)],
        labels=[i % 2 for i in range(10)],
        documents=[str(i) for i in range(10)],
        tokens=[[i + 1] * length for i, length in enumerate(lengths)],
        padding=0,
        device=torch.device("cpu"),
    )


def test_batches_are_sorted_by_length_padded_and_complete(split):
    batches = split.batches(4)
    assert len(batches) == len(list(batches)) == 3
    rows = []
    for batch in batches:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        assert set(batch) == {"input_ids", "attention_mask", "labels"}
        assert ids.dtype == mask.dtype == batch["labels"].dtype == torch.int64
        assert ids.shape[1] == int(mask.sum(1).max())
        assert torch.equal(ids == 0, mask == 0)
        assert torch.equal(batch["labels"], (ids[:, 0] - 1) % 2)
        rows += [
            (int(row[0]) - 1, int(length)) for row, length in zip(ids, mask.sum(1), strict=True)
        ]
    assert sorted(i for i, _ in rows) == list(range(10))
    assert [length for _, length in rows] == sorted(length for _, length in rows)
    assert all(length == len(split.tokens[i]) for i, length in rows)


def test_training_batches_come_in_another_order_each_pass_and_repeat_with_the_seed(split):
    one, same = split.batches(3, seed=1), split.batches(3, seed=1)
    passes = [[batch["input_ids"][:, 0].tolist() for batch in one] for _ in range(2)]
    assert passes[0] != passes[1]
    assert passes == [[batch["input_ids"][:, 0].tolist() for batch in same] for _ in range(2)]
    for groups in passes:
        assert sorted(i for group in groups for i in group) == list(range(1, 11))


def test_a_batch_size_below_one_raises(split):
    with pytest.raises(ValueError, match="batch_size=0 must be at least 1"):
        split.batches(0)


class Parity(nn.Module):
    """Says 1 for examples of even number, and expects to be in evaluation mode."""

    def forward(self, input_ids, attention_mask, labels):
        assert not self.training
        assert not torch.is_grad_enabled()
        logits = torch.stack([input_ids[:, 0] % 2, 1 - input_ids[:, 0] % 2], 1).float() * 4
        return SimpleNamespace(logits=logits, loss=nn.functional.cross_entropy(logits, labels))


@pytest.mark.parametrize("batch_size", [1, 3, 10])
def test_evaluation_is_in_the_split_s_order_and_independent_of_the_batch_size(split, batch_size):
    # Example i has the token i + 1 and the label i % 2; the model answers "label is i % 2", but not
    # for these two.
    split.labels[3], split.labels[6] = 0, 1
    model = Parity().train()
    found = evaluate(model, split, batch_size)
    assert found["correct"].tolist() == [i not in (3, 6) for i in range(10)]
    assert found["accuracy"] == pytest.approx(0.8)
    right, wrong = (
        float(nn.functional.cross_entropy(torch.tensor([[4.0, 0.0]]), torch.tensor([i])))
        for i in (0, 1)
    )
    assert found["loss"] == pytest.approx(0.8 * right + 0.2 * wrong)
    assert model.training


def test_the_assets_classifier_is_seeded_and_leaves_the_global_generator():
    from selective_lite.lab import load_classifier

    state = torch.get_rng_state()
    (one, tokenizer), (same, _), (other, _) = (load_classifier(seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.classifier.weight, same.classifier.weight)
    assert not torch.equal(one.classifier.weight, other.classifier.weight)
    assert torch.equal(one.bert.pooler.dense.weight, other.bert.pooler.dense.weight)
    assert not one.training
    assert one.config._name_or_path == "minilm"  # a delta's base, not the folder of a cache
    assert tokenizer("a film")["input_ids"][0] == tokenizer.cls_token_id


def test_the_language_model_is_read_from_its_quantized_file_and_speaks():
    from selective_lite.lab import load_language_model

    model, tokenizer = load_language_model()
    assert model.config._name_or_path == "smollm2"
    assert (model.training, model.dtype, model.config.tie_word_embeddings) == (
        False,
        torch.float32,
        True,
    )
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    ids = tokenizer("The capital of France is", return_tensors="pt").to(model.device)
    said = model.generate(**ids, max_new_tokens=2, do_sample=False)
    assert "Paris" in tokenizer.decode(said[0])
