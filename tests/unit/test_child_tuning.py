"""Child-Tuning: F's masks are fresh, of share p, and from the seed; D's child network is exact."""

import pytest
import torch

import selective_lite as sl
from selective_lite.methods.child_tuning import child_tuning, child_tuning_f, draw

RATES = {"lr": 0.02, "epochs": 2}


def gradients_seen(model, method, data):
    """Every parameter's gradient before and after the mask, a pair of dicts a step."""
    found = []

    def phases():
        for phase in method:
            mask = phase.before_step

            def watched(step, mask=mask):
                plain = {name: p.grad.clone() for name, p in model.named_parameters()}
                mask(step)
                found.append(
                    (plain, {name: p.grad.clone() for name, p in model.named_parameters()})
                )

            phase.before_step = watched
            yield phase

    sl.fit(model, phases(), data)
    return found


@pytest.mark.parametrize("p", [0.3, 0.75])
def test_f_keeps_a_share_p_of_every_gradient_times_one_over_p_and_the_head_s_too(build, batches, p):
    model = build("bert")
    kept = total = head = 0
    for plain, masked in gradients_seen(
        model, child_tuning_f(model, p=p, **RATES), batches("bert", 2)
    ):
        for name, gradient in plain.items():
            chosen = masked[name] != 0
            torch.testing.assert_close(masked[name][chosen], gradient[chosen] / p)
            kept += int(chosen[gradient != 0].sum())
            total += int((gradient != 0).sum())
            head += int((~chosen[gradient != 0]).sum()) if name.startswith("classifier") else 0
    # of some 14,000 draws: five standard deviations
    assert kept / total == pytest.approx(p, abs=0.02)
    assert head > 0


def test_f_draws_anew_at_every_step_and_for_every_tensor(build, batches):
    model = build("bert")
    steps = gradients_seen(model, child_tuning_f(model, **RATES), batches("bert", 2))
    masks = [masked["bert.pooler.dense.weight"] != 0 for _, masked in steps]
    assert len(masks) == 4
    assert all(not torch.equal(a, b) for i, a in enumerate(masks) for b in masks[:i])
    query, key = (
        steps[0][1][f"bert.encoder.layer.0.attention.self.{part}.weight"] != 0
        for part in ("query", "value")
    )
    assert not torch.equal(query, key)


def test_f_is_a_function_of_its_seed_and_leaves_the_global_generator_alone(build, batches):
    found = []
    for seed in (1, 1, 2):
        model = build("toy")
        model.dropout.p = 0.0
        state = torch.get_rng_state()
        sl.fit(model, child_tuning_f(model, seed=seed, **RATES), batches("toy", 2))
        assert torch.equal(torch.get_rng_state(), state)
        found.append(model.first.weight)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.usefixtures("meta_default")
def test_a_draw_is_on_cpu_whatever_the_default_device():
    found = draw(torch.Size([3, 4]), 0.5, torch.Generator("cpu").manual_seed(0))
    assert found.device.type == "cpu"
    assert 0 < int(found.sum()) < 12


def test_f_with_p_1_is_full_fine_tuning(build, batches):
    one, other = build("bert"), build("bert")
    for model in (one, other):
        model.requires_grad_(True)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    sl.fit(
        one, child_tuning_f(one, p=1.0, weight_decay=0.1, lr_head=0.01, **RATES), batches("bert", 2)
    )
    sl.fit(
        other,
        sl.full_finetuning(other, weight_decay=0.1, lr_head=0.01, **RATES),
        batches("bert", 2),
    )
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_f_trains_what_has_a_gradient_and_restores_the_flags_after_an_error_too(build, batches):
    model, data = build("toy"), batches("toy", 2)
    model.spare = torch.nn.Linear(2, 2).eval()  # no forward uses it
    model.first.weight.requires_grad_(False)
    before = sl.snapshot(model)

    def on_step(record):
        if record["step"] == 3:
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop") as caught:
        sl.fit(model, child_tuning_f(model, **RATES), data, on_step=on_step)
    assert caught.traceback
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["first.weight"]
    assert not any(module.training for module in model.modules())
    still = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert still == ["first.weight", "spare.weight", "spare.bias"]  # the first is the user's wish


