"""The long relaxed phase: what is frozen, and that every method takes as many steps."""

import pytest

import selective_lite as sl
from selective_lite.lab.experiments import relaxation, reviews
from selective_lite.lab.models import load_mean_classifier
from selective_lite.params import layer_of

SMALL = {"task": "tweets", "train": 48, "validation": 40, "test": 30, "batch": 8, "seed": 0}


@pytest.fixture(scope="module")
def small():
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(reviews, "TOLD_APART", {"train": 20, "validation": 10, "test": 12})
        patched.setattr(reviews, "load_mean_classifier", three_layers)
        reviews.prepared.cache_clear()
        yield relaxation.start(SMALL)
    reviews.prepared.cache_clear()


def three_layers():
    model, tokenizer = load_mean_classifier()
    del model.bert.encoder.layer[3:]
    return model, tokenizer


def test_only_the_upper_layers_are_candidates(small):
    model, _ = small
    assert {layer_of(name) for name in sl.weights(model)} == {1, 2}
    other, _ = reviews.start(SMALL)  # the model that is kept is as it was
    assert all(p.requires_grad for p in other.parameters())


@pytest.mark.parametrize("phase", [relaxation.SHORT, relaxation.LONG], ids=["short", "long"])
@pytest.mark.parametrize("method", list(relaxation.RECIPES))
def test_every_method_takes_as_many_passes(small, method, phase, monkeypatch):
    """And only Diff Pruning has a relaxed phase, of the length and at the rate of its config."""
    model, task = small
    asked = {}
    whole = relaxation.diff_pruning
    monkeypatch.setattr(
        relaxation, "diff_pruning", lambda *args, **more: asked.update(more) or whole(*args, **more)
    )
    config = {**SMALL, **phase, "budget": relaxation.BUDGET}
    phases = relaxation.RECIPES[method](model, task, config, 1e-3)
    passes = next(iter(phases)).epochs + (asked["epochs"][1] if asked else 0)
    phases.close()
    assert passes == phase["relaxed"] + relaxation.MASKED
    assert bool(asked) == method.endswith("structured")
    if asked:
        assert asked["lr_alpha"] == phase["lr_alpha"]
        assert asked["groups"] == ("tensor" if method == "structured" else None)


def test_the_rows_of_one_length():
    rows = [{"config": {"relaxed": length}} for length in (1, 8, 8)]
    assert len(relaxation.of_length(rows, 8)) == 2
