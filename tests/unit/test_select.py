"""Selection: exactly k, the same indices for the same scores.

Each control controls one thing.
"""

import sys
import weakref
from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import selective_lite as sl

select_module = sys.modules["selective_lite.selection"]  # `sl.select` is the function

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def stable_sort(scores, k, largest):
    """What `select` promises, by sorting Python numbers.

    Score first, then tensor order, then position.
    """
    flat = [
        (value, number, position)
        for number, score in enumerate(scores.values())
        for position, value in enumerate(score.reshape(-1).tolist())
    ]
    flat.sort(key=lambda entry: (-entry[0] if largest else entry[0], entry[1], entry[2]))
    names = list(scores)
    chosen = {}
    for _, number, position in sorted(flat[:k], key=lambda entry: entry[1:]):
        chosen.setdefault(names[number], []).append(position)
    return chosen


class Made(Mapping):
    """Scores that are made when asked for; it counts how often, and how many live at once."""

    def __init__(self, make, names):
        self.make, self.names = make, list(names)
        self.made, self.most, self.alive = dict.fromkeys(self.names, 0), 0, weakref.WeakSet()

    def __getitem__(self, name):
        score = self.make(name).clone()
        self.made[name] += 1
        self.alive.add(score)
        self.most = max(self.most, len(self.alive))
        return score

    def __iter__(self):
        return iter(self.names)

    def __len__(self):
        return len(self.names)


def as_lists(selection):
    return {name: positions.tolist() for name, positions in selection.indices.items()}


@st.composite
def scores_and_k(draw):
    one, other = draw(st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)))
    values = draw(
        st.one_of(
            # Few distinct values: nearly every cutoff is tied.
            st.lists(st.sampled_from([-2.0, -1.0, -0.0, 0.0, 1.0, 1.5]), min_size=2, max_size=60),
            st.lists(st.floats(-1e4, 1e4, width=16), min_size=2, max_size=60),
            st.lists(st.floats(-1e300, 1e300), min_size=2, max_size=60),
        )
    )
    flat = torch.tensor(values, dtype=torch.float64)
    cut = draw(st.integers(0, len(flat)))
    rest = flat[cut:].to(other)
    scores = {"a": flat[:cut].to(one), "b": rest.reshape(-1, 2) if len(rest) % 2 == 0 else rest}
    return scores, draw(st.integers(1, len(flat)))


@given(scores_and_k(), st.booleans(), st.sampled_from([3, 1 << 20]))
@settings(max_examples=150, deadline=None)
def test_select_is_a_stable_sort(case, largest, chunk):
    scores, k = case
    every = torch.cat([score.reshape(-1) for score in scores.values()])
    usual = select_module.CHUNK
    select_module.CHUNK = chunk  # 3: ties and tensors cross chunks
    try:
        if not every.isfinite().all():
            with pytest.raises(ValueError, match="not finite"):
                sl.select(scores, k, largest=largest)
        elif not every.any():
            with pytest.raises(ValueError, match="zero for every weight"):
                sl.select(scores, k, largest=largest)
        elif largest and every.count_nonzero() < k:
            with pytest.raises(
                ValueError, match=f"asks for {k} weights, but only {every.count_nonzero()} scores"
            ):
                sl.select(scores, k)
        else:
            made = Made(scores.get, scores)
            found = sl.select(made, k, largest=largest)
            assert found.count == k
            assert found.shapes == {name: tuple(score.shape) for name, score in scores.items()}
            assert as_lists(found) == stable_sort(scores, k, largest)
            assert made.most == 1
            assert max(made.made.values()) <= (
                6 if torch.float64 in (scores["a"].dtype, scores["b"].dtype) else 3
            )
    finally:
        select_module.CHUNK = usual


def test_float64_scores_that_agree_in_float32_are_told_apart():
    scores = {"a": 1 + torch.arange(6, dtype=torch.float64) * 1e-12, "b": torch.ones(3)}
    assert as_lists(sl.select(scores, 2)) == {"a": [4, 5]}


def test_no_tensor_made_on_the_way_is_longer_than_a_chunk_or_a_histogram(monkeypatch):
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if torch.is_tensor(out) and out.untyped_storage().data_ptr() not in given:
                sizes.append(out.numel())
            return out

    monkeypatch.setattr(select_module, "CHUNK", 5000)
    scores = {
        "a": torch.randn(200, 500),
        "b": torch.randn(90_000).bfloat16(),
        "c": torch.randn(700, 100),
    }
    given = {score.untyped_storage().data_ptr() for score in scores.values()}
    with Sizes():
        found = sl.select(scores, 0.1)
    assert found.count == 26_000
    assert 5000 <= max(sizes) <= 1 << 16


