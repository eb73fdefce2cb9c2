"""Small modules: they start as nothing, compute their formula, and come out or merge.

They live beside masked training.
"""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

import selective_lite as sl
from selective_lite.layers.small import (
    adapter_parameters,
    attach_module,
    find_layers,
    linear_sizes,
    linear_weights,
)
from selective_lite.methods.spt.allocation import adapter_size

MODELS = ("toy", "bert", "llama", "gpt2")
KINDS = ("lora", "adapter")


def linear_names(model):
    """The weights of all linear layers that are not tied."""
    shared = [
        p
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for p in module.parameters()
    ]
    found = (
        (f"{path}.weight", module) for path, module in model.named_modules() if linear_sizes(module)
    )
    return [name for name, module in found if not any(module.weight is p for p in shared)]


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def stir(model, seed=0):
    """Random numbers in every small module, as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapter_parameters(model).values():
            p.copy_(torch.randn(p.shape, generator=generator) / 4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_new_modules_change_nothing_and_leave_every_name(build, batches, name, kind):
    model, (batch,) = build(name), batches(name, 1)
    expected, keys, before = logits(model, batch), list(model.state_dict()), sl.snapshot(model)
    names = linear_names(model)
    made = sl.add_adapters(model, names, kind=kind, rank=2)
    assert list(made) == names
    assert torch.equal(logits(model, batch), expected)
    assert [key for key in model.state_dict() if ".adapter." not in key] == keys
    now = sl.snapshot(model)
    assert all(torch.equal(now[n], p) for n, p in before.items())
    assert {n: id(m) for n, m in sl.adapters(model).items()} == {n: id(m) for n, m in made.items()}
    stir(model)
    assert not torch.allclose(logits(model, batch), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_taking_them_out_gives_back_an_ordinary_model(build, batches, name, kind):
    model, (batch,) = build(name), batches(name, 1)
    model.get_parameter(linear_names(model)[0]).requires_grad_(False)
    expected, classes = logits(model, batch), [type(module) for module in model.modules()]
    objects = {n: (id(p), p.requires_grad) for n, p in model.named_parameters()}
    sl.add_adapters(model, linear_names(model), kind=kind, rank=2)
    stir(model)
    sl.remove_adapters(model)
    assert {n: (id(p), p.requires_grad) for n, p in model.named_parameters()} == objects
    assert [type(module) for module in model.modules()] == classes
    assert torch.equal(logits(model, batch), expected)
    assert sl.adapters(model) == {}


def layers():
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    return {
        "Linear": nn.Linear(5, 7).double(),
        "no bias": nn.Linear(5, 7, bias=False).double(),
        "Conv1D": Conv1D(7, 5).double(),
    }


@pytest.mark.parametrize("name", ["Linear", "no bias", "Conv1D"])
def test_lora_adds_b_a_x_to_the_layer(name):
    layer, x = layers()[name], torch.randn(2, 3, 5, dtype=torch.float64)
    matrix = layer.weight.detach().t() if name == "Conv1D" else layer.weight.detach()
    bias = 0 if layer.bias is None else layer.bias.detach()
    (module,) = sl.add_adapters(layer, ["weight"], rank=3).values()
    stir(layer)
    expected = torch.einsum("oi,bti->bto", matrix + module.B @ module.A, x) + bias
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)

    weight = torch.randn(2, 3, 7, dtype=torch.float64)
    (layer(x) * weight).sum().backward()
    d = torch.einsum("bto,bti->oi", weight, x)  # the gradient of a full difference D = B A
    torch.testing.assert_close(module.A.grad, module.B.detach().t() @ d, rtol=0, atol=1e-12)
    torch.testing.assert_close(module.B.grad, d @ module.A.detach().t(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["Linear", "Conv1D"])
def test_an_adapter_adds_its_bottleneck_s_output_to_the_layer_s(name):
    layer, x = layers()[name], torch.randn(2, 3, 5, dtype=torch.float64)
    y = layer(x).detach()
    (module,) = sl.add_adapters(layer, "weight", kind="adapter", rank=3).values()
    stir(layer)
    hidden = torch.stack(
        [functional.gelu(module.down @ v + module.down_bias) for v in y.reshape(-1, 7)]
    )
    expected = y + (hidden @ module.up.t() + module.up_bias).reshape(y.shape)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_the_charge_is_the_number_of_weights(kind):
    layer = nn.Linear(5, 7)
    (module,) = sl.add_adapters(layer, "weight", kind=kind, rank=3).values()
    expected = {"lora": 3 * (5 + 7), "adapter": 2 * 3 * 7 + 3 + 7}[kind]
    assert adapter_size(kind, 5, 7, 3) == sum(p.numel() for p in module.parameters()) == expected
    assert sum(p.numel() for p in adapter_parameters(layer).values()) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_what_does_not_start_at_zero_is_drawn_from_the_seed_within_its_bound(kind):
    drawn = {}
    for seed in (0, 0, 1):
        model = nn.Sequential(nn.Linear(16, 25), nn.Linear(25, 16))
        made = sl.add_adapters(model, ["0.weight", "1.weight"], kind=kind, rank=16, seed=seed)
        found = [p.detach() for m in made.values() for p in m.parameters() if p.any()]
        assert len(found) == 2  # one of each module, the rest is zero
        if seed in drawn:
            assert all(torch.equal(a, b) for a, b in zip(found, drawn[seed], strict=True))
        drawn[seed] = found
    for tensor, width in zip(drawn[0], (16, 25) if kind == "lora" else (25, 16), strict=True):
        bound = width**-0.5
        assert 0.95 * bound < tensor.max() <= bound
        assert -bound <= tensor.min() < -0.95 * bound
    assert not torch.equal(drawn[0][0], drawn[1][0])


@pytest.mark.parametrize("name", MODELS)
def test_merging_computes_what_the_modules_did_with_the_base_s_tensors_alone(build, batches, name):
    model, (batch,) = build(name).double(), batches(name, 1)
    keys, before = list(model.state_dict()), sl.snapshot(model)
    names = linear_names(model)
    sl.add_adapters(model, names, rank=2)
    stir(model)
    expected = logits(model, batch)
    sl.merge_adapters(model)
    assert list(model.state_dict()) == keys
    torch.testing.assert_close(logits(model, batch), expected, rtol=0, atol=1e-10)
    assert {n for n, p in model.named_parameters() if not torch.equal(p, before[n])} == set(names)


def test_half_precision_merges_with_one_rounding():
    layer = nn.Linear(64, 64).bfloat16()
    (module,) = sl.add_adapters(layer, "weight", rank=8).values()
    stir(layer)
    exact = layer.weight.double() + module.B.double() @ module.A.double()
    sl.merge_adapters(layer)
    spacing = torch.exp2(torch.floor(torch.log2(exact.abs().clamp_min(1e-30))) - 7)
    assert layer.weight.dtype == torch.bfloat16
    assert ((layer.weight.double() - exact).abs() <= 0.5001 * spacing).all()


def test_some_may_be_merged_and_others_taken_out(build):
    model = build("bert")
    one, other, third = linear_names(model)[:3]
    sl.add_adapters(model, [one, other, third], rank=2)
    stir(model)
    before = sl.snapshot(model)
    sl.remove_adapters(model, one)
    sl.merge_adapters(model, [other])
    assert list(sl.adapters(model)) == [third]
    assert torch.equal(model.get_parameter(one), before[one])
    assert not torch.equal(model.get_parameter(other), before[other])


def test_an_adapter_cannot_be_merged_and_nothing_is(build):
    model = build("bert")
    one, other = linear_names(model)[:2]
    sl.add_adapters(model, one, rank=2)
    sl.add_adapters(model, other, kind="adapter", rank=2)
    stir(model)
    before = sl.snapshot(model)
    with pytest.raises(
        ValueError, match=f"'{other}' is a bottleneck Adapter, which cannot be merged"
    ):
        sl.merge_adapters(model)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_a_deep_copy_trains_by_itself(build, batches):
    model, (batch,) = build("gpt2"), batches("gpt2", 1)
    made = sl.add_adapters(model, linear_names(model), rank=2)
    stir(model)
    before, twin = logits(model, batch), copy.deepcopy(model)
    assert torch.equal(logits(twin, batch), before)
    optimizer = torch.optim.SGD(adapter_parameters(twin).values(), lr=0.5)
    twin(**batch).loss.backward()
    optimizer.step()
    assert not torch.equal(logits(twin, batch), before)
    assert torch.equal(logits(model, batch), before)
    sl.remove_adapters(twin)
    assert sl.adapters(model) == made


def test_a_state_assigned_to_a_model_with_modules_is_used(build, batches):
    model, other, (batch,) = build("bert"), build("bert", seed=1), batches("bert", 1)
    for one in (model, other):
        sl.add_adapters(one, linear_names(one), rank=2)
    stir(other)
    model.load_state_dict(other.state_dict(), assign=True)
    assert torch.equal(logits(model, batch), logits(other, batch))


def shared():
    """Two linear layers that share a weight, and an input."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(3, 4), "b": nn.Linear(3, 4)})
    model["b"].weight = model["a"].weight
    return model, torch.randn(2, 3)


