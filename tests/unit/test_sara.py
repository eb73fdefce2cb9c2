"""SaRA: small weights are selected, those that stay small go on, the nuclear norm reaches them."""

import math

import pytest
import torch
from torch import nn

import selective_lite as sl
from selective_lite.layers.attach import Attached
from selective_lite.layers.masked import MaskedTraining
from selective_lite.methods import sara as module
from selective_lite.methods.sara import (
    SaRASchedule,
    learning_rate,
    nuclear_norm,
    sara,
    smaller_than,
    smallest,
)

KINDS = ("toy", "bert", "llama")


def ordinary(model, before):
    """Assert that a model has its own names, flags and classes."""
    assert list(sl.snapshot(model)) == list(before)
    assert all(p.requires_grad for p in model.parameters())
    assert not any(isinstance(module, Attached) for module in model.modules())


def caught(method):
    """The method's phases, and a list that will hold the `SaRASchedule` of each."""
    states = []

    def phases():
        for phase in method:
            states.append(phase.after_step.__self__)
            yield phase

    return phases(), states


# selection


@pytest.mark.parametrize("kind", KINDS)
def test_below_selects_every_small_weight_and_no_other(build, kind):
    model = build(kind)
    masks = smaller_than(model, 0.01).masks()
    assert list(masks) == list(sl.weights(model))
    for name, p in sl.weights(model).items():
        assert torch.equal(masks[name], p.detach().abs() < 0.01)


def test_the_bound_itself_is_not_below_it():
    model = nn.Linear(3, 1, bias=False)
    model.weight.data = torch.tensor([[0.25, -0.5, 0.5]])
    assert smaller_than(model, 0.5).indices["weight"].tolist() == [0]


