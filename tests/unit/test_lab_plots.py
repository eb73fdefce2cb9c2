"""The figures: alternative text, size, numbers drawn."""

import base64
import io
import re
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from PIL import Image

from selective_lite.lab import plots
from selective_lite.lab.kinds import kind_of
from selective_lite.params import layer_of

ALT = 'a curve that rises from "zero" to one'


@pytest.fixture
def shown(monkeypatch):
    """Collect what is displayed."""
    pages = []
    monkeypatch.setattr("IPython.display.display", lambda page: pages.append(page.data))
    return pages


def _axes():
    return Figure().subplots()


def test_a_figure_reaches_the_page_with_its_text_and_is_closed(shown):
    with plots.style():
        fig, ax = plt.subplots()
    ax.plot([0, 1])
    plots.show(fig, ALT)
    assert not plt.fignum_exists(fig.number)
    assert 'alt="a curve that rises from &quot;zero&quot; to one"' in shown[0]
    source = re.search(r'src="data:image/svg\+xml;base64,([^"]+)"', shown[0])
    assert b"<svg" in base64.b64decode(source[1])


def test_a_figure_of_many_points_becomes_a_small_bitmap(shown):
    with plots.figure(alt=ALT) as (_, ax):
        ax.scatter(*np.random.default_rng(0).normal(size=(2, 5000)), s=4)
    assert "data:image/png" in shown[0]
    assert len(shown[0]) < 150_000


@pytest.mark.parametrize("alt", ["", "too short", " " * 40, None])
def test_a_figure_without_a_sentence_is_refused(shown, alt):
    with pytest.raises(ValueError, match="alt="):
        plots.show(Figure(), alt)
    with pytest.raises(ValueError, match="alt="), plots.figure(alt=alt):
        pass
    assert not shown


def test_a_figure_is_not_shown_when_its_cell_fails(shown):
    with pytest.raises(KeyError), plots.figure(alt=ALT):
        raise KeyError
    assert not shown


def test_the_style_ends_with_its_context():
    before = dict(matplotlib.rcParams)
    with plots.style():
        assert not matplotlib.rcParams["axes.spines.top"]
    assert dict(matplotlib.rcParams) == before


def test_a_bitmap_keeps_the_exact_colours_of_flat_areas():
    fig = Figure(figsize=(2, 1))
    fig.add_axes((0, 0, 0.5, 1), facecolor=plots.PALETTE[1], xticks=[], yticks=[])
    seen = Image.open(io.BytesIO(plots.png(fig, 100, tints=4))).convert("RGB")
    assert seen.size == (200, 100)
    assert seen.getpixel((50, 50)) == (0xD5, 0x5E, 0x00)
    assert seen.getpixel((150, 50)) == (255, 255, 255)


def test_band_draws_mean_and_range():
    ax = _axes()
    edges = plots.band(ax, [1, 2], [[0.0, 4.0], [1.0, 2.0], [5.0, 0.0]], "ours")
    np.testing.assert_allclose(edges, [[0, 0], [2, 2], [5, 4]])
    np.testing.assert_allclose(ax.lines[0].get_ydata(), [2, 2])
    wide = np.arange(41.0)[:, None]
    np.testing.assert_allclose(plots.band(ax, [0], wide, "many", spread="95%")[:, 0], [1, 20, 39])


@pytest.mark.parametrize(
    ("runs", "spread", "message"),
    [
        ([1.0, 2.0], "range", "runs has shape"),
        ([[1.0]], "range", "runs has shape"),
        ([[1.0, 2.0]], "sd", "spread='sd'"),
        ([[1.0, 2.0]] * 3, "95%", "needs 20 runs"),
    ],
)
def test_band_refuses(runs, spread, message):
    with pytest.raises(ValueError, match=message):
        plots.band(_axes(), [1, 2], runs, "x", spread=spread)


