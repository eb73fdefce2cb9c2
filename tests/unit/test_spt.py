"""SPT: the sweep finds what trying every tau finds, budgets are spent, the mixture trains."""

import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import selective_lite as sl
from selective_lite.layers.small import adapter_parameters, linear_sizes
from selective_lite.methods.spt import allocate, spt
from selective_lite.methods.spt.sweep import crossing, tau_for

MODELS = ("toy", "bert", "llama", "gpt2", "vit")


@pytest.fixture(scope="module")
def sensitivity(build, batches):
    """sensitivity(kind) -> the model's squared gradients, computed once."""
    found = {}

    def of(kind):
        if kind not in found:
            found[kind] = sl.squared_gradient(build(kind), batches(kind, 3))
        return found[kind]

    return of


# The sweep


def charges_at_every_tau(scores, charge):
    """The charge at tau = 0, 1, ... N, entry by entry in the order of `select`."""
    entries = [
        (-float(value), place, name)
        for place, (name, score) in enumerate(scores.items())
        for value in score.reshape(-1).tolist()
    ]
    counts, found = dict.fromkeys(scores, 0), [0]
    for _, _, name in sorted(entries, key=lambda entry: entry[:2]):
        counts[name] += 1
        found.append(sum(int(charge(n, torch.tensor(count))) for n, count in counts.items()))
    return found


def _charge(prices):
    def charge(name, count):
        enough, price = prices[name]
        return torch.where(count >= enough, price, count)

    return charge


@st.composite
def sweeps(draw):
    """Scores with many ties and zeros, and prices that a tensor's count may or may not reach."""
    scores, prices = {}, {}
    for i in range(draw(st.integers(1, 4))):
        values = draw(
            st.lists(st.integers(0, 6) | st.floats(0, 1e3, width=32), min_size=1, max_size=12)
        )
        dtype = draw(st.sampled_from([torch.float32, torch.float64]))
        scores[f"t{i}"] = torch.tensor(values, dtype=dtype)
        enough = draw(st.integers(1, 14))
        prices[f"t{i}"] = (enough, draw(st.integers(enough, 30)))
    return scores, _charge(prices)


@given(sweeps(), st.integers(1, 130))
@settings(max_examples=80, deadline=None)
def test_the_crossing_is_the_first_tau_whose_charge_reaches_the_budget(case, k):
    scores, charge = case
    every = charges_at_every_tau(scores, charge)
    expected = next((tau for tau, spent in enumerate(every) if spent >= k), len(every))
    assert crossing(scores, charge, k) == expected


@given(sweeps(), st.integers(1, 130), st.booleans(), st.data())
@settings(max_examples=80, deadline=None)
def test_the_tau_is_the_one_that_trying_all_of_them_finds(case, k, capped, data):
    scores, charge = case
    limit = sum(int(score.count_nonzero()) for score in scores.values())
    if limit == 0:
        return
    taus = data.draw(st.none() | st.sets(st.integers(1, limit), min_size=1).map(sorted))
    every = charges_at_every_tau(scores, charge)
    spent = {tau: every[tau] for tau in taus or range(1, limit + 1)}
    within = [tau for tau in spent if spent[tau] <= k]
    if k > max(spent.values()) or (capped and not within):
        with pytest.raises(ValueError, match="budget asks for"):
            tau_for(scores, charge, k, taus=taus, capped=capped)
        return
    found = tau_for(scores, charge, k, taus=taus, capped=capped)
    assert found in spent
    if capped:
        assert spent[found] == max(spent[tau] for tau in within)
    else:
        closest = min(abs(total - k) for total in spent.values())
        assert spent[found] == min(total for total in spent.values() if abs(total - k) == closest)


