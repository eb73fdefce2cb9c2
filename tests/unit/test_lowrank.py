"""Low-rank updates: found at the right layers, added to their outputs, merged, and gone without a trace."""

import copy

import pytest
import torch
from torch import nn

from selective_lite.lowrank import attach, detach, sides, update_sites


class Product(nn.Module):
    """x -> x (u v^T)^T, a rank-one update."""

    def __init__(self, outputs, inputs):
        super().__init__()
        self.u, self.v = nn.Parameter(torch.randn(outputs, 1)), nn.Parameter(torch.randn(1, inputs))

    def forward(self, x):
        return x.to(self.v.dtype) @ self.v.t() @ self.u.t()


def test_every_linear_layer_outside_the_head_is_a_site(build):
    assert list(update_sites(build("toy"))) == ["first.weight", "second.weight"]
    assert len(update_sites(build("bert"))) == 2 * 6 + 1
    assert not any("classifier" in name for name in update_sites(build("bert")))


def test_a_matrix_tied_to_an_embedding_is_no_site(build):
    assert len(update_sites(build("llama"))) == 2 * 7
    assert not any("lm_head" in name or "embed" in name for name in update_sites(build("llama")))
    assert [name.split(".", 3)[-1] for name in update_sites(build("gpt2"))][:4] == [
        "attn.c_attn.weight",
        "attn.c_proj.weight",
        "mlp.c_fc.weight",
        "mlp.c_proj.weight",
    ]


def test_targets_are_ends_of_names_at_a_dot(build):
    model = build("bert")
    names = list(update_sites(model, ("query", "attention.output.dense")))
    assert len(names) == 4
    assert all(name.endswith(("query.weight", "attention.output.dense.weight")) for name in names)
    assert list(update_sites(build("toy"), "first")) == ["first.weight"]


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
    with pytest.raises(ValueError, match=f"targets names '{target}', which is no nn.Linear or Conv1D outside the head"):
        update_sites(build(kind), (target,))


def test_a_model_without_a_plain_layer_raises():
    class Scaled(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    replaced = nn.Linear(3, 3)
    replaced.forward = replaced.forward
    for model in (nn.Sequential(Scaled(3, 3)), nn.Sequential(replaced), nn.Sequential(nn.Embedding(3, 3))):
        with pytest.raises(ValueError, match=r"no nn\.Linear or Conv1D outside its head"):
            update_sites(model)


@pytest.mark.parametrize("kind", ["toy", "gpt2"])
def test_an_update_is_added_merged_and_gone(build, batches, kind):
    model, (batch,) = build(kind).double(), batches(kind, 1)
    plain = model(**batch).logits
    sites = update_sites(model)
    keys, classes = list(model.state_dict()), [type(module) for module in model.modules()]
    updates = {name: Product(*sides(layers[0])).double() for name, layers in sites.items()}
    biases = {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith("bias")}
    for name, layers in sites.items():
        attach(layers, updates[name])
    updated = model(**batch).logits
    assert not torch.allclose(plain, updated)
    for name, layers in sites.items():
        detach(layers, (updates[name].u @ updates[name].v).detach())
    torch.testing.assert_close(model(**batch).logits, updated, rtol=1e-9, atol=1e-9)
    assert list(model.state_dict()) == keys
    assert [type(module) for module in model.modules()] == classes
    assert all(torch.equal(model.get_parameter(name), bias) for name, bias in biases.items())


def test_a_deep_copy_has_an_update_of_its_own():
    model = nn.Sequential(nn.Linear(4, 3))
    attach([model[0]], Product(3, 4))
    twin = copy.deepcopy(model)
    x = torch.randn(2, 4)
    expected = model(x)
    assert torch.equal(twin(x), expected)
    with torch.no_grad():
        twin[0].low_rank.u.zero_()
    assert torch.equal(model(x), expected)
    assert not torch.equal(twin(x), expected)


def test_tied_layers_share_one_update_and_are_merged_once():
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    sites = update_sites(model)
    assert {name: list(map(id, layers)) for name, layers in sites.items()} == {
        "a.weight": [id(model["a"]), id(model["b"])]
    }
    update, x = Product(3, 3), torch.randn(2, 3)
    attach(sites["a.weight"], update)
    expected = [model[name](x) for name in "ab"]
    detach(sites["a.weight"], (update.u @ update.v).detach())
    assert model["b"].weight is model["a"].weight
    for name, y in zip("ab", expected, strict=True):
        torch.testing.assert_close(model[name](x), y)


def test_the_output_keeps_the_layer_s_dtype_and_the_merge_rounds_once():
    layer = nn.Linear(4, 3).bfloat16()
    update, weight = Product(3, 4), layer.weight.detach().clone()
    attach([layer], update)
    assert layer(torch.randn(2, 4).bfloat16()).dtype == torch.bfloat16
    difference = (update.u @ update.v).detach()
    detach([layer], difference)
    assert torch.equal(layer.weight, (weight.float() + difference).bfloat16())
