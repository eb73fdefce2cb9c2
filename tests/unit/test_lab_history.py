"""The progress bar and the history."""

import os
import subprocess
import sys

import numpy as np
import pytest

from selective_lite.lab import history
from selective_lite.lab.history import History, track

RECORDS = [
    {"phase": "relaxed", "step": i, "loss": 1.0 - 0.01 * i, "penalty": 2.0 - 0.02 * i}
    for i in range(60)
] + [{"phase": "fixed", "step": 60 + i, "loss": 0.3, "penalty": 0.0, "kept": 5} for i in range(20)]


@pytest.fixture
def shown(monkeypatch):
    """Collect what is displayed."""
    pages = []
    monkeypatch.setattr("IPython.display.display", lambda page: pages.append(page.data))
    return pages


def test_track_is_silent_where_nobody_watches():
    code = (
        "from selective_lite.lab.history import track; "
        "assert list(track(range(3), 'x')) == [0, 1, 2]"
    )
    environment = {**os.environ, "TQDM_DISABLE": ""}
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, env=environment, text=True, check=False
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


def test_track_shows_a_bar_on_a_terminal_unless_told_not_to(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    assert list(track("abc", "letters")) == ["a", "b", "c"]
    assert "letters" in capsys.readouterr().err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    assert list(track("abc", "letters")) == ["a", "b", "c"]
    assert capsys.readouterr().err == ""


def test_history_is_the_records_and_finds_last_values():
    history = History(RECORDS)
    assert len(history) == 80
    assert history[0] == RECORDS[0]
    assert history[:2].phases == ["relaxed"]
    assert history.phases == ["relaxed", "fixed"]
    assert history.last("loss") == 0.3
    assert History(RECORDS[:60]).last("penalty") == RECORDS[59]["penalty"]
    np.testing.assert_allclose(history.values("penalty", "fixed"), np.zeros(20))
    with pytest.raises(KeyError, match="name='lose'"):
        history.last("lose")


def test_history_refuses_what_fit_does_not_return():
    with pytest.raises(ValueError, match="records is empty"):
        History([])
    with pytest.raises(ValueError, match=r"records\[1\] lacks loss"):
        History([{"phase": "a", "loss": 1.0}, {"phase": "a"}])


def test_smoothing_keeps_a_straight_line_and_quiets_noise():
    line = np.linspace(3, 1, 201)
    np.testing.assert_allclose(history._smooth(line)[5:-5], line[5:-5])
    noise = np.random.default_rng(0).normal(size=2000)
    assert history._smooth(noise).std() < 0.2 * noise.std()
    np.testing.assert_allclose(history._smooth(np.array([2.0, 4.0])), [2.0, 4.0])


def test_plot_says_in_words_what_it_draws(shown):
    History(RECORDS).plot()
    assert "Training loss and penalty over 80 steps" in shown[0]
    assert "fixed from 0.3 to 0.3" in shown[0]
    History(RECORDS[60:]).plot()
    assert "Training loss over 20 steps" in shown[1]
