"""A delta and its base: what the file says of it, buffers, ties, prefixes and wrappers."""

import copy
import warnings

import pytest
import torch
from torch import nn

import selective_lite as sl
from tests.bits import same, state


def shifted(model, *names, amount=1.0):
    """A copy with the first three weights of these tensors shifted."""
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        for name in names:
            tuned.get_parameter(name).view(-1)[:3] += amount
    return tuned


QUERY = "bert.encoder.layer.0.attention.self.query.weight"
TABLE = "model.embed_tokens.weight"


# What the file says of its base


def test_the_file_says_what_its_base_is(build, tmp_path):
    base = build("bert")
    base.config._name_or_path, base.config._commit_hash = "someone/bert", "c0ffee"
    base.config.id2label = {0: "bad", 1: "good", 2: "mixed"}
    tuned = shifted(base, QUERY)
    sl.diff(base, tuned, method="by hand").save(tmp_path / "delta")
    metadata = sl.load(tmp_path / "delta").metadata
    assert metadata["base"] == {
        "class": "BertForSequenceClassification",
        "dtype": "torch.float32",
        "name_or_path": "someone/bert",
        "revision": "c0ffee",
        "part": "bert",
        "num_labels": 3,
        "id2label": {"0": "bad", "1": "good", "2": "mixed"},
    }
    assert metadata["library"] == sl.__version__
    assert (metadata["k"], metadata["method"]) == (3, "by hand")
    assert metadata["total"] == sum(p.numel() for p in sl.weights(base).values())
    page = sl.describe(tmp_path / "delta").splitlines()
    assert (
        "base         someone/bert (BertForSequenceClassification, torch.float32), revision c0ffee"
    ) in page
    assert "labels       bad, good, mixed" in page
    assert f"library      selective_lite {sl.__version__}" in page
    assert f"budget       3 of {metadata['total']:,} weights" in "\n".join(page)


def test_a_language_model_has_no_labels_and_a_module_no_name(build):
    base = build("llama")
    said = sl.diff(base, shifted(base, TABLE)).metadata["base"]
    assert said == {"class": "LlamaForCausalLM", "dtype": "torch.float32", "part": "model"}
    base = nn.Linear(3, 3)
    said = sl.diff(base, shifted(base, "weight"), head=()).metadata["base"]
    assert said == {"class": "Linear", "dtype": "torch.float32"}


def test_the_class_is_the_model_s_own_inside_masked_training():
    base = nn.Linear(3, 3)
    start = sl.snapshot(base)
    chosen = sl.Selection({"weight": torch.tensor([1])}, {"weight": (3, 3)})
    with sl.masked(base, chosen, head=()) as tuning:
        with torch.no_grad():
            tuning.parameters()[0].add_(1)
        assert sl.diff(start, base, head=()).metadata["base"]["class"] == "Linear"


def test_an_error_names_the_tensor_that_differs(build):
    base = build("bert")
    delta = sl.diff(base, shifted(base, QUERY, "bert.pooler.dense.weight"))
    other = build("bert")
    with torch.no_grad():
        other.bert.pooler.dense.weight.view(-1)[1] += 1
    before = state(other)
    with pytest.raises(sl.DeltaError, match="model's 'bert.pooler.dense.weight' is not the base's"):
        delta.apply(other)
    assert same(state(other), before)


# Buffers


