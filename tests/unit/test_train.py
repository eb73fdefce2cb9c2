"""Fit: phases in turn, rates and clipping by group, actions in order, and what is refused."""

from collections import defaultdict

import pytest
import torch
from torch import nn

import selective_lite as sl


def run(model, phases, data, **options):
    return sl.fit(model, phases, data, **options)


def phase(trained, **options):
    """A phase that trains the first layer, for one epoch and without clipping unless asked for."""
    options = {"epochs": 1, "clip": None, **options}
    return sl.Phase("only", [{"params": list(trained.first.parameters()), "lr": 0.1}], **options)


def test_records_tell_phase_step_and_loss(build, batches):
    model, data = build("toy"), batches("toy", 3)
    seen = []

    def phases():
        yield phase(model, epochs=2)
        yield sl.Phase(
            "second",
            [{"params": model.second.parameters(), "lr": 0.1}],
            1,
            penalty=lambda: torch.tensor(2.5),
        )

    records = run(model, phases(), data, on_step=seen.append)
    assert seen == records
    assert [(r["phase"], r["step"]) for r in records] == [("only", i) for i in range(1, 7)] + [
        ("second", i) for i in range(1, 4)
    ]
    assert [r["penalty"] for r in records] == [0.0] * 6 + [2.5] * 3


def test_a_step_is_the_optimizer_s_step_on_loss_plus_penalty(build, batches):
    model, twin, data = build("toy"), build("toy"), batches("toy", 1)
    model.dropout.p = twin.dropout.p = 0.0

    def penalty(model):
        return 0.3 * model.first.weight.square().sum()

    records = run(
        model, [phase(model, penalty=lambda: penalty(model))], data, optimizer=torch.optim.SGD
    )

    loss = twin(**data[0]).loss
    (loss + penalty(twin)).backward()
    with torch.no_grad():
        for p in twin.first.parameters():
            p.add_(p.grad, alpha=-0.1)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True)
    )
    assert records == [
        {"phase": "only", "step": 1, "loss": loss.item(), "penalty": penalty(build("toy")).item()}
    ]


def test_every_group_follows_its_own_schedule(build, batches):
    model, data = build("toy"), batches("toy", 4)
    groups = [
        {"params": model.first.parameters(), "lr": 0.4},
        {"params": model.second.parameters(), "lr": 0.2, "schedule": sl.constant},
        {"params": model.norm.parameters(), "lr": 1.0, "schedule": lambda progress: 1 + progress},
    ]
    optimizers, rates = [], defaultdict(list)

    def optimizer(groups):
        optimizers.append(torch.optim.SGD(groups))
        return optimizers[-1]

    def before_step(step):
        for number, group in enumerate(optimizers[-1].param_groups):
            rates[number].append(group["lr"])

    def after_step(step):
        assert step.optimizer is optimizers[-1]
        assert [group["lr"] for group in step.optimizer.param_groups] == [
            rates[number][-1] for number in range(3)
        ]
        seen.append((step.step, step.steps, step.progress))

    made, seen = sl.Phase("rates", groups, 1, before_step=before_step, after_step=after_step), []
    run(model, [made], data, optimizer=optimizer)
    # Both actions see the rates of the step between them.
    assert seen == [(1, 4, 0.25), (2, 4, 0.5), (3, 4, 0.75), (4, 4, 1.0)]
    assert rates[0] == pytest.approx([0.4, 0.3, 0.2, 0.1])
    assert rates[1] == pytest.approx([0.2] * 4)
    assert rates[2] == pytest.approx([1.0, 1.25, 1.5, 1.75])


def test_cosine_decay_falls_along_half_a_cosine():
    assert [sl.cosine_decay(progress) for progress in (0.0, 0.25, 0.5, 1.0)] == pytest.approx(
        [1.0, (1 + 0.5**0.5) / 2, 0.5, 0.0]
    )


def test_every_group_is_clipped_by_itself(build, batches):
    model, data = build("toy"), batches("toy", 1)
    groups = [
        {"params": list(module.parameters()), "lr": 1.0} for module in (model.first, model.second)
    ]
    norms = []

    def scale(step):
        for p in model.parameters():
            if p.grad is not None:
                p.grad *= 1000

    def optimizer(groups):
        class Watch(torch.optim.SGD):
            def step(self):
                for group in self.param_groups:
                    norms.append(
                        float(torch.cat([p.grad.flatten() for p in group["params"]]).norm())
                    )

        return Watch(groups)

    run(
        model,
        [sl.Phase("clip", groups, 1, before_step=scale, clip=0.25)],
        data,
        optimizer=optimizer,
    )
    assert norms == pytest.approx([0.25, 0.25], rel=1e-4)
    norms.clear()
    run(
        model,
        [sl.Phase("no clip", groups, 1, before_step=scale, clip=None)],
        data,
        optimizer=optimizer,
    )
    assert min(norms) > 0.25


