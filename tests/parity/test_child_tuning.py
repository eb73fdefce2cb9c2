"""Child-Tuning against the authors' code (Xu et al. 2021): three steps of F, D, none; D's mask."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import selective_lite as sl
from selective_lite.methods import child_tuning as module
from selective_lite.methods.child_tuning import child_tuning, child_tuning_f
from tests.parity.authors import AuthorsAdamW

DATA = Path(__file__).resolve().parents[1] / "data"
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}
FACTS = json.loads((DATA / "childtuning_facts.json").read_text())


class Given(nn.Module):
    """A matrix and a vector whose gradients are what the batch says."""

    def __init__(self, w, b):
        super().__init__()
        self.linear = nn.Linear(4, 3, bias=False)
        self.b = nn.Parameter(b.clone())
        with torch.no_grad():
            self.linear.weight.copy_(w)

    def forward(self, grad_w, grad_b):
        return (self.linear(torch.eye(4)).t() * grad_w).sum() + (self.b * grad_b).sum()


@pytest.fixture(scope="module")
def golden():
    with np.load(DATA / "childtuning.npz", allow_pickle=False) as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


@pytest.fixture
def model(golden):
    return Given(golden["w0"], golden["b0"])


def train(model, method, golden):
    """Three steps at a constant rate, no clipping: w and b after each, the optimizer's state."""
    made, w, b = [], [], []

    def phases():
        for phase in method:
            phase.clip = None
            for group in phase.groups:
                group["schedule"] = sl.constant
            yield phase

    def optimizer(groups):
        made.append(AuthorsAdamW(groups, eps=1e-6))
        return made[-1]

    def on_step(record):
        # A forward writes what is trained into the weights.
        model(torch.zeros(3, 4), torch.zeros(4))
        w.append(model.linear.weight.detach().clone())
        b.append(model.b.detach().clone())

    data = list(zip(golden["grad_w"], golden["grad_b"], strict=True))
    sl.fit(
        model, phases(), data, loss=lambda m, batch: m(*batch), optimizer=optimizer, on_step=on_step
    )
    return torch.stack(w), torch.stack(b), made[0].state


def check(golden, mode, w, b):
    torch.testing.assert_close(w, golden[f"{mode}/w"], **TOLERANCE)
    torch.testing.assert_close(b, golden[f"{mode}/b"], **TOLERANCE)


@pytest.fixture
def stored_draws(golden, monkeypatch):
    # a module's own parameters come first
    pairs = zip(golden["F/bernoulli_b"], golden["F/bernoulli_w"], strict=True)
    draws = iter([one for pair in pairs for one in pair])
    monkeypatch.setattr(module, "draw", lambda shape, p, generator: next(draws).bool())


@pytest.mark.usefixtures("stored_draws")
def test_three_steps_of_f_on_the_stored_draws(golden, model):
    method = child_tuning_f(model, lr=float(golden["lr"]), epochs=1, p=float(golden["reserve_p"]))
    w, b, state = train(model, method, golden)
    check(golden, "F", w, b)
    torch.testing.assert_close(state[model.linear.weight]["m"], golden["F/exp_avg_w"], **TOLERANCE)
    torch.testing.assert_close(
        state[model.linear.weight]["v"], golden["F/exp_avg_sq_w"], **TOLERANCE
    )
    # Momentum moves what the second step's draw left out, and only what an earlier draw had kept.
    out = golden["F/bernoulli_w"][1] == 0
    assert int(out.sum()) == FACTS["F: zero-draw count step2"]
    assert (
        int((w[1] != w[0])[out].sum())
        == FACTS["F: entries with zero draw at step 2 that still move (momentum)"]
    )


