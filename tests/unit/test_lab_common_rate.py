"""Two methods at one rate: each is run from its best rate to the other's, where it was not yet."""

import pytest

from selective_lite.lab import results
from selective_lite.lab.experiments import common_rate


def sweep(method, budget, rates, validation):
    return {"config": {"method": method, "budget": budget}, "rates": rates} | {
        "validation": validation
    }


def test_each_method_is_run_up_to_the_best_rate_of_the_other(monkeypatch):
    sweeps = [
        sweep("fish", 0.005, [3e-4, 1e-3, 3e-3], [0.7, 0.8, 0.7]),
        sweep("random", 0.005, [3e-3, 1e-2, 3e-2], [0.7, 0.8, 0.7]),
        sweep("fish", 0.02, [3e-4, 1e-3, 3e-3], [0.7, 0.8, 0.7]),
        sweep("random", 0.02, [1e-3, 3e-3, 1e-2], [0.7, 0.8, 0.7]),
        sweep("fish", 0.05, [3e-4, 1e-3, 3e-3], [0.7, 0.8, 0.7]),
    ]
    monkeypatch.setattr(results, "read", lambda name: sweeps)
    wanted = [(c["method"], c["budget"], c["lr"]) for c in common_rate.configs()]
    assert wanted == [("fish", 0.005, 1e-2), ("random", 0.005, 1e-3)]


def test_a_row_is_a_sweep_of_one_rate(monkeypatch):
    asked = []

    def trial(study, config):
        asked.append((config["seed"], config["lr"]))
        return (lambda lr: 0.7 + 0.1 * config["seed"]), None

    monkeypatch.setattr(common_rate, "trial", trial)
    row = common_rate.tried({"method": "fish", "budget": 0.005, "seeds": [0, 1], "lr": 1e-2})
    assert row == {"rates": [1e-2], "validation": [pytest.approx(0.75)]}
    assert asked == [(0, 1e-2), (1, 1e-2)]
