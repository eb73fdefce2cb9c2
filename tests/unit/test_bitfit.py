"""BitFit: what a bias is, whole biases and nothing else trained, an error if there are none."""

import pytest
import torch
from torch import nn

import selective_lite as sl
from selective_lite.methods.bitfit import QUERY_AND_MLP, bitfit, is_bias


@pytest.mark.parametrize(
    "name", ["bias", "a.bias", "a.in_proj_bias", "lstm.bias_ih_l0", "attention.q_bias", "a.bias_k"]
)
def test_names_of_bitfit(name):
    assert is_bias(name)


@pytest.mark.parametrize(
    "name",
    [
        "weight",
        "bias.weight",
        "relative_attention_bias.weight",
        "relative_position_bias_table",
        "unbiased",
    ],
)
def test_names_that_only_sound_like_bitfit(name):
    assert not is_bias(name)


@pytest.mark.parametrize(
    ("kind", "count"),
    # A block has seven biases of 12 and one of 20; before and after the blocks are two more of 12.
    [("toy", 7 + 7), ("bert", 2 * (7 * 12 + 20) + 24), ("vit", 2 * (7 * 12 + 20) + 24)],
)
def test_exactly_the_biases_and_the_head_are_trained(build, batches, kind, count):
    model, data = build(kind), batches(kind, 2)
    before, keys = sl.snapshot(model), list(model.state_dict())
    selection = bitfit(model)
    assert selection.count == count
    method = sl.fixed_mask(model, selection, lr=0.02, lr_head=0.01, epochs=2, weight_decay=0.1)
    records = sl.fit(model, method, data)
    assert [r["phase"] for r in records] == ["BitFit"] * 4
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if name.endswith(".bias")} | set(
        sl.head_weights(model)
    )
    assert set(selection.indices) == moved - set(sl.head_weights(model))
    assert list(model.state_dict()) == keys
    assert all(p.requires_grad for p in model.parameters())


def test_weights_and_biases_of_attention_modules_are_told_apart():
    model = nn.ModuleDict(
        {"attention": nn.MultiheadAttention(4, 2, add_bias_kv=True), "rnn": nn.LSTM(4, 3)}
    )
    assert list(bitfit(model).indices) == [
        "attention.in_proj_bias",
        "attention.bias_k",
        "attention.bias_v",
        "attention.out_proj.bias",
        "rnn.bias_ih_l0",
        "rnn.bias_hh_l0",
    ]


def test_a_part_is_a_whole_dotted_part_of_a_name(build):
    model = build("bert")
    layers = ("bert.encoder.layer.0", "bert.encoder.layer.1")
    assert list(bitfit(model, QUERY_AND_MLP).indices) == [
        f"{layer}.{part}.bias"
        for layer in layers
        for part in ("attention.self.query", "intermediate.dense")
    ]
    assert list(bitfit(model, ("attention.output.dense",)).indices) == [
        f"{layer}.attention.output.dense.bias" for layer in layers
    ]
    # in the attention blocks too, as in the authors' code
    assert len(bitfit(model, ("output.dense",)).indices) == 4
    assert list(bitfit(model, "pooler").indices) == ["bert.pooler.dense.bias"]
    with pytest.raises(ValueError, match="parts='quer' is in no bias's name"):
        bitfit(model, ("pooler", "quer"))


def test_the_head_may_be_named(build):
    selection = bitfit(build("bert"), head=("bert.pooler", "classifier"))
    assert "bert.pooler.dense.bias" not in selection.shapes
    assert "bert.encoder.layer.1.output.dense.bias" in selection.indices


def test_a_model_without_biases_raises(build):
    message = "model has no bias outside its head, so BitFit has nothing to train"
    with pytest.raises(ValueError, match=message):
        bitfit(build("llama"))
    with pytest.raises(ValueError, match=message):
        bitfit(build("toy"), head=("first", "norm", "classifier"))