def test_three_steps_of_d_on_the_stored_mask(golden, model):
    # In the authors' example only the matrix has a mask; what has none is trained whole.
    masked = golden["mask_w"]
    selection = sl.Selection(
        {"b": torch.arange(4), "linear.weight": masked.reshape(-1).nonzero().squeeze(1)},
        {"b": (4,), "linear.weight": (3, 4)},
    )
    w, b, state = train(
        model, sl.fixed_mask(model, selection, lr=float(golden["lr"]), epochs=1), golden
    )
    check(golden, "D", w, b)
    (vector,) = (p for p in state if len(p) == int(masked.sum()))
    torch.testing.assert_close(state[vector]["m"], golden["D/exp_avg_w"][masked], **TOLERANCE)
    torch.testing.assert_close(state[vector]["v"], golden["D/exp_avg_sq_w"][masked], **TOLERANCE)
    assert not golden["D/exp_avg_w"][~masked].any()


def test_three_steps_without_a_child_network_are_full_fine_tuning(golden, model):
    w, b, state = train(
        model, child_tuning_f(model, lr=float(golden["lr"]), epochs=1, p=1.0), golden
    )
    check(golden, "none", w, b)
    torch.testing.assert_close(
        state[model.linear.weight]["m"], golden["none/exp_avg_w"], **TOLERANCE
    )
    torch.testing.assert_close(
        state[model.linear.weight]["v"], golden["none/exp_avg_sq_w"], **TOLERANCE
    )


def test_under_decay_masked_weights_move_in_the_authors_code_and_not_here(golden, model):
    assert FACTS["D: max move of masked-out w (wd=0.01)"] > 5e-4
    masked = golden["mask_w"]
    index = masked.reshape(-1).nonzero().squeeze(1)
    shapes = {"b": (4,), "linear.weight": (3, 4)}
    selection = sl.Selection({"linear.weight": index}, shapes)
    rate = {"lr": float(golden["lr"]), "epochs": 1, "weight_decay": 0.01}
    train(model, sl.fixed_mask(model, selection, **rate), golden)
    assert torch.equal(model.linear.weight[~masked], golden["w0"][~masked])
    assert not (model.linear.weight == golden["w0"])[masked].any()


class Net(nn.Module):
    """As many candidates as in the authors' example: 144."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.classifier = nn.Linear(8, 3)

    def forward(self, x):
        return self.classifier(torch.tanh(self.second(torch.tanh(self.first(x)))))


def authors_mask(model, data, loss, p):
    """Squares of the batches' mean gradients, each tensor's clipped to norm 1; the top p."""
    parameters = sl.weights(model)
    fisher = {name: torch.zeros_like(w) for name, w in parameters.items()}
    for batch in data:
        gradients = torch.autograd.grad(loss(model, batch), list(parameters.values()))
        for total, gradient in zip(fisher.values(), gradients, strict=True):
            total += (gradient * min(1.0, 1.0 / (float(gradient.norm()) + 1e-6))) ** 2 / len(data)
    cutoff = np.percentile(
        np.concatenate([f.numpy().reshape(-1) for f in fisher.values()]), (1 - p) * 100
    )
    return {name: f >= float(cutoff) for name, f in fisher.items()}


@pytest.mark.parametrize(("scale", "same"), [(0.1, True), (30.0, False)])
def test_the_authors_mask_of_d_is_the_batch_reduction_where_no_gradient_is_clipped(scale, same):
    torch.manual_seed(4)
    model = Net().eval()
    data = [{"x": torch.randn(8, 8), "y": torch.randint(0, 3, (8,))} for _ in range(6)]

    def loss(model, batch):
        return scale * nn.functional.cross_entropy(model(batch["x"]), batch["y"])

    theirs = authors_mask(model, data, loss, 0.3)
    kept, of = FACTS["fisher_small_grads kept"], FACTS["fisher_small_grads of"]
    assert sum(int(mask.sum()) for mask in theirs.values()) == kept
    batch = child_tuning(model, data, 0.3, reduction="batch", loss=loss)
    assert (batch.count, batch.total) == (kept, of)
    shared = sum(int((mask & theirs[name]).sum()) for name, mask in batch.masks().items())
    assert (shared == kept) == same
    assert shared > 0.7 * kept
    per_sample = child_tuning(model, data, 0.3, loss=loss)
    assert per_sample.count == kept
    assert 0.4 < per_sample.overlap(batch) < 0.95
