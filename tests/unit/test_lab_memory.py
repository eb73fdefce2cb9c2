"""Ledgers side by side: what is printed, drawn and said follows from the books."""

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt

from selective_lite.lab import memory

FULL = {
    "weights": 40_000,
    "gradients": 30_000,
    "optimizer": 60_004,
    "index": 0,
    "passing": 0,
    "activations": 7_000,
}
FEW = {"weights": 41_000, "gradients": 1_000, "optimizer": 2_000, "index": 500, "passing": 1_500}
MEASURED = {"full": FULL, "few": FEW}
PREDICTED = {"few": {**FEW, "gradients": 1_024}}


def test_the_table_has_every_kind_and_says_where_a_prediction_is_off():
    top, full, few = memory.table(MEASURED, PREDICTED).splitlines()
    assert top.split() == ["kB", *memory.LOOKS, "sum", "prediction"]
    assert full.split() == ["full", "40.00", "30.00", "60.00", "0.00", "0.00", "7.00", "137.00"]
    assert few.split() == [
        "few",
        "41.00",
        "1.00",
        "2.00",
        "0.50",
        "1.50",
        "-",
        "46.00",
        "gradients",
        "-24",
        "bytes",
    ]


@pytest.mark.parametrize("kind", memory.PREDICTED)
def test_a_prediction_is_exact_when_every_kind_is_and_activations_are_not_judged(kind):
    assert memory.verdict(FULL, {k: FULL[k] for k in memory.PREDICTED}) == "exact"
    assert memory.verdict(FULL, {**FULL, kind: FULL[kind] + 1}) == f"{kind} -1 bytes"


@pytest.mark.parametrize(
    ("largest", "unit"),
    [(9, "bytes"), (9_999, "bytes"), (10_000, "kB"), (10_000_000, "MB"), (2 * 10**10, "GB")],
)
def test_the_unit_leaves_two_digits_before_the_point(largest, unit):
    assert (
        memory.unit({"small": {"weights": 1}, "large": {"weights": largest - 1, "index": 1}})[0]
        == unit
    )


def test_bars_are_as_long_as_the_bytes_and_ticks_stand_where_predicted_parts_end():
    _, ax = plt.subplots()
    memory.draw(ax, MEASURED, PREDICTED)
    ends = {
        (round(bar.get_y() + bar.get_height() / 2), bar.get_x() + bar.get_width())
        for bar in ax.patches
    }
    ticks = ax.lines[0].get_xydata()
    named = [text.get_text() for text in ax.get_legend().get_texts()]
    first, _ = (label.get_text() for label in ax.get_yticklabels())
    upside_down = ax.yaxis_inverted()
    plt.close("all")
    expected = [(0, end) for end in (40, 70, 130.004, 137.004)] + [
        (1, end) for end in (41, 42, 44, 44.5, 46)
    ]
    np.testing.assert_allclose(sorted({(y, round(x, 6)) for y, x in ends}), expected)
    np.testing.assert_allclose(ticks, [(end, 1) for end in (41, 42.024, 44.024, 44.524, 46.024)])
    assert named == [*memory.LOOKS, "predicted"]
    assert (first, upside_down) == ("full", True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_gates_of_half_precision_weights_are_float32(dtype):
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2)).to(dtype)
    added = memory.gates(model, "tensor", head=())
    assert [t.numel() for t in added] == [6, 2, 4, 2] * 2 + [4]
    assert {t.dtype for t in added} == {max(dtype, torch.float32, key=lambda kind: kind.itemsize)}


def test_one_call_prints_the_table_and_draws_with_words(monkeypatch, capsys):
    pages = []
    monkeypatch.setattr("IPython.display.display", lambda page: pages.append(page.data))
    memory.show(MEASURED, PREDICTED)
    assert memory.table(MEASURED, PREDICTED) in capsys.readouterr().out
    assert (
        "few 46: weights 41, gradients 1, optimizer 2, index 0.5, passing 1.5; "
        "prediction gradients -24 bytes." in pages[0]
    )


@pytest.mark.parametrize(
    ("measured", "predicted", "message"),
    [
        ({}, None, "measured is empty"),
        (MEASURED, {"other": FEW}, "predicted names 'other'"),
        ({"full": {"weight": 1}}, None, "a kind 'weight'"),
    ],
)
def test_books_that_do_not_fit_are_refused(measured, predicted, message):
    with pytest.raises(ValueError, match=message):
        memory.show(measured, predicted)