def test_scores_that_change_from_one_pass_to_the_next_are_refused():
    scores = Made(lambda name: torch.rand(1000), "ab")
    with pytest.raises(
        ValueError,
        match=r"scores changed from one pass to the next: \d+ of them, not 100, were found",
    ):
        sl.select(scores, 100)


def test_quantised_scores_give_the_same_indices_under_any_number_of_threads():
    scores = {
        "a": torch.randn(300, 500).mul(4).round().div(4),
        "b": torch.randn(70_000).bfloat16().float(),
    }
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(sl.select(scores, 0.01))
    finally:
        torch.set_num_threads(threads)
    assert found[0].count == 2200
    assert as_lists(found[0]) == as_lists(found[1])


def test_selecting_leaves_the_scores_as_they_are_and_takes_any_layout():
    score = torch.randn(5, 4).t()
    before = score.clone()
    assert as_lists(sl.select({"a": score}, 7)) == stable_sort({"a": before}, 7, largest=True)
    assert torch.equal(score, before)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=3, deadline=None)
def test_gradient_scores_select_the_same_but_for_rounding_at_the_cutoff(build, batches, seed):
    model = build("bert")
    data = batches("bert", count=3)
    threads = torch.get_num_threads()
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)).tolist()
    try:
        torch.set_num_threads(1)
        one = sl.squared_gradient(model, data)
        torch.set_num_threads(2)
        two = sl.squared_gradient(model, [data[i] for i in order])
    finally:
        torch.set_num_threads(threads)
    a, b = sl.select(one, 0.05), sl.select(two, 0.05)
    cutoff = min(float(one[name].reshape(-1)[index].min()) for name, index in a.indices.items())
    only_one_side = {
        name: (a.masks()[name] ^ b.masks()[name]).nonzero(as_tuple=True) for name in a.shapes
    }
    differing = torch.cat([one[name][where] for name, where in only_one_side.items()])
    assert torch.equal(
        (differing / cutoff - 1).abs() <= 1e-5, torch.ones(len(differing), dtype=torch.bool)
    )
    assert a.overlap(b) > 0.99  # and the rule is not met by comparing nothing


@pytest.mark.parametrize(
    ("scores", "budget", "error", "message"),
    [
        ({}, 1, ValueError, "scores is empty"),
        ({"w": torch.arange(3)}, 1, ValueError, r"scores\['w'\] has dtype torch.int64"),
        (
            {"v": torch.ones(3), "w": torch.ones(3, device="meta")},
            1,
            ValueError,
            r"scores\['w'\] .* on meta",
        ),
        (
            {"w": torch.tensor([1.0, float("nan")])},
            1,
            ValueError,
            r"scores\['w'\] has a value that is not finite",
        ),
        ({"w": torch.tensor([1.0, float("inf")])}, 1, ValueError, "not finite"),
        ({"w": torch.tensor([1.0, -float("inf")])}, 1, ValueError, "not finite"),
        ({"v": torch.zeros(2), "w": torch.zeros(2)}, 1, ValueError, "zero for every weight"),
        (
            {"w": torch.tensor([0.0, 2.0, -1.0])},
            3,
            ValueError,
            "budget=3 asks for 3 weights, but only 2 scores",
        ),
        ({"w": torch.ones(4)}, 5, ValueError, "budget=5 is outside"),
        ({"w": torch.ones(4)}, 1.5, ValueError, "budget=1.5 is outside"),
        ({"w": torch.ones(4)}, True, TypeError, "budget=True is a bool"),
    ],
)
def test_bad_scores_and_budgets_are_named(scores, budget, error, message):
    with pytest.raises(error, match=message):
        sl.select(scores, budget)


def test_a_fraction_may_refer_to_the_whole_model():
    scores = {"w": torch.rand(10) + 1}
    assert sl.select(scores, 0.05, of=100).count == 5
    with pytest.raises(
        ValueError, match=r"budget=0\.2 asks for 20 weights, but only 10 scores are non-zero"
    ):
        sl.select(scores, 0.2, of=100)
    with pytest.raises(ValueError, match=r"asks for 20 weights, but only 10 scores are there"):
        sl.select(scores, 0.2, of=100, largest=False)


def test_what_a_selection_says_about_itself():
    selection = sl.Selection({"b": torch.tensor([1, 5])}, {"a": (3,), "b": (2, 3)})
    assert (selection.count, selection.total, selection.fraction) == (2, 9, 2 / 9)
    assert selection.per_tensor() == {"a": 0, "b": 2}
    assert selection.masks()["b"].tolist() == [[False, True, False], [False, False, True]]
    assert not selection.masks()["a"].any()