@pytest.mark.parametrize(
    ("threshold", "message"),
    [
        (1e-9, r"threshold=1e-09 selects no weight: the smallest \|w\| is 0\.0\d+; raise it"),
        (99.0, r"threshold=99.0 selects all \d+ weights; lower it, or use full_finetuning"),
        (0.0, "threshold=0.0 must be a positive number"),
        (-1e-3, "must be a positive number"),
        (math.nan, "must be a positive number"),
        (math.inf, "must be a positive number"),
    ],
)
def test_a_threshold_that_selects_nothing_or_everything_raises_and_changes_nothing(
    threshold, message
):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    before = sl.snapshot(model)
    with pytest.raises(ValueError, match=message):
        sara(model, threshold=threshold, epochs=1, lam=0.0)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    ordinary(model, before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_budget_trains_exactly_the_k_smallest_and_nothing_else_under_decay(build, batches, kind):
    model, data = build(kind), batches(kind, 4)
    before, head = sl.snapshot(model), list(sl.head_weights(model))
    selection = sl.select(sl.magnitude(model), 60, largest=False)
    rate = 1e-4 if kind == "llama" else 1e-2  # its threshold is 3e-4
    method = sara(
        model, budget=60, epochs=3, lr=rate, lr_head=1e-2, lam=0.0, weight_decay=0.5, reselect=0.5
    )
    phases, states = caught(method)
    sl.fit(model, phases, data)
    assert selection.count == 60 == states[0].counts[0]
    assert states[0].counts[1] < 60
    masks = selection.masks()
    for name, p in model.named_parameters():
        if name not in head:
            assert torch.equal(p[~masks[name]], before[name][~masks[name]]), name
    # The padding row of an embedding is zero, selected, and never moves.
    assert (
        sum(int((p != before[name])[masks[name]].sum()) for name, p in sl.weights(model).items())
        > 30
    )
    assert all((model.get_parameter(name) != before[name]).any() for name in head)
    ordinary(model, before)


def test_the_threshold_of_a_budget_is_just_above_the_kth_weight():
    model = nn.Linear(4, 1, bias=False)
    model.weight.data = torch.tensor([[0.25, -0.5, 0.5, 0.75]])
    phases, states = caught(sara(model, budget=3, epochs=1, lam=0.0))
    phase = next(phases)
    assert (model.weight.abs() < states[0].threshold).tolist() == [[True, True, True, False]]
    assert states[0].threshold == pytest.approx(0.5)
    assert phase.groups[0]["lr"] == learning_rate(states[0].threshold)


# re-selection


def quiet(model, batch):
    """A loss without gradient: only decay moves a weight."""
    return 0 * model(**batch).loss


def test_weight_decay_pulls_selected_weights_to_zero(build, batches):
    model = build("toy")
    before, masks = sl.snapshot(model), smaller_than(model, 0.1).masks()
    method = sara(
        model, threshold=0.1, epochs=2, lr=0.1, lam=0.0, schedule=sl.constant, reselect=None
    )
    sl.fit(model, method, batches("toy", 3), loss=quiet)
    for name, mask in masks.items():
        expected = torch.where(mask, before[name] * (1 - 0.1 * 1e-2) ** 6, before[name])
        torch.testing.assert_close(model.get_parameter(name).detach(), expected, rtol=1e-5, atol=0)


class Watched(torch.optim.AdamW):
    """Keeps a copy of its parameters and first moments before and after every step."""

    def __init__(self, groups):
        super().__init__(groups)
        self.history = []

    def look(self):
        trained = self.param_groups[0]["params"]
        moments = [self.state[p]["exp_avg"].clone() if p in self.state else None for p in trained]
        counts = [float(self.state[p]["step"]) if p in self.state else 0.0 for p in trained]
        return [p.detach().clone() for p in trained], moments, counts

    def step(self):
        before = self.look()
        super().step()
        self.history.append((before, self.look()))


def test_survivors_keep_value_sign_moments_and_step_and_no_step_is_skipped(build, batches):
    model, made = build("toy"), []
    method = sara(
        model, threshold=0.1, epochs=2, lr=0.02, lam=0.0, reselect=3, schedule=sl.constant
    )
    phases, states = caught(method)
    sl.fit(
        model,
        phases,
        batches("toy", 4),
        optimizer=lambda groups: made.append(Watched(groups)) or made[0],
    )
    (values, moments, counts), (next_values, next_moments, next_counts) = (
        made[0].history[2][1],
        made[0].history[3][0],
    )
    (state,) = states
    dropped = 0
    for value, moment, count, after, after_moment, after_count in zip(
        values, moments, counts, next_values, next_moments, next_counts, strict=True
    ):
        keep = value.abs() < 0.1
        dropped += int((~keep).sum())
        assert torch.equal(value[keep], after)
        assert torch.equal(moment[keep], after_moment)
        assert count == after_count == 3
    assert 0 < dropped < state.counts[0]
    assert state.counts == [state.counts[0], state.counts[0] - dropped]
    assert len(made[0].history) == 8
    for before, after in made[0].history:
        assert any((a != b).any() for a, b in zip(before[0], after[0], strict=True))
    assert made[0].history[-1][1][2] == [8.0] * len(values)


def test_what_outgrew_the_threshold_keeps_its_value_from_then_on(build, batches):
    model, seen = build("toy"), []
    method = sara(model, threshold=0.1, epochs=2, lr=0.02, lam=0.0, reselect=3)

    def phases():
        for phase in method:
            state = phase.after_step.__self__

            def after_step(step, state=state):
                seen.append(
                    {name: values.detach().clone() for name, values in state.values.items()}
                )
                state.update(step)
                seen.append(dict(state.positions))

            phase.after_step = after_step
            yield phase

    sl.fit(model, phases(), batches("toy", 4))
    first, at, kept = seen[1], seen[4], seen[5]
    for name, positions in first.items():
        gone = ~torch.isin(positions, kept[name])
        frozen = model.get_parameter(name).detach().reshape(-1)[positions[gone]]
        assert torch.equal(frozen, at[name][gone])
        assert (frozen.abs() >= 0.1).all()
    assert sum(len(i) for i in kept.values()) < sum(len(i) for i in first.values())


@pytest.mark.parametrize(
    ("reselect", "expected"), [(1, 1), (5, 5), (0.5, 4), (0.25, 2), (0.01, 1), (None, None)]
)
def test_the_reselection_takes_place_once_after_its_step_or_fraction(
    build, batches, reselect, expected
):
    model, sizes = build("toy"), []
    method = sara(model, threshold=0.1, epochs=2, lr=0.02, lam=0.0, reselect=reselect)
    phases, states = caught(method)
    sl.fit(
        model,
        phases,
        batches("toy", 4),
        on_step=lambda record: sizes.append(states[0].selection.count),
    )
    assert len(sizes) == 8
    changes = [
        step + 1 for step in range(8) if sizes[step] != ([states[0].counts[0], *sizes])[step]
    ]
    assert changes == ([] if expected is None else [expected])
    assert states[0].selection.count == states[0].counts[-1]


@pytest.mark.parametrize("reselect", [4, 9, 0.99])
def test_a_reselection_behind_the_phase_s_end_raises_before_the_first_step(
    build, batches, reselect
):
    model = build("toy")
    before = sl.snapshot(model)
    with pytest.raises(
        ValueError, match=rf"reselect={reselect} is not before the end of a phase of 4 steps"
    ):
        sl.fit(
            model,
            sara(model, threshold=0.1, epochs=1, lam=0.0, reselect=reselect),
            batches("toy", 4),
        )
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    ordinary(model, before)


def test_a_tensor_may_lose_all_its_weights_and_training_goes_on(build, batches):
    # its biases start at zero: at a large rate they all grow over a small threshold
    model = build("bert")
    method = sara(
        model, threshold=5e-3, epochs=2, lr=4e-3, lam=0.0, reselect=2, schedule=sl.constant
    )
    phases, states = caught(method)
    records = sl.fit(model, phases, batches("bert", 4))
    empty = [name for name, positions in states[0].positions.items() if len(positions) == 0]
    assert empty
    assert set(states[0].selection.indices).isdisjoint(empty)
    assert len(records) == 8
    assert all(math.isfinite(r["loss"]) for r in records)


def test_no_small_weight_left_raises_and_gives_the_model_back(build, batches):
    model = build("toy")
    with torch.no_grad():
        model.embedding.weight.add_(1.0)
        model.norm.bias.add_(1.0)
    before = sl.snapshot(model)
    model.first.weight.requires_grad_(False)
    with pytest.raises(
        ValueError, match=r"no selected weight is below 0.0\d+ after step 2; lower lr"
    ):
        sl.fit(
            model, sara(model, budget=3, epochs=1, lr=1.0, lam=0.0, reselect=2), batches("toy", 4)
        )
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["first.weight"]
    model.first.weight.requires_grad_(True)
    ordinary(model, before)


def test_a_bfloat16_model_is_reselected_by_its_float32_values(build, batches):
    model = build("llama").bfloat16()
    phases, states = caught(sara(model, budget=200, epochs=2, lr=1e-3, lam=0.0, reselect=2))
    sl.fit(model, phases, batches("llama", 3))
    assert states[0].counts[0] == 200
    assert 0 < states[0].counts[1] < 200
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


# the nuclear norm


def sparse(rows, columns, k, seed=0):
    generator = torch.Generator().manual_seed(seed)
    index = torch.randperm(rows * columns, generator=generator)[:k].sort().values
    values = torch.randn(k, generator=generator, dtype=torch.float64)
    return values.requires_grad_(), index


def full(values, index, shape):
    return (
        torch.zeros(shape, dtype=values.dtype)
        .reshape(-1)
        .index_put((index,), values)
        .reshape(shape)
    )


@pytest.mark.parametrize(("rows", "columns", "k"), [(9, 6, 40), (6, 9, 40), (7, 7, 49)])
def test_the_norm_and_its_gradient_are_autograd_s_through_the_whole_matrix(rows, columns, k):
    values, index = sparse(rows, columns, k)
    norm = nuclear_norm(values, index, (rows, columns))
    (found,) = torch.autograd.grad(3 * norm, values)
    matrix = full(values, index, (rows, columns))
    assert torch.linalg.matrix_rank(matrix) == min(rows, columns)
    expected = torch.linalg.svdvals(matrix).sum()
    torch.testing.assert_close(norm, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        found, torch.autograd.grad(3 * expected, values)[0], rtol=1e-9, atol=1e-12
    )


def test_a_singular_matrix_gets_the_subgradient_of_least_norm():
    # Rank one, 3 x 3, in a matrix with empty rows and columns: u v^T is the only part of U V^T that
    # is not arbitrary.
    u, v = torch.tensor([1.0, -2.0, 2.0]).double(), torch.tensor([2.0, 3.0, 6.0]).double()
    index = torch.tensor([row * 8 + column for row in (1, 3, 4) for column in (0, 5, 7)])
    values = torch.outer(u, v).reshape(-1).requires_grad_()
    norm = nuclear_norm(values, index, (6, 8))
    norm.backward()
    torch.testing.assert_close(norm.detach(), torch.tensor(21.0).double())
    torch.testing.assert_close(values.grad, torch.outer(u / 3, v / 7).reshape(-1))


def test_a_matrix_of_zeros_gets_no_gradient():
    values = torch.zeros(5, requires_grad=True)
    norm = nuclear_norm(values, torch.arange(5), (4, 4))
    norm.backward()
    assert norm == 0
    assert torch.equal(values.grad, torch.zeros(5))


def test_the_penalty_is_lambda_times_the_norm_of_each_large_matrix_in_turn(build):
    model = build("bert")
    selection = smaller_than(model, 0.02)
    expected, masks = {}, selection.masks()
    for name in selection.indices:
        matrix = model.get_parameter(name).detach() * masks[name]
        if matrix.dim() == 2 and min(matrix.shape) > 11:
            expected[name] = (
                0.5
                * float(torch.linalg.svdvals(matrix).sum())
                * (int(masks[name].sum()) > module.FEWEST)
            )
    with MaskedTraining(model, selection, shrinks=True) as training:
        state = SaRASchedule(training, 0.02, reselect=None, lam=0.5, min_side=11, seed=3)
        assert "bert.embeddings.word_embeddings.weight" in expected
        assert "bert.embeddings.token_type_embeddings.weight" not in expected
        drawn = [state.penalty().item() for _ in range(200)]
        again = SaRASchedule(training, 0.02, reselect=None, lam=0.5, min_side=11, seed=3)
        assert [again.penalty().item() for _ in range(20)] == drawn[:20]
        other = SaRASchedule(training, 0.02, reselect=None, lam=0.5, min_side=11, seed=4)
        assert [other.penalty().item() for _ in range(20)] != drawn[:20]
        for value in expected.values():
            assert any(found == pytest.approx(value, rel=1e-4) for found in drawn)
        for found in drawn:
            assert any(found == pytest.approx(value, rel=1e-4) for value in expected.values())
        assert 0 in expected.values()  # a matrix of few selected weights


def test_the_nuclear_norm_shrinks_under_its_loss_and_is_in_the_records(build, batches):
    norms = {}
    for lam in (0.0, 0.5):
        model = build("bert")
        masks = smaller_than(model, 0.03).masks()
        method = sara(model, threshold=0.03, epochs=4, lr=1e-3, lam=lam, min_side=11, reselect=0.5)
        records = sl.fit(model, method, batches("bert", 10))
        matrices = [
            p.detach() * masks[name] for name, p in sl.weights(model).items() if min(p.shape) > 11
        ]
        norms[lam] = sum(
            float(torch.linalg.svdvals(matrix).sum()) for matrix in matrices if matrix.dim() == 2
        )
        assert any(r["penalty"] > 0 for r in records) == (lam > 0)
    assert norms[0.5] < 0.9 * norms[0.0]


def test_the_norm_of_a_matrix_below_the_threshold_as_a_whole(build, batches):
    model = build("bert")
    with torch.no_grad():
        model.bert.encoder.layer[0].intermediate.dense.weight.mul_(1e-3)
        expected = 0.5 * float(
            torch.linalg.svdvals(model.bert.encoder.layer[0].intermediate.dense.weight).sum()
        )
    method = sara(model, threshold=1e-3, epochs=1, lr=1e-9, lam=0.5, min_side=11, reselect=None)
    records = sl.fit(model, method, batches("bert", 30))
    # The other matrices have few weights below it.
    assert {round(r["penalty"] / expected, 1) for r in records} == {0.0, 1.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"lam": 5e-4},
            "lam=0.0005 weighs the nuclear norm of a matrix, but none has more than 100 selected",
        ),
        ({"lam": -1.0}, "lam=-1.0 must not be negative"),
        ({"lam": math.nan}, "lam=nan must not be negative"),
        ({"budget": 5}, "give one of threshold"),
        ({"threshold": None}, "give one of threshold"),
        ({"threshold": None, "budget": 0.0}, "budget=0.0 is outside"),
        ({"reselect": 0}, "reselect=0 must be a step"),
        ({"reselect": -3}, "reselect=-3 must be a step"),
        ({"reselect": True}, "reselect=True must be a step"),
        ({"reselect": 1.0}, "reselect=1.0 must be a step"),
        ({"reselect": 0.0}, "reselect=0.0 must be a step"),
        ({"epochs": 0}, "epochs=0 of phase 'SaRA'"),
        ({"lr": -1.0}, "lr=-1.0 of phase 'SaRA' must be finite"),
        ({"exclude": ("frist",)}, "exclude='frist' names no parameter"),
        ({"head": ("clasifier",)}, "head='clasifier' names no parameter"),
    ],
)
def test_bad_input_raises_at_the_call_and_changes_nothing(build, options, message):
    model = build("toy")
    before = sl.snapshot(model)
    with pytest.raises(ValueError, match=message):
        sara(model, **{"threshold": 0.1, "epochs": 1, "lam": 0.0, **options})
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    ordinary(model, before)


