"""Diff Pruning: gated differences, the penalty and its limits, exactly k changed weights."""

import pytest
import torch
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

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
    # groups open: unstructured
    assert product.expected_l0().item() == pytest.approx(elementwise, rel=1e-6)
    for relaxed in (product, added):
        with torch.no_grad():
            relaxed.log_alpha_group.fill_(-1e4)
    assert product.expected_l0().item() == 0.0  # groups closed: nothing is open
    # and the sum still counts all
    assert added.expected_l0().item() == pytest.approx(elementwise, rel=1e-6)
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
    assert relaxed.project(3)[0].indices["embedding.weight"].tolist() == [0, 1, 2]
    with pytest.raises(
        ValueError, match="asks for 4 weights, but only 3 differences passed their gates"
    ):
        relaxed.project(4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stretch": (0.0, 1.1)}, "must have gamma < 0 and zeta > 1"),
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
    head = () if kind == "sequential" else None
    before, keys = sl.snapshot(model), list(model.state_dict())
    options = {"groups": groups, "penalty": penalty, "head": head, **ON_THE_WAY}
    records = sl.fit(model, diff_pruning(model, 25, epochs=(3, 1), **options), data, loss=loss)

    assert [r["phase"] for r in records] == ["relaxed"] * 12 + ["fixed mask"] * 4
    assert sum(int((p != before[n]).sum()) for n, p in sl.weights(model, head).items()) == 25
    assert all((p != before[n]).all() for n, p in sl.head_weights(model, head).items())
    assert list(model.state_dict()) == keys
    assert not any(module.training for module in model.modules())
    assert records[0]["penalty"] > 0
    assert records[-1]["penalty"] == 0


def test_the_model_is_theta0_throughout_the_relaxed_phase_and_groups_have_their_rates(
    build, batches
):
    model = build("bert")
    before = sl.snapshot(model)
    rates = {"lr_w": 1e-3, "lr": 2e-3, "lr_alpha": 0.3, "lr_head": 4e-3}
    phases = iter(diff_pruning(model, 25, **rates, epochs=(1, 1), groups="tensor"))
    relaxed = next(phases)
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
    fixed = next(phases)
    assert fixed.selection.count == 25
    assert [group["lr"] for group in fixed.groups] == [2e-3, 4e-3]
    phases.close()
    assert sum(int((p != before[name]).sum()) for name, p in sl.weights(model).items()) == 25


def test_too_strong_a_penalty_raises_and_leaves_theta0(build, batches):
    model = build("bert")
    before = sl.snapshot(model)
    method = iter(diff_pruning(model, 25, epochs=(1, 1), **ON_THE_WAY))

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
    ("options", "error", "message"),
    [
        ({"budget": True}, TypeError, "budget=True"),
        ({"budget": 0}, ValueError, "budget=0"),
        ({"budget": 1.5}, ValueError, "budget=1.5"),
        ({"budget": 10**9}, ValueError, "budget=1000000000"),
        ({"epochs": 3}, ValueError, "epochs=3 must be a pair"),
        ({"epochs": (1, 1, 1)}, ValueError, r"epochs=\(1, 1, 1\) must be a pair"),
        ({"epochs": (0, 1)}, ValueError, "epochs=0 of phase 'relaxed'"),
        ({"epochs": (1, 0)}, ValueError, "epochs=0 of phase 'fixed mask'"),
        ({"lr_w": -1.0}, ValueError, "lr_w=-1.0"),
        ({"lr_alpha": float("nan")}, ValueError, "lr_alpha=nan"),
        ({"lr": "fast"}, TypeError, "lr='fast'"),
        ({"lr_head": float("inf")}, ValueError, "lr_head=inf"),
        ({"lam": 0.0}, ValueError, "lam=0 must be positive"),
        ({"lam": -1.0}, ValueError, "lam=-1.0"),
        ({"groups": "row"}, ValueError, "groups='row' is unknown"),
        ({"groups": "head"}, ValueError, r"needs model\.config\.num_attention_heads"),
        ({"groups": lambda model, weights: {}}, ValueError, "groups gave None"),
        ({"penalty": "mean"}, ValueError, "penalty='mean' is unknown"),
        ({"stretch": (0.0, 1.1)}, ValueError, "must have gamma < 0 and zeta > 1"),
        ({"head": ("clasifier",)}, ValueError, "names no parameter"),
    ],
)
def test_a_bad_argument_raises_at_the_call(build, options, error, message):
    model = build("toy")
    before = sl.snapshot(model)
    with pytest.raises(error, match=message):
        diff_pruning(model, **{"budget": 5, "epochs": (1, 1), **ON_THE_WAY, **options})
    assert all(
        torch.equal(before[name], p) and p.requires_grad for name, p in model.named_parameters()
    )


