"""Batches as data loaders give them, and errors that point to the batch when it is the batch.

Labels: hpcaitech/ColossalAI#5370. Streams: huggingface/transformers#5990, #20089, #11766. Samples:
QwenLM/Qwen3-VL#1661, huggingface/transformers#41709.
"""

import itertools

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import selective_lite as sl
from tests.cases.helpers import (
    bert,
    cross_entropy,
    llama,
    mlp,
    refused,
    right_or_refused,
    tokens,
    vectors,
)


def ignored():
    batch = tokens()
    return {**batch, "labels": torch.full_like(batch["labels"], -100)}


def test_a_batch_whose_labels_are_all_ignored_while_training():
    """ColossalAI#5370: a long prompt is truncated, every label is -100, the loss is nan."""
    model = llama()
    selection = sl.select(sl.squared_gradient(model, [tokens()]), 0.02)
    phases = sl.fixed_mask(model, selection, lr=1e-3, epochs=1)
    with refused("label", "-100"):
        sl.fit(model, phases, [tokens(), ignored(), tokens()])


def test_a_batch_whose_labels_are_all_ignored_while_scoring():
    """The same batch, one verb earlier: the scores would be nan everywhere."""
    with refused("label", "-100"):
        sl.squared_gradient(llama(), [tokens(), ignored()], reduction="batch")
    with refused("label", "-100"):
        sl.fish(llama(), [ignored()], 0.01)


def test_a_loss_that_is_not_finite_for_another_reason_is_not_blamed_on_the_labels():
    """A learning rate that is too large is still said to be one."""
    model = llama()
    with torch.no_grad():
        model.lm_head.weight[5, 5] = float("inf")
    selection = sl.select(sl.random_scores(model, 0), 10)
    with refused("learning rate", "batch") as _:
        sl.fit(model, sl.fixed_mask(model, selection, lr=1e-3, epochs=1), [tokens()])


def test_a_batch_without_labels():
    """The tokenizer gave none: `TypeError: 'NoneType' object is not iterable`, or none of loss."""
    unlabelled = {"input_ids": tokens()["input_ids"]}
    with refused("label", "loss"):
        sl.squared_gradient(bert(), [unlabelled])
    model = bert()
    with refused("label", "loss"):
        sl.fit(model, sl.full_finetuning(model, lr=1e-3, epochs=1), [unlabelled])


def test_a_model_that_gives_a_tensor_instead_of_an_output_with_a_loss():
    """A plain `nn.Module`, and the user forgot `loss=`."""
    batch = {"input": vectors()["x"]}
    with refused("loss"):
        sl.squared_gradient(mlp(), [batch], head=())
    model = mlp()
    with refused("loss"):
        sl.fit(model, sl.full_finetuning(model, lr=1e-3, epochs=1, head=()), [batch])


class Stream(IterableDataset):
    def __iter__(self):
        return iter([{"x": torch.ones(6), "labels": torch.tensor(1)}] * 8)


def stream():
    return DataLoader(Stream(), batch_size=2)


def test_batches_of_an_iterable_dataset():
    """transformers#5990, #20089, #11766: scores take them, `fit` says what to do.

    It leaves the model as it was.
    """
    model = mlp()
    selection = sl.select(sl.squared_gradient(model, stream(), loss=cross_entropy, head=()), 5)
    phases = sl.fixed_mask(model, selection, lr=1e-2, epochs=1, head=())
    with refused("islice", "list"):
        sl.fit(model, phases, stream(), loss=cross_entropy)
    assert all(p.requires_grad for p in model.parameters())
    taken = list(itertools.islice(stream(), 3))
    phases = sl.fixed_mask(model, selection, lr=1e-2, epochs=1, head=())
    assert len(sl.fit(model, phases, taken, loss=cross_entropy)) == 3


@pytest.mark.parametrize("batches", ["generator", "map", "empty list", "one batch"])
def test_batches_that_are_no_batches_for_fit(batches):
    """A generator is used up after an epoch; a single mapping is not a list of them."""
    given = {
        "generator": lambda: (vectors() for _ in range(3)),
        "map": lambda: map(dict, [vectors()]),
        "empty list": list,
        "one batch": vectors,
    }[batches]()
    model = mlp()
    selection = sl.select(sl.random_scores(model, 0, head=()), 5)
    with refused("batches"):
        sl.fit(
            model,
            sl.fixed_mask(model, selection, lr=1e-2, epochs=2, head=()),
            given,
            loss=cross_entropy,
        )


def test_scores_without_any_batch():
    """A loader that was used up, or a filter that left nothing."""
    with refused("batches"):
        sl.squared_gradient(mlp(), iter([]), loss=cross_entropy, head=())


class Shifted(nn.Module):
    """Positions of shape (1, T) are for all samples."""

    def __init__(self):
        super().__init__()
        self.l = nn.Linear(4, 2)

    def forward(self, position, x, labels, scale=1.0, mask=None):
        return nn.functional.cross_entropy(self.l(x * scale + position), labels)


def by_name(model, batch):
    return model(**batch)