@pytest.mark.parametrize(("selected", "sides"), [(100, 20), (101, 20), (101, 19)])
def test_a_matrix_needs_more_than_100_small_weights_and_both_sides_over_the_bound(selected, sides):
    model = nn.Linear(21, 20, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0).reshape(-1)[:selected] = 0.01
    options = {"threshold": 0.1, "epochs": 1, "lam": 0.5, "min_side": sides, "head": ()}
    if (selected, sides) == (101, 19):
        (phase,) = sara(model, **options)
        assert phase.penalty is not None
    else:
        with pytest.raises(ValueError, match="lower min_side, or give lam=0"):
            sara(model, **options)


def test_a_weight_at_the_threshold_itself_stops_training():
    model = nn.Linear(4, 1, bias=False)
    model.weight.data = torch.tensor([[0.25, -0.25, 0.4, 0.75]])
    method = sara(
        model, threshold=0.5, epochs=2, lr=0.5, lam=0.0, reselect=1, head=(), weight_decay=0.0
    )
    phases, states = caught(method)

    def loss(model, x):  # the gradient is -0.5, 0.5, 0, 0: plain steps of 0.25
        return (model.weight[0, 1] - model.weight[0, 0]) / 2 + 0 * model(x).sum()

    sl.fit(model, phases, [torch.ones(1, 4)], loss=loss, optimizer=torch.optim.SGD)
    assert states[0].positions["weight"].tolist() == [2]  # 0.5 and -0.5 are not below 0.5
    assert model.weight[0].tolist() == [0.5, -0.5, pytest.approx(0.4), 0.75]