def test_layers_that_share_a_weight_share_a_module_and_are_merged_once():
    model, x = shared()
    (module,) = sl.add_adapters(model, "a.weight", rank=2).values()
    assert model["a"].adapter is model["b"].adapter is module
    assert list(sl.adapters(model)) == ["a.weight"]
    stir(model)
    expected = [model[name](x) for name in "ab"]
    sl.merge_adapters(model)
    assert model["b"].weight is model["a"].weight
    for name, y in zip("ab", expected, strict=True):
        torch.testing.assert_close(model[name](x), y)


@pytest.mark.parametrize("kind", KINDS)
def test_a_shared_module_is_taken_out_of_all_its_layers_and_travels_in_a_delta(kind):
    base, x = shared()
    model = copy.deepcopy(base)
    sl.add_adapters(model, "a.weight", kind=kind, rank=2)
    stir(model)
    plain, expected = base["b"](x), model["b"](x)
    assert not torch.equal(plain, expected)
    with sl.diff(base, model).apply(base):
        assert torch.equal(base["b"](x), expected)
    sl.remove_adapters(model)
    for one in (base, model):
        assert torch.equal(one["b"](x), plain)
        assert [type(m) for m in one.values()] == [nn.Linear, nn.Linear]


class Product(nn.Module):
    """y + u v x, a rank-one difference in float32 beside whatever precision."""

    kind = "product"

    def __init__(self):
        super().__init__()
        self.u, self.v = nn.Parameter(torch.randn(4, 1)), nn.Parameter(torch.randn(1, 3))

    def forward(self, x, y):
        return y + (x.to(self.v.dtype) @ self.difference().t()).to(y.dtype)

    def difference(self):
        return self.u.detach() @ self.v.detach()


