"""BitFit: what a bias is, whole biases and nothing else trained, and a clear error where there are none."""

import pytest
import torch
from torch import nn

import selective_lite as sl
from selective_lite.methods.bitfit import QUERY_AND_MLP, biases, bitfit, is_bias


@pytest.mark.parametrize(
    "name", ["bias", "a.bias", "a.in_proj_bias", "lstm.bias_ih_l0", "attention.q_bias", "a.bias_k"]
)
def test_names_of_biases(name):
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
def test_names_that_only_sound_like_biases(name):
    assert not is_bias(name)


@pytest.mark.parametrize(
    ("kind", "count"),
    # A block has seven biases of 12 and one of 20; before and after the blocks are two more of 12.
    [("toy", 7 + 7), ("bert", 2 * (7 * 12 + 20) + 24), ("vit", 2 * (7 * 12 + 20) + 24)],
)
def test_exactly_the_biases_and_the_head_are_trained(build, batches, kind, count):
    model, data = build(kind), batches(kind, 2)
    before, keys = sl.snapshot(model), list(model.state_dict())
    selection = biases(model)
    assert selection.count == count
    records = sl.fit(model, bitfit(model, lr=0.02, lr_head=0.01, epochs=2, weight_decay=0.1), data)
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
    assert list(biases(model).indices) == [
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
    assert list(biases(model, QUERY_AND_MLP).indices) == [
        f"{layer}.{part}.bias"
        for layer in layers
        for part in ("attention.self.query", "intermediate.dense")
    ]
    assert list(biases(model, ("attention.output.dense",)).indices) == [
        f"{layer}.attention.output.dense.bias" for layer in layers
    ]
    assert (
        len(biases(model, ("output.dense",)).indices) == 4
    )  # in the attention blocks too, as in the authors' code
    assert list(biases(model, "pooler").indices) == ["bert.pooler.dense.bias"]
    with pytest.raises(ValueError, match="parts='quer' is in no bias's name"):
        biases(model, ("pooler", "quer"))
    with pytest.raises(ValueError, match="parts='quer' is in no bias's name"):
        next(bitfit(model, lr=0.1, epochs=1, parts=("quer",)))


def test_parts_rates_and_epochs_reach_the_phase(build):
    model = build("bert")
    (phase,) = bitfit(model, lr=0.1, lr_head=0.2, epochs=3, parts=("query",), weight_decay=0.3)
    assert [(group["lr"], group["weight_decay"]) for group in phase.groups] == [
        (0.1, 0.3),
        (0.2, 0.3),
    ]
    assert phase.epochs == 3
    assert phase.selection.count == 24
    (phase,) = bitfit(model, lr=0.1, epochs=1, head=("bert.pooler", "classifier"))
    assert "bert.pooler.dense.bias" not in phase.selection.shapes
    assert len(phase.groups[1]["params"]) == 4


def test_a_model_without_biases_raises_and_is_as_it_was(build, batches):
    model = build("llama")
    before = sl.snapshot(model)
    with pytest.raises(
        ValueError, match="model has no bias outside its head, so BitFit has nothing to train"
    ):
        sl.fit(model, bitfit(model, lr=0.1, epochs=1), batches("llama", 1))
    assert all(
        torch.equal(before[name], p) and p.requires_grad for name, p in model.named_parameters()
    )
    with pytest.raises(ValueError, match="no bias outside its head"):
        biases(build("toy"), head=("first", "norm", "classifier"))
