"""SaRA against the authors' code (Hu et al. 2024): masks, norm, steps; its default's faults."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import selective_lite as sl
from selective_lite.methods.sara import learning_rate, nuclear_norm, sara, smaller_than

DATA = Path(__file__).resolve().parents[1] / "data"
TOLERANCE = {"rtol": 1e-5, "atol": 2e-6}
NAMES = ("0.weight", "0.bias", "2.weight", "2.bias")
LAMBDA = {"dense_nolowrank": 0.0, "dense_lowrank": 5e-4}


@pytest.fixture(scope="module")
def golden():
    with np.load(DATA / "sara.npz", allow_pickle=False) as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


@pytest.fixture(scope="module")
def facts():
    return json.loads((DATA / "sara_facts.json").read_text())


@pytest.fixture
def model(golden):
    made = nn.Sequential(nn.Linear(65, 66), nn.Tanh(), nn.Linear(66, 10))
    made.load_state_dict({name: golden[f"theta0/{name}"] for name in NAMES})
    return made


def cross_entropy(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def test_the_mask_is_what_lies_below_the_threshold(golden, facts, model):
    selection = smaller_than(model, float(golden["threshold"]))
    for name, mask in selection.masks().items():
        assert torch.equal(mask, golden[f"mask0/{name}"])
    assert selection.per_tensor() == facts["masked counts"]
    # The same weights are the k smallest.
    smallest = sl.select(sl.magnitude(model), selection.count, largest=False)
    assert smallest.overlap(selection) == 1


def test_the_rate_of_a_threshold(golden):
    found = [learning_rate(threshold) for threshold in golden["lr_auto_threshold"].tolist()]
    assert found == pytest.approx(golden["lr_auto"].tolist(), rel=1e-12)
    assert found[2] == pytest.approx(4.97e-4, abs=5e-7)


def test_the_nuclear_norm_and_its_gradient(golden, model):
    index = smaller_than(model, float(golden["threshold"])).indices["0.weight"]
    values = golden["theta0/0.weight"].reshape(-1)[index].requires_grad_()
    norm = nuclear_norm(values, index, (66, 65))
    torch.testing.assert_close(norm.detach(), golden["nuclear_norm_0.weight"], **TOLERANCE)
    norm.backward()
    expected = golden["nuclear_norm_grad_0.weight"].reshape(-1)
    torch.testing.assert_close(values.grad, expected[index], rtol=1e-4, atol=1e-5)
    assert int(expected.count_nonzero()) == len(index)


@pytest.mark.parametrize("run", LAMBDA)
def test_five_steps_with_a_reselection_after_the_second(golden, facts, model, run):
    theta, gradients = [], []

    def phases():
        method = sara(
            model,
            threshold=2e-3,
            epochs=5,
            lr=1e-3,
            lam=LAMBDA[run],
            reselect=2,
            schedule=sl.constant,
        )
        for phase in method:
            state, values = phase.after_step.__self__, phase.groups[0]["params"]

            def before_step(step, state=state, values=values):
                gradients.append([v.grad.clone() for v in values])
                state.find_step(step)

            def after_step(step, state=state):
                state.update(step)
                model(golden["X"])  # writes the values into the weights
                theta.append(weights_inside(model))

            phase.before_step, phase.after_step = before_step, after_step
            yield phase
            masks = state.selection.masks()
            assert all(
                torch.equal(masks[name], golden[f"{run}/mask_after_reselect/{name}"])
                for name in NAMES
            )
            assert state.counts == [
                1725,
                sum(int(golden[f"{run}/mask_after_reselect/{n}"].sum()) for n in NAMES),
            ]

    records = sl.fit(model, phases(), [(golden["X"], golden["Y"])], loss=cross_entropy)
    assert [r["loss"] for r in records] == pytest.approx(golden[f"{run}/loss"].tolist(), abs=2e-6)
    norm = LAMBDA[run] * float(golden["nuclear_norm_0.weight"])
    assert records[0]["penalty"] == pytest.approx(norm, rel=1e-5)
    for name, gradient in zip(NAMES, gradients[0], strict=True):
        # the task's: theirs is before the penalty
        expected = golden[f"{run}/grad1/{name}"][golden[f"mask0/{name}"]]
        if name == "0.weight":
            expected = (
                expected
                + LAMBDA[run] * golden["nuclear_norm_grad_0.weight"][golden["mask0/0.weight"]]
            )
        torch.testing.assert_close(gradient, expected, **TOLERANCE, msg=name)
    for step in range(5):
        for name in NAMES:
            expected = golden[f"{run}/theta{step + 1}/{name}"]
            torch.testing.assert_close(
                theta[step][name], expected, **TOLERANCE, msg=f"{step} {name}"
            )
    if run == "dense_nolowrank":
        counts = {name: int(golden[f"{run}/mask_after_reselect/{name}"].sum()) for name in NAMES}
        assert counts == facts["reselected counts dense"]


def weights_inside(model):
    """The weights of a model in masked training, by their own names."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if n in NAMES}


def test_the_nuclear_norm_moves_the_authors_dense_run_and_not_their_default_one(golden, facts):
    moved = max(
        float(
            (golden[f"dense_lowrank/theta5/{n}"] - golden[f"dense_nolowrank/theta5/{n}"])
            .abs()
            .max()
        )
        for n in NAMES
    )
    assert moved == pytest.approx(facts["dense: same"], rel=1e-6)
    assert moved > 5e-3
    assert facts["UB: max |theta5(lambda_rank=5e-4)-theta5(lambda_rank=0)|"] == 0


@pytest.fixture
def ours(golden, model):
    """Our weights before the first step and after each of five, with a re-selection after two."""
    theta = [weights_inside(model)]

    def on_step(record):
        model(golden["X"])  # writes the values into the weights
        theta.append(weights_inside(model))

    method = sara(
        model, threshold=2e-3, epochs=5, lr=1e-3, lam=0.0, reselect=2, schedule=sl.constant
    )
    records = sl.fit(
        model, method, [(golden["X"], golden["Y"])], loss=cross_entropy, on_step=on_step
    )
    return records, theta


def test_the_first_forward_sees_the_weights_where_the_authors_default_sees_no_signs(
    golden, facts, ours
):
    records, theta = ours
    mask = golden["mask0/0.weight"]
    seen = golden["ub_nolowrank/theta_seen_by_forward_0/0.weight"]
    assert torch.equal(seen[mask], theta[0]["0.weight"][mask].abs())
    flipped = float((seen[mask] != theta[0]["0.weight"][mask]).float().mean())
    assert flipped == pytest.approx(
        facts["UB first forward: share of masked entries with flipped sign"]
    )
    assert records[0]["loss"] == pytest.approx(float(golden["dense_nolowrank/loss"][0]), abs=2e-6)
    assert records[0]["loss"] != pytest.approx(float(golden["ub_nolowrank/loss"][0]), abs=1e-5)


def test_no_step_is_skipped_at_the_reselection_where_the_authors_default_skips_one(golden, ours):
    _, theta = ours
    for name in NAMES:
        # Theirs re-selects in the third call in place of a step; only signs change.
        two, three = (golden[f"ub_nolowrank/theta{i}/{name}"].abs() for i in (2, 3))
        assert torch.equal(two, three)
        assert (theta[3][name] != theta[2][name]).any()


def test_zero_initialised_biases_are_trained_where_the_authors_default_gives_no_gradient(
    golden, ours
):
    _, theta = ours
    assert (golden["theta0/2.bias"] == 0).all()
    assert (golden["ub_nolowrank/grad1/2.bias"] == 0).all()
    assert (theta[1]["2.bias"] != 0).all()