def test_hooks_run_around_the_step_in_order(build, batches):
    model, data = build("toy"), batches("toy", 2)
    calls = []

    def optimizer(groups):
        class Watch(torch.optim.SGD):
            def step(self):
                calls.append("step")
                super().step()

        return Watch(groups)

    def loss(model, batch):
        calls.append("loss")
        return model(**batch).loss

    def before_step(step):
        assert all(p.grad is not None for p in model.first.parameters())
        calls.append("before")

    made = phase(
        model,
        before_step=before_step,
        after_step=lambda step: calls.append(step.progress),
        epochs=2,
    )
    run(
        model,
        [made],
        data,
        loss=loss,
        optimizer=optimizer,
        on_step=lambda record: calls.append("record"),
    )
    assert calls == [
        entry
        for progress in (0.25, 0.5, 0.75, 1.0)
        for entry in ("loss", "before", "step", progress, "record")
    ]


def test_a_gradient_changed_before_the_step_is_the_one_applied(build, batches):
    model = build("toy")
    before = sl.snapshot(model)

    def zero(step):
        for p in model.first.parameters():
            p.grad.zero_()

    run(model, [phase(model, before_step=zero)], batches("toy", 2), optimizer=torch.optim.SGD)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_each_phase_has_a_new_optimizer_and_may_follow_from_the_last(build, batches):
    model, data = build("toy"), batches("toy", 1)
    made = []

    def optimizer(groups):
        made.append(torch.optim.SGD(groups, momentum=0.9))
        return made[-1]

    def phases():
        yield phase(model)
        after_first.append(sl.snapshot(model))
        yield phase(model)

    after_first = []
    start = sl.snapshot(model)
    run(model, phases(), data, optimizer=optimizer)
    assert len(made) == 2
    assert not torch.equal(after_first[0]["first.weight"], start["first.weight"])
    assert not torch.equal(after_first[0]["first.weight"], model.first.weight)


def test_a_phase_may_wrap_the_model(build, batches):
    model, data = build("toy"), batches("toy", 1)

    class Doubled(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, **batch):
            found = self.inner(**batch)
            found.loss = 2 * found.loss
            return found

    model.dropout.p = 0.0
    plain = model(**data[0]).loss.item()
    records = run(model, [phase(model, model=Doubled())], data)
    assert records[0]["loss"] == pytest.approx(2 * plain)