@pytest.mark.parametrize("name", ["Linear", "Conv1D"])
def test_a_module_of_ones_own_is_attached_and_merges_with_one_rounding(name):
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4) if name == "Linear" else Conv1D(4, 3)).bfloat16()
    weight, keys, module = model[0].weight.detach().clone(), list(model.state_dict()), Product()
    ((layers, d_in, d_out),) = find_layers(model, {"0.weight": 1}).values()
    assert (layers, d_in, d_out) == ([model[0]], 3, 4)
    attach_module(layers, module)
    assert model(torch.randn(2, 3).bfloat16()).dtype == torch.bfloat16
    assert sl.adapters(model) == {"0.weight": module}
    with pytest.raises(
        ValueError,
        match=r"tuned has a small module of kind 'product' at '0\.weight'; merge it first",
    ):
        sl.diff({n: p.detach() for n, p in model.named_parameters() if "adapter" not in n}, model)
    sl.merge_adapters(model)
    difference = module.difference() if name == "Linear" else module.difference().t()
    assert torch.equal(model[0].weight, (weight.float() + difference).bfloat16())
    assert list(model.state_dict()) == keys


def test_every_linear_layer_outside_the_head_can_have_a_module(build):
    assert linear_weights(build("toy")) == ["first.weight", "second.weight"]
    assert linear_weights(build("toy"), head=("second",)) == ["first.weight", "classifier.weight"]
    assert len(linear_weights(build("bert"))) == 2 * 6 + 1
    assert not any("classifier" in name for name in linear_weights(build("bert")))
    assert linear_weights(shared()[0]) == ["a.weight"]


def test_a_matrix_tied_to_an_embedding_cannot(build):
    assert len(linear_weights(build("llama"))) == 2 * 7
    assert not any("lm_head" in name or "embed" in name for name in linear_weights(build("llama")))
    assert [name.split(".", 3)[-1] for name in linear_weights(build("gpt2"))][:4] == [
        "attn.c_attn.weight",
        "attn.c_proj.weight",
        "mlp.c_fc.weight",
        "mlp.c_proj.weight",
    ]