def test_forest_plot_hollows_the_points_that_may_be_zero():
    ax = _axes()
    plots.interval(ax, [("clear", -2.0, -3.0, -1.0), ("unclear", 0.5, -1.0, 2.0)], "points")
    fills = [line.get_markerfacecolor() for line in ax.lines if line.get_marker() == "o"]
    assert fills == [plots.PALETTE[0], "white"]
    assert ax.texts[0].get_text() == "−2.00 [−3.00, −1.00]"
    assert [label.get_text() for label in ax.get_yticklabels()] == ["clear", "unclear"]


@pytest.mark.parametrize("draw", [plots.interval, plots.bars])
def test_intervals_must_hold_their_estimate(draw):
    with pytest.raises(ValueError, match="row 'x'"):
        draw(_axes(), [("x", 1.0, 2.0, 3.0)])
    with pytest.raises(ValueError, match="at least one"):
        draw(_axes(), [])


@pytest.mark.parametrize(
    ("name", "kind", "layer"),
    [
        ("bert.embeddings.word_embeddings.weight", "embed", None),
        ("bert.embeddings.LayerNorm.weight", "norm, bias", None),
        ("bert.encoder.layer.3.attention.self.query.weight", "query", 3),
        ("bert.encoder.layer.3.attention.self.key.bias", "norm, bias", 3),
        ("encoder.layer.0.attention.output.dense.weight", "attn out", 0),
        ("encoder.layer.0.intermediate.dense.weight", "ffn in", 0),
        ("encoder.layer.11.output.dense.weight", "ffn out", 11),
        ("pooler.dense.weight", "other", None),
        ("model.embed_tokens.weight", "embed", None),
        ("model.layers.2.self_attn.k_proj.weight", "key", 2),
        ("model.layers.2.self_attn.v_proj.weight", "value", 2),
        ("model.layers.2.self_attn.o_proj.weight", "attn out", 2),
        ("model.layers.2.mlp.gate_proj.weight", "ffn in", 2),
        ("model.layers.2.mlp.down_proj.weight", "ffn out", 2),
        ("model.layers.2.post_attention_layernorm.weight", "norm, bias", 2),
        ("transformer.wte.weight", "embed", None),
        ("transformer.h.1.attn.c_attn.weight", "q, k, v", 1),
        ("transformer.h.1.attn.c_proj.weight", "attn out", 1),
        ("transformer.h.1.mlp.c_proj.weight", "ffn out", 1),
        ("transformer.h.1.ln_1.weight", "norm, bias", 1),
    ],
)
def test_tensors_are_sorted_by_what_they_do(name, kind, layer):
    assert (kind_of(name), layer_of(name)) == (kind, layer)


def test_where_counts_by_layer_and_kind():
    selection = SimpleNamespace(
        shapes={
            "embeddings.word_embeddings.weight": (10, 10),
            "encoder.layer.0.attention.self.query.weight": (5, 4),
            "encoder.layer.0.attention.self.query.bias": (5,),
            "encoder.layer.0.attention.output.LayerNorm.bias": (15,),
            "pooler.dense.weight": (4,),
        },
        per_tensor=lambda: {
            "embeddings.word_embeddings.weight": 1,
            "encoder.layer.0.attention.self.query.weight": 10,
            "encoder.layer.0.attention.self.query.bias": 5,
        },
    )
    rows, columns, fractions = plots.share_by_layer(selection)
    assert (rows, columns) == (["before", "1", "after"], ["embed", "query", "other", "norm, bias"])
    none = np.nan
    np.testing.assert_allclose(
        fractions, [[0.01, none, none, none], [none, 0.5, none, 0.25], [none, none, 0.0, none]]
    )
    fig = plots.share_figure(selection)
    assert sorted(text.get_text() for text in fig.axes[0].texts) == ["0", "1.0", "25", "50"]


@pytest.mark.parametrize(
    ("fraction", "text"),
    [
        (0, "0"),
        (1, "100"),
        (0.0996, "10"),
        (0.0512, "5.1"),
        (0.005, "0.50"),
        (0.0001, "0.010"),
        (1e-6, "<0.001"),
    ],
)
def test_percent_is_short(fraction, text):
    assert plots.percent(fraction) == text