def test_modes_are_training_during_a_phase_and_put_back_module_by_module(build, batches):
    model, data = build("toy"), batches("toy", 1)
    model.train()
    model.norm.eval()
    during = []

    def loss(model, batch):
        during.append(all(module.training for module in model.modules()))
        return model(**batch).loss

    run(model, [phase(model)], data, loss=loss)
    assert during == [True]
    assert [name for name, module in model.named_modules() if not module.training] == ["norm"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_raises_and_its_step_is_not_applied(build, batches, bad):
    model, data = build("toy"), batches("toy", 3)
    states = []

    def loss(model, batch):
        states.append(sl.snapshot(model))
        return model(**batch).loss * (bad if len(states) == 3 else 1.0)

    with pytest.raises(ValueError, match=r"loss is (nan|inf) at step 3 of phase 'only'; lower"):
        run(model, [phase(model)], data, loss=loss)
    assert all(torch.equal(states[2][name], p) for name, p in model.named_parameters())
    assert not torch.equal(states[0]["first.weight"], states[2]["first.weight"])


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize(
    "method",
    [
        lambda model, selection: sl.fixed_mask(model, selection, lr=1e-3, epochs=2),
        lambda model, selection: sl.full_finetuning(model, lr=1e-3, epochs=2),
    ],
    ids=["fixed_mask", "dense"],
)
def test_an_error_inside_a_phase_restores_the_model_while_it_is_handled(
    build, batches, pick, method, error
):
    model, data = build("toy"), batches("toy", 2)
    model.first.weight.requires_grad_(False)
    keys, classes = list(model.state_dict()), [type(module) for module in model.modules()]

    def on_step(record):
        if record["step"] == 3:
            raise error("stop")

    with pytest.raises(error, match="stop") as caught:
        run(model, method(model, pick(model)), data, on_step=on_step)
    assert caught.traceback  # alive here, and with it every frame of `fit`
    assert list(model.state_dict()) == keys
    assert [type(module) for module in model.modules()] == classes
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["first.weight"]
    assert not any(module.training for module in model.modules())


def test_no_batch_raises_before_the_model_is_touched(build, pick):
    model = build("toy")
    with pytest.raises(ValueError, match="batches is empty"):
        run(model, sl.fixed_mask(model, pick(model), lr=1e-3, epochs=1), [])
    assert type(model.first) is nn.Linear
    assert all(p.requires_grad for p in model.parameters())


def test_the_phase_is_named_after_the_selection_s_method(build, pick):
    model = build("toy")
    named = sl.Selection(pick(model).indices, pick(model).shapes, method="mine")
    for selection, options, name in (
        (pick(model), {}, "fixed mask"),
        (named, {}, "mine"),
        (named, {"name": "other"}, "other"),
    ):
        (phase,) = sl.fixed_mask(model, selection, lr=1e-3, epochs=1, **options)
        assert phase.name == name


def test_fixed_mask_trains_the_selection_and_the_head_at_their_rates(build, batches, pick):
    model, data = build("toy"), batches("toy", 4)
    selection, before = pick(model), sl.snapshot(model)
    (made,) = sl.fixed_mask(model, selection, lr=1e-3, lr_head=1e-2, epochs=1, weight_decay=0.5)
    assert [(group["lr"], group["weight_decay"]) for group in made.groups] == [
        (1e-3, 0.5),
        (1e-2, 0.5),
    ]

    run(model, sl.fixed_mask(model, selection, lr=1e-3, lr_head=1e-2, epochs=3), data)
    masks = selection.masks()
    for name, p in model.named_parameters():
        if name in masks:
            assert torch.equal(p[~masks[name]], before[name][~masks[name]])
        else:
            assert not (p == before[name]).any()
    assert any((p != before[name]).any() for name, p in sl.weights(model).items())


def test_dense_trains_everything_but_what_the_user_froze(build, batches):
    model, data = build("toy"), batches("toy", 4)
    model.first.weight.requires_grad_(False)
    before = sl.snapshot(model)
    run(model, sl.full_finetuning(model, lr=1e-2, lr_head=1e-3, epochs=1), data)
    still = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert still == ["first.weight"]
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["first.weight"]
    (made,) = sl.full_finetuning(model, lr=1e-2, lr_head=1e-3, epochs=1)
    assert [group["lr"] for group in made.groups] == [1e-2, 1e-3]
    assert [id(p) for p in made.groups[1]["params"]] == [
        id(p) for p in model.classifier.parameters()
    ]


def test_dense_trains_a_model_that_is_frozen_as_a_whole(build, batches):
    model = build("toy").requires_grad_(False)
    before = sl.snapshot(model)
    run(model, sl.full_finetuning(model, lr=1e-2, epochs=1), batches("toy", 4))
    assert all((p != before[name]).any() for name, p in model.named_parameters())
    assert not any(p.requires_grad for p in model.parameters())


METHODS = {
    "fixed_mask": lambda model, selection, **options: sl.fixed_mask(
        model, selection, **{"lr": 1e-2, "epochs": 1, **options}
    ),
    "full_finetuning": lambda model, selection, **options: sl.full_finetuning(
        model, **{"lr": 1e-2, "epochs": 1, **options}
    ),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_used_once(build, batches, pick, method):
    model, data = build("toy"), batches("toy", 2)
    phases = METHODS[method](model, pick(model))
    assert len(run(model, phases, data)) == 2
    before = sl.snapshot(model)
    with pytest.raises(ValueError, match="used already, and a method trains once"):
        run(model, phases, data)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    phases = METHODS[method](model, pick(model))
    assert len(list(phases)) == 1
    with pytest.raises(ValueError, match="used already"):
        list(phases)


@pytest.mark.parametrize("method", METHODS)
def test_phases_that_were_run_to_their_end_or_made_for_another_model_are_refused(
    build, batches, pick, method
):
    model, other, data = build("toy"), build("toy", seed=1), batches("toy", 2)
    before = sl.snapshot(model)
    wrong = [METHODS[method](other, pick(other))]
    if method == "fixed_mask":  # its compact parameters are gone after the list was made
        wrong.append(list(METHODS[method](model, pick(model))))
    for phases in wrong:
        with pytest.raises(
            ValueError, match=r"trains a parameter of shape .* not one of the model"
        ):
            run(model, phases, data)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(p.requires_grad for p in (*model.parameters(), *other.parameters()))


def test_a_frozen_parameter_in_a_group_is_refused(build, batches):
    model = build("toy")
    model.first.bias.requires_grad_(False)
    with pytest.raises(ValueError, match=r"parameter of shape \(7,\) that is frozen"):
        run(model, [phase(model)], batches("toy", 1))


def test_one_parameter_and_a_generator_of_parameters_are_groups_too(build, batches):
    model, data = build("toy"), batches("toy", 1)
    before = sl.snapshot(model)
    groups = [
        {"params": model.second.weight, "lr": 0.1},
        {"params": (p for p in model.first.parameters()), "lr": 0.1},
    ]
    run(model, [sl.Phase("two", groups, 1)], data)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"second.weight", "first.weight", "first.bias"}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"epochs": 0}, ValueError, "epochs=0 of phase .* must be at least 1"),
        ({"epochs": 1.5}, TypeError, "epochs=1.5 of phase .* must be an int"),
        ({"epochs": True}, TypeError, "epochs=True of phase .* must be an int"),
        ({"lr": -1e-3}, ValueError, "lr=-0.001 of phase .* must be finite and not negative"),
        ({"lr": float("nan")}, ValueError, "lr=nan of phase .* must be finite"),
        ({"lr": "1e-3"}, TypeError, "lr='1e-3' of phase .* must be a number"),
        ({"lr_head": float("inf")}, ValueError, "lr_head=inf of phase .* must be finite"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay=-0.1 of phase .* not negative"),
        ({"head": ("clasifier",)}, ValueError, "head='clasifier' names no parameter"),
    ],
)
def test_bad_options_raise_at_the_call(build, pick, method, options, error, message):
    model = build("toy")
    with pytest.raises(error, match=message):
        METHODS[method](model, pick(model), **options)
    assert all(p.requires_grad for p in model.parameters())


