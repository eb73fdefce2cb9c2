"""What is shipped makes the receiver's model the tuned one, or is refused.

It is never another model in silence.

Buffers: huggingface/peft#1732. Ties: huggingface/peft#2777, #2018,
thinking-machines-lab/tinker-cookbook#593. New tokens: huggingface/peft#1605, #2376,
hiyouga/LlamaFactory#6749. During training: huggingface/peft#353, #96,
huggingface/transformers#24073.
"""

import copy

import pytest
import torch
from torch import nn

import selective_lite as sl
from tests.cases.helpers import (
    ENCODER,
    assert_clear,
    bert,
    chosen,
    cross_entropy,
    hf,
    llama,
    mlp,
    refused,
    right_or_refused,
    some_of_each,
    tokens,
    train,
    vectors,
)


def with_batch_norm():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3)).eval()


def with_spectral_norm():
    torch.manual_seed(0)
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 16))
    return nn.Sequential(layer, nn.ReLU(), nn.Linear(16, 3)).eval()


class Counted(nn.Module):
    """Buffers of a user's own: a running mean, and a count that is an integer."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("seen", torch.tensor(0))

    def forward(self, x):
        if self.training:
            self.mean.lerp_(x.mean(0), 0.1)
            self.seen.add_(len(x))
        return self.layer(x - self.mean)


def counted():
    torch.manual_seed(0)
    return Counted().eval()


BUFFERED = [with_batch_norm, with_spectral_norm, counted]


def far_away():
    batch = vectors(64)
    return {**batch, "x": 3 * batch["x"] + 1}


@pytest.mark.parametrize("make", BUFFERED)
@pytest.mark.parametrize("start", ["model", "snapshot", "tuning"])
def test_statistics_that_moved_are_shipped(make, start, path):
    """peft#1732: batch norm's running statistics moved in training.

    The file did not hold them.
    """
    base, tuned, fresh = make(), make(), make()
    before, batch = sl.snapshot(tuned), far_away()
    selection = sl.select(sl.random_scores(tuned, 0, head=()), 0.2)
    if start == "tuning":
        with sl.masked(tuned.train(), selection, head=()) as tuning:
            train(tuned, tuning.parameters(), batch, cross_entropy, steps=20)
        delta = tuning.delta()
        tuned.eval()
    else:
        phases = sl.fixed_mask(tuned, selection, lr=1e-2, epochs=20, head=())
        sl.fit(tuned, phases, [batch], loss=cross_entropy)
        delta = sl.diff(base if start == "model" else before, tuned, head=())
    delta.save(path)
    before_applied = fresh(batch["x"])
    applied = sl.load(path).apply(fresh)
    assert torch.equal(fresh(batch["x"]), tuned(batch["x"]))
    for name, buffer in tuned.named_buffers():
        assert torch.equal(dict(fresh.named_buffers())[name], buffer), name
    applied.revert()
    assert torch.equal(fresh(batch["x"]), before_applied)


def test_a_delta_of_another_batch_norm_model_is_refused_not_half_applied():
    """The receiver's statistics are those of another pretraining."""
    base, tuned, other = with_batch_norm(), with_batch_norm(), with_batch_norm()
    selection = sl.select(sl.random_scores(tuned, 0, head=()), 0.2)
    phases = sl.fixed_mask(tuned, selection, lr=1e-2, epochs=2, head=())
    sl.fit(tuned, phases, [far_away()], loss=cross_entropy)
    other[1].running_mean += 1.0
    state = copy.deepcopy(other.state_dict())
    with pytest.raises(sl.DeltaError, match=r"1\.running_mean"):
        sl.diff(base, tuned, head=()).apply(other)
    assert all(torch.equal(state[n], t) for n, t in other.state_dict().items())


def pretrained():
    return {k: v.clone() for k, v in llama(tie_word_embeddings=True).state_dict().items()}


def export(tie):
    """The same checkpoint, with embeddings tied or two copies of the same numbers.

    They are the input's and the output's.
    """
    model = llama(tie_word_embeddings=tie)
    model.load_state_dict(pretrained())
    return model


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("only", ["embed_tokens", "up_proj"])
def test_a_base_that_ties_its_weights_differently(tie, only):
    """peft#2777, #2018, tinker-cookbook#593: it answers as the tuned model, or is refused."""
    tuned, other = export(tie), export(not tie)
    assert torch.equal(tuned(**tokens()).logits, other(**tokens()).logits)
    before, selection = sl.snapshot(tuned), some_of_each(tuned, 100, only=only)
    sl.fit(tuned, sl.fixed_mask(tuned, selection, lr=1e-2, epochs=8), [tokens()])
    with right_or_refused("tie"):
        sl.diff(before, tuned).apply(other)
        assert torch.equal(tuned(**tokens()).logits, other(**tokens()).logits)


