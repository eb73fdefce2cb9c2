"""What masks share: pairs that differ in one thing, and shares that hold for known masks."""

import pytest
import torch

from selective_lite.lab.experiments import masks
from selective_lite.selection import Selection


def test_pairs_differ_in_one_thing_and_none_is_made_twice():
    pairs = masks.pairs()
    assert len({str(pair) for pair in pairs}) == len(pairs)
    for pair in pairs:
        ours, theirs = pair["ours"], pair["theirs"]
        assert sum(ours[key] != theirs[key] for key in ours) == 1, pair
    for name in masks.SCORES:
        assert any(name in (pair["ours"]["score"], pair["theirs"]["score"]) for pair in pairs)


def test_shares_of_known_masks(monkeypatch):
    shapes = {"a": (10,), "b": (30,)}
    first = Selection({"a": torch.arange(4), "b": torch.arange(6)}, shapes)
    second = Selection({"a": torch.arange(2, 4), "b": torch.arange(3, 11)}, shapes)
    known = {"x": first, "y": second}
    monkeypatch.setattr(masks, "chosen", lambda score, **_: {0.25: known[score]})
    row = masks.compare({"budget": 0.25, "ours": {"score": "x"}, "theirs": {"score": "y"}})
    assert row["shared"] == pytest.approx(5 / 10)
    assert row["by_chance"] == pytest.approx(10 / 40)
    assert row["by_tensor"] == pytest.approx((4 * 2 / 10 + 6 * 8 / 30) / 10)
    assert row["per_tensor"] == [{"a": 4, "b": 6}, {"a": 2, "b": 8}]


def test_a_row_follows_from_its_own_scores():
    of = {name: {"score": name} for name in masks.SCORES}
    roots = masks.roots({"ours": of["fish"], "theirs": of["smallest"]})
    assert any(place.endswith("masks.py:gradients") for place in roots)
    assert any(place.endswith("masks.py:sizes") for place in roots)
    assert not any(place.endswith("masks.py:moved") for place in roots)
