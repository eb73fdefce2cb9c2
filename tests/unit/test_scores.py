"""Scores: the formula they claim, on an evaluation-mode model that comes back as it was."""

import copy
import weakref

import pytest
import torch
from torch import nn

import selective_lite as sl

GRADIENT_SCORES = {
    "squared": sl.squared_gradient,
    "squared_batch": lambda *a, **k: sl.squared_gradient(*a, reduction="batch", **k),
    "true_fisher": lambda *a, **k: sl.squared_gradient(*a, labels="model", **k),
    "expected_fisher": sl.expected_squared_gradient,
    "magnitude": sl.gradient_magnitude,
    "taylor1": sl.taylor,
    "taylor2": lambda *a, **k: sl.taylor(*a, order=2, **k),
}


def gradients(model, batch, loss=sl.model_loss):
    """The gradient of the mean loss for every candidate."""
    parameters = sl.weights(model)
    found = torch.autograd.grad(loss(model, batch), list(parameters.values()), allow_unused=True)
    return {
        n: torch.zeros_like(p) if g is None else g
        for (n, p), g in zip(parameters.items(), found, strict=True)
    }


def samples(data):
    return [
        {key: value[i : i + 1] for key, value in batch.items()}
        for batch in data
        for i in range(len(batch["labels"]))
    ]


def assert_close(found, expected):
    assert list(found) == list(expected)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("score", GRADIENT_SCORES)
def test_scoring_leaves_modes_gradients_and_flags_as_they_were(build, batches, score):
    model = build("toy")
    model.train()
    model.norm.eval()
    model.first.bias.requires_grad_(False)
    model.second.weight.grad = torch.full_like(model.second.weight, 3.0)
    before = sl.snapshot(model)

    GRADIENT_SCORES[score](model, batches("toy", 2))

    assert {n for n, m in model.named_modules() if not m.training} == {"norm"}
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["first.bias"]
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {"second.weight"}
    assert torch.equal(model.second.weight.grad, torch.full_like(model.second.weight, 3.0))
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


