"""What the model or its user froze stays frozen.

huggingface/transformers#25989, haotian-liu/LLaVA#1647.
"""

import pytest
import torch
from torch import nn

import selective_lite as sl
from tests.cases.helpers import (
    assert_only_these_moved,
    bert,
    hf,
    refused,
    some_of_each,
    tokens,
    train,
)

WHISPER = {
    "vocab_size": 53,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 20,
    "decoder_ffn_dim": 20,
    "num_mel_bins": 8,
    "max_source_positions": 10,
    "max_target_positions": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}


def batch():
    return tokens("classes")


def test_whispers_sinusoids_are_not_selected():
    """transformers#25989: the model itself sets requires_grad=False on its table of positions."""
    model = hf("WhisperForConditionalGeneration", **WHISPER)
    data = {
        "input_features": torch.randn(2, 8, 20),
        "labels": torch.randint(3, 53, (2, 6)),
    }
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
    before = sl.snapshot(model)
    selection = sl.select(sl.magnitude(model), 0.1)
    assert frozen
    assert not set(frozen) & {*selection.shapes, *selection.indices}
    sl.fit(model, sl.fixed_mask(model, selection, lr=1e-2, epochs=2), [data])
    assert all(torch.equal(model.get_parameter(n), before[n]) for n in frozen)


SCORES = {
    "magnitude": lambda m: sl.select(sl.magnitude(m), 0.1),
    "random": lambda m: sl.select(sl.random_scores(m, 0), 0.1),
    "fish": lambda m: sl.fish(m, [batch()], 0.1),
    "bitfit": sl.bitfit,
    "child_tuning": lambda m: sl.child_tuning(m, [batch()], 0.1),
    "smallest": lambda m: sl.smallest(m, 0.1),
}


@pytest.mark.parametrize("how", SCORES)
def test_embeddings_that_the_user_froze_are_not_selected(how):
    """LLaVA#1647: the frozen tower got trained; BERT's frozen embeddings took 48 of 101 weights."""
    model = bert()
    model.bert.embeddings.requires_grad_(False)
    selection = SCORES[how](model)
    assert selection.count > 0
    assert not any("embeddings" in name for name in selection.indices)
    assert not any("embeddings" in name for name in selection.shapes)


METHODS = {
    "full_finetuning": lambda m: sl.full_finetuning(m, lr=1e-2, epochs=2),
    "lt_sft": lambda m: sl.lt_sft(m, 0.1, lr=1e-2, epochs=(2, 2)),
    "diff_pruning": lambda m: sl.diff_pruning(m, 0.1, lr_w=1e-2, lr=1e-2, epochs=(3, 1)),
    "sara": lambda m: sl.sara(m, budget=0.1, lr=1e-4, lr_head=1e-2, lam=0, epochs=2),
    "child_tuning_f": lambda m: sl.child_tuning_f(m, lr=1e-2, epochs=2),
    "layerwise_rates": lambda m: sl.layerwise_rates(m, lr=1e-2, decay=0.9, epochs=2),
}


@pytest.mark.parametrize("method", METHODS)
def test_frozen_layers_stay_bit_identical_under_every_method(method):
    """A user's own freezing, then any method: the rest trains, the frozen rest does not."""
    model = bert()
    model.bert.embeddings.requires_grad_(False)
    before = sl.snapshot(model)
    sl.fit(model, METHODS[method](model), [batch()])
    moved = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
    assert any("encoder" in n for n in moved)
    assert not any("embeddings" in n for n in moved)
    for name, p in model.named_parameters():
        assert p.requires_grad == ("embeddings" not in name), name


def test_a_model_that_is_frozen_as_a_whole_is_trained_all_the_same():
    """`model.requires_grad_(False)` as before peft: all are candidates.

    Nothing else could have been meant.
    """
    model = bert().requires_grad_(False)
    before, selection = sl.snapshot(model), sl.select(sl.squared_gradient(model, [batch()]), 0.02)
    sl.fit(model, sl.fixed_mask(model, selection, lr=1e-2, epochs=2), [batch()])
    assert_only_these_moved(before, model, selection, head=sl.head_weights(model))
    assert not any(p.requires_grad for p in model.parameters())


def test_a_body_that_is_frozen_with_a_head_that_is_not():
    """The first step of many tutorials: all candidates are frozen, the head is free."""
    model = bert()
    model.bert.requires_grad_(False)
    selection = sl.fish(model, [batch()], 0.02)
    before = sl.snapshot(model)
    with sl.masked(model, selection):
        train(model, [p for p in model.parameters() if p.requires_grad], batch())
    assert_only_these_moved(before, model, selection, head=sl.head_weights(model))
    assert not torch.equal(model.classifier.weight, before["classifier.weight"])


def test_flags_are_as_before_after_training():
    """A second stage of the user's script relies on what it froze."""
    model = bert()
    model.bert.embeddings.requires_grad_(False)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    with sl.masked(model, some_of_each(model, head=None)) as tuning:
        train(model, tuning.parameters(), batch())
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    sl.squared_gradient(model, [batch()])
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags


def test_a_delta_of_a_model_with_frozen_layers_holds_the_rest(path):
    """And `diff` of a model that is frozen after training, as for inference, misses nothing."""
    model, fresh = bert(), bert()
    before = sl.snapshot(model)
    selection = some_of_each(model, head=None)
    sl.fit(model, sl.fixed_mask(model, selection, lr=1e-2, epochs=1), [batch()])
    model.bert.embeddings.requires_grad_(False)
    sl.diff(before, model).save(path)
    sl.load(path).apply(fresh)
    assert torch.equal(fresh(**batch()).logits, model(**batch()).logits)


def test_a_model_without_anything_to_select():
    """Integers only."""
    model = nn.Module()
    model.table = nn.Parameter(torch.arange(4), requires_grad=False)
    with refused("nothing can be selected"):
        sl.weights(model, ())
