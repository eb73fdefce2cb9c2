"""A weight is read by other code than its own layer's call.

huggingface/peft#2274, #2556 and their kind.

`F.linear(x, self.proj.weight)` in a parent, a fused head, the fast path of evaluation: selected
weights get their whole gradient there too, and everyone reads the values of now.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import selective_lite as sl
from tests.cases.helpers import (
    DECODER,
    ENCODER,
    SPEECH,
    assert_gradients_agree,
    chosen,
    hf,
    llama,
    some_of_each,
    tokens,
    train,
)


class Twice(nn.Module):
    """One weight, used by its module and by a function."""

    def __init__(self):
        super().__init__()
        self.emb, self.lin = nn.Embedding(30, 8), nn.Linear(8, 8)

    def forward(self, x):
        return F.linear(torch.tanh(self.lin(self.emb(x))), self.emb.weight)


class Reader(nn.Module):
    """Weight and bias are used by a function only, as in torchvision's Swin and Mamba."""

    def __init__(self):
        super().__init__()
        self.emb, self.out = nn.Embedding(30, 8), nn.Linear(8, 30)

    def forward(self, x):
        return F.linear(torch.tanh(self.emb(x)), self.out.weight, self.out.bias)


class Concatenated(Reader):
    """Two layers are run as one, on their weights side by side (fused projections)."""

    def __init__(self):
        super().__init__()
        self.more = nn.Linear(8, 30)

    def forward(self, x):
        weight = torch.cat([self.out.weight, self.more.weight])
        bias = torch.cat([self.out.bias, self.more.bias])
        first, second = F.linear(self.emb.weight[x].tanh(), weight, bias).chunk(2, -1)
        return first * second.sigmoid()


class Measured(Reader):
    """A layer is called, and its norm is part of the loss.

    Weight normalization by hand, L2 penalties.
    """

    def forward(self, x):
        scale = self.out.weight.norm(dim=1).clamp(min=0.1)
        return self.out(torch.tanh(self.emb(x))) / scale + self.out.bias.square().sum()


def next_token(model, batch):
    return F.cross_entropy(model(batch["x"]).flatten(0, 1), batch["x"].flatten())


def ids():
    return {"x": torch.randint(0, 30, (4, 6))}


@pytest.mark.parametrize("cls", [Twice, Reader, Concatenated, Measured])
@pytest.mark.parametrize("backwards", [1, 2])
def test_a_function_that_reads_a_weight_passes_the_whole_gradient_on(cls, backwards):
    """huggingface/peft#2274, #2556: `F.linear(h, self.emb.weight)`.

    Also with gradients accumulated.
    """
    model, batch = cls().double(), ids()
    selection = sl.select(sl.squared_gradient(model, [batch], loss=next_token, head=()), 0.2)
    assert_gradients_agree(model, selection, batch, next_token, backwards=backwards)


@pytest.mark.parametrize("cls", [Twice, Reader, Concatenated, Measured])
def test_evaluation_inside_is_what_it_is_after_leaving(cls):
    """Users evaluate between epochs: what they see must be the model that they will ship."""
    model, batch = cls(), ids()
    with sl.masked(model, some_of_each(model), head=()) as tuning:
        before = model(batch["x"])
        train(model, tuning.parameters(), batch, next_token, lr=0.1)
        with torch.no_grad():
            inside = model.eval()(batch["x"])
    assert not torch.equal(before, inside)
    assert torch.equal(model(batch["x"]), inside)


def test_a_read_weight_has_the_values_of_now_between_two_forwards():
    """An export, a plot or a norm taken by hand right after a step."""
    model = Reader()
    selection = chosen(model, out__weight=[3, 100], emb__weight=[7])
    with sl.masked(model, selection, head=()) as tuning:
        train(model, tuning.parameters(), ids(), next_token, lr=0.1)
        read = model.out.weight.detach().clone(), model.emb.weight.detach().clone()
    assert torch.equal(model.out.weight, read[0])
    assert torch.equal(model.emb.weight, read[1])