def resized(seed):
    model = llama(tie_word_embeddings=True)
    torch.manual_seed(seed)
    model.resize_token_embeddings(56)
    return model


def rows_of_new_tokens(model):
    rows = torch.arange(53 * 16, 56 * 16)
    return sl.Selection(
        {"model.embed_tokens.weight": rows},
        {n: tuple(p.shape) for n, p in model.named_parameters()},
    )


def test_only_the_new_tokens_rows_are_trained_and_shipped():
    """peft#1605, LlamaFactory#6749: the receiver resizes too, but its new rows were drawn anew."""
    model, batch = resized(0), tokens(start=50, stop=56)
    before = sl.snapshot(model)
    sl.fit(model, sl.fixed_mask(model, rows_of_new_tokens(model), lr=1e-2, epochs=5), [batch])
    delta = sl.diff(before, model)
    same, other = resized(0), resized(5)
    delta.apply(same)
    assert torch.equal(same(**batch).logits, model(**batch).logits)
    with right_or_refused("embed_tokens"):
        delta.apply(other)
        assert torch.equal(other(**batch).logits, model(**batch).logits)


def test_a_receiver_that_did_not_resize_is_told_to():
    """The tokenizer has the new tokens, the model has not."""
    model, batch = resized(0), tokens(start=50, stop=56)
    before = sl.snapshot(model)
    sl.fit(model, sl.fixed_mask(model, rows_of_new_tokens(model), lr=1e-2, epochs=1), [batch])
    receiver = llama(tie_word_embeddings=True)
    with refused("resize", kinds=sl.DeltaError):
        sl.diff(before, model).apply(receiver)


def test_a_receiver_that_has_more_tokens_than_the_tuned_model():
    """The other way round: the receiver added tokens of its own."""
    model = llama(tie_word_embeddings=True)
    before, selection = sl.snapshot(model), some_of_each(model)
    sl.fit(model, sl.fixed_mask(model, selection, lr=1e-2, epochs=1), [tokens()])
    with right_or_refused("embed_tokens", "resize"):
        sl.diff(before, model).apply(resized(0))


def stepped(model, tuning):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(torch.ones(2, 6)).sum().backward()
    optimizer.step()


def test_a_diff_at_every_checkpoint():
    """peft#353, #96, transformers#24073: inside masked training, after a step."""
    model = mlp()
    before = sl.snapshot(model)
    with sl.masked(model, sl.select(sl.random_scores(model, 0, head=()), 9), head=()) as tuning:
        stepped(model, tuning)
        inside = sl.diff(before, model, head=())
    after = sl.diff(before, model, head=())
    assert inside.count == after.count > 0
    for name, values in after.values.items():
        assert torch.equal(values, inside.values[name])


def test_a_file_at_every_checkpoint_is_what_diff_would_write(tmp_path):
    """The same from `tuning.delta()`, which holds no second copy of the model."""
    model = mlp()
    before = sl.snapshot(model)
    with sl.masked(model, sl.select(sl.random_scores(model, 0, head=()), 9), head=()) as tuning:
        for number in range(3):
            stepped(model, tuning)
            tuning.delta(method="by hand").save(tmp_path / f"{number}.safetensors")
            sl.diff(before, model, head=(), method="by hand").save(tmp_path / "diff.safetensors")
            mine = (tmp_path / f"{number}.safetensors").read_bytes()
            assert mine == (tmp_path / "diff.safetensors").read_bytes()
    tuning.delta(method="by hand").save(tmp_path / "after.safetensors")
    assert (tmp_path / "after.safetensors").read_bytes() == mine


def test_a_delta_is_not_applied_to_a_model_in_masked_training():
    """Its values would be overwritten at the next forward, in silence."""
    base, tuned, model = mlp(), mlp(), mlp()
    with torch.no_grad():
        tuned[0].weight[0, 0] += 1
    delta = sl.diff(base, tuned, head=())
    with sl.masked(model, chosen(model, **{"0__weight": [0, 3]}), head=()), refused("masked"):
        delta.apply(model)
    delta.apply(model)
    assert torch.equal(model[0].weight, tuned[0].weight)


def test_a_delta_is_not_reverted_inside_masked_training_in_silence():
    """Trained on top of a delta that is taken out halfway."""
    base, tuned, model = mlp(), mlp(), mlp()
    with torch.no_grad():
        tuned[0].weight[0, 0] += 1
    applied = sl.diff(base, tuned, head=()).apply(model)
    with sl.masked(model, chosen(model, **{"0__weight": [0, 3]}), head=()), refused("masked"):
        applied.revert()
    applied.revert()
    assert torch.equal(model[0].weight, base[0].weight)