def test_options_reach_the_schedule(build):
    model = build("bert")
    phases, states = caught(
        sara(model, threshold=0.02, epochs=1, lam=0.25, min_side=11, reselect=3, seed=3)
    )
    next(phases)
    (state,) = states
    assert (state.threshold, state.lam, state.reselect) == (0.02, 0.25, 3)
    with_seed = [state.penalty().item() for _ in range(20)]
    same = SaRASchedule(state.training, 0.02, reselect=3, lam=0.25, min_side=11, seed=3)
    assert [same.penalty().item() for _ in range(20)] == with_seed
    phases.close()


def test_what_is_excluded_or_frozen_is_not_selected(build):
    model = build("bert")
    model.bert.pooler.requires_grad_(False)
    for selection in (
        smallest(model, 60, exclude=("bert.embeddings",)),
        smaller_than(model, 0.01, exclude=("bert.embeddings",)),
    ):
        assert selection.method == "SaRA"
        names = selection.indices
        assert not any(n.startswith(("bert.embeddings", "bert.pooler")) for n in names)
        assert any(n.startswith("bert.embeddings") for n in selection.shapes)
        assert not any(n.startswith("bert.pooler") for n in selection.shapes)


def test_the_smallest_are_the_k_smallest(build):
    model = build("bert")
    selection = smallest(model, 60)
    every = torch.cat([p.detach().abs().flatten() for p in sl.weights(model).values()])
    chosen = torch.cat(
        [model.get_parameter(n).detach().reshape(-1)[i].abs() for n, i in selection.indices.items()]
    )
    assert torch.equal(chosen.sort().values, every.sort().values[:60])
    method = sara(model, budget=60, epochs=1, lam=0.0, reselect=None)
    (phase,) = method
    assert phase.selection.overlap(selection) == 1.0


