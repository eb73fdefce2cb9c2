"""SoRA: ranks close under the proximal step, merging changes no output, peft loads the export."""

import copy
import math
import warnings

import pytest
import torch
from torch import nn

import selective_lite as sl
from selective_lite.layers.attach import Attached
from selective_lite.methods.sora import SoRA, soft_threshold, sora, staircase

KINDS = ("toy", "bert", "llama", "gpt2")


def trained(update, seed=0, closed=0.5):
    """Give every update factors of a trained size, and close a part of its gates."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for made in update.updates.values():
            for p in (made.A, made.B, made.gate):
                p.copy_(torch.randn(p.shape, generator=generator))
            made.gate[torch.rand(made.gate.shape, generator=generator) < closed] = 0
            made.gate[0] = 0.5


def ordinary(model, before):
    assert list(sl.snapshot(model)) == list(before)
    assert not any(".adapter." in name for name in model.state_dict())
    assert not any(isinstance(module, Attached) for module in model.modules())


@pytest.mark.parametrize("kind", KINDS)
def test_it_starts_as_the_base_and_trains_factors_gates_and_head(build, batches, kind):
    model, (batch,) = build(kind), batches(kind, 1)
    before, logits, keys = sl.snapshot(model), model(**batch).logits, list(model.state_dict())
    model.get_parameter(next(iter(before))).requires_grad_(False)
    for p in model.parameters():
        p.grad = torch.ones_like(p)  # would count in a clipped norm
    with SoRA(model, rank=2) as update:
        assert all(p.grad is None for p in model.parameters())
        assert torch.equal(model(**batch).logits, logits)
        inside = {id(p) for p in model.parameters() if p.requires_grad}
        heads = sl.head_weights(model).values()
        assert inside == {id(p) for p in (*update.factors(), *update.gates(), *heads)}
        assert [id(p) for p in update.dense_parameters()] == [id(p) for p in heads]
        assert all(
            (made.gate != 0).all() and (made.B == 0).all() for made in update.updates.values()
        )
        assert update.ranks() == dict.fromkeys(update.updates, 2)
    ordinary(model, before)
    assert list(model.state_dict()) == keys
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == [
        next(iter(before))
    ]
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_the_draws_are_lora_s_and_a_normal_gate_and_follow_the_seed():
    model = nn.Linear(400, 300)
    drawn = []
    for seed in (0, 0, 1):
        with SoRA(model, rank=300, seed=seed) as update:
            (made,) = update.updates.values()
            drawn.append((made.A.detach(), made.gate.detach()))
    a, gate = drawn[0]
    assert float(a.abs().max()) == pytest.approx(1 / math.sqrt(400), rel=1e-3)
    assert float(a.std()) == pytest.approx(1 / math.sqrt(3 * 400), rel=0.02)
    assert abs(float(gate.mean())) < 0.2
    assert float(gate.std()) == pytest.approx(1, abs=0.15)
    assert torch.equal(a, drawn[1][0])
    assert not torch.equal(a, drawn[2][0])
    reference = torch.empty(300, 400)
    nn.init.kaiming_uniform_(reference, a=math.sqrt(5))
    assert float(a.std()) == pytest.approx(float(reference.std()), rel=0.02)


def test_alpha_over_rank_scales_the_update():
    layer, x = nn.Linear(4, 3, bias=False), torch.randn(2, 4)
    base = layer(x)
    with SoRA(layer, rank=2, alpha=5.0) as update:
        trained(update)
        (made,) = update.updates.values()
        expected = base + 2.5 * x @ (made.B @ torch.diag(made.gate) @ made.A).t()
        torch.testing.assert_close(layer(x), expected)
        update.prune()  # and r stays what it was
        assert len(made.gate) == 1
        torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_pruning_and_merging_change_no_output(build, batches, kind):
    model, (batch,) = build(kind).double(), batches(kind, 1)
    before = sl.snapshot(model)
    with SoRA(model, rank=4, alpha=8.0) as update:
        assert {p.dtype for p in update.factors()} == {torch.float64}
        trained(update)
        open_ranks = update.ranks()
        with torch.no_grad():
            logits = model(**batch).logits
            update.prune()
            torch.testing.assert_close(model(**batch).logits, logits, rtol=1e-10, atol=1e-10)
        assert update.ranks() == open_ranks
        for name, made in update.updates.items():
            shape = model.get_parameter(name).shape
            outputs, inputs = shape if kind != "gpt2" else shape[::-1]
            assert made.A.shape == (open_ranks[name], inputs)
            assert made.B.shape == (outputs, open_ranks[name])
            assert made.A.requires_grad
            assert made.gate.all()
    ordinary(model, before)
    torch.testing.assert_close(model(**batch).logits, logits, rtol=1e-8, atol=1e-8)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (name not in update.updates), name


def test_a_module_whose_ranks_are_all_closed_is_the_base_again():
    layer, x = nn.Linear(4, 3), torch.randn(2, 4)
    base, weight = layer(x), layer.weight.detach().clone()
    with SoRA(layer, rank=2) as update:
        trained(update)
        with torch.no_grad():
            update.gates()[0].zero_()
        update.prune()
        assert update.ranks() == {"weight": 0}
        assert torch.equal(layer(x), base)
        with pytest.raises(
            ValueError, match="every rank is closed, nothing is left to export; lower lam"
        ):
            update.export()
    assert torch.equal(layer.weight, weight)


@pytest.mark.filterwarnings("ignore")  # peft's own, about Conv1D and tied embeddings
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("when", ["open", "pruned", "closed"])
def test_peft_loads_the_export_as_a_smaller_plain_lora(build, batches, kind, when):
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    model, base, (batch,) = build(kind), build(kind), batches(kind, 1)
    with SoRA(model, rank=4, alpha=3.0) as update:
        trained(update)
        with torch.no_grad():
            update.gates()[0][:] = 0.5
            if kind == "bert":  # one update is closed as a whole, and must not appear
                update.updates["bert.encoder.layer.0.attention.self.key.weight"].gate.zero_()
        logits = model(**batch).logits.detach()
        ranks = {name: rank for name, rank in update.ranks().items() if rank}
        assert min(ranks.values()) < max(ranks.values()) <= 4
        if when == "pruned":
            update.prune()
        if when == "closed":
            update.close()
        tensors, config = update.export()
    names = {name.removesuffix(".weight") for name in ranks}
    assert set(tensors) == {
        f"base_model.model.{n}.lora_{part}.weight" for n in names for part in "AB"
    }
    assert sum(t.numel() for t in tensors.values()) == sum(
        rank * sum(base.get_parameter(name).shape) for name, rank in ranks.items()
    )
    if kind == "toy":
        base.config = {"model_type": "toy"}
    loaded = get_peft_model(base, LoraConfig(**config)).eval()
    result = set_peft_model_state_dict(loaded, {name: t.clone() for name, t in tensors.items()})
    assert not result.unexpected_keys
    assert not any("lora" in key for key in result.missing_keys)
    assert {n for n, m in loaded.base_model.model.named_modules() if hasattr(m, "lora_A")} == names
    torch.testing.assert_close(loaded(**batch).logits, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_the_export_names_its_modules_exactly():
    from peft import LoraConfig, get_peft_model

    # `up` also ends the name of `block.up`, and `xblockyup` would match a pattern whose dots are
    # wild.
    parts = {
        "up": nn.Linear(3, 3),
        "block": nn.ModuleDict({"up": nn.Linear(3, 3), "down": nn.Linear(3, 3)}),
    }
    model = nn.ModuleDict(parts)
    with SoRA(model, rank=3) as update:
        trained(update, closed=0.0)
        with torch.no_grad():
            update.updates["up.weight"].gate[1:] = 0
            update.updates["block.up.weight"].gate[2:] = 0
            update.updates["block.down.weight"].gate.zero_()
        _, config = update.export()
    model.config = {"model_type": "toy"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = get_peft_model(model, LoraConfig(**config))
    found = {
        n: m.r["default"]
        for n, m in loaded.base_model.model.named_modules()
        if hasattr(m, "lora_A")
    }
    assert found == {"up": 1, "block.up": 2}
    scaling = [
        m.scaling["default"] for m in loaded.base_model.model.modules() if hasattr(m, "lora_A")
    ]
    assert scaling == [1.0, 1.0]


def test_a_bfloat16_base_has_float32_factors_and_bfloat16_outputs(build, batches):
    model, (batch,) = build("llama").bfloat16(), batches("llama", 1)
    with SoRA(model, rank=2) as update:
        assert {p.dtype for p in (*update.factors(), *update.gates())} == {torch.float32}
        trained(update)
        loss = model(**batch).loss
        assert loss.dtype in (torch.bfloat16, torch.float32)
        loss.backward()
        assert model(**batch).logits.dtype == torch.bfloat16
        assert all(p.grad is not None for p in update.factors())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_a_deep_copy_made_inside_trains_by_itself(build, batches):
    model, (batch,) = build("llama"), batches("llama", 1)
    with SoRA(model, rank=2) as update:
        trained(update)
        twin = copy.deepcopy(model)
        first = twin(**batch).loss
        assert torch.equal(first, model(**batch).loss)
        first.backward()
        assert all(p.grad is None for p in update.factors())
        torch.optim.SGD([p for p in twin.parameters() if p.requires_grad], lr=0.1).step()
        assert not torch.equal(twin(**batch).loss, first)
        assert torch.equal(first, model(**batch).loss)


def test_close_twice_merges_once():
    layer = nn.Linear(4, 3)
    update = SoRA(layer, rank=2)
    trained(update)
    update.close()
    weight = layer.weight.detach().clone()
    update.close()
    assert torch.equal(layer.weight, weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 6}, "rank=6 does not fit 'second.weight'; give an int from 1 to 5"),
        ({"rank": 0}, "rank=0 does not fit 'first.weight'"),
        ({"targets": ("frist",)}, "targets names 'frist'"),
        ({"targets": ("classifier",)}, "targets names 'classifier'"),
        ({"head": ("clasifier",)}, "head='clasifier' names no parameter"),
    ],
)
def test_a_bad_update_raises_and_the_model_is_as_it_was(build, options, message):
    model = build("toy")
    before = sl.snapshot(model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=message):
        SoRA(model, **{"rank": 2, **options})
    ordinary(model, before)
    assert all(p.requires_grad and p.grad is not None for p in model.parameters())


def test_it_does_not_mix_with_itself_or_with_masked_training(build, pick):
    model = build("toy")
    before = sl.snapshot(model)
    with SoRA(model, rank=2), pytest.raises(ValueError, match="already in masked or SoRA training"):
        SoRA(model, rank=2, targets=("first",))
    with (
        sl.masked(model, pick(model)),
        pytest.raises(ValueError, match="already in masked or SoRA training"),
    ):
        SoRA(model, rank=2)
    ordinary(model, before)


# the method


def test_the_prox_minimises_its_objective():
    # prox(x) = argmin_z |z| xi + (z - x)^2 / 2, on a fine grid.
    grid = torch.linspace(-3, 3, 6001).double()
    for x in (-2.0, -0.5, -0.4, 0.0, 0.3, 0.41, 1.5):
        objective = 0.4 * grid.abs() + (grid - x).square() / 2
        best = float(grid[objective.argmin()])
        assert float(soft_threshold(torch.tensor(x).double(), 0.4)) == pytest.approx(best, abs=1e-3)


def test_xi_is_the_rate_of_the_step_times_lambda_times_its_schedule(build, batches):
    model, paths = build("toy"), []
    for options in ({"lam": 2.0}, {"lam": 2.0, "lam_schedule": staircase(0.5, 2)}, {"xi": 0.125}):
        method = sora(SoRA(model, rank=2), lr=0.1, epochs=2, **options)
        phase = next(iter(method))
        sl.fit(model, [phase], batches("toy", 2))
        method.close()
        paths.append([step["xi"] for step in phase.after_step.__self__.path])
    # the rate decays to zero, and is not yet there
    assert paths[0] == pytest.approx([0.2, 0.15, 0.1, 0.05])
    assert paths[1] == pytest.approx([0.1, 0.075, 0.1, 0.05])
    assert paths[2] == pytest.approx([0.125] * 4)


def test_a_gate_step_is_the_optimizer_s_then_the_prox(build, batches):
    model, data = build("toy"), batches("toy", 1)
    model.dropout.p = 0.0
    update = SoRA(model, rank=2)
    trained(update, closed=0.0)
    gates = [gate.detach().clone() for gate in update.gates()]
    model(**data[0]).loss.backward()
    gradients = [gate.grad.clone() for gate in update.gates()]
    method = sora(update, lr=0.1, epochs=1, lam=0.3, clip=None)
    phase = next(iter(method))
    sl.fit(model, [phase], data, optimizer=torch.optim.SGD)
    for gate, before, gradient in zip(update.gates(), gates, gradients, strict=True):
        torch.testing.assert_close(gate.detach(), soft_threshold(before - 0.1 * gradient, 0.03))
    method.close()


@pytest.mark.parametrize("kind", KINDS)
def test_training_closes_ranks_prunes_them_merges_and_touches_nothing_else(build, batches, kind):
    model, data = build(kind), batches(kind, 4)
    before, head = sl.snapshot(model), list(sl.head_weights(model))
    model.get_parameter(next(iter(before))).requires_grad_(False)
    update = SoRA(model, rank=4)
    phases = []

    def watched():
        for phase in sora(update, lr=1e-2, epochs=10, lam=6.0, lam_schedule=staircase(0.0, 3)):
            phases.append(phase)
            yield phase

    sl.fit(model, watched(), data)
    opened = [step["open"] for step in phases[0].after_step.__self__.path]
    total = 4 * len(update.updates)
    assert opened[0] == total
    assert 0 < opened[-1] < total
    assert sum(update.ranks().values()) == opened[-1]
    assert sum(len(gate) for gate in update.gates()) == opened[-1]  # pruned
    ordinary(model, before)
    assert update.closed
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == [
        next(iter(before))
    ]
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {*head, *(name for name, rank in update.ranks().items() if rank)}
    assert len(update.export()[0]) == 2 * sum(rank > 0 for rank in update.ranks().values())


def test_gates_do_not_decay_and_the_head_has_its_rate(build):
    model = build("toy")
    (phase,) = sora(SoRA(model, rank=2), epochs=3, lr_head=0.1)
    assert [(group["lr"], group["weight_decay"]) for group in phase.groups] == [
        (8e-4, 0.1),
        (8e-4, 0.0),
        (0.1, 0.1),
    ]
    assert (phase.epochs, phase.clip) == (3, 0.1)
    proximal = phase.after_step.__self__
    assert proximal.lam * 8e-4 == pytest.approx(3e-4)  # the authors' xi


def test_the_staircase_has_equal_stages_and_ends_at_one():
    schedule = staircase(0.25, 4)
    assert [schedule(step / 8) for step in range(1, 9)] == pytest.approx(
        [0.25, 0.25, 0.5, 0.5, 0.75, 0.75, 1.0, 1.0]
    )
    assert schedule(0.0) == 0.25
    assert [staircase(0.0, 10)(step / 10) for step in range(1, 11)] == pytest.approx(
        [i / 9 for i in range(10)]
    )
    for start, stages in ((-0.1, 3), (1.1, 3), (0.5, 1)):
        with pytest.raises(ValueError, match=r"must be in \[0, 1\] and stages="):
            staircase(start, stages)


@pytest.mark.parametrize(
    "options",
    [{"lam": -1.0}, {"lam": math.nan}, {"xi": -0.1}, {"lr": -0.1}, {"weight_decay": -0.1}],
)
def test_a_bad_option_raises_at_the_call_and_the_model_comes_back(build, options):
    model = build("toy")
    before = sl.snapshot(model)
    with pytest.raises(ValueError, match=r"not (be )?negative"):
        sora(SoRA(model, rank=2), **{"epochs": 1, **options})
    ordinary(model, before)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_an_update_is_trained_once(build):
    update = SoRA(build("toy"), rank=2)
    update.close()
    with pytest.raises(ValueError, match="update is closed"):
        sora(update, epochs=1)


def test_an_error_while_training_restores_the_model(build, batches):
    model = build("bert")
    before = sl.snapshot(model)

    def on_step(record):
        if record["step"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sl.fit(model, sora(SoRA(model, rank=2), epochs=2), batches("bert", 3), on_step=on_step)
    ordinary(model, before)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.usefixtures("meta_default")
def test_the_updates_are_made_beside_the_weights():
    model = nn.Sequential(nn.Linear(4, 3, device="cpu"))
    data = [torch.ones(2, 4, device="cpu")]
    update = SoRA(model, rank=2)
    records = sl.fit(
        model, sora(update, epochs=1), data, loss=lambda model, batch: model(batch).square().mean()
    )
    assert math.isfinite(records[0]["loss"])
    assert {t.device.type for t in update.export()[0].values()} == {"cpu"}
