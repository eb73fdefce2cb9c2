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


def test_frozen_weights_learn_too_and_are_frozen_again_after_it(build, batches):
    model = build("bert")
    frozen = model.bert.pooler.dense.weight.requires_grad_(False)
    before = frozen.clone()
    sl.fit(model, layerwise_rates(model, lr=0.1, decay=0.5, epochs=1), batches("bert", 1))
    assert not torch.equal(frozen, before)
    assert [p.requires_grad for p in model.parameters()] == [
        p is not frozen for p in model.parameters()
    ]


def test_bad_decay_and_a_model_without_blocks_raise(build):
    for decay in (0.0, 1.5):
        with pytest.raises(ValueError, match=f"decay={decay} is outside"):
            next(layerwise_rates(build("bert"), lr=0.1, decay=decay, epochs=1))
    with pytest.raises(ValueError, match="model has no numbered blocks"):
        depths(build("toy"))
