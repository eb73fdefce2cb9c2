"""SoRA against the numbers of the authors' code (Ding et al. 2023): forward, gradients, prox, gate steps, schedules."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import selective_lite as sl
from selective_lite.methods.sora import Proximal, SoRA, soft_threshold, staircase
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


def authors_prox(x, xi):
    """The authors' thresholding: shrink by xi, then zero what the *shrunk* value leaves below xi."""
    shrunk = torch.where(x > xi, x - xi, torch.where(x < -xi, x + xi, x))
    return torch.where(shrunk.abs() < xi, 0.0, shrunk)


def test_the_prox_is_the_soft_threshold_and_the_authors_zeroes_twice_as_far(golden):
    x, xi = golden["prox_x"], float(golden["prox_lambda"])
    torch.testing.assert_close(
        soft_threshold(x, xi), golden["prox_soft_threshold_DERIVED"], **TOLERANCE
    )
    assert torch.equal(authors_prox(x, xi), golden["prox_code"])
    assert torch.equal(authors_prox(golden["prox_rand_x"], xi), golden["prox_rand_code"])
    found, code = soft_threshold(x, xi), golden["prox_code"]
    twice = x.abs() >= 2 * xi
    torch.testing.assert_close(found[twice], code[twice], **TOLERANCE)
    between = (x.abs() > xi) & ~twice
    assert between.sum() == 6
    assert (found[between] != 0).all()
    assert (code[between] == 0).all()
    assert (
        x[x.abs() == xi] == code[x.abs() == xi]
    ).all()  # and what lies on the threshold keeps its value
    assert (found[x.abs() == xi] == 0).all()


def gate_steps(golden, run, prox, monkeypatch, **threshold):
    """The library's proximal steps on the stored gradients, under the authors' optimizer and a given prox."""
    monkeypatch.setattr("selective_lite.methods.sora.soft_threshold", prox)
    gate = nn.Parameter(golden["steps_g0"].clone())
    optimizer = AuthorsAdamW(
        [gate], lr=float(golden[f"steps_{run}_lr"]), eps=float(golden["steps_eps"])
    )
    proximal = Proximal([gate], schedule=sl.constant, **threshold)
    path = []
    for step, gradient in enumerate(golden["steps_grads"], 1):
        gate.grad = gradient.clone()
        optimizer.step()
        proximal.after_step(step / 4, optimizer)
        path.append(gate.detach().clone())
    return torch.stack(path), proximal


@pytest.mark.parametrize(
    ("run", "threshold", "xi"),
    [
        ("sparse_optimizer", {"lam": 0.0, "xi": 3e-4}, 3e-4),  # their fixed xi, without the rate
        ("multiply_lr", {"lam": 10.0, "xi": None}, 8e-3),  # their unused variant: rate * lambda
    ],
)
def test_four_steps_of_the_gates(golden, monkeypatch, run, threshold, xi):
    assert float(golden[f"steps_{run}_lambda"]) == pytest.approx(
        threshold["xi"] or threshold["lam"]
    )
    path, proximal = gate_steps(golden, run, authors_prox, monkeypatch, **threshold)
    torch.testing.assert_close(path, golden[f"steps_{run}"], **TOLERANCE)
    assert torch.equal(path == 0, golden[f"steps_{run}"] == 0)
    assert [step["xi"] for step in proximal.path] == pytest.approx([xi] * 4)
    assert [step["open"] for step in proximal.path] == [
        float(gates.count_nonzero()) for gates in path
    ]


def test_the_true_prox_closes_fewer_gates_on_the_same_gradients(golden, monkeypatch):
    path, _ = gate_steps(golden, "multiply_lr", soft_threshold, monkeypatch, lam=10.0, xi=None)
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