HF = {
    "WavLM attention": (
        "WavLMForSequenceClassification",
        SPEECH | {"num_buckets": 8, "max_bucket_distance": 16},
        "attention",
        "speech",
    ),
    "Mamba": (
        "MambaForCausalLM",
        {"vocab_size": 53, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4},
        "mixer",
        "tokens",
    ),
    "DeBERTa-v2's table of relative positions": (
        "DebertaV2ForSequenceClassification",
        ENCODER | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
        "rel_embeddings",
        "classes",
    ),
    "MobileBERT's masked language model": (
        "MobileBertForMaskedLM",
        {k: v for k, v in ENCODER.items() if k != "num_labels"}
        | {"embedding_size": 8, "intra_bottleneck_size": 16, "true_hidden_size": 16},
        "",
        "tokens",
    ),
    "DeBERTa-v2's masked language model": (
        "DebertaV2ForMaskedLM",
        {k: v for k, v in ENCODER.items() if k != "num_labels"},
        "",
        "tokens",
    ),
}


@pytest.mark.parametrize("what", HF)
def test_models_that_read_their_layers_weights_get_dense_gradients(what):
    """WavLM's attention, Mamba's dt_proj, DeBERTa-v2's rel_embeddings, two masked models.

    The last two are masked language models.
    """
    name, options, only, kind = HF[what]
    model = hf(name, **options).double()
    batch = tokens(kind)
    if kind == "speech":
        batch = {"input_values": torch.randn(2, 64).double(), "labels": torch.tensor([0, 2])}
    selection = some_of_each(model, only=only, head=None if kind != "tokens" else ())
    used = copy.deepcopy(model)
    used(**batch).loss.backward()
    named = dict(used.named_parameters())
    reached = [n for n in selection.indices if named[n].grad is not None]
    assert len(reached) >= 1
    selection = sl.Selection({n: selection.indices[n] for n in reached}, selection.shapes)
    assert_gradients_agree(model, selection, batch)


def fused(model, batch):
    """What TRL's trainers do: the head's weight times the hidden states.

    There is no call of `lm_head`.
    """
    hidden = model.model(batch["input_ids"]).last_hidden_state[:, :-1]
    logits = hidden @ model.lm_head.weight.T
    return F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())


@pytest.mark.parametrize("tied", [True, False])
def test_a_fused_head_trains_tied_and_untied_embeddings(tied):
    """huggingface/trl multiplies by `lm_head.weight` itself.

    Tied embeddings got half of their gradient.
    """
    model = llama(tie_word_embeddings=tied).double()
    assert_gradients_agree(model, some_of_each(model), tokens(), fused)


@pytest.mark.parametrize("nested", [True, False])
def test_the_fast_path_of_nn_transformer_encoder_evaluates_todays_weights(nested):
    """nn.TransformerEncoder reads its layers' weights in evaluation; it was a step behind."""
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)
    x = torch.randn(3, 5, 8)

    def loss(model, batch):
        return model(batch).square().mean() + model(batch)[..., 0].mean()

    selection = some_of_each(model)
    with sl.masked(model, selection, head=()) as tuning:
        with torch.no_grad():
            before = model.eval()(x)
        train(model.train(), tuning.parameters(), x, loss, lr=0.1)
        with torch.no_grad():
            inside = model.eval()(x)
    assert not torch.allclose(before, inside)
    with torch.no_grad():
        torch.testing.assert_close(model(x), inside)


def test_nn_transformer_encoder_has_dense_gradients():
    """Its attention hands `in_proj_weight` and `out_proj.weight` to a function."""
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 1).double()
    x = torch.randn(3, 5, 8).double()
    assert_gradients_agree(model, some_of_each(model), x, lambda m, b: m(b)[..., 0].square().mean())


def test_the_dtype_and_device_of_a_selected_weight_can_be_asked_for():
    """transformers asks `self.layer.weight.dtype` before it calls a layer."""
    model = llama()
    with sl.masked(model, some_of_each(model)):
        layer = model.model.layers[0].mlp.up_proj
        assert layer.weight.dtype == torch.float32
        assert layer.weight.device.type == "cpu"
        assert layer.weight.shape == (DECODER["intermediate_size"], DECODER["hidden_size"])
        assert model.dtype == torch.float32
        assert model.get_input_embeddings().weight.shape[0] == DECODER["vocab_size"]
