"""Methods of several phases, used as people use them.

Twice, as lists, on another model, with arguments that are off.

cambridgeltl/composable-sft#2 and its kind: what is wrong is said before a step is paid for.
"""

import pytest
import torch

import selective_lite as sl
from tests.cases.helpers import (
    ENCODER,
    assert_only_these_moved,
    bert,
    hf,
    refused,
    some_of_each,
    tokens,
)

METHODS = {
    "fixed_mask": lambda m, **o: sl.fixed_mask(m, some_of_each(m, head=None), **o),
    "full_finetuning": lambda m, **o: sl.full_finetuning(m, **o),
    "lt_sft": lambda m, epochs, **o: sl.lt_sft(m, 0.1, epochs=(epochs, epochs), **o),
    "diff_pruning": lambda m, epochs, **o: sl.diff_pruning(
        m, 0.1, lr_w=1e-2, epochs=(epochs, epochs), **o
    ),
    "sara": lambda m, **o: sl.sara(m, budget=0.1, lam=0.0, reselect=None, **o),
    "sora": lambda m, **o: sl.sora(sl.SoRA(m, 2), **o),
    "child_tuning_f": lambda m, **o: sl.child_tuning_f(m, **o),
    "layerwise_rates": lambda m, **o: sl.layerwise_rates(m, decay=0.9, **o),
}


def batches():
    return [tokens("classes")]


@pytest.mark.parametrize("method", METHODS)
def test_a_method_that_is_used_twice_says_so(method):
    """The second run trained nothing, in silence."""
    model = bert()
    phases = METHODS[method](model, lr=1e-2, epochs=1)
    sl.fit(model, phases, batches())
    before = sl.snapshot(model)
    with refused("once", "again", "used"):
        sl.fit(model, phases, batches())
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("method", METHODS)
def test_the_phases_of_another_model_are_refused(method):
    """`fit(student, fixed_mask(teacher, ...))`: the wrong one of two models."""
    model, other = bert(), bert(1)
    states = [{k: v.clone() for k, v in m.state_dict().items()} for m in (model, other)]
    phases = METHODS[method](other, lr=1e-2, epochs=1)
    with refused("model"):
        sl.fit(model, phases, batches())
    for each, state in zip((model, other), states, strict=True):
        assert list(each.state_dict()) == list(state)
        assert all(torch.equal(v, state[k]) for k, v in each.state_dict().items())


@pytest.mark.parametrize("method", ["fixed_mask", "lt_sft", "sara"])
def test_a_method_that_was_made_a_list_is_refused_or_right(method):
    """`phases = list(method)` to look at them: afterwards only the head was trained."""
    model = bert()
    before = sl.snapshot(model)
    with refused("method", "phase"):
        sl.fit(model, list(METHODS[method](model, lr=1e-2, epochs=1)), batches())
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert list(model.state_dict()) == list(before)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("wrong", [{"lr": -1e-3}, {"lr": float("nan")}, {"epochs": 0}])
def test_arguments_are_checked_when_a_method_is_called(method, wrong):
    """A negative rate was found at `fit`, after the scores and the dense phase."""
    (name,) = wrong
    with refused(name):
        METHODS[method](bert(), **{"lr": 1e-2, "epochs": 1} | wrong)


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda m: sl.fish(m, batches(), 5.0), "budget"),
        (lambda m: sl.fish(m, batches(), 0.01, fisher="nope"), "fisher"),
        (lambda m: sl.fish(m, batches(), 0.01, exclude=("nope",)), "exclude"),
        (lambda m: sl.fish(m, batches(), 0.01, head=("nope",)), "head"),
        (lambda m: sl.fish(m, batches(), True), "budget"),
        (lambda m: sl.child_tuning(m, batches(), 0.3, reduction="nope"), "reduction"),
        (lambda m: sl.lt_sft(m, 2.0, lr=1e-3, epochs=(1, 1)), "budget"),
        (lambda m: sl.diff_pruning(m, 0, lr_w=1e-3, lr=1e-3, epochs=(1, 1)), "budget"),
        (lambda m: sl.sara(m, budget=1.5, lr=1e-3, epochs=1), "budget"),
        (lambda m: sl.lt_sft(m, 0.1, lr=1e-3, epochs=(1, 1), exclude=("nope",)), "exclude"),
        (lambda m: sl.random(m, 0.0, 0), "budget"),
        (lambda m: sl.last_layers(m, 99), "count"),
    ],
)
def test_a_wrong_argument_is_named_before_scoring(call, word):
    """A misspelt prefix cost an hour of scores."""
    with refused(word):
        call(bert())


def test_an_interrupted_method_leaves_an_ordinary_model():
    """Ctrl-C in the second epoch."""
    for method in METHODS:
        model = bert()
        keys, types = list(model.state_dict()), [type(m) for m in model.modules()]

        def stop(record):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            sl.fit(model, METHODS[method](model, lr=1e-2, epochs=1), batches(), on_step=stop)
        assert [type(m) for m in model.modules()] == types, method
        assert list(model.state_dict()) == keys, method
        assert all(p.requires_grad for p in model.parameters()), method


def test_one_method_after_another():
    """BitFit first, then FISH on top: each trains its own selection only."""
    model = bert()
    for select in (sl.bitfit, lambda m: sl.fish(m, batches(), 0.02)):
        before, selection = sl.snapshot(model), select(model)
        sl.fit(model, sl.fixed_mask(model, selection, lr=1e-2, epochs=1), batches())
        assert_only_these_moved(before, model, selection, head=sl.head_weights(model))


def test_a_selection_of_another_model_is_refused_with_the_tensors_name():
    """Scores of the base, training of the large one."""
    model = bert()
    wider = hf("BertForSequenceClassification", **ENCODER | {"intermediate_size": 24})
    with refused("shape"):
        sl.masked(wider, some_of_each(model))


def test_a_selection_where_phases_are_expected_says_what_to_write():
    """`fit(model, sl.fish(...), batches)`: a selection is no method."""
    model = bert()
    with refused("fixed_mask"):
        sl.fit(model, sl.random(model, 0.1, 0), batches())
