"""The explorers: every frame fits, has its text, and is reached by its control."""

import re

import ipywidgets as widgets
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from selective_lite.lab import explorers, plots
from selective_lite.lab.figures.explorers import explorer
from selective_lite.methods.hard_concrete import hard_concrete, open_probability
from selective_lite.selection import select

GATES = [(0.0, 2 / 3, -0.1, 1.1), (2.0, 1.0, -1.5, 1.5), (-1.0, 0.4, -0.3, 1.05)]


def _figure(value=0.0):
    fig = Figure(figsize=(3, 2))
    fig.subplots().plot([0, value])
    return fig


def _inside(widget):
    """Every widget in a widget, itself included."""
    yield widget
    for child in getattr(widget, "children", ()):
        yield from _inside(child)


def _frames(widget):
    return [w.value for w in _inside(widget) if isinstance(w, widgets.HTML) and "<img" in w.value]


def _links(widget):
    """Pairs (control, trait, target, trait) joined in the state that the built page carries."""
    inside = {f"IPY_MODEL_{w.model_id}": w for w in _inside(widget)}
    models = widgets.Widget.get_manager_state()["state"].values()
    ends = [
        (*m["state"]["source"], *m["state"]["target"])
        for m in models
        if m["model_name"] == "LinkModel"
    ]
    return [
        (inside[a], trait, inside[b], other)
        for a, trait, b, other in ends
        if a in inside and b in inside
    ]


def test_controls_are_linked_to_their_frames_in_the_browser():
    axes = {"a": [("low", _figure()), ("high", _figure(1))], "b": [("one", _figure())]}
    widget = explorer(
        "Two axes", axes, lambda axis, label: f"the picture of {axis} at {label}", {"a": 1}
    )
    frames = _frames(widget)
    assert [re.search('alt="([^"]+)"', f)[1] for f in frames] == [
        "the picture of a at low",
        "the picture of a at high",
        "the picture of b at one",
    ]
    assert "a = high" in frames[1]
    names = sorted(
        (type(s).__name__, trait, type(t).__name__, other) for s, trait, t, other in _links(widget)
    )
    assert names == [("Dropdown", "index", "Stack", "selected_index")] + 2 * [
        ("IntSlider", "value", "Stack", "selected_index")
    ]
    for source, trait, target, other in _links(widget):
        assert getattr(source, trait) == getattr(target, other)
    sliders = [w for w in _inside(widget) if isinstance(w, widgets.IntSlider)]
    assert [(s.description, s.value, s.max) for s in sliders] == [("a", 1, 1), ("b", 0, 0)]


def test_without_stack_the_kernel_turns_the_pages(monkeypatch):
    monkeypatch.delattr(widgets, "Stack")
    presets = [(str(i), _figure(i)) for i in range(3)]
    widget = explorer(
        "Old widgets", {"x": presets}, {"x": [f"a line that ends at {i}" for i in range(3)]}
    )
    slider = next(w for w in _inside(widget) if isinstance(w, widgets.IntSlider))
    slider.value = 2
    assert [re.search("ends at .", f)[0] for f in _frames(widget)] == ["ends at 2"]


def test_an_explorer_refuses_what_the_page_cannot_carry():
    text = "a line that rises to one"
    with pytest.raises(ValueError, match="axes is empty"):
        explorer("t", {}, lambda *_: text)
    with pytest.raises(ValueError, match=r"axes\['x'\] has 16 frames"):
        explorer("t", {"x": [("1", _figure())] * 16}, lambda *_: text)
    with pytest.raises(ValueError, match=r"alt\['x'\] has 1 texts for 2"):
        explorer("t", {"x": [("1", _figure())] * 2}, {"x": [text]})
    with pytest.raises(ValueError, match="alt="):
        explorer("t", {"x": [("1", _figure())]}, lambda *_: "")
    noise = Figure(figsize=(5, 4))
    noise.subplots().imshow(np.random.default_rng(0).random((300, 300)))
    with pytest.raises(ValueError, match="draw fewer marks"):
        explorers.frame(noise)


@pytest.mark.parametrize(("log_alpha", "beta", "left", "right"), GATES)
def test_density_agrees_with_the_gates(log_alpha, beta, left, right):
    at = (log_alpha, beta, left, right)
    x = np.linspace(left, right, 13)[1:-1]
    step = 1e-6
    slope = (explorers.stretched_cdf(x + step, *at) - explorers.stretched_cdf(x - step, *at)) / (
        2 * step
    )
    np.testing.assert_allclose(explorers.stretched_density(x, *at), slope, rtol=1e-5)
    zero, one = explorers.point_masses(*at)
    location = torch.tensor(log_alpha, dtype=torch.float64, device="cpu")
    stretch = (left, right)
    assert 1 - zero == pytest.approx(
        float(open_probability(location, beta=beta, stretch=stretch)), abs=1e-6
    )
    u = (torch.arange(100_000, dtype=torch.float64, device="cpu") + 0.5) / 100_000
    z = hard_concrete(location.expand_as(u), u, beta=beta, stretch=stretch)
    assert float((z == 0).double().mean()) == pytest.approx(zero, abs=2e-5)
    assert float((z == 1).double().mean()) == pytest.approx(one, abs=2e-5)
    assert float((z <= 0.3).double().mean()) == pytest.approx(
        float(explorers.stretched_cdf(0.3, *at)), abs=2e-5
    )


