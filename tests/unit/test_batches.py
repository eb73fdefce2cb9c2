"""Batches: samples are told apart or the odd tensor is named; a missing loss is said."""

import pytest
import torch
from torch import nn

import selective_lite as sl
from selective_lite.batches import batch_size, check_loss, samples_of, take, to_device


def test_the_first_dimension_is_the_sample_for_every_tensor():
    batch = {"x": torch.ones(3, 2), "labels": torch.ones(3), "scale": torch.tensor(2.0)}
    batch |= {"texts": ["a", "b", "c"], "none": None, "size": 3}
    assert batch_size(batch) == 3
    second = take(batch, 1, 2)
    assert second["x"].shape == (1, 2)
    assert second["texts"] == ["b"]
    assert (second["scale"], second["none"], second["size"]) == (batch["scale"], None, 3)
    assert len(list(samples_of((torch.ones(4, 1), torch.ones(4))))) == 4


@pytest.mark.parametrize("first", ["position", "x"])
def test_a_tensor_without_a_sample_dimension_is_named(first):
    batch = {"position": torch.ones(1, 4), "x": torch.ones(5, 4), "labels": torch.ones(5)}
    batch = {first: batch.pop(first), **batch}
    with pytest.raises(ValueError, match=r"batch\['position'\] has 1 .* 5 samples; .*reduction="):
        batch_size(batch)


def test_a_batch_without_tensors_is_refused():
    with pytest.raises(ValueError, match=r"no tensor with a sample dimension, only \['int'\]"):
        batch_size({"a": 1})


def number(value):
    return torch.tensor(value, requires_grad=True)


@pytest.mark.parametrize(
    ("labels", "message"),
    [([-100, -100], "every label of this batch is -100"), ([0, -100], "lower the learning rate")],
)
def test_a_loss_that_is_not_finite_says_the_likely_cause(labels, message):
    with pytest.raises(ValueError, match=f"loss is nan at step 3.*{message}"):
        check_loss(number(float("nan")), {"labels": torch.tensor(labels)}, "at step 3")
    check_loss(number(1.0), {"labels": torch.tensor([-100])}, "at step 3")


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (torch.ones(2, requires_grad=True), TypeError, r"loss is of shape \(2,\) at step 3"),
        (1.0, TypeError, "loss is a float at step 3"),
        (torch.tensor(1.0), ValueError, "loss has no gradient at step 3: it was detached"),
    ],
)
def test_a_loss_that_cannot_be_trained_is_said_to_be_it(loss, error, message):
    with pytest.raises(error, match=message):
        check_loss(loss, {}, "at step 3")


def test_a_batch_without_labels_is_named(build, batches):
    model, (batch,) = build("bert"), batches("bert", 1)
    del batch["labels"]
    with pytest.raises(ValueError, match=r"no loss for a batch with \['input_ids'.*add 'labels'"):
        sl.model_loss(model, batch)


def test_a_batch_goes_where_the_model_is():
    model = nn.Linear(2, 2, dtype=torch.float64)
    moved = to_device((torch.ones(1, 2), "text"), model)
    assert moved[0].device == model.weight.device
    assert moved[1] == "text"