def begun(model, budget=5, **options):
    """The relaxed phase of a method, its gates and differences at random places; and the rest."""
    options = {"epochs": (1, 1), "head": (), **ON_THE_WAY, **options}
    rest = iter(diff_pruning(model, budget, **options))
    phase = next(rest)
    settle(phase.model)
    return phase, rest


def drawn(relaxed, seed):
    """The first noise of a seed: for the groups' gates, if any, then for every weight's."""
    generator = torch.Generator().manual_seed(seed)
    shared = relaxed.log_alpha_group
    locations = [*([] if shared is None else [shared]), *relaxed.log_alpha]
    return [torch.rand(p.shape, generator=generator) for p in locations]


STRETCHES = pytest.mark.parametrize("stretch", [(-1.5, 1.5), (-0.1, 1.1), (-0.5, 2.0)])


@STRETCHES
@pytest.mark.parametrize("groups", [None, "tensor"])
def test_gates_are_drawn_from_the_seed_at_beta_one_within_the_stretch(stretch, groups):
    phase, _ = begun(sequential(), groups=groups, stretch=stretch, seed=7)
    relaxed = phase.model.train()
    noise = iter(drawn(relaxed, 7))

    def gate(log_alpha):
        return sl.hard_concrete(log_alpha, next(noise), beta=1.0, stretch=stretch, eps=1e-4)

    group = torch.ones(4) if groups is None else gate(relaxed.log_alpha_group)
    found = list(relaxed.differences().values())
    for i, (w, log_alpha) in enumerate(zip(relaxed.w, relaxed.log_alpha, strict=True)):
        torch.testing.assert_close(found[i], gate(log_alpha) * w * group[i])


@pytest.mark.parametrize(("u", "bound"), [(1.0, -9.2102), (0.0, 9.2102)])
def test_noise_ends_where_the_authors_end_it(monkeypatch, u, bound):
    # The authors keep u in [1e-4, 1 - 1e-4]: the noise log u - log(1 - u) ends at +-9.2102.
    phase, _ = begun(sequential())
    relaxed = phase.model.train()
    monkeypatch.setattr(torch, "rand", lambda shape, **_: torch.full(tuple(shape), u))
    opened = []
    for location in (bound - 0.01, bound + 0.01):
        with torch.no_grad():
            for log_alpha in relaxed.log_alpha:
                log_alpha.fill_(location)
        opened.append(sum(int(d.count_nonzero()) for d in relaxed.differences().values()))
    assert opened == [0, sum(w.numel() for w in relaxed.w)]


@STRETCHES
@pytest.mark.parametrize(
    ("groups", "penalty"), [(None, "product"), ("tensor", "product"), ("tensor", "sum")]
)
def test_the_penalty_of_the_phase_is_lambda_times_the_expected_l0(stretch, groups, penalty):
    options = {"groups": groups, "penalty": penalty, "stretch": stretch, "lam": 0.25}
    phase, _ = begun(sequential(), **options)
    relaxed = phase.model

    def p(log_alpha):
        # P(z > 0) by the noise: u is uniform, and z > 0 where its logit is above the shift.
        left, right = stretch
        grid = (torch.arange(20_000) + 0.5) / 20_000
        shift = log_alpha.detach().flatten()[:, None]
        s = torch.sigmoid(torch.logit(grid) + shift)
        return (s * (right - left) + left > 0).double().mean(1).view(log_alpha.shape)

    single = [p(log_alpha) for log_alpha in relaxed.log_alpha]
    expected = sum(each.sum() for each in single)
    if groups is not None:
        group = p(relaxed.log_alpha_group)
        product = sum(each.sum() * shared for each, shared in zip(single, group, strict=True))
        expected = product if penalty == "product" else expected + group.sum()
    assert phase.penalty().item() == pytest.approx(0.25 * expected.item(), rel=2e-4)


