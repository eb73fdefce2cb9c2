"""Which weights count: tied ones once, buffers never, the head apart; and budgets."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import selective_lite as sl


def test_the_head_is_apart_and_both_parts_make_the_model(build):
    model = build("toy")
    body, head = sl.weights(model), sl.head_weights(model)
    assert list(head) == ["classifier.weight", "classifier.bias"]
    assert [*body, *head] == [name for name, _ in model.named_parameters()]


def test_buffers_and_integer_parameters_are_no_candidates():
    model = nn.BatchNorm1d(4)
    model.register_parameter(
        "packed", nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False)
    )
    assert list(sl.weights(model)) == ["weight", "bias"]


@pytest.mark.parametrize(
    ("kind", "first", "second"),
    [
        ("llama", "model.embed_tokens.weight", "lm_head.weight"),
        ("bert_tied", "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"),
    ],
)
def test_a_tied_weight_counts_once_under_its_first_name(build, kind, first, second):
    model = build(kind)
    assert model.get_parameter(first) is model.get_parameter(second)
    found = sl.weights(model)
    assert first in found
    assert second not in found
    assert sum(p.numel() for p in found.values()) == sum(p.numel() for p in model.parameters())


def test_a_head_prefix_ends_at_a_dot():
    model = nn.ModuleDict({"out": nn.Linear(2, 2), "output": nn.Linear(2, 2)})
    assert list(sl.head_weights(model, head=("out",))) == ["out.weight", "out.bias"]


def test_a_head_may_be_named_or_denied(build):
    model = build("toy")
    assert list(sl.head_weights(model, head="norm")) == ["norm.weight", "norm.bias"]
    assert "classifier.weight" in sl.weights(model, head=())


@pytest.mark.parametrize("head", [("clasifier",), ("classifier.weigh",)])
def test_a_head_that_names_nothing_raises(build, head):
    with pytest.raises(ValueError, match=f"head='{head[0]}' names no parameter"):
        sl.weights(build("toy"), head=head)


def test_a_model_that_is_all_head_raises():
    with pytest.raises(ValueError, match="nothing can be selected"):
        sl.weights(nn.ModuleDict({"classifier": nn.Linear(2, 2)}))


@given(st.integers(1, 10**9), st.floats(0, 1, exclude_min=True))
@settings(max_examples=50, deadline=None)
def test_a_fraction_rounds_and_a_count_counts(total, fraction):
    if round(fraction * total) == 0:
        with pytest.raises(ValueError, match="rounds to none"):
            sl.resolve_budget(fraction, total)
    else:
        assert sl.resolve_budget(fraction, total) == round(fraction * total)
    assert sl.resolve_budget(total, total) == total


def test_a_fraction_is_not_truncated():
    # int(0.29 * 100) is 28: 0.29 * 100 lies just below 29 in floating point.
    assert sl.resolve_budget(0.29, 100) == 29


@pytest.mark.parametrize(
    ("budget", "error", "message"),
    [
        (True, TypeError, "budget=True is a bool"),
        (False, TypeError, "budget=False is a bool"),
        ("0.5", TypeError, "budget='0.5' is not a number"),
        (None, TypeError, "budget=None is not a number"),
        (0, ValueError, r"budget=0 is outside \[1, 100\]"),
        (-3, ValueError, "budget=-3 is outside"),
        (101, ValueError, "budget=101 is outside"),
        (0.0, ValueError, r"budget=0.0 is outside \(0, 1\]"),
        (1.5, ValueError, "budget=1.5 is outside"),
        (-0.1, ValueError, "budget=-0.1 is outside"),
        (float("nan"), ValueError, "budget=nan is outside"),
        (0.001, ValueError, "rounds to none"),
    ],
)
def test_a_bad_budget_is_named(budget, error, message):
    with pytest.raises(error, match=message):
        sl.resolve_budget(budget, 100)


def test_a_snapshot_does_not_follow_the_model(build):
    model = build("toy")
    before = sl.snapshot(model)
    with torch.no_grad():
        model.first.weight.add_(1)
    assert torch.equal(before["first.weight"] + 1, model.first.weight)
    assert not before["first.weight"].requires_grad
