"""The upper layers give the whole model's logits and gradients; bad counts are refused."""

import pytest
import torch

import selective_lite as sl
from selective_lite.lab.upper_layers import UpperLayers, accuracy, correct, hidden_below, loss


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 53, (5, 9), generator=generator)
    mask = torch.ones_like(tokens)
    mask[0, 6:] = mask[3, 2:] = 0
    return {"input_ids": tokens, "attention_mask": mask, "labels": torch.tensor([0, 1, 2, 0, 1])}


@pytest.mark.parametrize("count", [1, 2])
def test_a_slice_has_the_logits_the_answers_and_the_gradients_of_its_model(build, batch, count):
    model = build("bert").eval()
    upper, below = UpperLayers(model, count), hidden_below(model, [batch], count)
    output = model(**batch)
    torch.testing.assert_close(upper(below[0]["hidden"], below[0]["mask"]), output.logits)
    assert torch.equal(correct(upper, below), output.logits.argmax(-1) == batch["labels"])
    names = list(sl.weights(upper))
    ours = torch.autograd.grad(loss(upper, below[0]), [upper.get_parameter(name) for name in names])
    whole = [
        model.get_parameter("bert." + name.replace("layer.", "encoder.layer.", 1)) for name in names
    ]
    for mine, its in zip(ours, torch.autograd.grad(output.loss, whole), strict=True):
        torch.testing.assert_close(mine, its)


def test_answers_are_counted_without_dropout_and_modes_are_put_back(build, batch):
    model = build("bert")
    upper, below = UpperLayers(model), hidden_below(model, [batch])
    expected = correct(upper, below)
    for module in upper.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.9
    upper.train()
    upper.pooler.eval()
    modes = [module.training for module in upper.modules()]
    assert torch.equal(correct(upper, below), expected)
    assert accuracy(upper, below) == pytest.approx(expected.double().mean().item())
    assert [module.training for module in upper.modules()] == modes


def test_leading_dimensions_are_free(build, batch):
    model = build("bert").eval()
    upper, (one,) = UpperLayers(model), hidden_below(model, [batch])
    copies = one["hidden"].expand(3, *one["hidden"].shape)
    torch.testing.assert_close(upper(copies, one["mask"])[2], upper(one["hidden"], one["mask"]))


@pytest.mark.parametrize("count", [0, 3])
def test_a_count_that_the_model_has_not_raises(build, count):
    with pytest.raises(ValueError, match=rf"count={count} must be from 1 to 2"):
        UpperLayers(build("bert"), count)
