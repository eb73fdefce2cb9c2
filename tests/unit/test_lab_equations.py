"""The equation contract."""

import numpy as np
import pytest
import torch

from selective_lite.lab.equations import check


def test_one_line_names_the_error_and_every_failing_variant(capsys):
    left = torch.tensor([0.5, 1.0], requires_grad=True)
    check(
        "eq-stretch",
        left,
        np.array([0.5, 1.0 + 1e-7]),
        {"not clamped": [0.5, 1.42], "no beta": [0.25, 1.0]},
    )
    assert capsys.readouterr().out == (
        "eq-stretch holds: max error 1e-07; fails when not clamped (0.42); no beta (0.25)\n"
    )


@pytest.mark.parametrize(
    ("left", "right", "wrong", "message"),
    [
        (1.0, 1.1, {"w": 2.0}, "does not hold: max error 0.1"),
        (1.0, 1.0, {}, "wrong is empty"),
        (1.0, 1.0, {"off": 2.0, "same": 1.0 + 1e-9}, "'same' agrees too"),
        (np.ones(3), 1.0, {"w": np.zeros(3)}, "right has ()"),
        (np.ones(3), np.ones(3), {"w": 0.0}, r"wrong\['w'\] has ()"),
        (np.ones(0), np.ones(0), {"w": np.ones(0)}, "at least one number"),
        (np.nan, np.nan, {"w": 0.0}, "all finite"),
    ],
)
def test_a_check_that_shows_nothing_fails(left, right, wrong, message):
    with pytest.raises(AssertionError, match=message):
        check("eq-x", left, right, wrong)


def test_tolerances_are_used(capsys):
    check("eq-mc", 0.50, 0.51, {"w": 0.6}, rtol=0, atol=0.02)
    with pytest.raises(AssertionError, match="does not hold"):
        check("eq-mc", 0.50, 0.51, {"w": 0.6}, rtol=0, atol=0.005)
    assert capsys.readouterr().out.count("\n") == 1


def test_a_variant_may_fail_by_not_being_finite(capsys):
    check("eq-log", 0.0, 0.0, {"log of zero": -np.inf})
    assert "log of zero (inf)" in capsys.readouterr().out


def test_label_and_types_are_checked():
    with pytest.raises(ValueError, match="label='stretch'"):
        check("stretch", 1.0, 1.0, {"w": 2.0})
    with pytest.raises(TypeError, match="right is str"):
        check("eq-x", 1.0, "one", {"w": 2.0})
