"""Diff Pruning: gated differences, the penalty and its limits, and exactly k changed weights at the end."""

import pytest
import torch
from torch import nn

import selective_lite as sl
from selective_lite.methods.diff_pruning import Relaxed, diff_pruning

ON_THE_WAY = {"lr_w": 0.02, "lr": 0.01, "lr_alpha": 1.0}


def settle(relaxed, seed=0):
    """Random differences and gates, so that nothing is open by its start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in (*relaxed.w, *relaxed.log_alpha):
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype))
        if relaxed.log_alpha_group is not None:
            relaxed.log_alpha_group.copy_(
                torch.randn(relaxed.log_alpha_group.shape, generator=generator)
            )
    return relaxed


def test_at_the_start_the_model_computes_what_it_did_and_nothing_of_it_has_moved(build, batches):
    model, (batch,) = build("bert"), batches("bert", 1)
    expected, before = model(**batch).logits, sl.snapshot(model)
    relaxed = Relaxed(model).eval()
    assert torch.equal(relaxed(**batch).logits, expected)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


@pytest.mark.parametrize("groups", [None, "tensor", "layer", "head"])
def test_the_forward_is_the_model_at_theta0_plus_delta(build, batches, groups):
    model, (batch,) = build("llama"), batches("llama", 1)
    relaxed = settle(Relaxed(model, groups=groups)).eval()
    found = relaxed(**batch).logits
    delta = relaxed.differences()
    with torch.no_grad():
        for name, p in sl.weights(model).items():
            p += delta[name]
    assert torch.equal(model(**batch).logits, found)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_difference_is_gate_times_group_gate_times_w(build):
    relaxed = settle(Relaxed(build("bert"), groups="head")).eval()
    for i, (name, delta) in enumerate(relaxed.differences().items()):
        z, z_group = (
            sl.deterministic_gate(a, stretch=(-1.5, 1.5))
            for a in (relaxed.log_alpha[i], relaxed.log_alpha_group)
        )
        assert torch.equal(delta, z * relaxed.w[i] * z_group[relaxed.group_ids[i]]), name


def test_training_draws_new_gates_from_the_seed_and_evaluation_draws_none(build):
    model = build("toy")
    one, same, other = (settle(Relaxed(model, seed=seed)).train() for seed in (1, 1, 2))
    state = torch.get_rng_state()
    draws = [r.differences()["first.weight"] for r in (one, same, other, one)]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], draws[3])
    one.eval()
    assert torch.equal(one.differences()["first.weight"], one.differences()["first.weight"])


def test_the_gradients_are_the_manual_ones(build, batches):
    model, (batch,) = build("toy").double(), batches("toy", 1)
    relaxed = settle(Relaxed(model, groups="tensor", seed=3)).train()
    model.dropout.p = 0.0
    state = relaxed.generator.get_state()
    relaxed(**batch).loss.backward()
    relaxed.generator.set_state(state)

    def gate(log_alpha):
        u = (
            torch.rand(log_alpha.shape, generator=relaxed.generator)
            .to(log_alpha)
            .clamp(1e-4, 1 - 1e-4)
        )
        s = torch.sigmoid(u.log() - (1 - u).log() + log_alpha.detach())
        stretched = 3 * s - 1.5
        return stretched.clamp(0, 1), ((stretched > 0) & (stretched < 1)) * 3 * s * (1 - s)

    z_group, slope_group = gate(relaxed.log_alpha_group)
    group_gradient = torch.zeros_like(z_group)
    gates = [gate(log_alpha) for log_alpha in relaxed.log_alpha]
    # theta = theta0 + z z_g w; the gradient of theta comes from the composed model itself.
    composed = {
        name: (model.get_parameter(name) + z * z_group[i] * relaxed.w[i]).detach().requires_grad_()
        for i, (name, (z, _)) in enumerate(zip(relaxed.names, gates, strict=True))
    }
    loss = torch.func.functional_call(model, composed, (), batch).loss
    for i, (g, (z, slope)) in enumerate(
        zip(torch.autograd.grad(loss, composed.values()), gates, strict=True)
    ):
        w = relaxed.w[i].detach()
        torch.testing.assert_close(relaxed.w[i].grad, g * z * z_group[i])
        torch.testing.assert_close(relaxed.log_alpha[i].grad, g * w * z_group[i] * slope)
        group_gradient[i] = (g * w * z * slope_group[i]).sum()
    torch.testing.assert_close(relaxed.log_alpha_group.grad, group_gradient)
    assert group_gradient.any()


def test_the_noise_reaches_as_far_as_in_the_authors_code(build):
    relaxed = Relaxed(build("toy"), log_alpha=-6.0).train()
    with torch.no_grad():
        for w in relaxed.w:
            w.fill_(1.0)
        opened = sum(
            int(d.count_nonzero()) for _ in range(100) for d in relaxed.differences().values()
        )
    draws = 100 * sum(w.numel() for w in relaxed.w)
    # A gate opens where u > sigmoid(6), which u within [1e-4, 1 - 1e-4] allows and [1e-2, 1 - 1e-2]
    # would not.
    assert opened == pytest.approx(draws * 0.00247, rel=0.4)


def probabilities(relaxed):
    """P(z != 0) of every gate and of every group; with beta 1 and (-1.5, 1.5) it is a sigmoid."""
    group = None if relaxed.log_alpha_group is None else relaxed.log_alpha_group.sigmoid()
    return [log_alpha.sigmoid() for log_alpha in relaxed.log_alpha], group


def test_the_penalty_is_a_sum_over_weights(build):
    relaxed = settle(Relaxed(build("toy")))
    single, _ = probabilities(relaxed)
    assert relaxed.expected_l0().item() == pytest.approx(
        sum(p.sum().item() for p in single), rel=1e-5
    )
    by_tensor = relaxed.expected_l0_by_tensor()
    assert list(by_tensor) == list(sl.weights(relaxed.model))
    assert by_tensor["norm.bias"].item() == pytest.approx(single[4].sum().item(), rel=1e-5)


def test_structured_the_product_is_the_paper_s_and_the_sum_the_code_s(build):
    product = settle(Relaxed(build("bert"), groups="head"))
    single, group = probabilities(product)
    of = [group[ids] for ids in product.group_ids]
    expected = sum((p * g).sum() for p, g in zip(single, of, strict=True))
    assert product.expected_l0().item() == pytest.approx(expected.item(), rel=1e-5)

    added = settle(Relaxed(build("bert"), groups="head", penalty="sum"))
    expected = sum(p.sum() for p in single) + group.sum()
    assert added.expected_l0().item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_product_has_the_limits_that_the_sum_lacks(build):
    free = settle(Relaxed(build("toy")))
    product, added = (
        settle(Relaxed(build("toy"), groups="tensor", penalty=p)) for p in ("product", "sum")
    )
    elementwise = free.expected_l0().item()
    for relaxed in (product, added):
        with torch.no_grad():
            relaxed.log_alpha_group.fill_(1e4)
    assert product.expected_l0().item() == pytest.approx(
        elementwise, rel=1e-6
    )  # groups open: unstructured
    for relaxed in (product, added):
        with torch.no_grad():
            relaxed.log_alpha_group.fill_(-1e4)
    assert product.expected_l0().item() == 0.0  # groups closed: nothing is open
    assert added.expected_l0().item() == pytest.approx(
        elementwise, rel=1e-6
    )  # and the sum still counts all
    assert all(not delta.any() for delta in product.eval().differences().values())


def test_project_takes_the_k_largest_differences_under_deterministic_gates(build):
    relaxed = settle(Relaxed(build("toy")))  # itself in training mode, as modules are born
    selection, delta = relaxed.project(20)
    assert relaxed.training
    assert not relaxed.model.training
    every = torch.cat([d.abs().flatten() for d in delta.values()])
    chosen = torch.cat(
        [delta[name].abs().flatten()[index] for name, index in selection.indices.items()]
    )
    assert selection.count == 20
    assert torch.equal(chosen.sort().values, every.sort().values[-20:])
    assert all(torch.equal(delta[n], d) for n, d in relaxed.eval().differences().items())


def test_too_few_open_differences_raise(build):
    relaxed = Relaxed(build("toy"))
    with torch.no_grad():
        relaxed.w[0][0, :3] = 1.0
    with pytest.raises(
        ValueError, match="asks for 4 weights, but only 3 differences passed their gates"
    ):
        relaxed.project(4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stretch": (0.0, 1.1)}, "must have l < 0 and r > 1"),
        ({"penalty": "mean"}, "penalty='mean' is unknown"),
        ({"groups": "row"}, "groups='row' is unknown"),
        ({"groups": "head"}, r"needs model\.config\.num_attention_heads"),
        ({"head": ("clasifier",)}, "names no parameter"),
    ],
)
def test_bad_options_raise_and_the_model_is_as_it_was(build, options, message):
    model = build("toy")
    before = sl.snapshot(model)
    with pytest.raises(ValueError, match=message):
        Relaxed(model, **options)
    assert all(
        torch.equal(before[name], p) and p.requires_grad for name, p in model.named_parameters()
    )


def sequential():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).eval()


def cross_entropy(model, batch):
    return nn.functional.cross_entropy(model(batch["x"]), batch["labels"])


def points(count=4):
    generator = torch.Generator().manual_seed(2)
    return [
        {
            "x": torch.randn(8, 6, generator=generator),
            "labels": torch.randint(0, 3, (8,), generator=generator),
        }
        for _ in range(count)
    ]


@pytest.mark.parametrize(
    ("kind", "groups", "penalty"),
    [
        ("sequential", None, "product"),
        ("sequential", "tensor", "sum"),
        ("toy", "layer", "product"),
        ("bert", None, "product"),
        ("bert", "head", "product"),
        ("llama", None, "product"),
        ("llama", "layer", "product"),
        ("llama", "head", "sum"),
    ],
)
def test_exactly_k_weights_differ_at_the_end(build, batches, kind, groups, penalty):
    model = sequential() if kind == "sequential" else build(kind)
    data, loss = (
        (points(), cross_entropy) if kind == "sequential" else (batches(kind, 4), sl.model_loss)
    )
    before, keys = sl.snapshot(model), list(model.state_dict())
    method = diff_pruning(model, 25, epochs=(3, 1), groups=groups, penalty=penalty, **ON_THE_WAY)
    records = sl.fit(model, method, data, loss=loss)

    assert [r["phase"] for r in records] == ["relaxed"] * 12 + ["fixed mask"] * 4
    assert sum(int((p != before[name]).sum()) for name, p in sl.weights(model).items()) == 25
    assert all((p != before[name]).all() for name, p in sl.head_weights(model).items())
    assert list(model.state_dict()) == keys
    assert not any(module.training for module in model.modules())
    assert records[0]["penalty"] > 0
    assert records[-1]["penalty"] == 0


def test_the_model_is_theta0_throughout_the_relaxed_phase_and_groups_have_their_rates(
    build, batches
):
    model = build("bert")
    before = sl.snapshot(model)
    method = diff_pruning(
        model, 25, lr_w=1e-3, lr=2e-3, lr_alpha=0.3, lr_head=4e-3, epochs=(1, 1), groups="tensor"
    )
    relaxed = next(method)
    rates = {
        id(p): (group["lr"], group.get("schedule"))
        for group in relaxed.groups
        for p in group["params"]
    }
    assert {rates.pop(id(p)) for p in relaxed.model.w} == {(1e-3, None)}
    gates = [*relaxed.model.log_alpha, relaxed.model.log_alpha_group]
    assert {rates.pop(id(p)) for p in gates} == {(0.3, sl.constant)}
    assert {rates.pop(id(p)) for p in sl.head_weights(model).values()} == {(4e-3, None)}
    assert not rates
    sl.fit(model, [relaxed], batches("bert", 3))
    assert all(torch.equal(before[name], p) for name, p in sl.weights(model).items())
    assert all(p.grad is None for p in sl.weights(model).values())
    fixed = next(method)
    assert fixed.selection.count == 25
    assert [group["lr"] for group in fixed.groups] == [2e-3, 4e-3]
    method.close()
    assert sum(int((p != before[name]).sum()) for name, p in sl.weights(model).items()) == 25


def test_too_strong_a_penalty_raises_and_leaves_theta0(build, batches):
    model = build("bert")
    before = sl.snapshot(model)
    method = diff_pruning(model, 25, epochs=(1, 1), **ON_THE_WAY)

    def phases():
        phase = next(method)
        yield phase
        with torch.no_grad():
            for log_alpha in phase.model.log_alpha:
                log_alpha.fill_(-10.0)
        yield from method

    with pytest.raises(
        ValueError, match="only 0 differences passed their gates: the penalty was too strong"
    ):
        sl.fit(model, phases(), batches("bert", 2))
    assert all(torch.equal(before[name], p) for name, p in sl.weights(model).items())
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("budget", "error"),
    [(True, TypeError), (0, ValueError), (1.5, ValueError), (10**9, ValueError)],
)
def test_a_bad_budget_raises_before_a_step(build, batches, budget, error):
    model = build("toy")
    with pytest.raises(error, match="budget="):
        sl.fit(model, diff_pruning(model, budget, epochs=(1, 1), **ON_THE_WAY), batches("toy", 1))
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_gates_have_the_dtype_of_the_model(build, batches, dtype):
    relaxed = Relaxed(build("bert").to(dtype), groups="head").train()
    assert {p.dtype for p in relaxed.parameters()} == {dtype}
    relaxed(**batches("bert", 1)[0]).loss.backward()
    assert relaxed.log_alpha_group.grad.dtype == dtype


def test_gates_of_groups_need_one_dtype(build):
    model = build("bert")
    model.bert.pooler.double()
    with pytest.raises(ValueError, match=r"torch.float64 on cpu.*gates of groups need one dtype"):
        Relaxed(model, groups="tensor")