def nothing(model, batch):
    """A loss whose gradient is zero everywhere."""
    return 0 * cross_entropy(model, batch)


@pytest.mark.parametrize("groups", [None, "tensor"])
def test_without_a_gradient_nothing_moves_and_what_was_learned_is_kept(groups):
    # AdamW, whose own default is to decay all that it trains.
    model, k = sequential(), 20
    before = sl.snapshot(model)
    phase, rest = begun(model, k, groups=groups, lam=1e-35, head=("2",))
    if groups is not None:
        with torch.no_grad():
            phase.model.log_alpha_group.copy_(torch.tensor([0.5, 2.0]))
    trained = list(phase.model.parameters())
    starts = [p.detach().clone() for p in trained]
    sl.fit(model, [phase], points(), loss=nothing)
    assert all(torch.equal(p, start) for p, start in zip(trained, starts, strict=True))

    with torch.no_grad():
        delta = phase.model.eval().differences()
    every = torch.cat([d.abs().flatten() for d in delta.values()])
    least = every.sort(descending=True).values[k - 1]
    assert int((every >= least).sum()) == k
    sl.fit(model, rest, points(), loss=nothing)
    for name, p in model.named_parameters():
        kept = torch.where(delta[name].abs() >= least, delta[name], 0) if name in delta else 0
        assert torch.equal(p, before[name] + kept), name


@pytest.mark.parametrize("closed", ["weights", "groups"])
def test_a_location_at_the_threshold_is_closed(closed):
    relaxed = begun(sequential(), groups="tensor")[0].model
    with torch.no_grad():
        for p in relaxed.log_alpha:
            p.fill_(relaxed.threshold if closed == "weights" else 1.0)
        relaxed.log_alpha_group.fill_(relaxed.threshold if closed == "groups" else 1.0)
    assert relaxed.count_open() == 0
    with pytest.raises(ValueError, match="only 0 differences passed their gates"):
        relaxed.project(1)


def test_the_seed_decides_what_is_trained():
    def trained(seed):
        model = sequential()
        method = diff_pruning(model, 20, epochs=(2, 1), seed=seed, head=(), **ON_THE_WAY)
        return [record["loss"] for record in sl.fit(model, method, points(), loss=cross_entropy)]

    assert trained(1) == trained(1) != trained(2)


def test_the_head_that_is_given_is_trained_whole_in_both_phases(build, batches):
    model, head = build("toy"), ("second", "classifier")
    names = list(sl.head_weights(model, head))
    phases = iter(diff_pruning(model, 5, epochs=(1, 1), head=head, **ON_THE_WAY))
    before = sl.snapshot(model)
    assert "second.weight" in names
    sl.fit(model, [next(phases)], batches("toy", 2))
    between = sl.snapshot(model)
    sl.fit(model, phases, batches("toy", 2))
    for name in names:
        assert (between[name] != before[name]).all(), name
        assert (model.get_parameter(name) != between[name]).all(), name


def test_a_function_groups_the_gates():
    model = sequential()

    def by_row(model, weights):
        rows = [torch.arange(len(p)) for p in weights.values()]
        return {
            name: ids if p.dim() == 1 else ids[:, None]
            for ids, (name, p) in zip(rows, weights.items(), strict=True)
        }

    phase, _ = begun(model, groups=by_row)
    relaxed = phase.model.eval()
    assert len(relaxed.log_alpha_group) == 8
    with torch.no_grad():
        relaxed.log_alpha_group.copy_(torch.where(torch.arange(8) == 2, 9.0, -9.0))
        for log_alpha in relaxed.log_alpha:
            log_alpha.fill_(9.0)
    delta = relaxed.differences()
    assert torch.equal(delta["0.weight"].any(1), torch.arange(8) == 2)


