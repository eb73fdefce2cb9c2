"""Arithmetic: sums of differences, switching in place, and what cannot be summed."""

import pytest
import torch

import selective_lite as sl


def tuned(build, seed=None, head=None, device="cpu", **shifts):
    """The toy model with weights shifted (`first_weight={position: amount}`), a norm, a head."""
    model = build("toy").to(device)
    with torch.no_grad():
        for name, changes in shifts.items():
            for position, amount in changes.items():
                model.get_parameter(name.replace("_", ".")).view(-1)[position] += amount
        if seed is not None:
            model.norm.weight += torch.randn(7, generator=torch.Generator().manual_seed(seed)).to(
                device
            )
        if head is not None:
            model.classifier.weight.fill_(head)
    return model


def bits(model):
    return {name: p.detach().view(torch.int32).clone() for name, p in model.named_parameters()}


def equal(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def base(build, device):
    return build("toy").to(device)


@pytest.fixture
def pair(build, base, device):
    """Two tuned models that share a position, and their deltas; the second has a whole tensor."""
    models = (
        tuned(build, device=device, first_weight={0: 1.0, 5: -2.0}, second_weight={3: 0.5}),
        tuned(build, device=device, seed=1, first_weight={5: 4.0, 9: 1.0}),
    )
    return models, [
        sl.diff(base, model, method=name)
        for model, name in zip(models, ("one", "two"), strict=True)
    ]


def test_the_sum_is_the_weighted_sum_of_differences(base, pair):
    models, deltas = pair
    before = bits(base)
    combined = sl.combine(base, deltas, [0.5, -2.0])
    assert equal(bits(base), before)
    start = {name: p.detach().double() for name, p in base.named_parameters()}
    with combined.apply(base):
        for name, p in base.named_parameters():
            one, two = (
                model.get_parameter(name).detach().double() - start[name] for model in models
            )
            torch.testing.assert_close(
                p.detach().double(), start[name] + 0.5 * one - 2.0 * two, rtol=1e-6, atol=1e-7
            )
    assert equal(bits(base), before)
    assert combined.positions["first.weight"].tolist() == [0, 5, 9]
    assert combined.dense.keys() == {"norm.weight"}
    assert combined.metadata["method"] == "0.5 one + -2 two"


def test_a_delta_at_weight_1_keeps_its_bits(build):
    base = build("toy")
    with torch.no_grad():
        base.first.weight.view(-1)[:3] = torch.tensor([1e30, 0.0, 1.0])
    model = build("toy")
    with torch.no_grad():
        model.first.weight.copy_(base.first.weight)
        model.first.weight.view(-1)[:3] = torch.tensor([1e-42, -0.0, 1 / 3])
    combined = sl.combine(base, [sl.diff(base, model)], [1])
    with combined.apply(base):
        assert equal(bits(base), bits(model))


def test_differences_that_cancel_out_are_not_stored(base, pair):
    models, (one, two) = pair
    assert sl.combine(base, [one, one, two], [0.5, -0.5, 1.0]).positions.keys() == {"first.weight"}
    alone = sl.diff(base, models[0], head=())
    with pytest.raises(ValueError, match="the differences cancel out"):
        sl.combine(base, [alone, alone], [1, -1])


def test_a_combined_delta_is_saved_and_loaded(base, pair, tmp_path):
    combined = sl.combine(base, pair[1], [1, 1])
    combined.save(tmp_path / "delta", "gap-lzma")
    with combined.apply(base):
        expected = bits(base)
    with sl.load(tmp_path / "delta").apply(base):
        assert equal(bits(base), expected)


def test_heads_must_be_the_same_or_one_is_chosen(build, base):
    deltas = [
        sl.diff(base, tuned(build, head=value, first_weight={i: 1.0}))
        for i, value in enumerate((1.0, 2.0))
    ]
    with pytest.raises(
        ValueError,
        match=r"different heads; give head=0 to head=1, the delta whose",
    ):
        sl.combine(base, deltas, [1, 1])
    with pytest.raises(ValueError, match="head=2 is not an index of 2 deltas"):
        sl.combine(base, deltas, [1, 1], head=2)
    for i, value in enumerate((1.0, 2.0)):
        assert (sl.combine(base, deltas, [1, 1], head=i).head["classifier.weight"] == value).all()
    assert (sl.combine(base, [deltas[1], deltas[1]], [1, 1]).head["classifier.weight"] == 2.0).all()


def test_what_cannot_be_summed_is_refused(build, base, pair):
    _, deltas = pair
    with pytest.raises(
        ValueError, match=r"weights=\[1\] must be a finite number for each of the 2 deltas"
    ):
        sl.combine(base, deltas, [1])
    with pytest.raises(ValueError, match="must be a finite number"):
        sl.combine(base, deltas, [1, float("nan")])
    with pytest.raises(ValueError, match="must be a finite number"):
        sl.combine(base, [], [])
    with pytest.raises(ValueError, match=r"the weighted sum is not finite in 'first.weight'"):
        sl.combine(base, deltas, [1e39, 0])
    with pytest.raises(sl.DeltaError, match="not the base that this delta was made from"):
        sl.combine(build("toy", seed=1), deltas, [1, 1])
    model = build("toy")
    sl.add_adapters(model, "second.weight", rank=1)
    with pytest.raises(
        ValueError, match=r"deltas\[1\] has small modules, which are not a difference of a weight"
    ):
        sl.combine(base, [deltas[0], sl.diff(base, model)], [1, 1])


def test_a_tensor_that_is_head_of_one_and_weight_of_another_is_refused(build, base):
    model = tuned(build, head=1.0, first_weight={0: 1.0})
    deltas = [sl.diff(base, model), sl.diff(base, model, head=())]
    with pytest.raises(ValueError, match=r"whether 'classifier.weight' is part of the head"):
        sl.combine(base, deltas, [1, 1], head=0)


def test_switching_puts_one_task_in_the_place_of_another(base, pair):
    models, (one, two) = pair
    before = bits(base)
    applied = one.apply(base)
    applied = applied.switch(two)
    assert equal(bits(base), bits(models[1]))
    applied = applied.switch(one)
    assert equal(bits(base), bits(models[0]))
    applied.revert()
    assert equal(bits(base), before)


def test_switching_to_a_delta_that_does_not_fit_leaves_the_old_one_in(build, base, pair):
    models, (one, two) = pair
    before = bits(base)
    other = build("toy", seed=1)
    foreign = sl.diff(build("toy", seed=2), other)
    applied = one.apply(base)
    with pytest.raises(sl.DeltaError, match="not the base that this delta was made from"):
        applied.switch(foreign)
    assert equal(bits(base), bits(models[0]))
    applied = applied.switch(two)
    applied.revert()
    assert equal(bits(base), before)


def test_switching_with_small_modules_leaves_the_old_ones_in(build, base, device):
    model = build("toy").to(device)
    sl.add_adapters(model, "first.weight", rank=2, seed=3)
    applied = sl.diff(base, model).apply(base)
    with pytest.raises(sl.DeltaError):
        applied.switch(sl.diff(build("toy", seed=2), build("toy", seed=1)))
    assert equal(bits(base), bits(model))
    applied.revert()
    assert not sl.adapters(base)


def test_a_delta_whose_values_were_changed_is_not_switched(base, pair):
    _, (one, two) = pair
    applied = one.apply(base)
    with torch.no_grad():
        base.first.weight.view(-1)[0] += 1
    before = bits(base)
    with pytest.raises(sl.DeltaError, match=r"'first.weight' no longer holds this delta's values"):
        applied.switch(two)
    assert equal(bits(base), before)
