"""SoRA against the authors' code (Ding et al. 2023): forward, gradients, prox, steps, schedules."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import selective_lite as sl
from selective_lite.methods.sora import SoRA, soft_threshold, sora, staircase
from tests.parity.authors import AuthorsAdamW

DATA = Path(__file__).resolve().parents[1] / "data"
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(scope="module")
def golden():
    with np.load(DATA / "sora.npz", allow_pickle=False) as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def test_the_update_and_its_gradients(golden):
    layer = nn.Linear(6, 5, bias=False)
    nn.init.zeros_(layer.weight)
    with SoRA(layer, rank=4, alpha=4 * float(golden["lora_scaling"])) as update:
        (made,) = update.updates.values()
        with torch.no_grad():
            made.A.copy_(golden["lora_A"])
            made.B.copy_(golden["lora_B"])
            made.gate.copy_(golden["gate"][0])
        y = layer(golden["lora_x"])
        torch.testing.assert_close(y.detach(), golden["lora_y"], **TOLERANCE)
        y.sum().backward()
        torch.testing.assert_close(made.gate.grad, golden["lora_grad_gate"][0], **TOLERANCE)
        torch.testing.assert_close(made.A.grad, golden["lora_grad_A"], **TOLERANCE)
        assert golden["gate"][0, 1] == 0
        assert made.gate.grad[1] != 0  # a closed gate may open again
    merged = layer(golden["lora_x"]).detach()
    torch.testing.assert_close(merged, golden["lora_y"], **TOLERANCE)


def test_the_prox_is_the_soft_threshold_and_the_authors_zeroes_twice_as_far(golden):
    xi = float(golden["prox_lambda"])
    expected = golden["prox_soft_threshold_DERIVED"]
    torch.testing.assert_close(soft_threshold(golden["prox_x"], xi), expected, **TOLERANCE)
    for kind in ("prox", "prox_rand"):
        x, code = golden[f"{kind}_x"], golden[f"{kind}_code"]
        found, twice = soft_threshold(x, xi), x.abs() >= 2 * xi
        torch.testing.assert_close(found[twice], code[twice], **TOLERANCE)
        between = (x.abs() > xi) & ~twice
        assert between.any()
        assert (found[between] != 0).all()
        assert (code[between] == 0).all()
        on_it = x.abs() == xi
        assert (found[on_it] == 0).all()
        assert torch.equal(code[on_it], x[on_it])  # the authors' keeps what lies on the threshold


class Gated(nn.Module):
    """A layer under SoRA whose gate gets a stored gradient, and nothing else does."""

    def __init__(self, gate):
        super().__init__()
        self.layer = nn.Linear(8, 8, bias=False)
        self.update = [SoRA(self, rank=8)]  # in a list: it is no module
        (self.made,) = self.update[0].updates.values()
        with torch.no_grad():
            self.made.gate.copy_(gate)

    def forward(self, gradient):
        nothing = 0 * (self.made.A.sum() + self.made.B.sum())
        return (self.made.gate * gradient).sum() + nothing


def gate_steps(golden, run, **threshold):
    """Four steps of `sora` on the stored gradients, under the authors' optimizer."""
    model, path = Gated(golden["steps_g0"][0]), []
    lr = float(golden[f"steps_{run}_lr"])
    method = sora(model.update[0], lr=lr, epochs=1, clip=None, **threshold)
    seen = []

    def phases():
        for phase in method:
            for group in phase.groups:
                group["schedule"] = sl.constant
            seen.append(phase)
            yield phase

    sl.fit(
        model,
        phases(),
        list(golden["steps_grads"][:, 0]),
        loss=lambda model, gradient: model(gradient),
        optimizer=lambda groups: AuthorsAdamW(groups, eps=float(golden["steps_eps"])),
        on_step=lambda record: path.append(model.made.gate.detach().clone()),
    )
    return torch.stack(path), seen[0].after_step.__self__.path


@pytest.mark.parametrize(
    ("run", "threshold", "xi"),
    [
        ("sparse_optimizer", {"xi": 3e-4}, 3e-4),  # their fixed xi, without the rate
        ("multiply_lr", {"lam": 10.0}, 8e-3),  # their unused variant: rate * lambda
    ],
)
def test_four_steps_of_the_gates(golden, run, threshold, xi):
    assert float(golden[f"steps_{run}_lambda"]) == pytest.approx(*threshold.values())
    path, taken = gate_steps(golden, run, **threshold)
    code = golden[f"steps_{run}"][:, 0]
    assert [step["xi"] for step in taken] == pytest.approx([xi] * 4)
    assert [step["open"] for step in taken] == [float(gates.count_nonzero()) for gates in path]
    # The prox differs from theirs below 2 xi only: a gate that theirs never closes takes its path.
    below = (code == 0).any(0)
    torch.testing.assert_close(path[:, ~below], code[:, ~below], **TOLERANCE)
    assert int((~below).sum()) >= 2


def test_the_true_prox_closes_fewer_gates_on_the_same_gradients(golden):
    path, _ = gate_steps(golden, "multiply_lr", lam=10.0)
    code = golden["steps_multiply_lr"]
    assert [int(gates.count_nonzero()) for gates in code] == [4, 4, 4, 2]
    assert [int(gates.count_nonzero()) for gates in path] == [5, 4, 4, 4]


def test_the_schedules_of_lambda(golden):
    lam, schedule = 7e-4, staircase(1 / 7, 7)
    linear = golden["schedule_linear_1e-4_7e-4_7"].tolist()
    assert [lam * schedule((i + 1) / 7) for i in range(7)] == pytest.approx(linear[:7], rel=1e-9)
    assert linear[7] == linear[6] == pytest.approx(lam * schedule(1.0))
    # The two others are functions of progress too; the logarithmic one is the linear one to within
    # 5e-8.
    geometric = [7e-4 * 7 ** (i / 6 - 1) for i in range(7)]
    assert geometric == pytest.approx(
        golden["schedule_exp_linear_1e-4_7e-4_7"].tolist()[:7], rel=1e-5
    )
    assert golden["schedule_log_linear_1e-4_7e-4_7"].tolist() == pytest.approx(linear, abs=5e-8)