def test_overlap_is_the_shared_part_of_the_smaller_selection():
    shapes = {"a": (4,), "b": (9,)}
    one = sl.Selection({"a": torch.tensor([0, 2]), "b": torch.tensor([4, 5])}, shapes)
    other = sl.Selection({"b": torch.tensor([0, 5])}, shapes)
    assert one.overlap(other) == other.overlap(one) == 1 / 2
    assert one.overlap(one) == 1


@pytest.mark.parametrize(
    "positions",
    [
        torch.tensor([], dtype=torch.int64),
        torch.tensor([2, 1]),
        torch.tensor([1, 1]),
        torch.tensor([-1, 1]),
        torch.tensor([0, 6]),
        torch.tensor([[0, 1]]),
        torch.tensor([0, 1], dtype=torch.int32),
    ],
)
def test_a_selection_of_bad_positions_cannot_be_made(positions):
    with pytest.raises(ValueError, match=r"indices\['w'\] must be"):
        sl.Selection({"w": positions}, {"w": (2, 3)})


def test_a_selection_must_know_its_shapes():
    with pytest.raises(ValueError, match="indices names 'v'"):
        sl.Selection({"v": torch.tensor([0])}, {"w": (2,)})


@given(st.integers(0, 2**32 - 1), st.integers(1, 40))
@settings(max_examples=40, deadline=None)
def test_random_nonzero_never_takes_a_zero_and_repeats_its_draw(seed, k):
    scores = {"a": torch.zeros(6, 10), "b": torch.zeros(20)}
    scores["a"][::2] = -3.0
    scores["b"][5:15] = 1e-30
    found = sl.random_nonzero(scores, k, seed)
    assert found.count == k
    assert all(scores[name].reshape(-1)[index].all() for name, index in found.indices.items())
    assert as_lists(found) == as_lists(sl.random_nonzero(scores, k, seed))


def test_random_nonzero_is_uniform_over_what_is_not_zero():
    scores = {"a": torch.tensor([0.0, 1e-6, 1e6, 0.0, -1.0])}
    counts = torch.zeros(5)
    for seed in range(600):
        counts[sl.random_nonzero(scores, 1, seed).indices["a"]] += 1
    assert counts[[0, 3]].sum() == 0
    assert counts[[1, 2, 4]].min() > 150  # 200 expected, standard deviation 11.5


def test_random_nonzero_refuses_what_select_refuses():
    with pytest.raises(ValueError, match="only 2"):
        sl.random_nonzero({"a": torch.tensor([0.0, 1.0, 2.0])}, 3, seed=0)
    with pytest.raises(ValueError, match="not finite"):
        sl.random_nonzero({"a": torch.tensor([1.0, float("nan"), 2.0])}, 2, seed=0)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_shuffled_keeps_the_count_of_every_tensor_and_moves_the_entries(seed):
    scores = {"a": torch.rand(40, 10), "b": torch.rand(300) * 2, "c": torch.rand(7) / 100}
    selection = sl.select(scores, 0.1)
    moved = sl.shuffled(selection, seed)
    assert moved.per_tensor() == selection.per_tensor()
    assert moved.shapes == selection.shapes
    assert moved.overlap(selection) < 0.5  # about 0.15 by chance
    assert as_lists(moved) == as_lists(sl.shuffled(selection, seed))


def test_a_rule_selects_whole_tensors_and_sizes_itself(build):
    model = build("toy")
    biases = sl.select_tensors(model, lambda name, _: name.endswith("bias"))
    assert biases.per_tensor() == {
        "embedding.weight": 0,
        "first.weight": 0,
        "first.bias": 7,
        "norm.weight": 0,
        "norm.bias": 7,
        "second.weight": 0,
    }
    with pytest.raises(ValueError, match="predicate holds for no candidate tensor"):
        sl.select_tensors(model, lambda name, _: False)


@pytest.mark.usefixtures("meta_default")
def test_selecting_makes_its_tensors_on_the_cpu_whatever_the_default_device():
    generator = torch.Generator().manual_seed(0)
    scores = {
        "a": torch.rand(20, 5, generator=generator, device="cpu"),
        "b": torch.rand(30, generator=generator, device="cpu", dtype=torch.float64),
    }
    selection = sl.select(scores, 10)
    assert as_lists(selection) == stable_sort(scores, 10, largest=True)
    assert sum(int(mask.sum()) for mask in selection.masks().values()) == 10
    assert sl.shuffled(selection, 0).count == 10
    assert sl.random_nonzero(scores, 10, 0).count == 10
    assert selection.overlap(selection) == 1
    model = nn.Linear(3, 2, device="cpu")
    assert sl.select_tensors(model, lambda name, _: name == "bias").indices["bias"].tolist() == [
        0,
        1,
    ]
    assert sl.select(sl.random_scores(model, 0), 3).count == 3
