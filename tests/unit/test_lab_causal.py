"""The language model's runs by the protocol of the second edition."""

from dataclasses import replace

import pytest
import torch

import selective_lite as sl
from selective_lite.lab.data.tweets import Sequences
from selective_lite.lab.experiments import causal, run

SMALL = {**causal.DATA, "batch": 4, "samples": 4, "seed": 0}


@pytest.fixture
def tiny(build):
    """The study with a tiny model and random texts."""

    def start(config):
        generator = torch.Generator().manual_seed(0)
        texts = torch.randint(1, 53, (32, 7), generator=generator).tolist()

        def split(tokens):
            empty = [""] * len(tokens)
            return Sequences(empty, [0] * len(tokens), empty, tokens, 0, torch.device("cpu"))

        torch.manual_seed(config["seed"])
        return build("llama"), causal.Tweets(*(split(texts[i : i + 8]) for i in range(0, 32, 8)))

    return replace(causal.STUDY, start=start)


@pytest.mark.parametrize("method", causal.RECIPES)
def test_every_method_runs(tiny, method):
    row = run.run(tiny, {**SMALL, "method": method, "budget": 0.2, "lr": 1e-2})
    assert len(row["bits"]) == len(row["tokens"]) == 8
    assert row["bits_a_token"] == pytest.approx(sum(row["bits"]) / sum(row["tokens"]), abs=1e-3)
    assert row["other"] > 0
    model, _ = tiny.start(SMALL)
    total = sum(p.numel() for p in sl.weights(model).values())
    sizes = {"full": total, "untouched": None}
    if method == "lora":
        assert row["trained"] == pytest.approx(0.2 * total, rel=0.2)
    else:
        assert row.get("trained") == sizes.get(method, round(0.2 * total))


def test_the_shuffled_control_has_the_counts_of_fish(tiny):
    rows = [
        run.run(tiny, {**SMALL, "method": method, "budget": 0.2, "lr": 1e-2})
        for method in ("fish", "fish_shuffled")
    ]
    assert rows[0]["per_tensor"] == rows[1]["per_tensor"]
    assert rows[0]["bits"] != rows[1]["bits"]


def test_a_sweep_seeks_the_fewest_bits(tiny):
    cell = {**SMALL, "method": "random", "budget": 0.05, "seeds": (0, 1), "start": 1e-2}
    row = run.sweep(tiny, cell)
    costs = dict(zip(row["rates"], row["validation"], strict=True))
    assert costs[causal.rate(row)] == min(cost for cost in costs.values() if cost is not None)
    assert 1e-2 in costs


def test_a_config_has_a_hundred_steps_and_starts_are_half_decades():
    assert causal.DATA["train"] // causal.DATA["batch"] * causal.DATA["epochs"] >= 100
    assert {start for start in causal.GRIDS.values() if start} <= set(run.RATES)
