"""Any floating tensor can be selected in part, with the README's defaults.

The models are those that people have.

huggingface/peft#2809, hiyouga/LlamaFactory#6869, unslothai/unsloth#4476, baichuan-inc/Baichuan2#340
("Target module ... is not supported"); experts: huggingface/peft#3009, #2527, #2545,
NVIDIA-NeMo/Automodel#1151; encoder-decoders: cambridgeltl/composable-sft#2.
"""

import copy

import pytest
import torch
from torch import nn

import selective_lite as sl
from tests.cases.helpers import (
    DECODER,
    IMAGE,
    SEQ2SEQ,
    VIT,
    assert_gradients_agree,
    assert_only_these_moved,
    chosen,
    hf,
    images,
    right_or_refused,
    some_of_each,
    tokens,
    train,
)

LM = {k: v for k, v in SEQ2SEQ.items() if k != "num_labels"}
MIXTURE = DECODER | {"num_experts_per_tok": 2}
MODELS = {
    "Gemma3ForCausalLM": (DECODER | {"head_dim": 4}, tokens),
    "OPTForCausalLM": (
        {
            "vocab_size": 53,
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "ffn_dim": 20,
            "max_position_embeddings": 32,
            "word_embed_proj_dim": 16,
        },
        tokens,
    ),
    "FalconForCausalLM": (
        {k: DECODER[k] for k in ("vocab_size", "hidden_size", "num_hidden_layers")}
        | {"num_attention_heads": 4},
        tokens,
    ),
    "MambaForCausalLM": (
        {"vocab_size": 53, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4},
        tokens,
    ),
    "BartForConditionalGeneration": (LM, tokens),
    "M2M100ForConditionalGeneration": (LM, tokens),
    "Qwen3MoeForCausalLM": (
        MIXTURE | {"moe_intermediate_size": 8, "head_dim": 4, "num_experts": 4},
        tokens,
    ),
    "MixtralForCausalLM": (MIXTURE | {"num_local_experts": 4}, tokens),
    "ViTForImageClassification": (VIT, images),
    "SwinForImageClassification": (
        IMAGE
        | {
            "patch_size": 4,
            "embed_dim": 8,
            "depths": [1, 1],
            "num_heads": [2, 2],
            "window_size": 4,
        },
        images,
    ),
    "ConvNextForImageClassification": (
        {"hidden_sizes": [8, 8], "depths": [1, 1], "num_stages": 2, "num_labels": 3},
        images,
    ),
    "ResNetForImageClassification": (
        {
            "embedding_size": 8,
            "hidden_sizes": [8, 8],
            "depths": [1, 1],
            "layer_type": "basic",
            "num_labels": 3,
        },
        images,
    ),
    "LlamaForCausalLM": (DECODER, tokens),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_readmes_defaults_train_at_once(name):
    """Gemma's scaled embedding and its kind: random scores, 300 weights, fit.

    peft#2809, unsloth#4476, Baichuan2#340.
    """
    options, batch = MODELS[name]
    model = hf(name, **options)
    before = sl.snapshot(model)
    selection = sl.select(sl.random_scores(model, 0), 300)
    sl.fit(model, sl.fixed_mask(model, selection, lr=1e-2, epochs=1), [batch()])
    assert_only_these_moved(before, model, selection, head=sl.head_weights(model))


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Qwen3MoeForCausalLM", "OPTForCausalLM"])
def test_fish_on_a_language_model(name):
    """The front door, on models that have no task head: score, select, train, ship."""
    options, batch = MODELS[name]
    model = hf(name, **options)
    fresh = copy.deepcopy(model)
    selection = sl.fish(model, [batch()], 0.01)
    with sl.masked(model, selection) as tuning:
        train(model, tuning.parameters(), batch())
    tuning.delta().apply(fresh)
    with torch.no_grad():
        assert torch.equal(fresh(**batch()).logits, model(**batch()).logits)


@pytest.mark.parametrize("name", ["Qwen3MoeForCausalLM", "MixtralForCausalLM"])
def test_single_weights_of_experts_train(name):
    """peft#3009, #2527, #2545: a mixture's experts are one three-dimensional parameter.

    So it is since transformers 5.
    """
    options, batch = MODELS[name]
    model = hf(name, **options).double()
    model.set_experts_implementation("eager")  # torch's grouped product knows no float64
    scores = sl.squared_gradient(model, [batch()])
    experts = {n: (s if ".experts." in n else torch.zeros_like(s)) for n, s in scores.items()}
    selection = sl.select(experts, 50)
    assert any(len(selection.shapes[n]) == 3 for n in selection.indices)
    assert_gradients_agree(model, selection, batch())


class Patches(nn.Module):
    """A vision transformer's bare parameters: a class token and a table of positions."""

    def __init__(self):
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, 6))
        self.position = nn.Parameter(torch.randn(1, 6, 6))
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x):
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.position * self.scale
        return self.attention(x, x, x, need_weights=False)[0]