def test_what_the_user_froze_stays_frozen_and_has_no_gate(build, batches):
    model = build("bert")
    model.bert.embeddings.requires_grad_(False)
    before = sl.snapshot(model)
    phases = iter(diff_pruning(model, 25, epochs=(3, 1), **ON_THE_WAY))
    relaxed = next(phases)
    assert list(relaxed.model.names) == list(sl.weights(model))
    assert not any("embeddings" in name for name in relaxed.model.names)

    def method():
        yield relaxed
        yield from phases

    sl.fit(model, method(), batches("bert", 4))
    moved = {n: int((p != before[n]).sum()) for n, p in model.named_parameters()}
    assert sum(moved[name] for name in sl.weights(model)) == 25
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {name for name in moved if "embeddings" in name}
    assert not any(moved[name] for name in frozen)


@pytest.mark.parametrize("groups", [None, "layer"])
def test_what_is_excluded_stays_as_it_was_and_counts_in_the_total(build, batches, groups):
    model, out = build("bert"), ("bert.embeddings", "bert.encoder.layer.1")
    before = sl.snapshot(model)
    options = {"groups": groups, "exclude": out, **ON_THE_WAY}
    phases = diff_pruning(model, 0.01, epochs=(3, 1), **options)
    found = []

    def watched():
        for phase in phases:
            found.append(phase.selection)
            yield phase

    sl.fit(model, watched(), batches("bert", 4))
    candidates = sl.weights(model)
    k = sl.resolve_budget(0.01, sum(p.numel() for p in candidates.values()))
    moved = {name: int((p != before[name]).sum()) for name, p in candidates.items()}
    assert sum(moved.values()) == k == found[1].count
    assert not any(count for name, count in moved.items() if name.startswith(out))
    assert list(found[1].shapes) == list(candidates)
    assert found[1].method == "Diff Pruning"


def test_an_exclusion_that_leaves_too_little_raises(build):
    model = build("toy")
    with pytest.raises(ValueError, match="exclude='embeding' names no parameter"):
        diff_pruning(model, 5, epochs=(1, 1), exclude="embeding", **ON_THE_WAY)
    everything = ("embedding", "first", "norm", "second")
    with pytest.raises(ValueError, match="leaves no weight to gate"):
        diff_pruning(model, 5, epochs=(1, 1), exclude=everything, **ON_THE_WAY)
    few = ("embedding", "first", "second")
    diff_pruning(model, 14, epochs=(1, 1), exclude=few, **ON_THE_WAY)
    with pytest.raises(ValueError, match="asks for 15 weights, but only 14 are not excluded"):
        diff_pruning(model, 15, epochs=(1, 1), exclude=few, **ON_THE_WAY)


def test_a_tensor_that_cannot_be_selected_in_part_is_refused_by_name_and_can_be_excluded():
    model = nn.Sequential(nn.Embedding(5, 4, max_norm=1.0), nn.Linear(4, 3))
    options = {"epochs": (1, 1), "head": (), **ON_THE_WAY}
    with pytest.raises(ValueError, match=r"'0\.weight' is an embedding with max_norm"):
        diff_pruning(model, 5, **options)
    phase = next(iter(diff_pruning(model, 5, exclude="0", **options)))
    assert phase.model.names == ["1.weight", "1.bias"]


def test_a_model_in_masked_training_is_refused(build, pick):
    model = build("toy")
    with sl.masked(model, pick(model)), pytest.raises(ValueError, match="already in masked"):
        diff_pruning(model, 5, epochs=(1, 1), **ON_THE_WAY)


def test_a_model_without_values_is_refused(build):
    model = build("toy").to("meta")
    with pytest.raises(ValueError, match=r"'embedding\.weight' is on the meta device"):
        diff_pruning(model, 5, epochs=(1, 1), **ON_THE_WAY)


def compiled_as_a_whole(model):
    return torch.compile(model, backend="eager")


def compiled_in_part(model):
    model.first = torch.compile(model.first, backend="eager")
    return model


@pytest.mark.parametrize("wrap", [compiled_as_a_whole, compiled_in_part])
def test_a_compiled_model_is_trained_as_the_plain_one_is(build, batches, wrap):
    plain, other = build("toy"), build("toy")
    wrapped = wrap(other)
    for model in (plain, wrapped):
        torch.manual_seed(3)  # dropout
        method = diff_pruning(model, 25, epochs=(3, 1), groups="tensor", **ON_THE_WAY)
        sl.fit(model, method, batches("toy", 4))
    before = dict(sl.weights(build("toy")))
    assert list(sl.weights(wrapped)) == list(before)
    for name, p in sl.weights(wrapped).items():
        assert torch.equal(p, plain.get_parameter(name)), name
    assert sum(int((p != before[n]).sum()) for n, p in sl.weights(wrapped).items()) == 25


