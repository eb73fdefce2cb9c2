"""Hard-Concrete gates: exact zeros and ones, the closed form, and the gradient by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import selective_lite as sl

STRETCHES = st.tuples(st.floats(-3, -0.05), st.floats(1.05, 3))
BETAS = st.floats(0.2, 2)


def by_hand(log_alpha, u, beta, stretch):
    """The gate z, and its derivative 1[0 < s_bar < 1] (r - l) s (1 - s) / beta."""
    left, right = stretch
    s = 1 / (1 + torch.exp(-(u.log() - (1 - u).log() + log_alpha) / beta))
    stretched = s * (right - left) + left
    inside = (stretched > 0) & (stretched < 1)
    return stretched.clamp(0, 1), inside * (right - left) * s * (1 - s) / beta


@given(st.floats(-6, 6), BETAS, STRETCHES, st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_a_sample_and_its_gradient_are_the_formula(location, beta, stretch, seed):
    generator = torch.Generator().manual_seed(seed)
    u = torch.rand(200, generator=generator, dtype=torch.float64).clamp(1e-5, 1 - 1e-5)
    log_alpha = torch.full((200,), location, dtype=torch.float64, requires_grad=True)
    z = sl.hard_concrete(log_alpha, u, beta=beta, stretch=stretch)
    (gradient,) = torch.autograd.grad(z.sum(), log_alpha)
    expected, slope = by_hand(log_alpha.detach(), u, beta, stretch)
    torch.testing.assert_close(z.detach(), expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient, slope, rtol=1e-6, atol=1e-9)


@given(st.floats(-3, 3), BETAS, STRETCHES)
@settings(max_examples=15, deadline=None)
def test_the_share_of_open_gates_is_the_closed_form(location, beta, stretch):
    # A regular grid over u instead of chance: the share is then exact to one cell.
    u = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    log_alpha = torch.full_like(u, location)
    z = sl.hard_concrete(log_alpha, u, beta=beta, stretch=stretch)
    expected = float(sl.open_probability(log_alpha[:1], beta=beta, stretch=stretch))
    assert float((z > 0).double().mean()) == pytest.approx(expected, abs=1e-4)


def test_zero_and_one_are_reached_exactly_with_zero_gradient():
    log_alpha = torch.tensor([-20.0, 0.0, 20.0], requires_grad=True)
    z = sl.hard_concrete(log_alpha, torch.full((3,), 0.5))
    z.sum().backward()
    assert z.tolist() == [0.0, 0.5, 1.0]
    assert log_alpha.grad[0] == log_alpha.grad[2] == 0
    assert log_alpha.grad[1] > 0


def test_noise_of_zero_and_one_gives_finite_gates_and_gradients():
    log_alpha = torch.zeros(2, requires_grad=True)
    z = sl.hard_concrete(log_alpha, torch.tensor([0.0, 1.0]))
    z.sum().backward()
    assert z.tolist() == [0.0, 1.0]
    assert log_alpha.grad.isfinite().all()
    # It counts as noise of 1e-6, and so a gate that is open enough is open under any noise.
    assert sl.hard_concrete(torch.tensor(20.0), torch.tensor(0.0)) == 1


def test_the_deterministic_gate_has_no_temperature():
    log_alpha = torch.tensor([-9.0, -1.0, 0.0, 1.0, 9.0], dtype=torch.float64)
    expected = (1 / (1 + torch.exp(-log_alpha)) * 1.2 - 0.1).clamp(0, 1)
    torch.testing.assert_close(sl.deterministic_gate(log_alpha), expected)
    assert expected[0] == 0
    assert expected[-1] == 1


def test_with_beta_one_and_a_symmetric_stretch_the_open_probability_is_a_sigmoid():
    log_alpha = torch.linspace(-4, 4, 9)
    found = sl.open_probability(log_alpha, beta=1.0, stretch=(-1.5, 1.5))
    torch.testing.assert_close(found, log_alpha.sigmoid())


@pytest.mark.parametrize(
    "stretch", [(0.0, 1.1), (0.1, 1.1), (-0.1, 1.0), (-0.1, 0.9), (1.5, -1.5), (float("nan"), 2)]
)
@pytest.mark.parametrize(
    "call",
    [
        lambda s: sl.hard_concrete(torch.zeros(1), torch.ones(1) / 2, stretch=s),
        lambda s: sl.open_probability(torch.zeros(1), stretch=s),
        lambda s: sl.deterministic_gate(torch.zeros(1), stretch=s),
        lambda s: sl.HardConcrete((1,), stretch=s),
    ],
)
def test_a_stretch_that_never_reaches_zero_or_one_raises(call, stretch):
    with pytest.raises(ValueError, match=r"stretch=\(.*\) must have gamma < 0 and zeta > 1"):
        call(stretch)


@pytest.mark.parametrize("beta", [0.0, -1.0, float("nan")])
def test_a_temperature_that_is_not_positive_raises(beta):
    with pytest.raises(ValueError, match=f"beta={beta} must be positive"):
        sl.hard_concrete(torch.zeros(1), torch.ones(1) / 2, beta=beta)
    with pytest.raises(ValueError, match=f"beta={beta} must be positive"):
        sl.HardConcrete((1,), beta=beta)


def test_the_module_samples_in_training_and_is_deterministic_in_evaluation(device):
    gate = sl.HardConcrete((5, 4), beta=0.5, stretch=(-0.5, 1.5), log_alpha=0.3).to(device)
    draws = [gate(torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    u = torch.rand((5, 4), generator=torch.Generator().manual_seed(0)).to(device)
    assert torch.equal(draws[0], sl.hard_concrete(gate.log_alpha, u, beta=0.5, stretch=(-0.5, 1.5)))
    gate.eval()
    assert torch.equal(gate(), sl.deterministic_gate(gate.log_alpha, stretch=(-0.5, 1.5)))
    assert gate.expected_l0().item() == pytest.approx(
        20 / (1 + math.exp(-0.3 + 0.5 * math.log(1 / 3)))
    )


@pytest.mark.usefixtures("meta_default")
def test_gates_stay_on_the_device_of_their_location():
    gate = sl.HardConcrete((3,))
    gate.log_alpha = torch.nn.Parameter(torch.zeros(3, device="cpu"))
    with torch.no_grad():
        assert float(gate(torch.Generator().manual_seed(0)).sum()) > 0
        assert float(gate.eval()().sum()) == 1.5
        assert float(gate.expected_l0()) > 0
