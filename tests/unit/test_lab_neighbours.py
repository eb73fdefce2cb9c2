"""The neighbours that no library has: each equal to its formula by hand, and each refusal."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import selective_lite as sl
from selective_lite.kernels.small import Adapter
from selective_lite.lab.neighbours import dylora, fusion, hub, low_rank, proxy, quantize, relora
from selective_lite.layers.small import adapters, add_adapters

DOUBLE = {"dtype": torch.float64}
NAMES = ["a.weight", "b.weight"]


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(6, 5, **DOUBLE), nn.Linear(5, 4, **DOUBLE)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


def batches(count=6):
    generator = torch.Generator().manual_seed(1)
    return [
        tuple(torch.randn(8, size, generator=generator, **DOUBLE) for size in (6, 4))
        for _ in range(count)
    ]


def loss(model, batch):
    return nn.functional.mse_loss(model(batch[0]), batch[1])


# Quantization


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_grid_is_the_one_of_torch_and_no_error_is_over_half_a_step(bits):
    weight = torch.randn(7, 9, generator=torch.Generator().manual_seed(0))
    most = 2 ** (bits - 1) - 1
    zero = torch.zeros(7, dtype=torch.int32)
    whole, rows = (quantize.quantize(weight, bits, per) for per in ("tensor", "row"))
    expected = torch.fake_quantize_per_tensor_affine(weight, whole.scale, zero[0], -most, most)
    torch.testing.assert_close(whole.values, expected)
    scale = rows.scale.flatten()
    expected = torch.fake_quantize_per_channel_affine(weight, scale, zero, 0, -most, most)
    torch.testing.assert_close(rows.values, expected)
    for one in (whole, rows):
        assert ((one.values - weight).abs() <= one.scale / 2 * (1 + 1e-5)).all()
        assert one.codes.abs().max() == most
    assert (rows.values - weight).square().sum() < (whole.values - weight).square().sum()
    assert rows.bytes == 63 * bits / 8 + 7 * 4


def test_a_row_of_zeros_stays_zero():
    weight = torch.stack([torch.zeros(3), torch.ones(3)])
    assert torch.equal(quantize.quantize(weight, 4, "row").values, weight)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((torch.ones(2, 2), 1), "bits=1"),
        ((torch.ones(2, 2), True), "bits=True"),
        ((torch.ones(2, 2), 4, "column"), "per='column'"),
        ((torch.ones(2), 4, "row"), "needs rows"),
        ((torch.tensor([1.0, float("nan")]), 4), "finite"),
    ],
)
def test_what_cannot_be_quantized_is_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        quantize.quantize(*arguments)


def test_a_model_is_quantized_in_its_matrices_or_not_at_all():
    model = Toy()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="holds 'c.weight'"):
        quantize.quantize_model(model, 4, names=["a.weight", "c.weight"])
    with torch.no_grad():
        model.b.weight[0, 0] = float("inf")
    with pytest.raises(ValueError, match="finite"):
        quantize.quantize_model(model, 4)
    assert torch.equal(model.a.weight, before["a.weight"])
    model.load_state_dict(before)
    found = quantize.quantize_model(model, 4)
    assert list(found) == NAMES
    assert torch.equal(model.a.weight, found["a.weight"].values)
    assert torch.equal(model.a.bias, before["a.bias"])


# Low rank


def test_a_truncation_is_the_nearest_matrix_of_its_rank():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 6, generator=generator, **DOUBLE)
    A, B = low_rank.truncated(weight, 3)
    assert (A.shape, B.shape) == ((3, 6), (8, 3))
    error = (weight - B @ A).square().sum()
    tail = torch.linalg.svdvals(weight)[3:].square().sum()
    torch.testing.assert_close(error, tail)  # Eckart and Young
    for _ in range(50):
        other = torch.randn(8, 3, generator=generator, **DOUBLE)
        fitted = torch.linalg.lstsq(other, weight).solution
        assert (weight - other @ fitted).square().sum() > error
    for rank in (0, 7, True):
        with pytest.raises(ValueError, match=f"rank={rank}"):
            low_rank.truncated(weight, rank)


def test_how_many_ranks_and_entries_hold_a_share():
    left, right = torch.eye(6, **DOUBLE)[:2], torch.eye(5, **DOUBLE)[:2]
    weight = left.T @ torch.diag(torch.tensor([3.0, 1.0], **DOUBLE)) @ right  # squares 9 and 1
    assert [low_rank.rank_for(weight, share) for share in (0.5, 0.9, 0.95, 1.0)] == [1, 1, 2, 2]
    assert [low_rank.entries_for(weight, share) for share in (0.9, 1.0)] == [1, 2]
    ones = torch.ones(4, 4)
    assert (low_rank.rank_for(ones), low_rank.entries_for(ones, 0.9)) == (1, 15)
    with pytest.raises(ValueError, match="not zero"):
        low_rank.rank_for(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="share=0"):
        low_rank.entries_for(ones, 0)


# ReLoRA


def test_a_restart_leaves_what_the_model_computes():
    model, x = Toy(), batches(1)[0][0]
    for module in add_adapters(model, NAMES, rank=2).values():
        nn.init.normal_(module.B)
    before, start = model(x), model.a.weight.clone()
    difference = adapters(model)["a.weight"].difference()
    relora.restart(model, torch.Generator().manual_seed(3))
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model.a.weight, start + difference, rtol=1e-12, atol=1e-12)
    assert not any(module.B.any() for module in adapters(model).values())


def test_ranks_add_up_over_cycles():
    spread = {}
    for cycles in (1, 3):
        model = Toy()
        start = model.a.weight.detach().clone()
        method = relora.relora(model, NAMES, rank=1, lr=0.02, epochs=3, cycles=cycles)
        sl.fit(model, method, batches(), loss=loss)
        module = adapters(model)["a.weight"]
        values = torch.linalg.svdvals(model.a.weight.detach() + module.difference() - start)
        spread[cycles] = int((values > 1e-6 * values[0]).sum())
    assert spread == {1: 1, 3: 3}


def test_a_restart_forgets_all_but_the_largest_of_the_optimizers_state():
    weight = nn.Parameter(torch.zeros(10))
    optimizer = torch.optim.Adam([weight])
    weight.grad = torch.arange(10.0)
    optimizer.step()
    relora.forget(optimizer, 0.3)
    state = optimizer.state[weight]
    assert [state[name].nonzero().flatten().tolist() for name in ("exp_avg", "exp_avg_sq")] == [
        [7, 8, 9],
        [7, 8, 9],
    ]
    assert state["step"] == 1


def test_the_rate_rises_and_falls_in_each_cycle():
    rates = [relora.jagged(step / 40, 2, 0.25) for step in range(40)]
    assert rates[0] == rates[20] == 0
    assert rates[5] == rates[25] == pytest.approx(1)
    assert rates[:20] == pytest.approx(rates[20:], abs=1e-6)
    assert rates[19] < 0.05


@pytest.mark.parametrize(("option", "value"), [("cycles", 0), ("warmup", 2.0), ("kept", -0.1)])
def test_relora_refuses_before_it_touches_the_model(option, value):
    model = Toy()
    with pytest.raises(ValueError, match=f"{option}={value}"):
        relora.relora(
            model, NAMES, **{"rank": 1, "lr": 0.1, "epochs": 1, "cycles": 2, option: value}
        )
    assert not adapters(model)


# DyLoRA


def test_the_first_ranks_compute_without_the_rest():
    model, x = Toy(), batches(1)[0][0]
    method = dylora.dylora(model, ["a.weight"], rank=3, lr=0.05, epochs=4)
    sl.fit(model, method, batches(), loss=loss)
    module = adapters(model)["a.weight"]
    assert module.used == 3
    assert module.B.detach().abs().sum(0).all()  # every rank was trained
    for ranks in (1, 2, 3):
        dylora.use(model, ranks)
        part = module.B[:, :ranks] @ module.A[:ranks]
        torch.testing.assert_close(model.a(x) - nn.functional.linear(x, part), by_base(model, x))
        torch.testing.assert_close(module.difference(), part)
    for ranks in (0, 4, True):
        with pytest.raises(ValueError, match=f"ranks={ranks}"):
            dylora.use(model, ranks)
    with pytest.raises(ValueError, match="no DyLoRA"):
        dylora.use(Toy(), 1)


def by_base(model, x):
    return nn.functional.linear(x, model.a.weight, model.a.bias)


def test_unused_ranks_get_no_gradient():
    model = Toy()
    dylora.dylora(model, ["a.weight"], rank=3, lr=0.05, epochs=1)
    module = adapters(model)["a.weight"]
    nn.init.normal_(module.B)
    dylora.use(model, 2)
    loss(model, batches(1)[0]).backward()
    assert module.A.grad[:2].abs().sum(1).all()
    assert not module.A.grad[2].any()
    assert not module.B.grad[:, 2].any()


def test_a_rank_over_the_matrix_is_refused():
    model = Toy()
    with pytest.raises(ValueError, match="rank=5 does not fit 'b.weight'"):
        dylora.dylora(model, NAMES, rank=5, lr=0.1, epochs=1)
    assert not adapters(model)


# LoRAHub


def loras(seed, rank=2):
    generator = torch.Generator().manual_seed(seed)
    parts = (torch.randn(*shape, generator=generator, **DOUBLE) for shape in ((rank, 6), (5, rank)))
    return {"a.weight": tuple(parts)}


def test_a_weighted_lora_has_the_sums_of_the_factors():
    one, two = loras(0), loras(1)
    A, B = hub.combined([one, two], [0.5, -1.0])["a.weight"]
    (A1, B1), (A2, B2) = one["a.weight"], two["a.weight"]
    by_hand = 0.25 * B1 @ A1 - 0.5 * (B1 @ A2 + B2 @ A1) + B2 @ A2  # with cross terms
    torch.testing.assert_close(B @ A, by_hand)


def test_weights_are_found_without_gradients_and_within_the_evaluations():
    asked = []

    def bowl(weights):
        asked.append(weights)
        return (weights[0] - 0.7) ** 2 + (weights[1] + 0.4) ** 2

    found = hub.weigh(bowl, 2, l1=0.0, evaluations=60)
    assert asked[0] == [0, 0]
    assert len(asked) <= 61
    np.testing.assert_allclose(found, [0.7, -0.4], atol=0.02)
    bounded = hub.weigh(lambda weights: -sum(weights), 2, bound=0.6, evaluations=60)
    assert (np.abs(bounded) <= 0.6).all()
    assert (np.abs(hub.weigh(bowl, 2, l1=5.0, evaluations=60)) < 0.05).all()


def test_a_hub_of_one_or_of_several_bases_is_refused():
    with pytest.raises(ValueError, match="hub has 1 LoRA"):
        hub.combined([loras(0)], [1.0])
    with pytest.raises(ValueError, match=r"hub\[1\] differs from hub\[0\] in 'a.weight'"):
        hub.combined([loras(0), loras(1, rank=3)], [1.0, 1.0])
    with pytest.raises(ValueError, match="weights has 3 numbers for 2"):
        hub.combined([loras(0), loras(1)], [1.0, 1.0, 1.0])
    with pytest.raises(ValueError, match="count=1"):
        hub.weigh(sum, 1)
    with pytest.raises(ValueError, match="evaluations=3"):
        hub.weigh(sum, 2, evaluations=3)


# Proxy-tuning


def language_model(seed, width, vocabulary=11):
    torch.manual_seed(seed)
    sizes = {"n_embd": width, "n_layer": 1, "n_head": 2, "n_positions": 16}
    return GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, **sizes)).eval()


def test_proxy_logits_are_the_large_models_and_the_small_ones_difference():
    large, tuned, untuned = (
        language_model(seed, width) for seed, width in ((0, 8), (1, 4), (2, 4))
    )
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    steered = proxy.ProxyTuned(large, tuned, untuned, scale=1.5)
    by_hand = large(ids).logits + 1.5 * (tuned(ids).logits - untuned(ids).logits)
    torch.testing.assert_close(steered(ids), by_hand)
    same = proxy.ProxyTuned(large, tuned, tuned)
    torch.testing.assert_close(same(ids), large(ids).logits)
    longer = same.generate(ids, 3)
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(longer, large.generate(ids, attention_mask=torch.ones_like(ids), **options))
    with pytest.raises(ValueError, match="tokens=0"):
        steered.generate(ids, 0)


def test_proxies_of_another_vocabulary_are_refused():
    with pytest.raises(ValueError, match="vocabularies differ"):
        proxy.ProxyTuned(language_model(0, 8), language_model(1, 4), language_model(2, 4, 12))


# AdapterFusion


def trained_adapters(seed, width=5):
    generator = torch.Generator().manual_seed(seed)
    one = Adapter(6, width, 2, generator=generator, like=torch.zeros((), **DOUBLE))
    for part in one.parameters():
        nn.init.normal_(part, generator=generator)
    return {"a.weight": one}


def test_fusion_is_attention_over_the_adapters_by_a_loop():
    model, tasks = Toy(), [trained_adapters(seed) for seed in range(3)]
    x = batches(1)[0][0]
    y = by_base(model, x)
    fused = fusion.fuse(model, tasks)["a.weight"]
    for part in (fused.query, fused.key, fused.value):
        nn.init.normal_(part)
    rows = []
    for i in range(len(x)):
        said = [task["a.weight"](x[i], y[i]) for task in tasks]
        scores = torch.stack([(fused.query @ y[i]) @ (fused.key @ one) for one in said]).exp()
        rows.append(
            sum(s / scores.sum() * (fused.value @ o) for s, o in zip(scores, said, strict=True))
        )
    torch.testing.assert_close(model.a(x), torch.stack(rows))
    model.a(x).sum().backward()
    trained = {name for name, p in fused.named_parameters() if p.grad is not None}
    assert trained == {"query", "key", "value"}


def test_fusing_adapters_that_agree_changes_nothing_at_the_start():
    model, one = Toy(), trained_adapters(0)
    x = batches(1)[0][0]
    alone = one["a.weight"](x, by_base(model, x))
    fusion.fuse(model, [one, copy.deepcopy(one)])
    torch.testing.assert_close(model.a(x), alone)


def test_what_cannot_be_fused_is_refused():
    model = Toy()
    with pytest.raises(ValueError, match="tasks has 1 set"):
        fusion.fuse(model, [trained_adapters(0)])
    with pytest.raises(ValueError, match=r"tasks\[1\] has adapters behind other layers"):
        fusion.fuse(model, [trained_adapters(0), {}])
    with pytest.raises(ValueError, match="belongs to another base"):
        fusion.fuse(model, [trained_adapters(0), trained_adapters(1, width=4)])
    assert not adapters(model)