class Listed(nn.Module):
    """Parameters in a list and in a dict (soft prompts, experts by hand)."""

    def __init__(self):
        super().__init__()
        self.prompts = nn.ParameterList([nn.Parameter(torch.randn(5, 6)) for _ in range(2)])
        self.maps = nn.ParameterDict({"a": nn.Parameter(torch.randn(6, 6))})

    def forward(self, x):
        return (x + self.prompts[0] * self.prompts[1]) @ self.maps["a"]


class Rectified(nn.Linear):
    """A subclass with a forward of its own."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight.abs(), self.bias)


class Scaled(nn.Embedding):
    """Gemma's and BART's embedding: the parent's result, times a number."""

    def forward(self, x):
        return super().forward(x) * 4.0


class Recurrent(nn.Module):
    def __init__(self, cls, **options):
        super().__init__()
        self.rnn = cls(6, 4, batch_first=True, **options)

    def forward(self, x):
        return self.rnn(x)[0]


SEQUENCE, IMAGES = (2, 5, 6), (2, 6, 5, 5)
LAYERS = {
    "class token and positions": (Patches, SEQUENCE),
    "ParameterList": (Listed, SEQUENCE),
    "Linear subclass": (lambda: Rectified(6, 4), SEQUENCE),
    "Embedding subclass": (lambda: Scaled(11, 4), (2, 5)),
    "LSTM": (lambda: Recurrent(nn.LSTM), SEQUENCE),
    "LSTM of two directions": (lambda: Recurrent(nn.LSTM, bidirectional=True), SEQUENCE),
    "GRU": (lambda: Recurrent(nn.GRU, num_layers=2), SEQUENCE),
    "RNN": (lambda: Recurrent(nn.RNN), SEQUENCE),
    "LSTM with a projection": (lambda: Recurrent(nn.LSTM, proj_size=2), SEQUENCE),
    "GRUCell": (lambda: nn.GRUCell(6, 4), (5, 6)),
    "Conv1d": (lambda: nn.Conv1d(5, 4, 3), SEQUENCE),
    "Conv2d": (lambda: nn.Conv2d(6, 4, 3, padding=1, padding_mode="reflect"), IMAGES),
    "Conv2d in groups": (lambda: nn.Conv2d(6, 4, 3, groups=2), IMAGES),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(6, 4, 2), IMAGES),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(6), IMAGES),
    "GroupNorm": (lambda: nn.GroupNorm(2, 6), IMAGES),
    "LayerNorm of two dimensions": (lambda: nn.LayerNorm((5, 6)), SEQUENCE),
    "PReLU": (lambda: nn.PReLU(6), (5, 6)),
    "EmbeddingBag": (lambda: nn.EmbeddingBag(11, 4), (2, 5)),
    "Embedding with sparse gradients": (lambda: nn.Embedding(11, 4, sparse=True), (2, 5)),
    "Embedding with padding": (lambda: nn.Embedding(11, 4, padding_idx=3), (2, 5)),
    "Embedding scaled by frequency": (
        lambda: nn.Embedding(11, 4, scale_grad_by_freq=True),
        (2, 5),
    ),
    "weight_norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 4)), SEQUENCE),
}


def weighted_mean(model, x):
    found = model(x)
    return (found.square() * torch.arange(1.0, found.numel() + 1).view_as(found)).mean()


@pytest.mark.parametrize("what", LAYERS)
def test_part_of_any_layer_has_its_dense_gradient(what):
    """Every layer of torch.nn that people fine-tune.

    They were told `Target module Conv2d(...) is not supported`.
    """
    make, shape = LAYERS[what]
    torch.manual_seed(0)
    model = make().double()
    x = torch.randn(shape).double() if "mbedding" not in what else torch.randint(0, 11, shape)
    assert_gradients_agree(model, some_of_each(model), x, weighted_mean)


