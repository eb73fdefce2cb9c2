"""Describe: a page with a delta's numbers, from memory, from a file, and on the command line."""

import runpy
import sys

import pytest
import torch

import selective_lite as sl


@pytest.fixture
def delta(build):
    base, model = build("bert"), build("bert")
    with torch.no_grad():
        model.bert.encoder.layer[0].attention.self.query.weight[0, :6] += 1
        model.bert.encoder.layer[1].attention.self.query.weight[0, :2] += 1
        model.bert.pooler.dense.bias += 1
    sl.add_adapters(model, "bert.pooler.dense.weight", rank=2)
    return sl.diff(base, model, method="by hand")


def test_the_page_says_what_the_delta_holds(delta, tmp_path):
    page = sl.describe(delta)
    total = delta.metadata["total"]
    for line in (
        "base         not said (BertForSequenceClassification, torch.float32)",
        "labels       LABEL_0, LABEL_1, LABEL_2",
        "method       by hand",
        f"budget       20 of {total:,} weights ({20 / total:.3%}), in 3 tensors, 1 of them whole",
        "head         39 weights: classifier.bias, classifier.weight",
        "modules      1 x lora of rank 2",
        "dtypes       torch.float32",
        "in memory    positions 32, values 32, dense 48, head 156, modules 192 bytes",
        "encoding     flat",
        f"library      selective_lite {sl.__version__}",
        "buffers      none",
        "  bert.pooler.dense.bias                                     12 of          12  100.000%",
        "  bert.encoder.layer.0.attention.self.query.weight            6 of         144    4.167%",
        "  0                   6   30.0%",
        "  1                   2   10.0%",
        "  outside            12   60.0%",
    ):
        assert line in page.splitlines(), page
    delta.save(tmp_path / "delta", "gap-lzma")
    size = (tmp_path / "delta").stat().st_size
    assert f"encoding     gap-lzma, file {size:,} bytes" in sl.describe(tmp_path / "delta")


def test_the_list_of_tensors_is_as_long_as_asked(delta):
    assert (
        sum(" of " in line and "%" in line for line in sl.describe(delta, tensors=2).splitlines())
        == 1 + 2
    )


def test_a_head_alone_has_a_page_and_hostile_texts_are_made_printable(build):
    base, model = build("toy"), build("toy")
    with torch.no_grad():
        model.classifier.bias += 1
    delta = sl.diff(base, model, method="\x1b[2J\ud800\nbase\u202e")
    page = sl.describe(delta)
    assert "method       ?[2J??base?" in page.splitlines()
    assert "budget       0 of" in page


def test_the_command_prints_the_page_or_says_what_is_wrong(delta, tmp_path, monkeypatch, capsys):
    def run(name):
        monkeypatch.setattr(sys, "argv", ["ship", str(tmp_path / name)])
        runpy.run_module("selective_lite.ship", run_name="__main__")

    delta.save(tmp_path / "delta")
    run("delta")
    assert capsys.readouterr().out == sl.describe(tmp_path / "delta") + "\n"
    (tmp_path / "damaged").write_bytes(b"no delta")
    for name, message in (("damaged", "is no delta file"), ("gone", "No such file")):
        with pytest.raises(SystemExit, match=message):
            run(name)
