"""The reviews: the protocol of the second edition, from the head to the rate of a row."""

import math
from dataclasses import replace

import pytest
import torch

import selective_lite as sl
from selective_lite.lab import load_classifier, results
from selective_lite.lab.data.sentiment import Split
from selective_lite.lab.experiments import movies, probes, reviews, run
from selective_lite.lab.models import load_mean_classifier

SMALL = {"train": 48, "validation": 40, "test": 30, "batch": 8, "epochs": 2, "samples": 16}


@pytest.fixture(scope="module")
def small():
    """A study whose model has one layer, and few reviews; its sweeps are bracketed."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(reviews, "TOLD_APART", {"train": 20, "validation": 10, "test": 12})
        patched.setattr(reviews, "load_mean_classifier", one_layer)
        reviews.prepared.cache_clear()
        yield replace(reviews.STUDY, data=({"task": "tweets", **SMALL},))
    reviews.prepared.cache_clear()


def one_layer():
    model, tokenizer = load_mean_classifier()
    del model.bert.encoder.layer[1:]
    return model, tokenizer


def config(method, budget, **more):
    return {"method": method, "budget": budget, "task": "tweets", **SMALL, **more}


def test_the_mean_is_over_the_tokens_and_not_over_padding():
    model, tokenizer = load_mean_classifier()
    texts = ["a film", "one of the better films of the year, by far"]
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    seen = []
    with model.classifier.register_forward_pre_hook(lambda _, args: seen.append(args[0])):
        model(**inputs)
        model(**tokenizer(texts[:1], return_tensors="pt"))
    with torch.no_grad():
        hidden = model.bert(**inputs).last_hidden_state
    torch.testing.assert_close(seen[0][0], hidden[0, :4].mean(0))  # [CLS] a film [SEP]
    torch.testing.assert_close(seen[0][0], seen[1][0], rtol=1e-4, atol=1e-5)


def test_the_model_is_the_classifier_without_its_pooler():
    mean, first = load_mean_classifier()[0], load_classifier()[0]
    names = {name for name in sl.weights(first) if ".pooler." not in name}
    assert set(sl.weights(mean)) == names
    assert set(sl.head_weights(mean)) == {"classifier.weight", "classifier.bias"}
    states = mean.state_dict(), first.state_dict()
    assert all(torch.equal(*(state[name] for state in states)) for name in states[0])


def test_features_are_in_the_order_of_the_split(small):
    model, data = small.start(config("head", 0.0, seed=0))
    found = probes.features(model, data.validation, batch_size=7)
    for i in (0, 13, 39):
        alone = probes.features(model, one(data.validation, i))
        torch.testing.assert_close(found[i : i + 1], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", reviews.OWN)
def test_a_method_of_its_own_size_has_a_random_control_of_that_size(small, method):
    sizes = []
    for name, budget in ((method, "own"), ("random", method)):
        cell = config(name, budget, seed=0)
        model, data = small.start(cell)
        phases = small.recipes[name](model, data, cell, 1e-3)
        phase = next(iter(phases))
        sizes.append(run.selected(phase).get("selected") or run.trained(phase, model))
        phases.close()
    if method == "child_tuning_f":  # which draws its mask at every step
        sizes[0] = round(0.3 * sizes[0])
    assert sizes[0] == sizes[1]


def one(split, i):
    parts = {n: [getattr(split, n)[i]] for n in ("texts", "labels", "documents", "tokens")}
    return Split(**parts, padding=split.padding, device=split.device)


def test_a_probe_is_where_its_loss_has_no_gradient():
    torch.manual_seed(0)
    x, labels = torch.randn(60, 5).double(), torch.randint(3, (60,))
    found = probes.logistic(x, labels, 1e-2)
    weight, bias = (part.requires_grad_() for part in found[:2])
    loss = torch.nn.functional.cross_entropy(x @ weight.T + bias, labels)
    (loss + 1e-2 * weight.square().sum()).backward()
    assert max(weight.grad.abs().max(), bias.grad.abs().max()) < 1e-6


def test_the_penalty_is_the_one_that_validation_likes(small):
    model, data = small.start(config("head", 0.0, seed=0))
    found = probes.probe(model, data)
    labels = {part: torch.tensor(getattr(data, part).labels) for part in ("train", "validation")}
    inputs = {part: probes.features(model, getattr(data, part)) for part in labels}
    right = {
        penalty: probes.correct(
            probes.logistic(inputs["train"], labels["train"], penalty),
            inputs["validation"],
            labels["validation"],
        ).sum()
        for penalty in probes.PENALTIES
    }
    assert right[found.penalty] == max(right.values())


def test_every_run_starts_from_the_same_head_which_is_a_row(small):
    models = [small.start(config("random", 0.005, seed=seed))[0] for seed in (0, 1)]
    assert torch.equal(models[0].classifier.weight, models[1].classifier.weight)
    row = run.run(small, config("head", 0.0, seed=0, lr=0.0))
    model, data = small.start(config("head", 0.0, seed=0))
    assert row["accuracy"] == small.measure(model, data)["accuracy"]
    assert row["tested"] == SMALL["test"]
    assert 1 / 3 < row["told_apart"] <= 1


@pytest.mark.parametrize("method", sorted({method for method, _ in reviews.GRIDS} - {"head"}))
def test_every_method_of_the_plan_runs(small, method, monkeypatch):
    budget = max(
        (b for m, b in reviews.GRIDS if m == method and isinstance(b, float)), default="own"
    )
    model, _ = small.start(config(method, budget, seed=0))
    counts = {name: min(5, p.numel()) for name, p in sl.weights(model).items()}

    def read(name):
        of = {"method": {"fish_shuffled": "fish", "shuffled": "unstructured"}.get(method)}
        sweep = {"config": {**config(method, budget), **of, "seeds": [1, 0]}}
        others = {name: 2 * count for name, count in counts.items()}
        sweep["per_seed"] = [{"per_tensor": others}, {"per_tensor": counts}]
        return [sweep] if name == "reviews_rates" else []

    monkeypatch.setattr(results, "read", read)
    row = run.run(small, config(method, budget, seed=0, lr=1e-3))
    assert all(math.isfinite(loss) for loss in row["first_losses"])
    total = sum(p.numel() for p in sl.weights(model).values())
    if method in movies.SHUFFLES:
        assert row["per_tensor"] == counts
    elif method in ("random", "fish", "magnitude", "lt_sft", "child_tuning_d"):
        assert row["trained"] == row["selected"] == round(budget * total)
    elif method == "lora_linear":
        assert row["trained"] == pytest.approx(budget * total, rel=0.25)


@pytest.mark.parametrize("best", [1e-6, 3e-4, 1e-3, 3e-2, 30.0])
def test_a_bracket_goes_on_until_the_best_is_between_worse_ones(best):
    place = run.RATES.index(best)
    found = run.bracket(lambda lr: -abs(run.RATES.index(lr) - place), 1e-3)
    rates = list(found)
    assert rates == sorted(rates)
    inside = run.RATES[max(0, place - 1) : place + 2]
    assert max(found, key=found.get) == best
    assert set(inside) <= set(rates)
    assert len(rates) <= abs(place - run.RATES.index(1e-3)) + 3


def test_a_plateau_has_worse_rates_on_both_sides():
    value = {1e-4: 0.1, 3e-4: 0.5, 1e-3: 0.5, 3e-3: 0.5, 1e-2: -math.inf}
    assert list(run.bracket(value.__getitem__, 1e-3)) == list(value)


def test_a_bracket_refuses_a_start_between_half_decades():
    with pytest.raises(ValueError, match="start=0.002 is not by half decades"):
        run.bracket(lambda lr: 0.0, 2e-3)


def test_a_sweep_is_the_mean_of_two_seeds_and_its_rate_the_best(small):
    cell = config("random", 0.005, seeds=(0, 1), start=1e-3)
    row = run.sweep(small, cell)
    assert all(part["selected"] == round(0.005 * part["total"]) for part in row["per_seed"])
    gains = [run.trial(small, {**cell, "seed": seed, "lr": 1e-3})[0] for seed in (0, 1)]
    at = row["rates"][1]
    assert row["validation"][1] == pytest.approx(sum(gain(at) for gain in gains) / 2)
    place = row["rates"].index(reviews.rate(row))
    assert row["validation"][place] == max(row["validation"])
    assert row["rates"] == sorted(row["rates"])


def test_a_rate_that_failed_is_not_chosen_and_of_equals_the_smaller_is():
    row = {"validation": [None, 0.7, 0.8, 0.8, 0.1], "rates": [1e-4, 3e-4, 1e-3, 3e-3, 1e-2]}
    assert reviews.rate(row) == 1e-3


def test_starts_are_half_decades():
    assert {start for start in reviews.GRIDS.values() if start} <= set(run.RATES)


def test_full_takes_the_scaled_rate_of_child_tuning_f(small, monkeypatch):
    """Two tasks have each their own sweep; the cell that is not tuned reads that of its task."""
    two = tuple({"task": task, **SMALL} for task in ("tweets", "movies"))
    cells = {("child_tuning_f", "own"): 1e-4, ("full", "child_tuning_f"): ()}
    study = replace(small, data=two, grids=cells, seeds=lambda method, budget: (0,))
    sweeps = [
        {"config": cell, "rates": [1e-4, 3e-4], "validation": found}
        for cell, found in zip(study.rate_configs(), ([0.7, 0.6], [0.6, 0.7]), strict=True)
    ]
    monkeypatch.setattr(results, "read", lambda name: sweeps if name == "reviews_rates" else [])
    rates = {(c["method"], c["task"]): c["lr"] for c in study.configs()}
    assert [rates["child_tuning_f", task] for task in ("tweets", "movies")] == [1e-4, 3e-4]
    assert rates["full", "tweets"] == pytest.approx(0.3**0.5 * 1e-4)
    assert rates["full", "movies"] == pytest.approx(0.3**0.5 * 3e-4)


def test_a_row_of_sora_has_the_ranks_that_it_ends_with(small):
    row = run.run(small, config("sora", "own", seed=0, lr=1e-3))
    opened = sum(row["ranks"])
    assert 0.3 < opened / (8 * len(row["ranks"])) < 0.7  # half of what N(0, 1) draws shrinks away
    fewest, most = 2 * 384 + 1, 384 + 1536 + 1
    assert fewest * opened <= row["trained"] <= most * opened


def test_a_row_of_sara_counts_all_that_it_trained_though_it_let_go_of_some(small):
    cell = config("sara_threshold", "own", seed=0, lr=1e-3)
    model, _ = small.start(cell)
    small_ones = sum(int((p.abs() < 2e-3).sum()) for p in sl.weights(model).values())
    assert run.run(small, cell)["trained"] == small_ones
