"""SaRA against the numbers of the authors' code (Hu et al. 2024): masks, norm, five steps; and its default's faults."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call

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

            def before_step(progress, optimizer, state=state, values=values):
                gradients.append([v.grad.clone() for v in values])
                state.check(progress, optimizer)

            def after_step(progress, optimizer, state=state):
                state.update(progress, optimizer)
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
        expected = golden[f"{run}/grad1/{name}"][
            golden[f"mask0/{name}"]
        ]  # the task's: theirs is before the penalty
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


class AuthorsDefault:
    """What the authors' default optimizer does, from a description: three faults on a masked AdamW.

    The weights seen in the first forward, and in the first one after a re-selection, are |values|,
    also for autograd; the step of the re-selection is skipped; the nuclear norm's gradient goes to
    tensors that nobody reads.
    """

    def __init__(self, theta, masks, threshold, lam):
        self.masks, self.threshold, self.lam = masks, threshold, lam
        self.theta = {name: t.clone() for name, t in theta.items()}
        self.unread = torch.zeros_like(theta["0.weight"])
        self.begin()

    def begin(self):
        self.values = {n: nn.Parameter(t[self.masks[n]]) for n, t in self.theta.items()}
        self.optimizer = torch.optim.AdamW(self.values.values(), lr=1e-3, weight_decay=1e-2)
        self.absolute = True
        self.show()

    def show(self):
        """The weights that the next forward sees, with the values in the graph."""
        self.seen = {}
        for name, values in self.values.items():
            shown = self.theta[name].clone()
            shown[self.masks[name]] = values.abs() if self.absolute else values
            self.seen[name] = shown

    def step(self, loss):
        u, _, vh = torch.linalg.svd(
            self.theta["0.weight"] * self.masks["0.weight"], full_matrices=False
        )
        self.unread = self.lam * (u @ vh) * self.masks["0.weight"]
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.absolute = False
        self.write()
        self.show()

    def reselect(self):
        self.masks = {n: m & (self.theta[n].abs() < self.threshold) for n, m in self.masks.items()}
        self.begin()

    def write(self):
        for name, values in self.values.items():
            self.theta[name][self.masks[name]] = values.detach()


@pytest.mark.parametrize("lam", [0.0, 5e-4])
def test_the_authors_default_optimizer_flips_signs_skips_a_step_and_loses_the_nuclear_norm(
    golden, facts, model, lam
):
    theta0, masks = weights_inside(model), {name: golden[f"mask0/{name}"] for name in NAMES}
    reference = AuthorsDefault(theta0, masks, 2e-3, lam)
    run = "ub_nolowrank"  # their other run has the same weights, see the facts
    for name in NAMES:
        assert torch.equal(
            reference.seen[name].detach(), golden[f"{run}/theta_seen_by_forward_0/{name}"]
        )
    mask, seen = masks["0.weight"], reference.seen["0.weight"].detach()
    flipped = (seen[mask] != theta0["0.weight"][mask]).float().mean()
    assert float(flipped) == pytest.approx(
        facts["UB first forward: share of masked entries with flipped sign"]
    )
    for call in range(1, 6):
        loss = cross_entropy(
            lambda x: functional_call(model, reference.seen, x), (golden["X"], golden["Y"])
        )
        assert loss.item() == pytest.approx(float(golden[f"{run}/loss"][call - 1]), abs=2e-6)
        if call == 3:
            before = {name: t.clone() for name, t in reference.theta.items()}
            reference.reselect()
            assert all(torch.equal(before[name], reference.theta[name]) for name in NAMES)
            counts = {name: int(mask.sum()) for name, mask in reference.masks.items()}
            assert counts == facts["reselected counts UB"]
        else:
            reference.step(loss)
        if call == 1:
            for name, values in reference.values.items():
                torch.testing.assert_close(values.grad, golden[f"{run}/grad1/{name}"], **TOLERANCE)
        for name in NAMES:
            found, expected = reference.seen[name].detach(), golden[f"{run}/theta{call}/{name}"]
            torch.testing.assert_close(found, expected, **TOLERANCE, msg=f"{call} {name}")
    assert bool(reference.unread.any()) == (lam > 0)


def test_sara_starts_from_the_weights_themselves_where_the_authors_default_sees_them_without_sign(
    golden, model
):
    # The forward of the first step sees the model's own weights, and zero-initialised ones do get a
    # gradient.
    expected = cross_entropy(model, (golden["X"], golden["Y"])).item()
    method = sara(model, threshold=2e-3, epochs=5, lr=1e-3, lam=0.0, reselect=2)
    records = sl.fit(model, method, [(golden["X"], golden["Y"])], loss=cross_entropy)
    assert records[0]["loss"] == expected
    assert expected != pytest.approx(float(golden["ub_nolowrank/loss"][0]), abs=1e-5)
    assert (golden["theta0/2.bias"] == 0).all()
    assert (golden["ub_nolowrank/grad1/2.bias"] == 0).all()
    assert (model.get_parameter("2.bias") != 0).all()
