"""Operations in place behind a layer, and gradients of gradients, as in plain torch.

In place: bitsandbytes-foundation/bitsandbytes#736, gustavecortal/gpt-j-fine-tuning-example#1,
pytorch/torchtitan#4665. Second derivatives: pytorch/pytorch#58509, #76185, #104040, #7714.
"""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import selective_lite as sl
from tests.cases.helpers import (
    ENCODER,
    assert_gradients_agree,
    chosen,
    hf,
    some_of_each,
    tokens,
)


def mean_square(model, x):
    return model(x).square().mean()


class InPlace(nn.Module):
    """A layer, something done in place to what it gave, and another layer."""

    def __init__(self, layer, act):
        super().__init__()
        self.first, self.act, self.last = layer, act, nn.Linear(8, 3)

    def forward(self, x):
        return self.last(self.act(self.first(x)))


def add(h):
    h += torch.ones(8, dtype=h.dtype)
    return h


def fill(h):
    return h.masked_fill_(h < 0, 0.0)


def write(h):
    h[..., 0] = 0.0
    return h


ACTS = {
    "ReLU(inplace=True)": nn.ReLU(inplace=True),
    "SiLU(inplace=True)": nn.SiLU(inplace=True),
    "Dropout(inplace=True)": nn.Dropout(0.0, inplace=True),
    "h += x": add,
    "masked_fill_": fill,
    "h[..., 0] = 0": write,
}
LAYERS = {
    "Linear": lambda: nn.Linear(6, 8),
    "Linear without bias": lambda: nn.Linear(6, 8, bias=False),
    "Conv1D": lambda: Conv1D(8, 6),
    "Embedding": lambda: nn.Embedding(11, 8),
}


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("layer", LAYERS)
def test_in_place_behind_a_layer(layer, act):
    """bitsandbytes#736: an operation in place behind a layer of a sequence model.

    ReLU(inplace=True), or an addition.
    """
    act = ACTS[act]
    torch.manual_seed(0)
    model = InPlace(LAYERS[layer](), act if isinstance(act, nn.Module) else Called(act)).double()
    for shape in ((4, 5), (2, 3, 5)):  # batches of vectors and of sequences
        x = torch.randint(0, 11, shape)
        x = x if layer == "Embedding" else torch.randn(*shape, 6).double()
        assert_gradients_agree(model, some_of_each(model), x, mean_square)


class Called(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def test_in_place_behind_only_a_bias_or_only_a_weight():
    """pytorch/torchtitan#4665: whichever of the two is selected, the other is not touched."""
    for only in ("first.weight", "first.bias"):
        model = InPlace(nn.Linear(6, 8), nn.ReLU(inplace=True)).double()
        x = torch.randn(2, 3, 6).double()
        assert_gradients_agree(model, some_of_each(model, only=only), x, mean_square)


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("LongformerForSequenceClassification", {"attention_window": 4, "pad_token_id": 1}),
        (
            "DebertaForSequenceClassification",
            {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
        ),
    ],
)
def test_models_with_operations_in_place_train(name, more):
    """Longformer divides its queries in place, DeBERTa adds to its query projection."""
    model = hf(name, **ENCODER, **more)
    before = sl.snapshot(model)
    selection = sl.select(sl.random_scores(model, 0), 0.2)
    sl.fit(model, sl.fixed_mask(model, selection, lr=1e-3, epochs=1), [tokens("classes", 2, 8)])
    assert sl.diff(before, model).count > 0


def test_a_convolution_with_relu_in_place_behind_its_norm():
    """Every ResNet block."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(16, 3)
    )
    x = torch.randn(5, 3, 4, 4).double()
    assert_gradients_agree(model.double(), some_of_each(model), x, mean_square)


def smooth(layer=None):
    return nn.Sequential(layer or nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).double()


def gradient_penalty(model, x):
    z = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(model(z).sum(), z, create_graph=True)
    return (g.norm(dim=1) - 1).square().mean()


def penalty_and_loss(model, x):
    return model(x).square().mean() + 0.5 * gradient_penalty(model, x)


@pytest.mark.parametrize("loss", [gradient_penalty, penalty_and_loss])
@pytest.mark.parametrize("layer", [None, "Conv1D"])
def test_a_gradient_penalty_is_right_or_refused(loss, layer):
    """pytorch/pytorch#7714 (WGAN-GP), #58509: a wrong second derivative.

    A custom function that saves intermediates gave wrong numbers.
    """
    torch.manual_seed(0)
    model = smooth(Conv1D(6, 4) if layer else None)
    selection, x = some_of_each(model), torch.randn(8, 4).double()
    try:
        assert_gradients_agree(model, selection, x, loss)
    except RuntimeError as error:
        assert "twice" in str(error) or "second" in str(error)  # refused


def test_the_curvature_of_the_selected_weights_is_right_or_refused():
    """pytorch/pytorch#76185: a Hessian-vector product over what is trained.

    SAM and influence functions need it.
    """
    torch.manual_seed(0)
    model = smooth()
    x, v = torch.randn(8, 4).double(), torch.tensor([1.0, -2.0, 0.5]).double()
    index = torch.tensor([0, 9, 13])
    loss = model(x).square().mean()
    (g,) = torch.autograd.grad(loss, model[0].weight, create_graph=True)
    (dense,) = torch.autograd.grad((g.flatten()[index] * v).sum(), model[0].weight)
    with sl.masked(model, chosen(model, **{"0__weight": index}), head=()) as tuning:
        (values,) = tuning.parameters()
        try:
            (g,) = torch.autograd.grad(model(x).square().mean(), values, create_graph=True)
            (found,) = torch.autograd.grad((g * v).sum(), values)
        except RuntimeError as error:
            assert "twice" in str(error) or "second" in str(error)  # refused
        else:
            torch.testing.assert_close(found, dense.flatten()[index])


def test_scores_of_a_loss_that_itself_takes_gradients():
    """#7714 again: the score of a loss with a gradient penalty is its own gradient squared."""
    torch.manual_seed(0)
    model, x = smooth(), torch.randn(8, 4).double()
    scores = sl.squared_gradient(model, [x], loss=penalty_and_loss, reduction="batch", head=())
    penalty_and_loss(model, x).backward()
    for name, p in model.named_parameters():
        true = torch.zeros_like(p) if p.grad is None else p.grad
        torch.testing.assert_close(scores[name], true.square())