def test_a_loss_that_raises_leaves_the_model_as_it_was(build, batches):
    model = build("toy").train()

    def fails(model, batch):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        sl.squared_gradient(model, batches("toy", 1), loss=fails)
    assert all(module.training for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_a_backward_pass_that_raises_leaves_no_hook_behind(build, batches):
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise RuntimeError("out of memory")

    model, data = build("toy"), batches("toy", 1)
    with pytest.raises(RuntimeError, match="out of memory"):
        sl.squared_gradient(model, data, loss=lambda m, b: Fails.apply(m(**b).loss))
    seen = []
    model.second.weight.register_hook(lambda gradient: seen.append(gradient))
    model(**data[0]).loss.backward()
    assert torch.equal(model.second.weight.grad, seen[0])
    assert model.second.weight.grad.any()


@pytest.mark.gpu
@pytest.mark.parametrize("score", GRADIENT_SCORES)
def test_scores_on_a_gpu_are_those_of_the_cpu_and_stay_there(build, batches, accelerator, score):
    expected = GRADIENT_SCORES[score](build("bert"), batches("bert", 2))
    model = build("bert").to(accelerator)
    found = GRADIENT_SCORES[score](model, batches("bert", 2, device=accelerator))
    assert {value.device.type for value in found.values()} == {accelerator}
    torch.testing.assert_close(
        {n: v.cpu() for n, v in found.items()}, expected, rtol=1e-3, atol=1e-6
    )
    one, other = (sl.select(scores, 0.5) for scores in (found, expected))
    assert one.count == other.count
    assert one.overlap(other) > 0.99


@pytest.mark.parametrize("score", GRADIENT_SCORES)
def test_scores_do_not_depend_on_dropout_or_on_being_under_no_grad(build, batches, score):
    model, data = build("toy"), batches("toy", 2)
    expected = GRADIENT_SCORES[score](model, data)
    with torch.no_grad():
        found = GRADIENT_SCORES[score](model.train(), data)
    assert all(torch.equal(found[n], expected[n]) for n in expected)


def test_per_sample_is_the_sum_of_squares_of_single_samples_for_any_batch_size(build, batches):
    model, data = build("toy"), batches("toy", 2)
    expected = {name: torch.zeros_like(p) for name, p in sl.weights(model).items()}
    for sample in samples(data):
        for name, gradient in gradients(model, sample).items():
            expected[name] += gradient**2
    assert_close(sl.squared_gradient(model, data), expected)
    assert_close(sl.squared_gradient(model, samples(data)), expected)


def twice(model, batch):
    """A loss with two passes through the model, and a gradient of its own on the way."""
    first = model(**batch).loss
    (inner,) = torch.autograd.grad(first, list(sl.weights(model).values())[:1], retain_graph=True)
    return (
        inner.square().sum() * first
        + model(**{**batch, "labels": batch["labels"].flip(0)}).loss ** 2
    )


@pytest.mark.parametrize("kind", ["toy", "bert", "bert_tied", "llama", "gpt2"])
@pytest.mark.parametrize("loss", [sl.model_loss, twice])
def test_scores_are_bit_for_bit_those_of_whole_gradients(build, batches, kind, loss):
    model, data = build(kind), batches(kind, 2)
    expected = {name: torch.zeros_like(p) for name, p in sl.weights(model).items()}
    for batch in data:
        for name, gradient in gradients(model, batch, loss).items():
            expected[name].addcmul_(gradient, gradient)
    found = sl.squared_gradient(model, data, reduction="batch", loss=loss)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("kind", ["bert", "bert_tied"])
def test_no_two_gradients_are_held(build, batches, kind):
    model, live, most = build(kind), weakref.WeakSet(), []

    def seen(gradient):
        live.add(gradient)
        most.append(len(live))

    for p in sl.weights(model).values():
        p.register_hook(seen)
    sl.squared_gradient(model, batches(kind, 2), reduction="batch")
    assert len(most) > 2 * 30  # every weight, in both batches
    assert max(most) == 1


def test_a_function_that_gives_no_gradient_leaves_a_score_of_zero(build, batches):
    class Blocks(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient, None

    model = build("toy")
    model.spare = nn.Linear(2, 2)
    found = sl.squared_gradient(
        model, batches("toy", 1), loss=lambda m, b: Blocks.apply(m(**b).loss, m.spare.weight)
    )
    assert found["first.weight"].any()
    assert not found["spare.weight"].any()


def test_batch_squares_each_batch_s_mean_gradient_and_is_another_thing(build, batches):
    model, data = build("toy"), batches("toy", 2)
    parts = [gradients(model, batch) for batch in data]
    expected = {name: parts[0][name] ** 2 + parts[1][name] ** 2 for name in parts[0]}
    found = sl.squared_gradient(model, data, reduction="batch")
    assert_close(found, expected)
    per_sample = sl.squared_gradient(model, data)
    assert not torch.allclose(found["first.weight"], per_sample["first.weight"], rtol=0.1)


def test_true_fisher_converges_to_the_expectation_over_the_model_s_own_labels(build, batches):
    model = build("toy").double()
    (batch,) = batches("toy", 1, size=1)
    probabilities = model(**batch).logits.softmax(-1)[0].detach()
    expected = {name: torch.zeros_like(p) for name, p in sl.weights(model).items()}
    for label, probability in enumerate(probabilities):
        given = {**batch, "labels": torch.tensor([label])}
        for name, gradient in gradients(model, given).items():
            expected[name] += probability * gradient**2
    many = {key: value.expand(600, *value.shape[1:]) for key, value in batch.items()}
    found = sl.squared_gradient(model, [many], labels="model", seed=1)["second.weight"] / 600
    assert (found / expected["second.weight"] - 1).abs().median() < 0.1
    observed = sl.squared_gradient(model, [batch])["second.weight"]
    # the given label is another score
    assert (observed / expected["second.weight"] - 1).abs().median() > 0.2


def test_true_fisher_is_a_function_of_its_seed_and_ignores_the_given_labels(build, batches):
    model, data = build("toy"), batches("toy", 3)
    others = [{**batch, "labels": (batch["labels"] + 1) % 3} for batch in data]
    state = torch.get_rng_state()
    one = sl.squared_gradient(model, data, labels="model", seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    same, other = (sl.squared_gradient(model, others, labels="model", seed=seed) for seed in (3, 4))
    assert torch.equal(one["first.weight"], same["first.weight"])
    assert not torch.equal(one["first.weight"], other["first.weight"])


def test_expected_fisher_weighs_every_class_with_its_probability_and_ignores_the_given_labels(
    build, batches
):
    model, data = build("toy").double(), batches("toy", 2)
    expected = {name: torch.zeros_like(p) for name, p in sl.weights(model).items()}
    for sample in samples(data):
        probabilities = model(**sample).logits.softmax(-1)[0].detach()
        for label, probability in enumerate(probabilities):
            for name, gradient in gradients(
                model, {**sample, "labels": torch.tensor([label])}
            ).items():
                expected[name] += probability * gradient**2
    assert_close(sl.expected_squared_gradient(model, data), expected)
    unlabelled = [{"input_ids": batch["input_ids"]} for batch in data]
    assert_close(sl.expected_squared_gradient(model, unlabelled), expected)
    assert "second.weight" not in sl.expected_squared_gradient(
        model, data, head=("second", "classifier")
    )


def test_expected_fisher_is_the_mean_of_draws(build, batches):
    model, (batch,) = build("toy").double(), batches("toy", 1, size=2)
    exact = sl.expected_squared_gradient(model, [batch])["second.weight"]
    many = {key: value.repeat(300, *[1] * (value.dim() - 1)) for key, value in batch.items()}
    drawn = sl.squared_gradient(model, [many], labels="model", seed=1)["second.weight"] / 300
    assert (drawn / exact - 1).abs().median() < 0.1


def test_expected_fisher_of_a_language_model_raises(build, batches):
    with pytest.raises(
        ValueError, match=r"logits have shape \(3, 7, 53\), not \(samples, classes\)"
    ):
        sl.expected_squared_gradient(build("llama"), batches("llama", 1))


def test_what_is_excluded_scores_zero_and_the_rest_is_not_copied(build):
    scores = sl.magnitude(build("bert"))
    kept = {name: score.clone() for name, score in scores.items()}
    found = sl.exclude(scores, ("bert.embeddings", "bert.pooler.dense.bias"))
    assert list(found) == list(scores)
    for name, score in found.items():
        out = name.startswith("bert.embeddings.") or name == "bert.pooler.dense.bias"
        assert score.shape == scores[name].shape
        assert score.any() != out or not kept[name].any()
        assert (score is scores[name]) != out
        assert torch.equal(scores[name], kept[name])
    assert not sl.exclude(scores, "bert.pooler")["bert.pooler.dense.weight"].any()
    with pytest.raises(
        ValueError, match=r"exclude='bert.embed' names no parameter; give names or prefixes"
    ):
        sl.exclude(scores, ("bert.pooler", "bert.embed"))


def test_gradient_magnitude_and_taylor_are_their_formulas(build, batches):
    model, data = build("toy"), batches("toy", 2)
    parts = [gradients(model, batch) for batch in data]
    total = {name: parts[0][name] + parts[1][name] for name in parts[0]}
    weights = sl.weights(model)
    assert_close(sl.gradient_magnitude(model, data), {n: g.abs() for n, g in total.items()})
    assert_close(
        sl.taylor(model, data), {n: (g * weights[n].detach()).abs() for n, g in total.items()}
    )

    each = [gradients(model, sample) for sample in samples(data)]
    expected = {}
    for name, weight in weights.items():
        g = torch.stack([part[name] for part in each]).mean(0)
        h = torch.stack([part[name] ** 2 for part in each]).mean(0)
        expected[name] = (-g * weight.detach() + h * weight.detach() ** 2 / 2).abs()
    assert_close(sl.taylor(model, data, order=2), expected)


def test_magnitude_and_movement_are_absolute_values_on_a_copy(build):
    model = build("toy")
    start = sl.snapshot(model)
    with torch.no_grad():
        model.first.weight.sub_(2.0)
    moved = sl.movement(model, start)
    torch.testing.assert_close(moved["first.weight"], torch.full((7, 6), 2.0))
    assert not moved["second.weight"].any()
    magnitude = sl.magnitude(model)
    assert torch.equal(magnitude["first.weight"], model.first.weight.abs())
    magnitude["first.weight"].zero_()
    assert model.first.weight.all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda start: start.pop("first.weight"), r"start has no 'first.weight' of shape \(7, 6\)"),
        (
            lambda start: start.update({"first.weight": torch.zeros(1)}),
            r"start has no 'first.weight' of shape \(7, 6\)",
        ),
    ],
)
def test_movement_from_another_model_raises(build, change, message):
    model = build("toy")
    start = sl.snapshot(model)
    change(start)
    with pytest.raises(ValueError, match=message):
        sl.movement(model, start)


