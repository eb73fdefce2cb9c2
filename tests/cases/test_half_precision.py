"""Training a model that is held in bfloat16 or float16.

vllm-project/speculators#765, fla-org/flame#47.

Near 1 a bfloat16 has steps of 1/128: an update of 1e-4 is rounded away, a hundred times over.
"""

import copy

import pytest
import torch
from safetensors.torch import load_file

import selective_lite as sl
from tests.cases.helpers import bert, some_of_each, tokens, train

SMALL_STEPS = {"lr": 1e-4, "epochs": 100}


def moved(before, model, names):
    return {n: int((model.get_parameter(n) != before[n]).sum()) for n in names}


def batch():
    return tokens("classes", 8)


@pytest.mark.parametrize("whole", [True, False])
def test_norms_of_a_bfloat16_model_move(whole):
    """speculators#765, flame#47: norm weights never moved.

    Selected in part they did, whole they did not.
    """
    model = bert().bfloat16()
    norms = sl.select_tensors(model, lambda name, _: name.endswith("LayerNorm.weight"))
    if not whole:
        norms = sl.Selection({n: i[:-1] for n, i in norms.indices.items()}, norms.shapes)
    before = sl.snapshot(model)
    sl.fit(model, sl.fixed_mask(model, norms, **SMALL_STEPS), [batch()])
    assert sum(moved(before, model, norms.indices).values()) > 0.5 * norms.count
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_head_of_a_half_precision_model_moves(dtype):
    """The same for the task head, which is trained whole: its weights near 1 stood still."""
    model = bert()
    with torch.no_grad():
        model.classifier.weight.copy_(1 + model.classifier.weight.sign() / 4)
    model.to(dtype)
    before = sl.snapshot(model)
    selection = sl.select(sl.random_scores(model, 0), 10)
    sl.fit(model, sl.fixed_mask(model, selection, **SMALL_STEPS), [batch()])
    assert moved(before, model, ["classifier.weight"])["classifier.weight"] > 24  # of 48
    assert model.classifier.weight.dtype == dtype


def test_biases_of_a_bfloat16_model_move():
    """BitFit in bfloat16: all biases are selected whole."""
    model = bert()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("intermediate.dense.bias"):
                p.fill_(1.0)
    model.bfloat16()
    before, biases = sl.snapshot(model), sl.bitfit(model)
    sl.fit(model, sl.fixed_mask(model, biases, **SMALL_STEPS), [batch()])
    (name,) = [n for n in biases.indices if n.endswith("intermediate.dense.bias")]
    assert moved(before, model, [name])[name] > 10  # of 20


def test_full_finetuning_and_phases_of_a_bfloat16_model_move_small_weights_or_say_so():
    """A dense phase has no compact values; LT-SFT's second phase has."""
    model = bert().bfloat16()
    before = sl.snapshot(model)
    sl.fit(model, sl.lt_sft(model, 0.2, lr=1e-3, epochs=(2, 2)), [batch()])
    delta = sl.diff(before, model)
    assert 0 < delta.count <= round(0.2 * delta.metadata["total"])


def test_the_shipped_file_of_a_bfloat16_model_gives_the_tuned_model(path):
    """Values are trained in float32, shipped in bfloat16: rounded once, applied bit for bit."""
    model = bert().bfloat16()
    fresh = copy.deepcopy(model)
    with sl.masked(model, some_of_each(model, head=None)) as tuning:
        train(model, [*tuning.parameters(), *tuning.dense_parameters()], batch())
        tuning.delta().save(path)
    sl.load(path).apply(fresh)
    for name, p in model.named_parameters():
        assert torch.equal(p, fresh.get_parameter(name)), name
    assert torch.equal(model(**batch()).logits, fresh(**batch()).logits)


def test_precise_values_are_float32():
    """For merging or averaging deltas later, nothing should be rounded."""
    model = bert().bfloat16()
    with sl.masked(model, some_of_each(model, head=None)) as tuning:
        train(model, [*tuning.parameters(), *tuning.dense_parameters()], batch())
        rough, precise = tuning.delta(), tuning.delta(precise=True)
    assert all(t.dtype == torch.float32 for t in (*precise.values.values(), *precise.head.values()))
    models = bert().bfloat16(), bert().bfloat16()
    for fresh, delta in zip(models, (rough, precise), strict=True):
        delta.apply(fresh)
        for name, p in model.named_parameters():
            assert torch.equal(p, fresh.get_parameter(name)), name


def test_a_checkpoint_written_inside_holds_the_models_own_keys(tmp_path):
    """`save_pretrained` in a training loop: the model's own keys, and today's values.

    No vector of the library's is beside the weights.
    """
    model = bert().bfloat16()
    own = set(model.state_dict())
    with sl.masked(model, some_of_each(model, head=None)) as tuning:
        train(model, [*tuning.parameters(), *tuning.dense_parameters()], batch())
        model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert set(saved) == own
    for name, p in model.named_parameters():
        assert torch.equal(saved[name], p), name


def test_autocast_over_a_float32_model_keeps_float32_values():
    """Mixed precision as usual: the model is float32, the products are bfloat16."""
    model = bert()
    before, selection = sl.snapshot(model), some_of_each(model, head=None)

    def loss(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return model(**batch).loss

    with sl.masked(model, selection) as tuning:
        train(model, tuning.parameters(), batch(), loss)
        assert all(p.dtype == torch.float32 for p in tuning.parameters())
    assert sum(moved(before, model, selection.indices).values()) > 0.5 * selection.count