def test_density_explorer_moves_along_four_axes():
    widget = explorers.density_explorer()
    sliders = {w.description: w for w in _inside(widget) if isinstance(w, widgets.IntSlider)}
    assert list(sliders) == ["log α", "β", "γ", "ζ"]
    assert len(_frames(widget)) == sum(s.max + 1 for s in sliders.values())
    assert all(s.max + 1 <= explorers.MAX_FRAMES for s in sliders.values())
    assert max(map(len, _frames(widget))) <= explorers.FRAME_BYTES
    # All axes start at the same gate, so they start with the same sentence.
    stacks = [
        w
        for w in _inside(widget)
        if isinstance(w, widgets.Stack) and isinstance(w.children[0], widgets.HTML)
    ]
    starts = {re.search('alt="([^"]+)"', s.children[s.selected_index].value)[1] for s in stacks}
    zero, one = explorers.point_masses(**explorers.DENSITY_BASE)
    assert len(starts) == 1
    assert f"probability {zero:.2f} of exactly 0, {one:.2f} of exactly 1" in starts.pop()


def test_density_explorer_refuses_an_impossible_gate():
    for wrong in ({"left": 0.0}, {"right": 1.0}, {"beta": 0.0}, {"gamma": 1.0}):
        with pytest.raises(ValueError, match=r"stretch=|base"):
            explorers.density_explorer({**explorers.DENSITY_BASE, **wrong})


def test_budget_explorer_takes_scores_or_selections():
    generator = torch.Generator(device="cpu").manual_seed(0)
    shapes = {
        "embeddings.weight": (50, 8),
        "layer.0.query.weight": (8, 8),
        "layer.1.intermediate.weight": (8, 32),
    }
    scores = {
        name: torch.rand(shape, generator=generator, device="cpu") for name, shape in shapes.items()
    }
    scores["layer.0.query.weight"] += 1  # all of it comes first
    frames = _frames(explorers.budget_explorer(scores, budgets=(0.05, 64, 0.5)))
    assert [re.search("<strong>(.*?)</strong>", f)[1] for f in frames] == [
        "budget = 5 %",
        "budget = 64 weights",
        "budget = 50 %",
    ]
    assert "100 %, is selected of query in layer 1" in frames[1]
    made = [("5 %", select(scores, 0.05))]
    assert _frames(explorers.budget_explorer(made)) == frames[:1]
    two = explorers.budget_explorer({"FISH": made * 3, "random": made}, start=0)
    assert [w.options for w in _inside(two) if isinstance(w, widgets.Dropdown)] == [
        ("FISH", "random")
    ]
    assert "tensor, random at budget 5 %" in _frames(two)[-1]
    later = explorers.budget_explorer(scores, budgets=(0.05, 64, 0.5), start=2)
    assert [w.value for w in _inside(later) if isinstance(w, widgets.IntSlider)] == [2]


def test_leak_explorer_counts_only_unselected_weights():
    selected = np.zeros((4, 6), dtype=bool)
    selected[0, 0] = True
    naive = np.zeros((3, 4, 6))
    naive[1:, 2, 3] = 0.25
    naive[:, 0, 0] = [0, 1, 2]
    compact = np.where(selected, naive, 7.0)
    widget = explorers.leak_explorer(
        {"naive": naive, "compact": compact}, selected, steps=[0, 10, 20]
    )
    assert [w.value for w in _inside(widget) if isinstance(w, widgets.IntSlider)] == [2]  # the end
    texts = [re.search('alt="([^"]+)"', f)[1] for f in _frames(widget)]
    assert texts[0].endswith("after 0 steps: naive, no change; compact, no change.")
    assert texts[1].endswith("after 10 steps: naive, largest change 2.5e-01; compact, no change.")
    causes = explorers.leak_explorer(
        {"decay": {"naive": naive}, "momentum": {"naive": compact}}, selected
    )
    assert [w.options for w in _inside(causes) if isinstance(w, widgets.Dropdown)] == [
        ("step (decay)", "step (momentum)")
    ]


def test_leak_explorer_refuses():
    trace = np.zeros((3, 4, 6))
    with pytest.raises(ValueError, match="of one shape"):
        explorers.leak_explorer({"naive": trace, "compact": trace[:2]})
    with pytest.raises(ValueError, match="selected has shape"):
        explorers.leak_explorer({"naive": trace}, np.ones((4, 6), dtype=bool))
    with pytest.raises(ValueError, match="steps has 2"):
        explorers.leak_explorer({"naive": trace}, steps=[0, 1])
    with pytest.raises(ValueError, match="of one shape"):
        explorers.leak_explorer({})


def test_importing_leaves_matplotlib_as_it_was():
    assert _figure().axes[0].spines["top"].get_visible() != plots.STYLE["axes.spines.top"]