def test_uniform_is_a_function_of_its_seed_and_never_zero(build):
    model = build("toy")
    state = torch.get_rng_state()
    scores = sl.random_scores(model, 0)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(0 < float(score.min()) <= float(score.max()) <= 1 for score in scores.values())
    assert torch.equal(
        scores["first.weight"], sl.random_scores(copy.deepcopy(model).half(), 0)["first.weight"]
    )
    assert not torch.equal(scores["first.weight"], sl.random_scores(model, 1)["first.weight"])


def test_an_unused_parameter_scores_zero(build, batches):
    model = build("toy")
    model.spare = nn.Linear(2, 2)
    assert not sl.squared_gradient(model, batches("toy", 1))["spare.weight"].any()


@pytest.mark.parametrize("score", GRADIENT_SCORES)
def test_a_zero_head_raises_instead_of_scoring_zero(build, batches, score):
    model = build("toy")
    nn.init.zeros_(model.classifier.weight)
    with pytest.raises(ValueError, match="zero for every weight"):
        GRADIENT_SCORES[score](model, batches("toy", 1))


@pytest.mark.parametrize("score", GRADIENT_SCORES)
def test_no_batch_raises(build, score):
    with pytest.raises(ValueError, match="batches is empty"):
        GRADIENT_SCORES[score](build("toy"), [])