def test_targets_are_ends_of_names_at_a_dot(build):
    model = build("bert")
    names = linear_weights(model, ("attention.output.dense", "query"))
    assert len(names) == 4
    assert all(name.endswith(("query.weight", "attention.output.dense.weight")) for name in names)
    assert "query" in names[0]  # in model order
    assert linear_weights(build("toy"), "first") == ["first.weight"]
    assert linear_weights(shared()[0], "b") == ["a.weight"]


@pytest.mark.parametrize(
    ("kind", "target"),
    [
        ("bert", "uery"),
        ("bert", "classifier"),
        ("bert", "word_embeddings"),
        ("bert", "attention"),
        ("llama", "lm_head"),
        ("toy", "norm"),
    ],
)
def test_a_target_that_names_nothing_fitting_raises(build, kind, target):
    with pytest.raises(
        ValueError,
        match=f"targets names '{target}', which is no nn.Linear or Conv1D outside the head",
    ):
        linear_weights(build(kind), (target,))


def test_a_model_without_a_plain_layer_raises():
    for model, _ in (_scaled(), _replaced(), (nn.Sequential(nn.Embedding(3, 3)), "")):
        with pytest.raises(ValueError, match=r"no nn\.Linear or Conv1D outside its head"):
            linear_weights(model)


@pytest.mark.parametrize("kind", KINDS)
def test_modules_have_the_dtype_and_device_of_their_weight(kind):
    model = nn.Sequential(
        nn.Linear(4, 4).bfloat16(),
        nn.Linear(4, 4, dtype=torch.float64),
        nn.Linear(4, 4, device="meta"),
    )
    made = list(
        sl.add_adapters(model, ["0.weight", "1.weight", "2.weight"], kind=kind, rank=2).values()
    )
    for module, dtype, device in zip(
        made, (torch.bfloat16, torch.float64, torch.float32), ("cpu", "cpu", "meta"), strict=True
    ):
        assert {(p.dtype, p.device.type) for p in module.parameters()} == {(dtype, device)}


@pytest.mark.usefixtures("meta_default")
@pytest.mark.parametrize("kind", KINDS)
def test_modules_are_made_beside_the_weights(kind):
    layer = nn.Linear(4, 3, device="cpu")
    sl.add_adapters(layer, "weight", kind=kind, rank=2)
    out = layer(torch.ones(2, 4, device="cpu"))
    out.sum().backward()
    assert {p.grad.device.type for p in adapter_parameters(layer).values()} == {"cpu"}
    if kind == "lora":
        sl.merge_adapters(layer)
    assert layer.weight.device.type == "cpu"


def test_modules_follow_their_layer_s_mode(build):
    model = build("bert").train()
    assert all(m.training for m in sl.add_adapters(model, linear_names(model)[:1], rank=1).values())
    model.eval()
    assert not any(
        m.training for m in sl.add_adapters(model, linear_names(model)[1:2], rank=1).values()
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_a_bias_is_trained_in_part_beside_a_module(build, batches, name, kind):
    # Against the same model without masked training: the forward, and the gradient of every module
    # and bias entry.
    model, (batch,) = build(name).double(), batches(name, 1)
    names = linear_names(model)
    sl.add_adapters(model, names, kind=kind, rank=2)
    stir(model)
    biases = [
        n
        for n in model.state_dict()
        if n.endswith(".bias") and n.removesuffix("bias") + "weight" in names
    ]
    expected = model(**batch)
    expected.loss.backward()
    modules = adapter_parameters(model)
    gradients = {n: model.get_parameter(n).grad.clone() for n in (*biases, *modules)}
    shapes = {n: tuple(model.get_parameter(n).shape) for n in biases}
    selection = sl.Selection({n: torch.tensor([0, 2]) for n in biases}, shapes)
    classes, flags = (
        [type(m) for m in model.modules()],
        [p.requires_grad for p in model.parameters()],
    )
    with sl.masked(model, selection, dense=tuple(modules)) as training:
        found = model(**batch)
        assert torch.equal(found.logits, expected.logits)
        found.loss.backward()
        for n, vector in zip(biases, training.parameters(), strict=True):
            torch.testing.assert_close(vector.grad, gradients[n][[0, 2]], rtol=1e-9, atol=1e-12)
        for n, p in modules.items():
            torch.testing.assert_close(p.grad, gradients[n], rtol=1e-9, atol=1e-12)
        assert not model.get_parameter(names[0]).requires_grad
        for act in (sl.remove_adapters, sl.merge_adapters):
            with pytest.raises(
                ValueError, match=f"'{names[0]}' is in masked training; leave that first"
            ):
                act(model)
    assert [type(m) for m in model.modules()] == classes
    assert [p.requires_grad for p in model.parameters()] == flags
    sl.remove_adapters(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in build(name).modules()]


def _scaled():
    class Scaled(nn.Linear):
        pass

    return nn.Sequential(Scaled(3, 3)), "0.weight"


def _tied():
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Embedding(3, 3)})
    model["b"].weight = model["a"].weight
    return model, "a.weight"


