"""Digits: splits that share no image, shifts that do what they say, a seeded transformer."""

import pytest
import torch

from selective_lite.lab import evaluate
from selective_lite.lab.data.digits import (
    Images,
    digit_classifier,
    inverted,
    load_digits,
    noisy,
    rotated,
)


@pytest.fixture(scope="module")
def digits():
    return load_digits(place="cpu")


@pytest.fixture
def few(digits):
    return digits.train.first(40)


def splits(digits):
    return digits.pretrain, digits.train, digits.validation, digits.test


def test_the_splits_hold_every_image_once_and_each_digit_500_times(digits):
    assert [len(images) for images in splits(digits)] == [2500, 500, 500, 1500]
    pixels = torch.cat([images.pixels for images in splits(digits)])
    labels = torch.cat([images.labels for images in splits(digits)])
    assert pixels.shape == (5000, 1, 28, 28)
    assert (pixels.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert (pixels.min(), pixels.max()) == (0, 1)
    assert len(pixels.flatten(1).unique(dim=0)) == 5000
    assert labels.bincount().tolist() == [500] * 10


def test_a_split_is_a_function_of_the_seed(digits):
    same, other = load_digits(place="cpu"), load_digits(place="cpu", seed=1)
    for one, two, three in zip(*map(splits, (digits, same, other)), strict=True):
        assert torch.equal(one.pixels, two.pixels)
        assert torch.equal(one.labels, two.labels)
        assert not torch.equal(one.labels, three.labels)


def test_every_digit_is_in_every_split(digits):
    for images in splits(digits):
        assert images.labels.bincount(minlength=10).min() > 0.06 * len(images)


@pytest.mark.parametrize(
    "sizes", [{"train": 0}, {"validation": -1}, {"pretrain": 4000}, {"train": 2000}]
)
def test_a_split_without_images_raises(sizes):
    with pytest.raises(
        ValueError, match=r"leave -?\d+ of 5000 images for the test split; give at least 1 to each"
    ):
        load_digits(place="cpu", **sizes)


def test_batches_are_complete_and_scaled(few):
    batches = few.batches(16)
    found = list(batches)
    assert len(batches) == len(found) == 3
    assert set(found[0]) == {"pixel_values", "labels"}
    assert [len(batch["labels"]) for batch in found] == [16, 16, 8]
    assert torch.equal(torch.cat([batch["pixel_values"] for batch in found]), 2 * few.pixels - 1)
    assert torch.equal(torch.cat([batch["labels"] for batch in found]), few.labels)


def test_training_batches_come_in_another_order_each_pass_and_repeat_with_the_seed(few):
    one, same = few.batches(16, seed=1), few.batches(16, seed=1)
    passes = [one.indices() for _ in range(2)]
    assert passes[0] != passes[1]
    assert passes == [same.indices() for _ in range(2)]
    assert all(sorted(i for group in groups for i in group) == list(range(40)) for groups in passes)


def test_a_batch_size_below_one_raises(few):
    with pytest.raises(ValueError, match="batch_size=0 must be at least 1"):
        few.batches(0)


def test_a_quarter_turn_is_a_quarter_turn_counter_clockwise(few):
    turned = rotated(few, 90)
    torch.testing.assert_close(turned.pixels, few.pixels.rot90(1, (2, 3)), rtol=0, atol=1e-5)
    assert torch.equal(turned.labels, few.labels)
    torch.testing.assert_close(rotated(few, 360).pixels, few.pixels, rtol=0, atol=1e-4)


def test_any_turn_keeps_most_of_the_ink_and_stays_within_the_range(few):
    turned = rotated(few, 30)
    assert turned.pixels.shape == few.pixels.shape
    assert -1e-5 <= turned.pixels.min() <= turned.pixels.max() <= 1 + 1e-5
    assert turned.pixels.sum() == pytest.approx(few.pixels.sum().item(), rel=0.02)


def test_inverting_twice_gives_the_images_back(few):
    assert torch.equal(inverted(few).pixels, 1 - few.pixels)
    torch.testing.assert_close(inverted(inverted(few)).pixels, few.pixels, rtol=0, atol=1e-6)
    assert torch.equal(inverted(few).labels, few.labels)


def test_noise_is_seeded_and_stays_within_the_range(few):
    found = noisy(few, 0.5)
    assert torch.equal(found.pixels, noisy(few, 0.5).pixels)
    assert not torch.equal(found.pixels, noisy(few, 0.5, seed=1).pixels)
    assert (found.pixels.min(), found.pixels.max()) == (0, 1)
    assert torch.equal(noisy(few, 0.0).pixels, few.pixels)
    grey = Images(torch.full((50, 1, 28, 28), 0.5), torch.zeros(50, dtype=torch.int64))
    assert (noisy(grey, 0.1).pixels - 0.5).std() == pytest.approx(0.1, rel=0.02)


def test_a_shift_is_mapped_over_every_split(digits):
    shifted = digits.map(inverted)
    for one, two in zip(splits(digits), splits(shifted), strict=True):
        assert torch.equal(two.pixels, 1 - one.pixels)


def test_the_classifier_is_seeded_and_leaves_the_global_generator():
    state = torch.get_rng_state()
    one, same, other = (digit_classifier(seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert not one.training
    for (name, p), q in zip(one.named_parameters(), same.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert not torch.equal(one.classifier.weight, other.classifier.weight)


def test_the_classifier_takes_the_images_and_is_evaluated_as_texts_are(few):
    model = digit_classifier(labels=10, patch=14, hidden=16, layers=1, heads=2)
    output = model(**next(iter(few.batches(8))))
    assert output.logits.shape == (8, 10)
    one, other = evaluate(model, few, 16), evaluate(model, few, 40)
    assert torch.equal(one["correct"], other["correct"])
    assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
    with torch.no_grad():
        logits = model(pixel_values=2 * few.pixels - 1).logits
    assert torch.equal(one["correct"], logits.argmax(-1) == few.labels)


@pytest.mark.parametrize("options", [{"patch": 5}, {"hidden": 30}])
def test_a_classifier_that_cannot_be_cut_so_raises(options):
    with pytest.raises(ValueError, match="must divide"):
        digit_classifier(**options)