def test_a_loss_that_is_not_finite_is_named(build, batches):
    with pytest.raises(ValueError, match="loss is nan in scoring; .* check this batch"):
        sl.squared_gradient(
            build("toy"), batches("toy", 1), loss=lambda m, b: m(**b).loss * float("nan")
        )


def test_a_score_that_is_not_finite_is_named(build, batches):
    model = build("toy")
    with torch.no_grad():
        model.embedding.weight[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"scores\['embedding.weight'\] has a value that is not"):
        sl.select(sl.magnitude(model), 5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, b: sl.squared_gradient(m, b, reduction="mean"), "reduction='mean' is unknown"),
        (lambda m, b: sl.squared_gradient(m, b, labels="true"), "labels='true' is unknown"),
        (lambda m, b: sl.taylor(m, b, order=3), "order=3 is unknown"),
    ],
)
def test_an_unknown_option_is_named(build, batches, call, message):
    with pytest.raises(ValueError, match=message):
        call(build("toy"), batches("toy", 1))


def test_a_half_precision_model_is_scored_in_float32(build, batches):
    model = build("toy").bfloat16()
    # bfloat16 has eight bits: a sum of 600 equal terms would stop at 256
    data = batches("toy", 1, size=1) * 600
    one = sl.squared_gradient(model, data[:1])["second.weight"]
    assert one.dtype == torch.float32
    torch.testing.assert_close(
        sl.squared_gradient(model, data)["second.weight"], 600 * one, rtol=1e-4, atol=0
    )


def test_a_tied_weight_is_scored_with_the_gradient_of_both_its_uses(build, batches):
    model, data = build("bert_tied").double(), batches("bert_tied", 1)
    name = "bert.embeddings.word_embeddings.weight"

    def loss(model, batch):  # the model's own would round to float32
        logits = model(input_ids=batch["input_ids"]).logits
        return nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())

    found = sl.gradient_magnitude(model, data, loss=loss)[name]
    weight, position, step = model.get_parameter(name), (int(data[0]["input_ids"][0, 0]), 1), 1e-4
    losses = []
    with torch.no_grad():
        for offset in (step, -2 * step):
            weight[position] += offset
            losses.append(float(loss(model, data[0])))
    difference = (losses[0] - losses[1]) / (2 * step)
    assert abs(difference) == pytest.approx(float(found[position]), rel=1e-5)


def test_a_batch_may_be_a_tuple_where_the_loss_takes_one():
    torch.manual_seed(0)
    model, x, y = nn.Linear(3, 2), torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1])
    loss = lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1])  # noqa: E731
    found = sl.squared_gradient(model, [(x, y)], loss=loss)["weight"]
    mapped = sl.squared_gradient(
        model, [{"x": x, "y": y}], loss=lambda m, b: loss(m, (b["x"], b["y"]))
    )
    assert torch.equal(found, mapped["weight"])
    with pytest.raises(TypeError, match=r"holds a tuple, and model\(\*\*batch\) takes mappings"):
        sl.squared_gradient(model, [(x, y)])
    with pytest.raises(TypeError, match="holds a Tensor; per-sample scores take mappings, tuples"):
        sl.squared_gradient(model, [x], loss=loss)