def test_the_defaults_are_the_authors(build):
    model = build("bert")
    (phase,) = sara(model, threshold=0.02, epochs=3, min_side=11)
    state = phase.after_step.__self__
    assert [group["lr"] for group in phase.groups] == [learning_rate(0.02)] * 2
    assert {group["weight_decay"] for group in phase.groups} == {1e-2}
    assert {group["schedule"] for group in phase.groups} == {sl.cosine_decay}
    assert (state.lam, state.reselect, phase.epochs) == (5e-4, 0.5, 3)
    (phase,) = sara(
        model, threshold=0.02, epochs=3, min_side=11, lr=0.2, lr_head=0.1, weight_decay=0.0
    )
    assert [(group["lr"], group["weight_decay"]) for group in phase.groups] == [
        (0.2, 0.0),
        (0.1, 0.0),
    ]


@pytest.mark.usefixtures("meta_default")
def test_the_method_makes_its_tensors_beside_the_weights():
    model = nn.Sequential(nn.Linear(20, 30, device="cpu"), nn.Linear(30, 20, device="cpu"))
    data = [torch.ones(2, 20, device="cpu")] * 3
    method = sara(model, threshold=0.1, epochs=1, lam=0.1, min_side=4, reselect=1)
    records = sl.fit(model, method, data, loss=lambda model, batch: model(batch).square().mean())
    assert all(r["penalty"] > 0 for r in records)
