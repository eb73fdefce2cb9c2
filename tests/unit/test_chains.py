"""Chains: deltas in turn as one, to the bit and to the byte, and what is no chain."""

import copy
import itertools

import pytest
import torch
from torch import nn

import selective_lite as sl
from tests.bits import same, state

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Net(nn.Module):
    """Weights, a norm that changes whole, buffers, and a head."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(8, 9), nn.Linear(9, 6), nn.LayerNorm(6)
        self.batch_norm, self.classifier = nn.BatchNorm1d(6), nn.Linear(6, 3)


def net(dtype=torch.float32):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net().to(dtype).eval()


def moved(model, seed):
    """The model after more training: some weights, others than before or the same, and the rest."""
    tuned, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in (tuned.first.weight, tuned.second.weight, tuned.second.bias):
            where = torch.rand(p.shape, generator=generator) < 0.4
            p += where * torch.randn(p.shape, generator=generator)
        tuned.norm.weight += 1
        tuned.classifier.weight += torch.randn(3, 6, generator=generator)
        tuned.batch_norm.running_mean += 1
        tuned.batch_norm.num_batches_tracked += 1
    return tuned


def chain(models, folder, encoding):
    """The deltas from each model to the next, saved and loaded."""
    found = []
    for i, (before, after) in enumerate(itertools.pairwise(models)):
        sl.diff(before, after, method=f"{i} to {i + 1}").save(folder / f"{i}", encoding)
        found.append(sl.load(folder / f"{i}"))
    return found


@pytest.mark.parametrize("encoding", ["flat", "gap-lzma"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_chain_is_the_diff_from_its_first_to_its_last_model_to_the_byte(
    tmp_path, dtype, encoding
):
    models = [net(dtype)]
    for seed in (1, 2, 3):
        models.append(moved(models[-1], seed))
    with torch.no_grad():  # some go back to where they began
        models[-1].first.weight[:3] = models[0].first.weight[:3]
        models[-1].batch_norm.running_mean.copy_(models[0].batch_norm.running_mean)
    base, before = models[0], state(models[0])
    composed = sl.compose(base, chain(models, tmp_path, encoding))
    assert same(state(base), before)
    expected = sl.diff(base, models[-1], method="0 to 1, then 1 to 2, then 2 to 3")
    assert "batch_norm.running_mean" not in composed.buffers
    assert composed.positions["first.weight"].min() >= 3 * 8
    for one, delta in (("one", composed), ("other", expected)):
        delta.save(tmp_path / one, encoding)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()
    with sl.load(tmp_path / "one").apply(base):
        assert same(state(base), state(models[-1]))
    assert same(state(base), before)


def test_parts_of_a_chain_are_chains(tmp_path, device):
    models = [net(torch.bfloat16)]
    for seed in (1, 2, 3):
        models.append(moved(models[-1], seed))
    one, two, three = chain(models, tmp_path, "gap-lzma")
    base = models[0].to(device)
    whole = sl.compose(base, [sl.compose(base, [one, two]), three])
    with whole.apply(base):
        assert same(state(base), state(models[-1]))
    with one.apply(base):
        rest = sl.compose(base, [two, three])
        with rest.apply(base):
            assert same(state(base), state(models[-1]))


def test_a_chain_goes_through_float32_values_of_half_precision(build, batches, pick):
    base, model = build("toy").bfloat16(), build("toy").bfloat16()
    deltas = []
    for _ in range(2):
        with sl.masked(model, pick(model)) as tuning:
            optimizer = torch.optim.SGD(tuning.parameters(), lr=0.5)
            for batch in batches("toy", 2):
                model(**batch).loss.backward()
                optimizer.step()
            deltas.append(tuning.delta(precise=True))
    composed = sl.compose(base, deltas)
    assert {str(values.dtype) for values in composed.values.values()} == {"torch.bfloat16"}
    with composed.apply(base):
        assert same(state(base), state(model))


def test_small_modules_are_composed_where_there_is_one_a_layer():
    base, one = net(), net()
    with torch.no_grad():
        one.first.weight[0, 0] += 1
    two = copy.deepcopy(one)
    sl.add_adapters(one, "second.weight", rank=2, seed=1)
    sl.add_adapters(two, "first.weight", rank=1, seed=2)
    with torch.no_grad():
        for model in (one, two):
            for module in sl.adapters(model).values():
                for p in module.parameters():
                    p += 1
        two.first.weight[0, 1] += 1
    start = net()
    with torch.no_grad():
        start.first.weight[0, 0] += 1
    first, second = sl.diff(base, one, method="one"), sl.diff(start, two)
    composed = sl.compose(base, [first, second])
    assert composed.metadata["method"] == "one, then not said"
    assert sl.adapters(base) == {}
    with composed.apply(base):
        found = state(base)
        assert set(sl.adapters(base)) == {"first.weight", "second.weight"}
    with first.apply(base), second.apply(base):
        assert same(state(base), found)


def again(model):
    tuned = copy.deepcopy(model)
    sl.add_adapters(tuned, "second.weight", rank=1)
    return tuned


def test_what_is_no_chain_is_refused_by_name_and_the_base_is_as_it_was():
    base = net()
    one = moved(base, 1)
    two = moved(one, 2)
    first, second, other = sl.diff(base, one), sl.diff(one, two), sl.diff(moved(base, 3), two)
    small = sl.diff(base, again(base))
    other_dtype = sl.diff(net(torch.float16), moved(net(torch.float16), 1))
    before = state(base)
    for deltas, message in (
        ([second, first], r"deltas\[0\] does not go onto .* is not the base's"),
        ([first, other], r"deltas\[1\] does not go onto .* 'first.weight' is not the base's"),
        ([first, first], r"deltas\[1\] does not go onto .* is not the base's"),
        (
            [first, second, other_dtype],
            r"deltas\[2\] does not .*, the delta's base is torch.float16",
        ),
        (
            [small, first, small],
            r"deltas\[2\] does not .*layer of 'second.weight' has a small module",
        ),
    ):
        with pytest.raises(sl.DeltaError, match=message):
            sl.compose(base, deltas)
        assert same(state(base), before)
        assert sl.adapters(base) == {}
    with pytest.raises(ValueError, match=r"deltas=\[\] must hold at least one delta"):
        sl.compose(base, [])
    with pytest.raises(ValueError, match="base has a small module at 'second.weight'; merge or"):
        sl.compose(again(base), [first])
    back = [sl.diff(base, one, head=()), sl.diff(one, base, head=())]
    with pytest.raises(ValueError, match="equal bit by bit; there is nothing to store"):
        sl.compose(base, back)
    assert same(state(base), before)


def test_a_base_without_the_head_is_refused(build):
    base, tuned = build("bert"), build("bert")
    with torch.no_grad():
        tuned.classifier.bias += 1
        tuned.bert.pooler.dense.bias += 1
    with pytest.raises(sl.DeltaError, match=r"deltas\[0\] .* base has no 'classifier"):
        sl.compose(base.bert, [sl.diff(base, tuned)])
