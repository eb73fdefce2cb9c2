"""Calibration: it leads the marginal gate along a line, and leaves enough gates open."""

import math

import pytest
import torch

import selective_lite as sl
from selective_lite.methods.diff_pruning import Relaxed, diff_pruning
from selective_lite.methods.diff_pruning import calibration as module
from selective_lite.methods.diff_pruning.calibration import Calibration
from selective_lite.training import Step


def scattered(model, **options):
    """Gates at random places."""
    relaxed, generator = Relaxed(model, **options), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in (
            *relaxed.log_alpha,
            *([] if relaxed.log_alpha_group is None else [relaxed.log_alpha_group]),
        ):
            p.copy_(4 * torch.randn(p.shape, generator=generator))
    return relaxed


@pytest.mark.parametrize("groups", [None, "tensor", "head"])
@pytest.mark.parametrize("k", [1, 40, 1000])
def test_the_watched_gate_is_the_mth_and_says_whether_m_are_open(build, groups, k):
    relaxed = scattered(build("bert"), groups=groups)
    places = [a.detach().expand_as(w) for a, w in zip(relaxed.log_alpha, relaxed.w, strict=True)]
    if groups:
        shared = relaxed.log_alpha_group.detach()
        places = [
            torch.minimum(a, shared[i]) for a, i in zip(places, relaxed.group_ids, strict=True)
        ]
    ordered = torch.cat([a.flatten() for a in places]).sort(descending=True).values
    m = round(1.2 * k)
    calibration = Calibration(relaxed, k, lam=1e-6)
    assert calibration.log_alpha == ordered[m - 1].item()
    assert (relaxed.count_open() >= m) == (calibration.log_alpha > 0)


def test_a_model_beyond_the_sample_is_watched_through_every_nth_gate(build, monkeypatch):
    relaxed = scattered(build("bert"))
    exact = Calibration(relaxed, 1000, lam=1e-6).log_alpha
    monkeypatch.setattr(module, "SAMPLE", 500)
    assert Calibration(relaxed, 1000, lam=1e-6).log_alpha == pytest.approx(exact, abs=0.6)


def test_a_budget_of_everything_watches_the_last_gate(build):
    relaxed = scattered(build("toy"))
    total = sum(w.numel() for w in relaxed.w)
    lowest = min(a.min().item() for a in relaxed.log_alpha)
    assert Calibration(relaxed, total, lam=1e-6).log_alpha == lowest


def test_the_line_leads_from_the_start_to_a_margin_above_the_threshold(build):
    calibration = Calibration(
        Relaxed(build("toy"), stretch=(-0.1, 1.1), log_alpha=3.0), 5, lam=1e-6, margin=0.5
    )
    threshold = math.log(0.1 / 1.1)
    assert [calibration.target(t) for t in (0.0, 0.5, 1.0)] == pytest.approx(
        [3.0, (3.0 + threshold + 0.5) / 2, threshold + 0.5]
    )


def test_lambda_is_the_formula_s_and_brakes_on_momentum_before_the_line_is_crossed(build):
    relaxed = Relaxed(build("toy"))
    calibration = Calibration(relaxed, 5, lam=1e-6)
    optimizer = torch.optim.SGD(relaxed.parameters())
    expected, summed, before = 1e-6, 0.0, 5.0
    for step, place in ((1, 5.0), (2, 4.9), (3, 4.5), (5, 3.5), (8, 3.5), (10, 1.2)):
        assert calibration.penalty().item() == pytest.approx(
            expected * relaxed.expected_l0().item(), rel=1e-5
        )
        with torch.no_grad():
            for log_alpha in relaxed.log_alpha:
                log_alpha.fill_(place)
        calibration.update(Step(step, 10, optimizer))
        error = place + 9 * (place - before) - (5 - 4 * step / 10)
        error = max(-3.0, min(1.5, error))
        share = {5: 0.2, 8: 0.3, 10: 0.2}.get(step, 0.1)
        summed, before = summed + error * share, place
        expected = 1e-6 * math.exp(2 * error + 10 * summed)
        assert calibration.lam == pytest.approx(expected, rel=1e-4)
    # At 0.3 the gate is above its line (4.5 against 3.8), and its momentum has the price cut all
    # the same.
    prices = [step["lambda"] for step in calibration.path]
    assert prices[3] < prices[2]
    assert [step["open"] for step in calibration.path] == [sum(w.numel() for w in relaxed.w)] * 6


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("groups", [None, "tensor", "head"])
def test_enough_gates_stay_open_and_the_crowd_closes(build, batches, groups, seed):
    model, k = build("bert", seed), 300
    relaxed = Relaxed(model, groups=groups, seed=seed)
    calibration = Calibration(relaxed, k, lam=1e-7)
    gates = [*relaxed.log_alpha, *([] if groups is None else [relaxed.log_alpha_group])]
    parts = [
        {"params": list(relaxed.w), "lr": 0.01},
        {"params": gates, "lr": 0.4, "schedule": sl.constant},
    ]
    phase = sl.Phase(
        "relaxed",
        parts,
        6,
        penalty=calibration.penalty,
        after_step=calibration.update,
        model=relaxed,
    )
    records = sl.fit(model, [phase], batches("bert", 10))
    assert [step["expected_l0"] * step["lambda"] for step in calibration.path] == pytest.approx(
        [record["penalty"] for record in records], rel=1e-4
    )
    total = sum(w.numel() for w in relaxed.w)
    assert calibration.path[0]["open"] == total
    assert k <= calibration.path[-1]["open"] < total / 2
    assert relaxed.project(k)[0].count == k


@pytest.mark.parametrize("groups", [None, "tensor"])
def test_the_method_calibrates_its_relaxed_phase(build, batches, groups):
    model, k = build("bert"), 300
    rates = {"lr_w": 0.01, "lr_alpha": 0.4, "lr": 0.01}
    phase = next(iter(diff_pruning(model, k, epochs=(6, 1), groups=groups, **rates)))
    total = phase.model.count_open()
    records = sl.fit(model, [phase], batches("bert", 10))
    assert total == sum(w.numel() for w in phase.model.w)
    assert k <= phase.model.count_open() < total / 2
    penalties = [record["penalty"] for record in records]
    assert max(penalties) > 100 * penalties[0]  # lambda was raised: E[L0] cannot grow
