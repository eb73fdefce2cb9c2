"""Freezing and layer-wise rates: which layer a tensor lies in, and what follows from it."""

import pytest
import torch

import selective_lite as sl
from selective_lite.methods.freezing import depths, last_layers, layerwise_rates


@pytest.mark.parametrize(
    ("kind", "places"),
    [
        (
            "bert",
            {
                "bert.embeddings.position_embeddings.weight": 0,
                "bert.encoder.layer.0.output.dense.bias": 1,
                "bert.encoder.layer.1.attention.self.query.weight": 2,
                "bert.pooler.dense.weight": 3,
            },
        ),
        (
            "llama",
            {
                "model.embed_tokens.weight": 0,
                "model.layers.1.mlp.up_proj.weight": 2,
                "model.norm.weight": 3,
            },
        ),
        (
            "gpt2",
            {
                "transformer.wpe.weight": 0,
                "transformer.h.0.ln_1.weight": 1,
                "transformer.ln_f.bias": 3,
            },
        ),
    ],
)
def test_depth_counts_from_the_embeddings_to_what_follows_the_last_block(build, kind, places):
    model = build(kind)
    found = depths(model)
    assert list(found) == list(sl.weights(model))
    assert {name: found[name] for name in places} == places


def test_the_last_layers_train_and_the_first_are_frozen(build):
    model = build("bert")
    counts = last_layers(model, 1).per_tensor()
    assert {name for name, count in counts.items() if count} == {
        name
        for name in sl.weights(model)
        if name.startswith(("bert.encoder.layer.1.", "bert.pooler."))
    }
    assert all(count in (0, model.get_parameter(name).numel()) for name, count in counts.items())
    with pytest.raises(ValueError, match=r"count=3 is outside \[1, 2\]"):
        last_layers(model, 3)


def test_each_layer_learns_slower_than_the_one_above_it(build, batches):
    model = build("bert")
    (phase,) = layerwise_rates(model, lr=0.1, decay=0.5, epochs=1, lr_head=0.7)
    of = {id(p): group["lr"] for group in phase.groups for p in group["params"]}
    assert of[id(model.bert.pooler.dense.weight)] == pytest.approx(0.1)
    assert of[id(model.bert.encoder.layer[1].output.dense.weight)] == pytest.approx(0.05)
    assert of[id(model.bert.encoder.layer[0].output.dense.weight)] == pytest.approx(0.025)
    assert of[id(model.bert.embeddings.word_embeddings.weight)] == pytest.approx(0.0125)
    assert of[id(model.classifier.weight)] == 0.7
    assert len(of) == len(list(model.parameters()))
    before = sl.snapshot(model)
    sl.fit(model, [phase], batches("bert", 1), optimizer=torch.optim.SGD)
    assert not torch.equal(before["bert.pooler.dense.weight"], model.bert.pooler.dense.weight)


@pytest.mark.parametrize("all_frozen", [False, True])
def test_what_the_user_froze_stays_frozen_unless_it_is_everything(build, batches, all_frozen):
    model = build("bert")
    frozen = model.bert.pooler.dense.weight
    (model if all_frozen else frozen).requires_grad_(False)
    flags, before = [p.requires_grad for p in model.parameters()], frozen.clone()
    sl.fit(model, layerwise_rates(model, lr=0.1, decay=0.5, epochs=1), batches("bert", 1))
    assert torch.equal(frozen, before) != all_frozen
    assert [p.requires_grad for p in model.parameters()] == flags


def test_the_last_layers_are_counted_from_the_top_whatever_is_frozen_below(build):
    model = build("bert")
    model.bert.encoder.layer[0].requires_grad_(False)
    model.bert.embeddings.requires_grad_(False)
    (expected, found) = (last_layers(m, 1) for m in (build("bert"), model))
    assert list(found.indices) == list(expected.indices)
    assert found.method == "last 1 layers"
    with pytest.raises(ValueError, match=r"count=2 is outside \[1, 1\]"):
        last_layers(model, 2)


def test_a_plain_stack_has_numbered_blocks_too():
    model = torch.nn.Sequential(*(torch.nn.Linear(3, 3) for _ in range(3)))
    assert list(last_layers(model, 2, head=()).indices) == [
        "1.weight",
        "1.bias",
        "2.weight",
        "2.bias",
    ]


def test_bad_options_raise_at_the_call(build):
    for decay in (0.0, 1.5):
        with pytest.raises(ValueError, match=f"decay={decay} is outside"):
            layerwise_rates(build("bert"), lr=0.1, decay=decay, epochs=1)
    with pytest.raises(ValueError, match="epochs=0 of phase 'layer-wise'"):
        layerwise_rates(build("bert"), lr=0.1, decay=0.5, epochs=0)
    with pytest.raises(ValueError, match="model has no numbered blocks"):
        layerwise_rates(build("toy"), lr=0.1, decay=0.5, epochs=1)
    with pytest.raises(ValueError, match="model has no numbered blocks"):
        depths(build("toy"))