@pytest.mark.parametrize("first", ["position", "x"])
def test_a_tensor_without_the_sample_dimension(first):
    """Qwen3-VL#1661, transformers#41709: one sample of five was scored, or torch complained."""
    model = Shifted()
    position, x, labels = torch.randn(1, 4), torch.randn(5, 4), torch.tensor([0, 1, 0, 0, 1])
    true = sum(
        sl.squared_gradient(
            model,
            [{"position": position, "x": x[i : i + 1], "labels": labels[i : i + 1]}],
            loss=by_name,
            head=(),
        )["l.weight"]
        for i in range(5)
    )
    batch = {"position": position, "x": x, "labels": labels}
    if first == "x":
        batch = {"x": x, "labels": labels, "position": position}
    with right_or_refused("position"):
        found = sl.squared_gradient(model, [batch], loss=by_name, head=())["l.weight"]
        torch.testing.assert_close(found, true)


def test_image_patches_of_all_samples_in_one_tensor():
    """Qwen's vision: 12 patches for 3 samples.

    Per-sample scores cannot cut them; per-batch scores can go on.
    """
    model = nn.Linear(4, 2)
    batch = {"patches": torch.randn(12, 4), "labels": torch.tensor([0, 1, 0])}

    def loss(model, batch):
        pooled = batch["patches"].view(len(batch["labels"]), -1, 4).mean(1)
        return nn.functional.cross_entropy(model(pooled), batch["labels"])

    with refused("patches"):
        sl.squared_gradient(model, [batch], loss=loss, head=())
    found = sl.squared_gradient(model, [batch], reduction="batch", loss=loss, head=())
    assert found["weight"].shape == (2, 4)


def test_numbers_and_none_in_a_batch():
    """Collators put `None` masks and plain numbers between the tensors."""
    model = Shifted()
    x, labels = torch.randn(5, 4), torch.tensor([0, 1, 0, 0, 1])
    plain = {"x": x, "labels": labels, "position": torch.zeros(5, 4)}
    mixed = {**plain, "scale": 1.0, "mask": None}
    found, true = (sl.squared_gradient(model, [b], loss=by_name, head=()) for b in (mixed, plain))
    torch.testing.assert_close(found, true)
    selection = sl.select(true, 5)
    sl.fit(
        model,
        sl.fixed_mask(model, selection, lr=1e-2, epochs=1, head=()),
        [mixed],
        loss=by_name,
    )


@pytest.mark.parametrize("kind", [tuple, list])
def test_batches_that_are_tuples(kind):
    """`for x, y in loader`: a TensorDataset has no names.

    Scores raised a TypeError, `fit` took them.
    """

    def loss(model, batch):
        x, labels = batch
        return nn.functional.cross_entropy(model(x), labels)

    batch = vectors()
    model = mlp()
    pair = kind((batch["x"], batch["labels"]))
    found = sl.squared_gradient(model, [pair], loss=loss, head=())
    true = sl.squared_gradient(model, [batch], loss=cross_entropy, head=())
    torch.testing.assert_close(found, true)
    selection = sl.child_tuning(model, [pair], 0.3, loss=loss, head=())
    loader = DataLoader(TensorDataset(*pair), batch_size=4)
    sl.fit(model, sl.fixed_mask(model, selection, lr=1e-2, epochs=1, head=()), loader, loss=loss)


def test_fish_counts_samples_of_tuples_and_stops_in_the_middle_of_a_batch():
    """`samples=` of a loader without names."""

    def loss(model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    batch, model = vectors(), mlp()
    pair = (batch["x"], batch["labels"])
    found = sl.fish(model, [pair, pair], 10, samples=5, loss=loss, head=())
    true = sl.fish(model, [tuple(t[:5] for t in pair)], 10, loss=loss, head=())
    assert {n: i.tolist() for n, i in found.indices.items()} == {
        n: i.tolist() for n, i in true.indices.items()
    }


def test_a_batch_encoding_of_a_tokenizer():
    """transformers' BatchEncoding is a mapping, though no dict."""
    from transformers import BatchEncoding

    model = bert()
    batch = BatchEncoding(tokens("classes"))
    found = sl.squared_gradient(model, [batch])
    true = sl.squared_gradient(model, [tokens("classes")])
    torch.testing.assert_close(found, true)
    sl.fit(model, sl.full_finetuning(model, lr=1e-3, epochs=1), [batch])


@pytest.mark.gpu
def test_batches_on_another_device_are_moved(accelerator):
    """A loader gives CPU tensors, the model is on an accelerator: a bare aten error."""
    model = mlp().to(accelerator)
    scores = sl.squared_gradient(model, [vectors()], loss=cross_entropy, head=())
    phases = sl.fixed_mask(model, sl.select(scores, 5), lr=1e-2, epochs=1, head=())
    assert len(sl.fit(model, phases, [vectors()], loss=cross_entropy)) == 1


def test_a_last_batch_of_another_size():
    """drop_last is False by default: 8 samples in batches of 3."""
    batch = vectors()
    parts = [{k: v[i : i + 3] for k, v in batch.items()} for i in (0, 3, 6)]
    model = mlp()
    found = sl.squared_gradient(model, parts, loss=cross_entropy, head=())
    true = sl.squared_gradient(model, [batch], loss=cross_entropy, head=())
    torch.testing.assert_close(found, true)