def test_rates_decay_and_epochs_reach_f_s_phase(build):
    (phase,) = child_tuning_f(build("toy"), p=0.5, lr=0.1, lr_head=0.2, epochs=3, weight_decay=0.3)
    assert [(g["lr"], g["weight_decay"]) for g in phase.groups] == [(0.1, 0.3), (0.2, 0.3)]
    assert (phase.name, phase.epochs) == ("Child-Tuning-F", 3)


@pytest.mark.parametrize("reduction", ["per_sample", "batch"])
@pytest.mark.parametrize("kind", ["toy", "bert"])
def test_d_trains_exactly_the_child_network_and_the_head(build, batches, kind, reduction):
    model, data = build(kind), batches(kind, 3)
    before, keys = sl.snapshot(model), list(model.state_dict())
    total = sum(p.numel() for p in sl.weights(model).values())
    expected = sl.select(sl.squared_gradient(model, data, reduction=reduction), 0.2)
    child = child_tuning(model, data, 0.2, reduction=reduction)
    method = sl.fixed_mask(model, child, lr_head=0.01, weight_decay=0.1, **RATES)
    records = sl.fit(model, method, data)
    assert [r["phase"] for r in records] == ["Child-Tuning-D"] * 6
    assert child.count == expected.count == round(0.2 * total)
    for name, mask in expected.masks().items():
        assert torch.equal(model.get_parameter(name) != before[name], mask), name
    assert all((p != before[name]).all() for name, p in sl.head_weights(model).items())
    assert list(model.state_dict()) == keys
    assert all(p.requires_grad for p in model.parameters())


def test_options_reach_d_s_scores(build, batches):
    model, data = build("toy"), batches("toy", 2)
    assert "embedding.weight" in child_tuning(model, data, 0.5).indices
    assert "embedding.weight" not in child_tuning(model, data, 0.5, exclude="embedding").indices
    assert child_tuning(model, data, 7).count == 7
    assert child_tuning(model, data).count == round(0.3 * 164)

    def on_one_weight(model, batch):
        return model.second.weight.square().sum()

    assert set(child_tuning(model, data, 0.1, loss=on_one_weight).indices) == {"second.weight"}
    named = child_tuning(model, data, 0.1, head=("second", "classifier"))
    # Of the toy's 164 candidates, 35 are in the head now.
    assert "second.weight" not in named.shapes
    assert named.count == round(0.1 * 129)


def test_the_head_of_f_may_be_named(build):
    model = build("toy")
    (phase,) = child_tuning_f(model, head=("second", "classifier"), **RATES)
    named = {id(p) for p in (*model.second.parameters(), *model.classifier.parameters())}
    assert {id(p) for p in phase.groups[1]["params"]} == named


@pytest.mark.parametrize("p", [0.0, -0.1, 1.5, float("nan")])
def test_a_share_outside_its_range_raises_at_the_call(build, p):
    with pytest.raises(ValueError, match=rf"p={p} is outside \(0, 1\]"):
        child_tuning_f(build("toy"), p=p, **RATES)
    with pytest.raises(ValueError, match=rf"budget={p} is outside \(0, 1\]"):
        child_tuning(build("toy"), [], p)


def test_bad_options_of_d_raise_and_the_model_is_as_it_was(build, batches):
    model, data = build("toy"), batches("toy", 1)
    before = sl.snapshot(model)
    for options, message in (
        ({"reduction": "mean"}, "reduction='mean' is unknown"),
        ({"exclude": ("frist",)}, "exclude='frist' names no parameter"),
        ({"budget": 1.0}, "scores are non-zero; lower it"),  # rows of words that no sample has
    ):
        with pytest.raises(ValueError, match=message):
            child_tuning(model, data, **options)
    assert all(
        torch.equal(before[name], p) and p.requires_grad for name, p in model.named_parameters()
    )
