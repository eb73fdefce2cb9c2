"""Hard-Concrete gates against the numbers of the authors' code, values and gradients.

The paper is Louizos et al. 2018.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

import selective_lite as sl

DATA = Path(__file__).resolve().parents[1] / "data"
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(scope="module")
def golden():
    with np.load(DATA / "l0_hard_concrete.npz", allow_pickle=False) as file:
        return {name.removeprefix("t0667_"): torch.from_numpy(file[name]) for name in file.files}


@pytest.fixture
def settings(golden):
    return {
        "beta": float(golden["temperature"]),
        "stretch": (float(golden["l"]), float(golden["r"])),
    }


def test_a_sample_and_its_gradient(golden, settings):
    log_alpha = golden["loga"].clone().requires_grad_()
    z = sl.hard_concrete(log_alpha, golden["u"], eps=float(golden["epsilon"]), **settings)
    torch.testing.assert_close(z.detach(), golden["z"], **TOLERANCE)
    closed, opened = golden["z"] == 0, golden["z"] == 1
    assert torch.equal(z == 0, closed)
    assert torch.equal(z == 1, opened)
    assert closed.any()
    assert opened.any()
    (z * golden["z_grad_coef"]).sum().backward()
    torch.testing.assert_close(log_alpha.grad, golden["z_grad_loga"], **TOLERANCE)


def test_the_gate_at_test_time(golden, settings):
    found = sl.deterministic_gate(golden["loga"], stretch=settings["stretch"])
    torch.testing.assert_close(found, golden["z_deterministic"][0], **TOLERANCE)


def test_the_open_probability(golden, settings):
    found = sl.open_probability(golden["loga"], **settings)
    torch.testing.assert_close(found, golden["p_open"], **TOLERANCE)
    torch.testing.assert_close(1 - found, golden["cdf0"], **TOLERANCE)


def test_the_penalty_and_its_gradients(golden, settings):
    # The authors' objective: lambda for every weight of an open row, and their L2 term weighted
    # with P(open).
    log_alpha, weights = (
        golden["loga"].clone().requires_grad_(),
        golden["weights"].clone().requires_grad_(),
    )
    decay = float(golden["weight_decay"]) / 2
    row = (float(golden["lamba"]) + decay * weights.square()).sum(1)
    penalty = (sl.open_probability(log_alpha, **settings) * row).sum() + decay * golden[
        "bias"
    ].square().sum()
    torch.testing.assert_close(
        -penalty.detach().reshape(()), golden["reg"].reshape(()), **TOLERANCE
    )
    (-penalty).backward()
    torch.testing.assert_close(log_alpha.grad, golden["reg_grad_loga"], **TOLERANCE)
    torch.testing.assert_close(weights.grad, golden["reg_grad_weights"], **TOLERANCE)