def test_a_selection_of_another_model_raises_at_the_call(build, pick):
    with pytest.raises(ValueError, match="selection holds 'bert"):
        sl.fixed_mask(build("toy"), pick(build("bert")), lr=1e-3, epochs=1)


def test_a_selection_in_place_of_phases_raises(build, batches, pick):
    model = build("toy")
    with pytest.raises(
        TypeError, match=r"phases is a Selection; give fixed_mask\(model, selection"
    ):
        run(model, pick(model), batches("toy", 1))


@pytest.mark.parametrize("kind", ["generator", "iterable dataset", "loader"])
def test_batches_without_a_length_raise_before_training(build, batches, pick, kind):
    model, data = build("toy"), batches("toy", 2)

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(data)

    made = {
        "generator": lambda: (batch for batch in data),
        "iterable dataset": Stream,
        "loader": lambda: torch.utils.data.DataLoader(Stream(), batch_size=None),
    }[kind]()
    phases = sl.fixed_mask(model, pick(model), lr=1e-2, epochs=1)
    with pytest.raises(TypeError, match=r"batches is a \w+ without a length.*islice"):
        run(model, phases, made)
    assert type(model.first) is nn.Linear
    assert all(p.requires_grad for p in model.parameters())


def test_a_loader_over_a_dataset_with_a_length_trains(build, batches, pick):
    model = build("toy")
    samples = [{key: v[0] for key, v in batch.items()} for batch in batches("toy", 4, size=1)]
    loader = torch.utils.data.DataLoader(samples, batch_size=2, shuffle=True)
    assert len(run(model, sl.fixed_mask(model, pick(model), lr=1e-2, epochs=3), loader)) == 6


@pytest.mark.gpu
def test_batches_are_moved_to_the_model_s_device(build, batches, accelerator):
    model, seen = build("toy").to(accelerator), []

    def loss(model, batch):
        seen.append({value.device.type for value in batch.values()})
        return model(**batch).loss

    run(model, sl.full_finetuning(model, lr=1e-2, epochs=1), batches("toy", 1), loss=loss)
    assert seen == [{torch.device(accelerator).type}]


def test_labels_that_are_all_ignored_are_named_as_the_cause(build, batches):
    model, (good,) = build("llama"), batches("llama", 1)
    bad = {**good, "labels": torch.full_like(good["labels"], -100)}
    with pytest.raises(ValueError, match=r"at step 2 of phase 'dense': every label .* is -100"):
        run(model, sl.full_finetuning(model, lr=1e-3, epochs=1), [good, bad])


def test_closing_phases_restores_the_model(build, pick):
    model = build("toy")
    phases = sl.fixed_mask(model, pick(model), lr=1e-2, epochs=1)
    next(iter(phases))
    assert type(model.first) is not nn.Linear
    for _ in range(2):
        phases.close()
        assert type(model.first) is nn.Linear
        assert all(p.requires_grad for p in model.parameters())
    phases = sl.fixed_mask(model, pick(model), lr=1e-2, epochs=1)
    phases.close()  # before they were used
    with pytest.raises(ValueError, match="used already"):
        iter(phases)


def test_the_same_run_twice_gives_the_same_bits(build, batches, pick):
    found = []
    for _ in range(2):
        torch.manual_seed(5)  # dropout
        model = build("toy")
        run(model, sl.fixed_mask(model, pick(model), lr=1e-2, epochs=2), batches("toy", 3))
        found.append(sl.snapshot(model))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