@pytest.mark.parametrize("what", LAYERS)
def test_part_of_any_layer_trains_and_nothing_else_moves(what):
    """And leaving gives the model of before, with its keys."""
    make, shape = LAYERS[what]
    torch.manual_seed(0)
    model = make()
    before, keys = sl.snapshot(model), list(model.state_dict())
    x = torch.randn(shape) if "mbedding" not in what else torch.randint(0, 11, shape)
    selection = some_of_each(model)
    kind = torch.optim.SGD if "sparse" in what else torch.optim.AdamW
    with sl.masked(model, selection, head=()) as tuning:
        train(model, tuning.parameters(), x, weighted_mean, kind=kind)
        with torch.no_grad():
            inside = model.eval()(x)
    assert_only_these_moved(before, model, selection)
    assert list(model.state_dict()) == keys
    with torch.no_grad():  # oneDNN's kernels and torch's own differ in the last bit
        torch.testing.assert_close(model(x), inside)


@pytest.mark.parametrize("cls", [nn.LSTM, nn.GRU])
def test_a_masked_recurrent_model_can_be_copied(cls):
    """A copy for early stopping or an average of weights, while an LSTM's bias is selected."""
    model, x = Recurrent(cls), torch.randn(SEQUENCE)
    with sl.masked(model, some_of_each(model), head=()) as tuning:
        train(model, tuning.parameters(), x, weighted_mean)
        with right_or_refused("masked", "copy"):
            copied = copy.deepcopy(model)
            with torch.no_grad():
                assert torch.equal(copied(x), model(x))
                tuning.parameters()[0].add_(1.0)
                assert not torch.equal(copied(x), model(x))


def test_a_weight_with_another_layout_in_memory():
    """An optimizer or a checkpoint left a transposed weight, or one in channels_last."""
    model = nn.Sequential(nn.Conv2d(6, 4, 3), nn.Flatten(), nn.Linear(36, 3)).double()
    model.to(memory_format=torch.channels_last)
    model[2].weight.data = model[2].weight.data.T.contiguous().T
    x = torch.randn(IMAGES).double()
    with right_or_refused("contiguous"):
        assert_gradients_agree(model, some_of_each(model), x, weighted_mean)


def test_an_uninitialized_lazy_layer_is_refused():
    """nn.LazyLinear before its first batch has no shape yet."""
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"(?i)lazy|uninitialized|first batch|forward"):
        sl.select(sl.random_scores(model, 0, head=()), 5)


def test_what_cannot_be_selected_is_refused_before_scoring_with_every_name():
    """One error that names all tensors, and the remedy, before the long work."""
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2)).to("meta")
    selection = chosen(nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2)), **{"0__weight": [1]})
    with pytest.raises(ValueError, match=r"meta"):
        sl.masked(model, selection, head=())


def test_lt_sft_trains_an_encoder_decoder():
    """composable-sft#2: it was refused after the dense phase had been paid for."""
    model = hf("BartForConditionalGeneration", **LM)
    before = sl.snapshot(model)
    sl.fit(model, sl.lt_sft(model, 0.05, lr=1e-3, epochs=(2, 2)), [tokens()])
    delta = sl.diff(before, model)
    assert 0 < delta.count <= round(0.05 * delta.metadata["total"])


@pytest.mark.parametrize("method", ["diff_pruning", "sara", "child_tuning_f", "full_finetuning"])
def test_other_methods_train_an_encoder_decoder(method):
    """The same kind: each trains, or is refused before a step is paid for."""
    model, steps = hf("BartForConditionalGeneration", **LM), []
    before = sl.snapshot(model)
    calls = {
        "diff_pruning": lambda: sl.diff_pruning(model, 0.05, lr_w=1e-2, lr=1e-3, epochs=(2, 1)),
        "sara": lambda: sl.sara(model, budget=0.05, lam=0.0, lr=1e-3, epochs=2),
        "child_tuning_f": lambda: sl.child_tuning_f(model, lr=1e-3, epochs=2),
        "full_finetuning": lambda: sl.full_finetuning(model, lr=1e-3, epochs=2),
    }
    try:
        sl.fit(model, calls[method](), [tokens()], on_step=steps.append)
    except ValueError:
        assert not steps
        raise
    assert sl.diff(before, model).count > 0