def test_the_sweep_goes_on_over_the_chunks_of_a_tensor(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    scores = {
        n: torch.randint(1, 9, (size,), generator=generator).float()
        for n, size in (("a", 50), ("b", 23))
    }
    charge = _charge({"a": (20, 33), "b": (9, 12)})
    every = charges_at_every_tau(scores, charge)
    monkeypatch.setattr(sys.modules["selective_lite.selection"], "CHUNK", 7)
    for k in range(1, every[-1] + 1):
        assert crossing(scores, charge, k) == next(
            tau for tau, spent in enumerate(every) if spent >= k
        )


@pytest.mark.parametrize("taus", [[], [0, 3], [2, 2], [3, 2], [1, 7]])
def test_taus_that_are_empty_do_not_increase_or_go_beyond_the_scores_raise(taus):
    scores = {"a": torch.tensor([1.0, 2, 3, 4, 5, 6, 0])}
    with pytest.raises(
        ValueError, match=r"taus must increase within \[1, 6\], the number of non-zero scores"
    ):
        tau_for(scores, lambda name, count: count, 2, taus=taus)


# The allocation


class Small(nn.Module):
    """A 6 x 4 matrix, its bias, an embedding; r = 1 costs 10 (LoRA), 2 * 6 + 1 + 6 (Adapter)."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5, 2)
        self.layer = nn.Linear(4, 6)


def ranked(*order):
    """Scores of `Small` by hand: tensors from the most sensitive entry on; the rest follows."""
    sizes = {"table.weight": (5, 2), "layer.weight": (6, 4), "layer.bias": (6,)}
    scores, used = {n: torch.zeros(size) for n, size in sizes.items()}, dict.fromkeys(sizes, 0)
    rest = [
        name for name, size in sizes.items() for _ in range(math.prod(size) - order.count(name))
    ]
    for value, name in zip(range(40, 0, -1), [*order, *rest], strict=True):
        scores[name].view(-1)[used[name]] = value
        used[name] += 1
    return scores


W, B, T = "layer.weight", "layer.bias", "table.weight"


def test_an_allocation_by_hand():
    # alpha = 5: the matrix is structured at 10 / 5 = 2 of its entries. beta = 2: the bias is whole
    # at 3 of its 6.
    scores = ranked(T, W, B, T, W, B, B, T)
    charged = {1: 1, 2: 2, 3: 3, 4: 4, 5: 3 + 10, 6: 14, 7: 10 + 6 + 2, 8: 10 + 6 + 3}
    for tau, total in charged.items():
        found = allocate(Small(), scores, 10, rank=1, alpha=5, beta=2, taus=[tau, 40])
        assert (found.tau, found.charged) == (tau, total)
    # the rest of the table; what follows is paid for already
    charged |= {tau: 11 + tau for tau in range(9, 16)}
    for k in range(10, 27):
        nearest = min(charged.values(), key=lambda total: (abs(total - k), total))
        assert allocate(Small(), scores, k, rank=1, alpha=5, beta=2).charged == nearest
    assert found.structured == (W,)
    assert found.whole == (B,)
    assert {n: i.tolist() for n, i in found.selection.indices.items()} == {T: [0, 1, 2]}
    assert found.counts == {"structured": 10, "whole": 6, "unstructured": 3}
    assert (found.kind, found.rank, found.left_out) == ("lora", 1, ())


def test_a_threshold_that_is_no_integer_is_not_reached_below_it():
    # 10 / 4 = 2.5 and 6 / 4 = 1.5: three entries of the matrix and two of the bias.
    scores = ranked(W, W, B, W, B)
    found = [
        allocate(Small(), scores, 10, rank=1, alpha=4, beta=4, taus=[tau, 40]).counts
        for tau in (3, 4, 5)
    ]
    assert [tuple(counts.values()) for counts in found] == [(0, 0, 3), (10, 0, 1), (10, 6, 0)]


def test_an_adapter_is_charged_for_its_biases():
    scores = ranked(*[W] * 4, T)
    found = allocate(Small(), scores, 20, kind="adapter", rank=1, alpha=5)
    assert found.counts == {"structured": 19, "whole": 0, "unstructured": 1}
    assert found.structured == (W,)


def check_identity(model, scores, found, alpha=10, beta=5):
    """The charge identity, and every rule, recomputed from the tau most sensitive weights."""
    used = {n: s for n, s in scores.items() if n not in found.left_out}
    top = sl.select(used, found.tau)
    owners = {f"{path}.weight": module for path, module in model.named_modules()}
    shared = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    structured, whole, entries, total = [], [], {}, 0
    for name, count in top.per_tensor().items():
        sizes = linear_sizes(owners[name]) if name in owners and used[name].dim() == 2 else None
        if sizes is not None and not any(owners[name].weight is p for p in shared):
            price = found.rank * sum(sizes)
            if found.kind == "adapter":
                price = 2 * found.rank * sizes[1] + found.rank + sizes[1]
            if count >= price / alpha:
                structured.append(name)
                total += price
                continue
        if used[name].dim() == 1 and count >= used[name].numel() / beta:
            whole.append(name)
            total += used[name].numel()
        elif count:
            entries[name] = top.indices[name]
            total += count
    assert list(found.structured) == structured
    assert list(found.whole) == whole
    assert list(found.selection.indices) == list(entries)
    assert all(torch.equal(found.selection.indices[n], i) for n, i in entries.items())
    assert found.charged == total == sum(found.counts.values())


@pytest.mark.parametrize("kind", ["lora", "adapter"])
@pytest.mark.parametrize("name", MODELS)
def test_everything_is_charged_on_every_architecture(build, sensitivity, name, kind):
    model, scores = build(name), sensitivity(name)
    total = sum(p.numel() for p in sl.weights(model).values())
    seen = {"structured": 0, "whole": 0, "unstructured": 0}
    for fraction in (0.04, 0.14):
        k = max(round(fraction * total), 60)
        nearest = allocate(model, scores, k, kind=kind, rank=1)
        capped = allocate(model, scores, k, kind=kind, rank=1, spend="capped")
        for found in (nearest, capped):
            check_identity(model, scores, found)
            for role, count in found.counts.items():
                seen[role] += count
        assert capped.charged <= k
        assert abs(nearest.charged - k) <= k - capped.charged
    assert all(seen.values()), seen


@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_takes_part_by_default(build, sensitivity, name):
    found = allocate(build(name), sensitivity(name), 100, rank=1)
    assert found.left_out == ()
    assert list(found.selection.shapes) == list(sl.weights(build(name)))
    assert found.selection.method == "SPT"


def test_tensors_that_are_no_linear_layer_s_are_tuned_by_entries_only(build, sensitivity):
    embeddings = {
        "vit.embeddings.cls_token",
        "vit.embeddings.position_embeddings",
        "vit.embeddings.patch_embeddings.projection.weight",
    }
    scores = {n: s + 1e6 if n in embeddings else s for n, s in sensitivity("vit").items()}
    found = allocate(build("vit"), scores, 60, rank=1)
    assert found.counts == {"structured": 0, "whole": 0, "unstructured": 60}
    assert set(found.selection.indices) <= embeddings


def test_a_tied_embedding_is_tuned_by_entries_only(build, sensitivity):
    model, scores = build("llama"), dict(sensitivity("llama"))
    scores["model.embed_tokens.weight"] = scores["model.embed_tokens.weight"] + 1e6
    found = allocate(model, scores, 60, rank=1)
    assert found.counts == {"structured": 0, "whole": 0, "unstructured": 60}


def test_two_layers_that_share_a_weight_get_no_module():
    model = nn.ModuleDict({"a": nn.Linear(6, 6), "b": nn.Linear(6, 6), "c": nn.Linear(6, 6)})
    model["b"].weight = model["a"].weight
    scores = {name: torch.ones(p.shape) for name, p in sl.weights(model).items()}
    scores["a.weight"] *= 9
    found = allocate(model, scores, 60, rank=1)
    assert found.structured == ("c.weight",)
    assert len(found.selection.indices["a.weight"]) == 36


def test_a_table_that_masked_training_refuses_takes_no_part():
    model = nn.Sequential(nn.Embedding(9, 6, max_norm=1.0), nn.Linear(6, 6))
    found = allocate(model, sl.random_scores(model, 0, head=()), 18, rank=1, head=())
    assert found.left_out == ("0.weight",)
    spt(model, found, lr=0.1, epochs=1, head=())


def test_excluded_tensors_and_tensors_without_a_score_take_no_part(build, sensitivity):
    model, scores = build("bert"), dict(sensitivity("bert"))
    del scores["bert.pooler.dense.bias"]
    found = allocate(
        model,
        scores,
        300,
        rank=1,
        exclude=("bert.embeddings", "bert.encoder.layer.0.output.dense.weight"),
    )
    expected = [n for n in sl.weights(model) if n.startswith("bert.embeddings.")]
    assert list(found.left_out) == [
        *expected,
        "bert.encoder.layer.0.output.dense.weight",
        "bert.pooler.dense.bias",
    ]
    assert not {*found.structured, *found.whole, *found.selection.indices} & set(found.left_out)
    one = allocate(model, scores, 300, rank=1, exclude="bert.embeddings")
    assert list(one.left_out) == [*expected, "bert.pooler.dense.bias"]


def test_a_fraction_is_of_all_candidates(build, sensitivity):
    model, scores = build("vit"), sensitivity("vit")
    total = sum(p.numel() for p in sl.weights(model).values())
    one = allocate(model, scores, 0.1, rank=1, exclude=("vit.layers.0",))
    other = allocate(model, scores, round(0.1 * total), rank=1, exclude=("vit.layers.0",))
    assert (one.tau, one.charged) == (other.tau, other.charged)


def test_scores_of_any_dtype_give_the_same_and_the_model_is_not_touched(build, sensitivity):
    model = build("bert")
    scores = {n: s.bfloat16() for n, s in sensitivity("bert").items()}
    mixed = {
        n: s.to((torch.float64, torch.float32, torch.bfloat16)[i % 3])
        for i, (n, s) in enumerate(scores.items())
    }
    before, flags = sl.snapshot(model), [p.requires_grad for p in model.parameters()]
    one, other = allocate(model, scores, 400, rank=2), allocate(model, mixed, 400, rank=2)
    assert (one.structured, one.whole, one.tau, one.counts) == (
        other.structured,
        other.whole,
        other.tau,
        other.counts,
    )
    assert all(torch.equal(i, other.selection.indices[n]) for n, i in one.selection.indices.items())
    assert all(torch.equal(before[n], p) and p.grad is None for n, p in model.named_parameters())
    assert [p.requires_grad for p in model.parameters()] == flags


@pytest.mark.usefixtures("meta_default")
def test_an_allocation_makes_its_tensors_on_the_cpu():
    model = nn.Sequential(nn.Linear(6, 5, device="cpu"), nn.LayerNorm(5, device="cpu"))
    found = allocate(model, sl.random_scores(model, 0), 15, rank=1, alpha=1, beta=1)
    assert found.charged > 0
    (phase,) = spt(model, found, lr=0.1, epochs=1)
    assert {p.device.type for group in phase.groups for p in group["params"]} == {"cpu"}


def test_weights_may_be_on_another_device_than_the_scores(build, sensitivity):
    found = allocate(build("bert").to("meta"), sensitivity("bert"), 400, rank=2)
    assert found.counts == allocate(build("bert"), sensitivity("bert"), 400, rank=2).counts


BAD = {
    "below a module": (
        {"budget": 23},
        r"budget=23 is 23 weights, below 24, the size of the smallest module at rank=1",
    ),
    "above the reach": (
        {"budget": 3000},
        r"budget asks for 3000 weights, but these tensors can take only \d+; lower",
    ),
    "above the model": ({"budget": 10**6}, r"budget=1000000 is outside \[1, \d+\]"),
    "no tau within": (
        {"spend": "capped", "taus": [500, 600]},
        r"budget asks for at most 300 weights, but the smallest tau, 500, trains",
    ),
    "rank": (
        {"rank": 13},
        r"rank=13 does not fit 'bert.encoder.layer.0.attention.self.query.weight'; .* 1 to 12",
    ),
    "no rank": ({"rank": 0}, "rank=0 does not fit"),
    "kind": ({"kind": "dora"}, "kind='dora' is unknown"),
    "spend": ({"spend": "all"}, "spend='all' is unknown; choose one of"),
    "alpha": ({"alpha": 0.5}, "alpha=0.5, beta=5.0: both are finite and at least 1"),
    "beta": ({"beta": float("nan")}, "alpha=10.0, beta=nan: both are finite and at least 1"),
    "infinite": ({"alpha": float("inf")}, "alpha=inf, beta=5.0: both are finite"),
    "exclude": ({"exclude": ("bert.enc",)}, "exclude='bert.enc' names no parameter"),
    "all excluded": ({"exclude": ("bert",)}, "scores and exclude leave no tensor"),
    "taus": ({"taus": [3, 1]}, "taus must increase within"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_option_raises(build, sensitivity, case):
    options, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        allocate(build("bert"), sensitivity("bert"), **{"budget": 300, "rank": 1, **options})


def test_bad_scores_raise(build, sensitivity):
    model, scores = build("bert"), sensitivity("bert")
    bias = "bert.pooler.dense.bias"
    for bad, message in (
        ({"pooler": scores[bias]}, "scores holds 'pooler', which is not a parameter"),
        ({bias: scores[bias][:-1]}, rf"scores\['{bias}'\] has shape \(11,\), the model \(12,\)"),
        (
            {bias: scores[bias] * float("nan")},
            rf"scores\['{bias}'\] has a value that is not finite",
        ),
        ({n: torch.zeros_like(s) for n, s in scores.items()}, "scores are zero for every weight"),
    ):
        with pytest.raises(ValueError, match=message):
            allocate(model, {**scores, **bad}, 300, rank=1)
    with pytest.raises(TypeError, match="budget=True is a bool"):
        allocate(model, scores, True, rank=1)


def test_a_zero_head_gives_no_sensitivity(build, batches):
    model = build("vit")
    nn.init.zeros_(model.classifier.weight)
    with pytest.raises(ValueError, match="zero-initialised head passes no gradient"):
        sl.squared_gradient(model, batches("vit", 1))


# The mixture


def small_budget(model):
    return max(60, sum(p.numel() for p in sl.weights(model).values()) // 6)


@pytest.fixture(scope="module")
def mixed(build, sensitivity):
    """mixed(kind, **options) -> a model and an allocation of it with something of every kind."""

    def of(name, kind="lora"):
        model = build(name)
        found = allocate(model, sensitivity(name), small_budget(model), kind=kind, rank=1)
        if not all(found.counts.values()):  # the tiniest model needs another balance
            found = allocate(
                model, sensitivity(name), small_budget(model), kind=kind, rank=1, alpha=4
            )
        assert all(found.counts.values()), found.counts
        return model, found

    return of


@pytest.mark.parametrize("kind", ["lora", "adapter"])
@pytest.mark.parametrize("name", MODELS)
def test_what_is_allocated_moves_and_everything_else_keeps_its_bits(mixed, batches, name, kind):
    model, allocation = mixed(name, kind)
    before, keys = sl.snapshot(model), list(model.state_dict())
    flags, heads = [p.requires_grad for p in model.parameters()], sl.head_weights(model)
    trained = []

    def on_step(record):
        trained.append(sum(p.numel() for p in model.parameters() if p.requires_grad))

    method = spt(model, allocation, lr=0.01, epochs=4, weight_decay=0.1)
    records = sl.fit(model, method, batches(name, 3), on_step=on_step)
    assert set(trained) == {allocation.charged + sum(p.numel() for p in heads.values())}
    assert len(records) == 12
    assert [k for k in model.state_dict() if ".adapter." not in k] == keys
    assert [p.requires_grad for n, p in model.named_parameters() if ".adapter." not in n] == flags
    assert tuple(sl.adapters(model)) == allocation.structured
    assert (
        sum(p.numel() for p in adapter_parameters(model).values())
        == allocation.counts["structured"]
    )
    assert all(p.any() for p in adapter_parameters(model).values())

    masks = allocation.selection.masks()
    moved = total = 0
    for n, p in model.named_parameters():
        if ".adapter." in n:
            continue
        if n in allocation.whole or n in heads:
            assert not torch.equal(p, before[n]), n
        elif n in allocation.selection.indices:
            assert torch.equal(p[~masks[n]], before[n][~masks[n]]), n
            moved += int((p[masks[n]] != before[n][masks[n]]).sum())
            total += int(masks[n].sum())
        else:
            assert torch.equal(p, before[n]), n
    assert moved > 0.8 * total


def unclipped(phases):
    for phase in phases:
        phase.clip = None
        yield phase


@pytest.mark.parametrize("name", ["toy", "gpt2"])
def test_a_step_is_the_gradient_s_step_for_modules_vectors_entries_and_head_at_their_rates(
    mixed, build, batches, name
):
    model, allocation = mixed(name)
    model, reference = model.double(), build(name).double()
    for one in (model, reference):
        for module in one.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    (batch,) = batches(name, 1)
    rates = {"lr": 0.1, "lr_modules": 0.3, "lr_head": 0.7}
    drawn = sl.add_adapters(reference, allocation.structured, rank=1, seed=5).values()
    a = [module.A.detach().clone() for module in drawn]
    sl.remove_adapters(reference)
    reference(**batch).loss.backward()

    sl.fit(
        model,
        unclipped(spt(model, allocation, epochs=1, seed=5, **rates)),
        [batch],
        optimizer=torch.optim.SGD,
    )
    masks, heads = allocation.selection.masks(), sl.head_weights(reference)
    for n, p in reference.named_parameters():
        gradient = torch.zeros_like(p) if p.grad is None else p.grad
        if n in heads:
            expected = p - 0.7 * gradient
        elif n in allocation.whole:
            expected = p - 0.1 * gradient
        else:
            mask = (
                masks[n]
                if n in allocation.selection.indices
                else torch.zeros_like(p, dtype=torch.bool)
            )
            expected = torch.where(mask, p - 0.1 * gradient, p)
        torch.testing.assert_close(model.get_parameter(n), expected, rtol=0, atol=1e-12, msg=n)
    for n, start, module in zip(allocation.structured, a, sl.adapters(model).values(), strict=True):
        # B starts at zero: A gets no gradient in the first step, B gets the matrix's gradient times
        # A^T.
        gradient = reference.get_parameter(n).grad
        gradient = gradient.t() if name == "gpt2" else gradient
        torch.testing.assert_close(module.A.detach(), start, rtol=0, atol=0)
        torch.testing.assert_close(
            module.B.detach(), -0.3 * gradient @ start.t(), rtol=0, atol=1e-12
        )


def test_single_weights_and_vectors_are_not_decayed_modules_and_head_are(mixed):
    model, allocation = mixed("bert")
    (phase,) = spt(model, allocation, lr=0.1, epochs=2, weight_decay=0.3)
    assert [(group["lr"], group["weight_decay"]) for group in phase.groups] == [
        (0.1, 0.0),
        (0.1, 0.3),
        (0.1, 0.3),
    ]
    sizes = [sum(p.numel() for p in group["params"]) for group in phase.groups]
    counts, head = allocation.counts, sum(p.numel() for p in sl.head_weights(model).values())
    assert sizes == [counts["whole"] + counts["unstructured"], counts["structured"], head]
    assert (phase.name, phase.epochs, phase.selection) == ("spt", 2, allocation.selection)


def test_merged_the_model_has_the_base_s_tensors_alone_and_computes_the_same(mixed, batches):
    found = {}
    for merge in (False, True):
        model, allocation = mixed("bert")
        model = model.double()
        model.bert.pooler.dense.bias.requires_grad_(False)
        keys, classes = list(model.state_dict()), [type(m) for m in model.modules()]
        torch.manual_seed(3)  # dropout
        sl.fit(model, spt(model, allocation, lr=0.01, epochs=2, merge=merge), batches("bert", 2))
        found[merge] = model(**batches("bert", 1)[0]).logits
        assert [n for n, p in model.named_parameters() if not p.requires_grad] == [
            "bert.pooler.dense.bias"
        ]
    assert list(model.state_dict()) == keys
    assert [type(m) for m in model.modules()] == classes
    torch.testing.assert_close(found[True], found[False], rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", ["lora", "adapter"])
@pytest.mark.parametrize("name", ["bert", "llama", "vit"])
def test_after_an_error_the_model_has_its_own_names_classes_and_flags(mixed, batches, name, kind):
    model, allocation = mixed(name, kind)
    next(iter(model.parameters())).requires_grad_(False)
    keys, classes = list(model.state_dict()), [type(m) for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]

    def on_step(record):
        assert len(sl.adapters(model)) == len(allocation.structured)
        if record["step"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sl.fit(model, spt(model, allocation, lr=0.01, epochs=2), batches(name, 2), on_step=on_step)
    assert list(model.state_dict()) == keys
    assert [type(m) for m in model.modules()] == classes
    assert [p.requires_grad for p in model.parameters()] == flags


def test_an_allocation_that_does_not_fit_raises_and_changes_nothing(mixed, build):
    model, allocation = mixed("bert")
    for other, message in (
        (build("vit"), "is not a parameter of this model"),
        (_shorter(build("bert")), r"is for shape"),
    ):
        before, keys = sl.snapshot(other), list(other.state_dict())
        classes = [type(m) for m in other.modules()]
        with pytest.raises(ValueError, match=message):
            spt(other, allocation, lr=0.01, epochs=1)
        assert list(other.state_dict()) == keys
        assert [type(m) for m in other.modules()] == classes
        assert all(
            p.requires_grad and torch.equal(p, before[n]) for n, p in other.named_parameters()
        )
    with pytest.raises(ValueError, match="epochs=0 of phase 'spt'"):
        spt(model, allocation, lr=0.01, epochs=0)
    with pytest.raises(ValueError, match=r"lr_modules=-1.0 of phase 'spt'"):
        spt(model, allocation, lr=0.01, lr_modules=-1.0, epochs=1)
    assert sl.adapters(model) == {}


def _shorter(model):
    """Every small module still fits, the word embeddings do not."""
    model.resize_token_embeddings(40)
    return model


def test_an_adapter_cannot_be_merged(mixed):
    model, allocation = mixed("bert", "adapter")
    with pytest.raises(ValueError, match="merge=True, but kind='adapter' cannot be merged"):
        spt(model, allocation, lr=0.01, epochs=1, merge=True)
    assert sl.adapters(model) == {}


def test_small_modules_that_were_there_before_stay_as_they_are(build, sensitivity, batches):
    model, other = build("bert"), "bert.pooler.dense.weight"
    allocation = allocate(model, sensitivity("bert"), 300, rank=1, exclude=other)
    (own,) = sl.add_adapters(model, other, rank=1).values()
    before = [p.detach().clone() for p in own.parameters()]
    method = spt(model, allocation, lr=0.01, epochs=1)
    next(iter(method))
    method.close()  # as after an error
    assert list(sl.adapters(model)) == [other]
    sl.fit(model, spt(model, allocation, lr=0.01, epochs=1, merge=True), batches("bert", 2))
    assert list(sl.adapters(model)) == [other]
    assert all(torch.equal(a, b) for a, b in zip(before, own.parameters(), strict=True))


def test_whole_vectors_and_head_of_a_bfloat16_model_train_as_float32_masters(
    build, sensitivity, batches
):
    model = build("bert").bfloat16()
    scores = {n: s.float() for n, s in sensitivity("bert").items()}
    allocation = allocate(model, scores, small_budget(model), rank=1)
    assert allocation.whole
    before = sl.snapshot(model)
    (phase,) = spt(model, allocation, lr=0.01, epochs=1)
    trained = [p for n in (0, 2) for p in phase.groups[n]["params"]]
    assert {p.dtype for p in trained} == {torch.float32}
    sl.remove_adapters(model)
    sl.fit(model, spt(model, allocation, lr=1e-5, epochs=8), batches("bert", 4))
    moved = [n for n in allocation.whole if not torch.equal(model.get_parameter(n), before[n])]
    assert moved  # steps of 1e-5 are lost in bfloat16 itself


def test_a_model_of_several_dtypes_trains(mixed, batches):
    model, allocation = mixed("toy")
    assert "first.weight" in allocation.structured
    model.first.double()
    model.norm.double()
    model.embedding.double()
    model.scale = model.scale.double()
    model.dropout.register_forward_hook(lambda module, inputs, output: output.float())
    sl.fit(model, spt(model, allocation, lr=0.01, epochs=1), batches("toy", 2))
    assert {p.dtype for p in sl.adapters(model)["first.weight"].parameters()} == {torch.float64}
    assert all(
        p.dtype == model.get_parameter(n).dtype
        for n, m in sl.adapters(model).items()
        for p in m.parameters()
    )


# Shipped


@pytest.mark.parametrize("kind", ["lora", "adapter"])
@pytest.mark.parametrize("name", ["vit", "llama", "gpt2"])
def test_the_mixture_travels_in_one_file_and_goes_without_a_trace(
    mixed, build, batches, tmp_path, name, kind
):
    model, allocation = mixed(name, kind)
    base, batch = build(name), batches(name, 1)[0]
    sl.fit(model, spt(model, allocation, lr=0.01, epochs=3), batches(name, 3))
    delta = sl.diff(base, model, method="spt")
    assert set(delta.modules) == set(allocation.structured)
    assert 0.8 * allocation.charged < delta.count <= allocation.charged
    delta.save(tmp_path / "spt.safetensors")

    keys, before, flags = (
        list(base.state_dict()),
        sl.snapshot(base),
        [p.requires_grad for p in base.parameters()],
    )
    classes, plain = [type(m) for m in base.modules()], base(**batch).logits
    loaded = sl.load(tmp_path / "spt.safetensors")
    assert set(loaded.modules) == set(allocation.structured)
    applied = loaded.apply(base)
    expected = dict(model.named_parameters())
    assert {n for n, _ in base.named_parameters()} == set(expected)
    assert all(torch.equal(p, expected[n]) for n, p in base.named_parameters())
    assert torch.equal(base(**batch).logits, model(**batch).logits)
    assert not torch.equal(plain, base(**batch).logits)
    applied.revert()
    assert list(base.state_dict()) == keys
    assert [type(m) for m in base.modules()] == classes
    assert [p.requires_grad for p in base.parameters()] == flags
    assert all(
        p.detach().numpy().tobytes() == before[n].numpy().tobytes()
        for n, p in base.named_parameters()
    )
    assert torch.equal(base(**batch).logits, plain)
