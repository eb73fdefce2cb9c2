"""Groups: every weight is in one group, and a head's rows and columns are the model's own."""

import pytest
import torch
from torch import nn

import selective_lite as sl
from selective_lite.methods.diff_pruning.groups import by_head, by_layer, by_tensor, group_ids


def spread(groups, model):
    """Group ids in the weights' own shapes."""
    return {
        name: torch.broadcast_to(groups[name], p.shape) for name, p in sl.weights(model).items()
    }


@pytest.mark.parametrize("grouping", [by_tensor, by_layer, by_head])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_every_weight_has_one_group_and_no_number_is_left_out(build, kind, grouping):
    model = build(kind)
    found = spread(grouping(model, sl.weights(model)), model)
    assert list(found) == list(sl.weights(model))
    used = torch.cat([ids.flatten() for ids in found.values()]).unique()
    assert torch.equal(used, torch.arange(len(used)))


def test_by_tensor_is_one_group_a_tensor(build):
    model = build("bert")
    groups = by_tensor(model, sl.weights(model))
    assert [int(i) for i in groups.values()] == list(range(len(sl.weights(model))))


def test_by_layer_joins_a_block_and_nothing_else(build):
    model = build("bert")
    members = {}
    for name, group in by_layer(model, sl.weights(model)).items():
        members.setdefault(int(group), []).append(name)
    blocks = [names for names in members.values() if len(names) > 1]
    assert [{name.split(".")[3] for name in names} for names in blocks] == [{"0"}, {"1"}]
    assert all(name.startswith("bert.encoder.layer.") for names in blocks for name in names)
    assert all(".layer." not in names[0] for names in members.values() if len(names) == 1)


def test_layers_of_two_stacks_are_apart():
    model = nn.ModuleDict(
        {"encoder": nn.Sequential(nn.Linear(2, 2)), "decoder": nn.Sequential(nn.Linear(2, 2))}
    )
    groups = by_layer(model, sl.weights(model, ()))
    assert groups["encoder.0.weight"] == groups["encoder.0.bias"] != groups["decoder.0.weight"]


def _heads_that_change(model, batch, change):
    """Which heads' context in the first attention block changes when `change` is applied."""
    seen = []
    outputs = ("attention.output.dense", "self_attn.o_proj")
    module = next(m for n, m in model.named_modules() if n.endswith(outputs))
    hook = module.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].detach().clone())
    )
    with torch.no_grad():
        model(**batch)
        change()
        model(**batch)
    hook.remove()
    heads = model.config.num_attention_heads
    before, after = (context.reshape(-1, heads, context.shape[-1] // heads) for context in seen)
    return [head for head in range(heads) if not torch.equal(before[:, head], after[:, head])]


@pytest.mark.parametrize(
    ("kind", "projection", "output"),
    [
        (
            "bert",
            "bert.encoder.layer.0.attention.self.query",
            "bert.encoder.layer.0.attention.output.dense",
        ),
        (
            "bert",
            "bert.encoder.layer.0.attention.self.value",
            "bert.encoder.layer.0.attention.output.dense",
        ),
        ("llama", "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.o_proj"),
    ],
)
def test_a_head_s_group_holds_the_rows_that_make_it_and_the_columns_that_read_it(
    build, batches, kind, projection, output
):
    model = build(kind)
    groups = spread(by_head(model, sl.weights(model)), model)
    weight = model.get_parameter(projection + ".weight")
    for head in range(model.config.num_attention_heads):
        columns = slice(head * 4, head * 4 + 4)  # both tiny models have heads of four
        (group,) = groups[output + ".weight"][:, columns].unique().tolist()
        rows = groups[projection + ".weight"] == group
        assert int(rows.sum()) == 4 * weight.shape[1]

        def change(rows=rows):
            weight[rows] *= 1.5

        assert _heads_that_change(model, batches(kind, 1)[0], change) == [head]


def test_a_shared_key_head_belongs_to_the_first_query_head_that_reads_it(build, batches):
    model = build("llama")  # four query heads, two key heads
    groups = spread(by_head(model, sl.weights(model)), model)
    block = "model.layers.0.self_attn."
    of_query = [groups[f"{block}q_proj.weight"][4 * head, 0] for head in range(4)]
    of_key = [groups[f"{block}k_proj.weight"][4 * head, 0] for head in range(2)]
    assert of_key == [of_query[0], of_query[2]]
    weight = model.get_parameter(f"{block}v_proj.weight")

    def change():
        weight[groups[f"{block}v_proj.weight"] == of_query[2]] *= 1.5

    assert _heads_that_change(model, batches("llama", 1)[0], change) == [2, 3]


def test_heads_cover_biases_and_leave_other_tensors_whole(build):
    model = build("bert")
    groups = by_head(model, sl.weights(model))
    block = "bert.encoder.layer.1.attention."
    assert torch.equal(groups[block + "self.key.bias"], groups[block + "self.key.weight"][:, 0])
    assert groups[block + "output.dense.bias"].dim() == 0
    assert groups["bert.pooler.dense.weight"].dim() == 0
    first = groups["bert.encoder.layer.0.attention.self.key.bias"]
    assert not torch.isin(groups[block + "self.key.bias"], first).any()


def test_head_groups_of_a_model_without_heads_raise(build):
    toy, gpt2 = build("toy"), build("gpt2")
    with pytest.raises(ValueError, match=r"groups='head' needs model\.config\.num_attention_heads"):
        by_head(toy, sl.weights(toy))
    with pytest.raises(ValueError, match="no query, key or value projection by a known name"):
        by_head(gpt2, sl.weights(gpt2))


@pytest.mark.usefixtures("meta_default")
@pytest.mark.parametrize("grouping", [by_tensor, by_layer, by_head])
def test_group_numbers_are_on_the_cpu_whatever_the_default_device(build, grouping):
    torch.set_default_device("cpu")
    model = build("bert")
    torch.set_default_device("meta")
    assert {ids.device.type for ids in grouping(model, sl.weights(model)).values()} == {"cpu"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "groups gave None for 'weight'"),
        (0, "groups gave 0 for 'weight'"),
        (torch.tensor(0.0), "must give an int64 tensor"),
        (torch.tensor([[-1]]), "group numbers from 0"),
        (torch.zeros(4, dtype=torch.int64), r"ids of shape \(4,\) for 'weight'.*shape \(3, 2\)"),
    ],
)
def test_a_function_that_gives_no_group_numbers_raises(given, message):
    layer = nn.Linear(2, 3, bias=False)
    with pytest.raises(ValueError, match=message):
        group_ids(layer, sl.weights(layer), lambda model, weights: {"weight": given})
    with pytest.raises(ValueError, match="groups gave None for 'weight'"):
        group_ids(layer, sl.weights(layer), lambda model, weights: {})