def tuned_bert():
    model = bert()
    before, selection = sl.snapshot(model), some_of_each(model)
    selection = sl.Selection(
        {n: i for n, i in selection.indices.items() if n.startswith("bert.")}, selection.shapes
    )
    sl.fit(model, sl.fixed_mask(model, selection, lr=1e-2, epochs=2), [tokens("classes")])
    return model, sl.diff(before, model)


class Holder(nn.Module):
    """A user's own module around the model."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, **batch):
        return self.model(**batch)


@pytest.mark.parametrize("wrap", [Holder, lambda m: Holder(Holder(m)), torch.compile])
def test_the_same_base_under_another_prefix(wrap):
    """The receiver's model is in a module of its own (`model.bert...`), or is compiled.

    The sender's names are `bert...`.
    """
    tuned, delta = tuned_bert()
    receiver = bert()
    applied = delta.apply(wrap(receiver))
    assert torch.equal(receiver(**tokens("classes")).logits, tuned(**tokens("classes")).logits)
    applied.revert()
    assert all(
        torch.equal(p, q) for p, q in zip(receiver.parameters(), bert().parameters(), strict=True)
    )


def test_the_body_of_the_base_without_its_head():
    """BertModel receives what BertForSequenceClassification learned.

    The body is right, the head is named.
    """
    tuned, delta = tuned_bert()
    receiver = hf("BertModel", **ENCODER)
    receiver.load_state_dict(bert().bert.state_dict())
    try:
        with pytest.warns(UserWarning, match="classifier"):
            delta.apply(receiver)
    except sl.DeltaError as error:
        assert_clear(error, ("head", "classifier"))
    else:
        for name, p in receiver.named_parameters():
            assert torch.equal(p, tuned.get_parameter(f"bert.{name}")), name


def test_two_parts_of_a_model_that_are_both_the_base_are_not_guessed_between():
    """A pair of encoders: which of the two is meant?"""
    _, delta = tuned_bert()
    pair = nn.ModuleDict({"left": bert(), "right": bert()})
    state = copy.deepcopy(pair.state_dict())
    with refused("left", "right", "several", "which", kinds=sl.DeltaError):
        delta.apply(pair)
    assert all(torch.equal(state[n], t) for n, t in pair.state_dict().items())
    delta.apply(pair["left"])


def test_a_delta_of_a_float32_base_on_one_that_was_loaded_in_half_precision():
    """`torch_dtype="auto"` or `dtype=torch.bfloat16` at the receiver's."""
    _, delta = tuned_bert()
    with refused("dtype", "bfloat16", kinds=sl.DeltaError):
        delta.apply(bert().bfloat16())


def test_a_delta_applied_twice_is_refused():
    """A notebook cell that was run again."""
    tuned, delta = tuned_bert()
    model = bert()
    delta.apply(model)
    with refused("already", "base", kinds=sl.DeltaError):
        delta.apply(model)
    assert torch.equal(model(**tokens("classes")).logits, tuned(**tokens("classes")).logits)


def test_nothing_moved_is_said_instead_of_an_empty_file():
    """A rate of zero, or the wrong model object."""
    with refused("equal", "nothing"):
        sl.diff(mlp(), mlp(), head=())


def test_a_selection_can_be_kept_and_used_again(tmp_path):
    """Resume next week, or train the same mask on a second task."""
    model = bert()
    selection = sl.fish(model, [tokens("classes")], 0.02)
    selection.save(tmp_path / "mask.safetensors")
    again = sl.Selection.load(tmp_path / "mask.safetensors")
    assert again.shapes == selection.shapes
    assert again.method == selection.method == "FISH"
    assert all(torch.equal(again.indices[n], i) for n, i in selection.indices.items())
    sl.fit(model, sl.fixed_mask(model, again, lr=1e-2, epochs=1), [tokens("classes")])


def test_training_goes_on_from_a_file(path):
    """A delta of yesterday, trained further today: the same positions, from its values."""
    tuned, delta = tuned_bert()
    delta.save(path)
    model = bert()
    loaded = sl.load(path)
    with sl.masked(model, loaded.selection(model)) as tuning:
        tuning.resume(loaded)
        with torch.no_grad():
            found = model(**tokens("classes")).logits
        assert torch.equal(found, tuned(**tokens("classes")).logits)
        train(model, [p for p in model.parameters() if p.requires_grad], tokens("classes"))
    later = tuning.delta()
    fresh = bert()
    later.apply(fresh)
    assert torch.equal(fresh(**tokens("classes")).logits, model(**tokens("classes")).logits)