class Normed(nn.Module):
    """Batch norm and spectral norm: buffers of floats and of an integer that training moves."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(4, 6), nn.BatchNorm1d(6)
        self.second = nn.utils.spectral_norm(nn.Linear(6, 5))
        self.classifier = nn.Linear(5, 2)

    def forward(self, x):
        return self.classifier(torch.relu(self.second(self.norm(self.first(x)))))


def normed(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Normed().eval()


@pytest.fixture
def moved():
    """A base and the same model after some steps in training mode."""
    base = normed()
    tuned = copy.deepcopy(base).train()
    optimizer = torch.optim.SGD(tuned.parameters(), lr=0.1)
    for seed in range(3):
        x = 2 + torch.randn(8, 4, generator=torch.Generator().manual_seed(seed))
        tuned(x).square().mean().backward()
        optimizer.step()
    return base, tuned.eval()


@pytest.mark.parametrize("encoding", ["flat", "gap-lzma"])
@pytest.mark.parametrize("as_snapshot", [False, True])
def test_buffers_are_shipped_applied_and_reverted(moved, tmp_path, encoding, as_snapshot):
    base, tuned = moved
    delta = sl.diff(sl.snapshot(base) if as_snapshot else base, tuned)
    assert set(delta.buffers) == {
        "norm.running_mean",
        "norm.running_var",
        "norm.num_batches_tracked",
        "second.weight_u",
        "second.weight_v",
    }
    delta.save(tmp_path / "delta", encoding)
    x, before = torch.randn(5, 4), state(base)
    plain = base(x)
    with sl.load(tmp_path / "delta").apply(base) as applied:
        assert torch.equal(base(x), tuned(x))
        assert same(state(base), state(tuned))
        assert not torch.equal(base(x), plain)
    assert same(state(base), before)
    assert applied._reverted


def test_a_buffer_that_did_not_move_is_not_in_the_file_and_no_weight(moved):
    base, tuned = moved
    delta = sl.diff(base, shifted(base, "first.weight"))
    assert delta.buffers == {}
    full = sl.diff(base, tuned)
    tensors = (*full.values.values(), *full.dense.values())
    assert full.buffers
    assert full.count == sum(t.numel() for t in tensors)


def test_the_base_s_buffers_are_part_of_its_fingerprint(moved):
    base, tuned = moved
    delta = sl.diff(base, tuned)
    with torch.no_grad():
        base.norm.running_var[2] += 1
    before = state(base)
    with pytest.raises(sl.DeltaError, match="model's 'norm.running_var' is not the base's"):
        delta.apply(base)
    assert same(state(base), before)


def test_buffers_that_move_under_a_delta_are_not_reverted(moved):
    base, tuned = moved
    applied = sl.diff(base, tuned).apply(base)
    base.norm.num_batches_tracked += 1
    with pytest.raises(sl.DeltaError, match="'norm.num_batches_tracked' no longer holds"):
        applied.revert()


def test_a_base_without_buffers_is_said_and_one_without_some_is_refused(moved):
    base, tuned = moved
    start = {name: p.detach().clone() for name, p in base.named_parameters()}
    with pytest.warns(UserWarning, match="base holds no buffers, such as 'norm.running_mean'"):
        assert sl.diff(start, tuned).buffers == {}
    start["norm.running_mean"] = base.norm.running_mean
    with pytest.raises(ValueError, match=r"base has no 'norm.running_var' of shape \(6,\)"):
        sl.diff(start, tuned)


def test_buffers_of_sums_must_agree_or_one_delta_is_chosen(moved):
    base, tuned = moved
    other = normed()
    other.load_state_dict(tuned.state_dict())
    other.norm.running_mean += 1
    deltas = [sl.diff(base, tuned), sl.diff(base, other)]
    with pytest.raises(ValueError, match="different buffers; give head=0 to head=1"):
        sl.combine(base, deltas, [0.5, 0.5])
    for i, model in enumerate((tuned, other)):
        found = sl.combine(base, deltas, [0.5, 0.5], head=i)
        assert torch.equal(found.buffers["norm.running_mean"], model.norm.running_mean)
    assert sl.combine(base, [deltas[0]] * 2, [0.5, 0.5]).buffers.keys() == deltas[0].buffers.keys()


# Ties


def llama(tied):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=53, tie_word_embeddings=tied, **sizes, **heads)
        model = LlamaForCausalLM(config).eval()
    if not tied:
        model.load_state_dict(llama(True).state_dict())
    return model


@pytest.mark.parametrize("tied", [True, False])
def test_a_base_that_ties_differently_is_refused(tied):
    base, other = llama(tied), llama(not tied)
    delta = sl.diff(base, shifted(base, TABLE))
    before = state(other)
    with pytest.raises(
        sl.DeltaError, match=r"ties 'model.embed_tokens.weight' to 'lm_head.weight'"
    ):
        delta.apply(other)
    assert same(state(other), before)
    delta.apply(base)


def test_a_tie_of_other_tensors_does_not_matter():
    base, other = llama(True), llama(False)
    name = "model.layers.0.mlp.up_proj.weight"
    sl.diff(base, shifted(base, name)).apply(other)
    assert same(state(other.model), state(shifted(base, name).model))


def test_the_part_without_the_output_layer_takes_a_tied_delta():
    base, tuned = llama(True), shifted(llama(True), TABLE)
    part = llama(True).model
    sl.diff(base, tuned).apply(part)
    assert same(state(part), state(tuned.model))


# Another prefix, a wrapper, a part


class Wrapper(nn.Module):
    def __init__(self, inside, name="encoder"):
        super().__init__()
        setattr(self, name, inside)


@pytest.fixture
def classified(build):
    """A base and a tuned BERT classifier; the head differs too."""
    base = build("bert")
    tuned = shifted(base, QUERY, "bert.pooler.dense.bias", "classifier.weight")
    return base, tuned


def test_a_wrapped_model_takes_the_delta(classified):
    base, tuned = classified
    delta = sl.diff(base, tuned)
    whole = Wrapper(base, "net")
    with delta.apply(whole):
        assert same(state(base), state(tuned))
    compiled = torch.compile(base, backend="eager")
    with delta.apply(compiled):
        assert same(state(base), state(tuned))


def test_a_delta_of_a_wrapped_or_compiled_model_fits_the_model_itself(classified):
    base, tuned = classified
    compiled = sl.diff(sl.snapshot(base), torch.compile(tuned, backend="eager"))
    assert compiled.metadata == sl.diff(base, tuned).metadata
    wrapped = sl.diff(Wrapper(base), Wrapper(tuned), head=["encoder.classifier"])
    for delta in (compiled, wrapped):
        with delta.apply(base):
            assert same(state(base), state(tuned))


@pytest.mark.parametrize("name", [None, "encoder"])
def test_the_encoder_takes_its_part_and_a_warning_says_that_the_head_was_left_out(classified, name):
    base, tuned = classified
    part = base.bert if name is None else Wrapper(base.bert, name)
    before = state(part)
    with pytest.warns(UserWarning, match=r"no 'classifier.*: the delta's head was left out"):
        applied = sl.diff(base, tuned).apply(part)
    assert same(state(base.bert), state(tuned.bert))
    applied.revert()
    assert same(state(part), before)


def test_an_encoder_s_delta_fits_the_classifier(classified):
    base, tuned = classified
    delta = sl.diff(base.bert, tuned.bert)
    assert delta.head == {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        delta.apply(base)
    assert same(state(base.bert), state(tuned.bert))


def test_small_modules_follow_the_prefix(build):
    base = build("bert")
    tuned = copy.deepcopy(base)
    sl.add_adapters(tuned, QUERY, rank=2, seed=5)
    with torch.no_grad():
        sl.adapters(tuned)[QUERY].B.add_(1)
    delta = sl.diff(base, tuned)
    with pytest.warns(UserWarning, match="left out"), delta.apply(base.bert):
        assert same(state(base.bert), state(tuned.bert))
    assert sl.adapters(base) == {}


def test_several_places_that_fit_are_refused(classified):
    base, tuned = classified
    both = nn.ModuleDict({"one": copy.deepcopy(base), "two": copy.deepcopy(base)})
    before = state(both)
    with pytest.raises(sl.DeltaError, match=r"several times, as two.bert.* and as one.bert"):
        sl.diff(base, tuned).apply(both)
    assert same(state(both), before)


def test_a_part_of_a_head_is_refused(classified):
    base, tuned = classified
    delta = sl.diff(base, tuned)
    base.classifier.register_parameter("bias", None)
    with pytest.raises(sl.DeltaError, match="no parameter 'classifier.bias', which is part of the"):
        delta.apply(base)


def test_sums_and_exports_of_a_part(classified, tmp_path):
    base, tuned = classified
    other = shifted(base, QUERY, amount=2.0)
    deltas = [sl.diff(base.bert, tuned.bert), sl.diff(base, other)]
    found = sl.combine(base, deltas, [1, 1], head=1)
    expected = base.get_parameter(QUERY).view(-1)[:3] + 3
    torch.testing.assert_close(found.values[QUERY], expected.detach())
    encoder = sl.diff(base.bert, other.bert)
    sl.to_shira(encoder, base, tmp_path / "shira")
    assert (tmp_path / "shira" / "adapter_model.safetensors").exists()


# Other shapes and dtypes


def test_resized_embeddings_are_named_with_both_shapes(build):
    base = build("llama")
    base.resize_token_embeddings(56)
    delta = sl.diff(base, shifted(base, TABLE))
    other = build("llama")
    before = state(other)
    with pytest.raises(
        sl.DeltaError,
        match=r"'model.embed_tokens.weight' has shape \[53, 16\], the delta's base has \[56, 16\]; "
        r"resize alike: model.resize_token_embeddings\(56\)",
    ):
        delta.apply(other)
    assert same(state(other), before)


def test_added_rows_that_were_drawn_anew_are_explained(build):
    base = build("llama")
    base.resize_token_embeddings(56)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned.model.embed_tokens.weight[53:] += 1
    other = build("llama")
    torch.manual_seed(7)
    other.resize_token_embeddings(56)
    with pytest.raises(sl.DeltaError, match=r"embed_tokens.weight' is not .* drawn anew"):
        sl.diff(base, tuned).apply(other)
    whole = sl.diff(base, tuned, head=[TABLE])  # the remedy: ship the tensor whole
    whole.apply(other)
    assert torch.equal(other.model.embed_tokens.weight, tuned.model.embed_tokens.weight)


def test_a_model_without_values_is_refused(build):
    base = build("toy")
    delta = sl.diff(base, shifted(base, "first.weight"))
    with pytest.raises(sl.DeltaError, match="'first.weight' is on the meta device"):
        delta.apply(build("toy").to("meta"))
    with pytest.raises(ValueError, match="is on the meta device"):
        sl.diff(base, build("toy").to("meta"))


def test_a_quantized_model_is_refused(build):
    base = build("toy")
    delta = sl.diff(base, shifted(base, "first.weight"))
    other = build("toy")
    packed = torch.zeros(21, 1, dtype=torch.uint8)
    other.first.weight = nn.Parameter(packed, requires_grad=False)
    with pytest.raises(sl.DeltaError, match="'first.weight' is quantized .*uint8.*float32"):
        delta.apply(other)


# Masked training


def test_apply_and_revert_inside_masked_training_say_to_leave_it(build, pick):
    base = build("toy")
    delta = sl.diff(base, shifted(base, "first.weight"))
    applied = delta.apply(base)
    with sl.masked(base, pick(base)):
        before = state(base)
        for act in (lambda: delta.apply(base), applied.revert, lambda: delta.base_values(base)):
            with pytest.raises(
                sl.DeltaError, match="model is in masked training; leave that first"
            ):
                act()
        assert same(state(base), before)
    applied.revert()


# The selection that a delta was made from


def test_a_delta_gives_the_selection_back(build, pick, batches):
    model = build("bert")
    chosen, base = pick(model), sl.snapshot(model)
    with sl.masked(model, chosen) as tuning, torch.no_grad():
        for p in tuning.parameters():
            p.add_(1)
    delta = sl.diff(base, model, method="by hand")
    found = delta.selection(model)
    assert found.method == "by hand"
    assert list(found.indices) == list(chosen.indices)
    assert all(torch.equal(found.indices[n], chosen.indices[n]) for n in chosen.indices)
    assert found.shapes == {name: tuple(p.shape) for name, p in sl.weights(model).items()}
    alone = delta.selection()
    assert alone.indices.keys() == alone.shapes.keys() == chosen.indices.keys()
    assert delta.selection(model.bert).count == found.count
    with torch.no_grad():
        model.load_state_dict(base)
        model.classifier.bias += 1
    with pytest.raises(ValueError, match="replaces no weight outside its head"):
        sl.diff(base, model).selection()