def _twice():
    model = nn.Sequential(nn.Linear(3, 3))
    sl.add_adapters(model, "0.weight", rank=1)
    return model, "0.weight"


def _masked():
    model = nn.Sequential(nn.Linear(3, 3))
    sl.masked(model, sl.Selection({"0.bias": torch.tensor([1])}, {"0.bias": (3,)}))
    return model, "0.weight"


def _replaced():
    model = nn.Sequential(nn.Linear(3, 3))
    model[0].forward = model[0].forward
    return model, "0.weight"


def _integers():
    model = nn.Sequential(nn.Linear(3, 3))
    model[0].weight = nn.Parameter(torch.ones(3, 3, dtype=torch.int8), requires_grad=False)
    return model, "0.weight"


def _plain(d_in=3, d_out=4):
    return nn.Sequential(nn.Linear(d_in, d_out)), "0.weight"


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (
            lambda: (_plain()[0], "0.wieght"),
            {},
            "'rest.0.wieght', which is not a parameter of this model",
        ),
        (
            lambda: (_plain()[0], "0.bias"),
            {},
            "'rest.0.bias' belongs to a Linear; only floating-point weights",
        ),
        (
            lambda: (nn.Sequential(nn.Embedding(3, 4)), "0.weight"),
            {},
            "'rest.0.weight' belongs to a Embedding",
        ),
        (_scaled, {}, "'rest.0.weight' belongs to a Scaled"),
        (_integers, {}, "'rest.0.weight' belongs to a Linear; only floating-point weights"),
        (_tied, {}, "'rest.a.weight' belongs to a Linear and a Embedding; only"),
        (_twice, {}, "layer of 'rest.0.weight' has a small module already"),
        (_masked, {}, "layer of 'rest.0.weight' is in masked training"),
        (_replaced, {}, "'rest.0.weight' is in a layer whose forward was replaced"),
        (_plain, {"rank": 4}, "rank=4 does not fit 'rest.0.weight'; give an int from 1 to 3"),
        (
            lambda: _plain(4, 3),
            {"rank": 4},
            "rank=4 does not fit 'rest.0.weight'; give an int from 1 to 3",
        ),
        (_plain, {"rank": 0}, "rank=0 does not fit"),
        (_plain, {"rank": 1.0}, "rank=1.0 does not fit"),
        (_plain, {"rank": True}, "rank=True does not fit"),
        (_plain, {"kind": "dora"}, "kind='dora' is unknown; choose one of"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_have_a_module_raises_and_the_model_is_as_it_was(make, options, message, kind):
    inner, name = make()
    # The first layer could have one, and must not get it.
    model = nn.ModuleDict({"first": nn.Linear(9, 9), "rest": inner})
    classes, keys = [type(m) for m in model.modules()], list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        sl.add_adapters(
            model, ["first.weight", "rest." + name], **{"kind": kind, "rank": 1, **options}
        )
    assert [type(m) for m in model.modules()] == classes
    assert list(model.state_dict()) == keys


def test_a_name_without_a_module_raises_and_nothing_is_taken_out(build):
    model = build("bert")
    one, other = linear_names(model)[:2]
    sl.add_adapters(model, one, rank=1)
    for act in (sl.remove_adapters, sl.merge_adapters):
        with pytest.raises(ValueError, match=f"'{other}', which has no small module"):
            act(model, [one, other])
    assert list(sl.adapters(model)) == [one]