def test_a_weight_need_not_be_contiguous():
    model = sequential()
    turned = torch.randn(6, 8).t()
    model[0].weight = nn.Parameter(turned)
    assert not model[0].weight.is_contiguous()
    before = sl.snapshot(model)
    method = diff_pruning(model, 20, epochs=(2, 1), head=(), **ON_THE_WAY)
    sl.fit(model, method, points(), loss=cross_entropy)
    assert sum(int((p != before[n]).sum()) for n, p in model.named_parameters()) == 20


def test_a_model_in_several_processes_is_refused():
    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        model = nn.parallel.DistributedDataParallel(sequential())
        with pytest.raises(ValueError, match="would not average the gradients of differences"):
            begun(model)
    finally:
        torch.distributed.destroy_process_group()


def test_a_method_is_used_once(build, batches):
    model = build("toy")
    method = diff_pruning(model, 5, epochs=(1, 1), **ON_THE_WAY)
    sl.fit(model, method, batches("toy", 4))
    with pytest.raises(ValueError, match="used"):
        sl.fit(model, method, batches("toy", 4))


@pytest.mark.parametrize("kind", ["toy", "bert"])
def test_a_model_that_was_frozen_as_a_whole_is_trained_and_frozen_again(build, batches, kind):
    model = build(kind).requires_grad_(False)
    before = sl.snapshot(model)
    sl.fit(model, diff_pruning(model, 25, epochs=(3, 1), **ON_THE_WAY), batches(kind, 4))
    assert sum(int((p != before[name]).sum()) for name, p in sl.weights(model).items()) == 25
    assert all((p != before[name]).all() for name, p in sl.head_weights(model).items())
    assert not any(p.requires_grad for p in model.parameters())


def test_the_head_is_trained_during_the_relaxed_phase_of_a_frozen_model(build, batches):
    model = build("bert").requires_grad_(False)
    before = sl.snapshot(model)
    phases = iter(diff_pruning(model, 25, epochs=(1, 1), **ON_THE_WAY))
    sl.fit(model, [next(phases)], batches("bert", 1))
    assert all((p != before[name]).all() for name, p in sl.head_weights(model).items())
    phases.close()
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_what_is_trained_is_float32_at_least_and_the_model_keeps_its_dtype(build, batches, dtype):
    model = build("bert").to(dtype)
    relaxed = Relaxed(model, groups="head").train()
    trained = torch.promote_types(dtype, torch.float32)
    assert {p.dtype for p in model.parameters()} == {dtype}
    own = [*relaxed.w, *relaxed.log_alpha, relaxed.log_alpha_group, *relaxed.head]
    assert {p.dtype for p in own} == {trained}
    output = relaxed(**batches("bert", 1)[0])
    assert output.logits.dtype == dtype
    output.loss.backward()
    assert all(p.grad.dtype == trained for p in own)


def test_steps_of_a_half_precision_head_add_up(build, batches):
    model = build("bert").bfloat16()
    start, rate = 0.02, 1e-5
    with torch.no_grad():
        model.classifier.weight.fill_(start)
        assert not (model.classifier.weight + rate != model.classifier.weight).any()
    rates = {**ON_THE_WAY, "lr_head": rate}
    phases = iter(diff_pruning(model, 25, epochs=(60, 1), **rates))
    sl.fit(model, [next(phases)], batches("bert", 1))
    next(phases)  # the head is in the model again
    assert (model.classifier.weight != torch.tensor(start).bfloat16()).any()
    phases.close()
    assert model.classifier.weight.dtype == torch.bfloat16


def test_gates_of_groups_need_one_dtype(build):
    model = build("bert")
    model.bert.pooler.double()
    with pytest.raises(ValueError, match=r"torch.float64 on cpu.*gates of groups need one dtype"):
        Relaxed(model, groups="tensor")
