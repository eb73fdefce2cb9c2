"""The tweets' rows: complete, inside their grids, of exact counts, and with the delta kept."""

import json
from dataclasses import replace

import pytest
import torch

import selective_lite as sl
from selective_lite.lab import results
from selective_lite.lab.data.tweets import Sequences, Texts
from selective_lite.lab.experiments import four_deltas, run, tweets

ROWS = results.read(tweets.NAME)
RATES = results.read(tweets.NAME + "_rates")


def test_every_config_has_its_row():
    for rows, configs in ((RATES, tweets.STUDY.rate_configs()), (ROWS, tweets.STUDY.configs())):
        assert [row["config"] for row in rows] == json.loads(json.dumps(list(configs)))


def test_no_best_learning_rate_lies_on_the_edge_of_its_grid():
    for row in RATES:
        tried = row["config"]["grid"][: len(row["validation"])]
        assert tweets.rate(row) in tried[1:-1], f"widen this grid: {row['config']}"


def test_masks_have_exactly_k_weights():
    total = 134_515_008
    for row in ROWS:
        k = round(row["config"]["budget"] * total)
        if row["config"]["method"] != "untouched":
            assert row["trained"] == k == sum(row["per_tensor"].values())


def test_rows_say_of_every_text_what_it_costs():
    for row in ROWS:
        assert len(row["bits"]) == len(row["tokens"]) == row["config"]["test"]
        assert sum(row["bits"]) / sum(row["tokens"]) == pytest.approx(row["bits_a_token"], abs=1e-4)
    assert len({tuple(row["tokens"]) for row in ROWS}) == 1


def test_the_shipped_delta_is_its_row_s():
    (row,) = [row for row in ROWS if tweets.shipped(row["config"])]
    file = results.find("language.safetensors")
    assert (four_deltas.sha256(file), file.stat().st_size) == (row["sha256"], row["bytes"])
    delta = sl.load(file)
    assert delta.count == row["trained"]
    places = {
        **{n: len(i) for n, i in delta.positions.items()},
        **{n: t.numel() for n, t in delta.dense.items()},
    }
    assert places == {name: count for name, count in row["per_tensor"].items() if count}


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["untouched", "fish", "random"])
def test_every_method_runs_on_a_gpu(build, accelerator, tmp_path, monkeypatch, method):
    texts = torch.randint(1, 53, (24, 7)).tolist()

    def split(tokens):
        empty = [""] * len(tokens)
        return Sequences(empty, [0] * len(tokens), empty, tokens, 0, torch.device(accelerator))

    def start(config):
        return build("llama").to(accelerator), Texts(*(split(texts[i : i + 8]) for i in (0, 8, 16)))

    study = replace(tweets.STUDY, start=start)
    monkeypatch.setattr(results, "CHECKOUT", tmp_path)
    config = {**tweets.DATA, "method": method, "budget": 0.02, "seed": 0, "batch": 4}
    row = run.run(study, {**config, "lr": 1e-3})
    assert len(row["bits"]) == len(row["tokens"]) == 8
    if method != "untouched":
        assert row["trained"] == sum(row["per_tensor"].values()) > 0
        found = run.sweep(study, {**config, "grid": (1e-3, 1e-2)})["validation"]
        assert 1 <= len(found) <= 2
