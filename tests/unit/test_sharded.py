"""Models that FSDP2 (`fully_shard`) has sharded: two processes train as one, or say what to do."""

from unittest.mock import Mock

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.utils.checkpoint import checkpoint

import selective_lite as sl
from selective_lite.kernels.sharded import Rows
from tests import sharded, side_by_side

pytestmark = pytest.mark.filterwarnings("ignore::selective_lite.heads.HeadWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def two(folder):
    """What two processes came to, by rank and by what they did."""
    side_by_side.run(*(["-m", "tests.sharded", rank, folder] for rank in (0, 1)))
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("kind", sharded.KINDS)
def test_two_processes_train_as_one(two, folder, kind):
    one = sharded.alone(kind, folder)
    first, second = two[0][kind], two[1][kind]
    torch.testing.assert_close(first["norms"], one["norms"], rtol=1e-7, atol=0)
    for name, before in one["before"].items():
        assert torch.equal(first["after"][name], second["after"][name])
        torch.testing.assert_close(first["after"][name], one["after"][name], rtol=0, atol=1e-7)
        if name not in one["heads"]:
            mask = one["masks"].get(name, torch.zeros_like(before).bool())
            assert torch.equal(first["after"][name][~mask], before[~mask])
            unused = name.startswith("experts.2") or name not in one["masks"]
            assert torch.equal(first["after"][name][mask], before[mask]) == unused


@pytest.mark.parametrize("kind", sharded.KINDS)
def test_only_trained_values_are_summed_and_once_a_backward(two, kind):
    for found in (two[0][kind], two[1][kind]):
        each = found["trained"] + found["tensors"]
        dimensions = 2 if "hybrid" in kind else 1
        assert found["summed"] == [each] * dimensions * sharded.STEPS * sharded.ACCUMULATED


@pytest.mark.parametrize("kind", sharded.KINDS)
def test_the_delta_is_that_of_one_process(two, folder, kind):
    one = sharded.alone(kind, folder)
    files = [folder / f"{kind}-{who}.safetensors" for who in ("0", "1", "alone")]
    assert files[0].read_bytes() == files[1].read_bytes()
    ours, theirs = sl.load(files[0]), sl.load(files[2])
    assert ours.metadata == theirs.metadata
    model = sharded.build(kind)
    ours.apply(model)
    for name, after in one["after"].items():
        torch.testing.assert_close(sl.snapshot(model)[name], after, rtol=0, atol=1e-7)
        assert torch.equal(sl.snapshot(model)[name], two[0][kind]["after"][name])


@pytest.mark.parametrize("how", sharded.HOW)
def test_training_goes_on_where_it_stopped(two, how):
    for found in two:
        for name, straight in found[sharded.HOW[how]]["after"].items():
            assert torch.equal(found[how]["after"][name], straight)


@pytest.fixture
def group():
    """A process group of this process only: sharded tensors and all of FSDP's hooks, in one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def mlp(dtype=torch.float64):
    torch.manual_seed(0)
    layers = (nn.Linear(6, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, 3))
    return nn.Sequential(*layers).to(dtype)


def shard(model, mesh, **options):
    for layer in (model[0], model[3]):
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def loss_of(model, x=None):
    x = torch.linspace(-1, 1, 48).view(8, 6) if x is None else x
    return model(x.to(next(model.parameters()).dtype)).float().square().mean()


def train(model, parameters, count=3):
    optimizer = torch.optim.AdamW(parameters, lr=0.05)
    for _ in range(count):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()


def some(model, pick, **options):
    """Random positions of every tensor outside the last layer, which is the head."""
    selection = pick(model)
    inside = {n: at for n, at in selection.indices.items() if not n.startswith("4.")}
    return sl.Selection(inside, selection.shapes)


@pytest.mark.parametrize("unsharded", [False, True], ids=["sharded", "gathered by the user"])
def test_values_that_are_changed_by_hand_are_in_the_next_backward(group, pick, unsharded):
    """Nobody calls an optimizer, and every layer is gathered anew for the backward."""
    plain, model = mlp(), mlp()
    selection = some(plain, pick)
    shard(model, group, reshard_after_forward=True)
    for each in (plain, model):
        with sl.masked(each, selection, head=("4",)) as tuning:
            trained = [*tuning.parameters(), *tuning.dense_parameters()]
            for _ in range(3):
                if each is model and unsharded:
                    for module in (model, model[0], model[3]):
                        module.unshard()
                for p in trained:
                    p.grad = None
                loss_of(each).backward()
                for p in trained:
                    p.data.sub_(p.grad)
    assert_equal(plain, model)


def test_a_part_may_be_called_alone(group, pick):
    """An encoder under a model that is not: FSDP's root is the module that was called."""
    selection = some(mlp(), pick)
    selection = sl.Selection(
        {f"0.{name}": at for name, at in selection.indices.items()},
        {f"0.{name}": shape for name, shape in selection.shapes.items()},
    )
    plain, model = (nn.Sequential(mlp(), nn.Linear(3, 2)) for _ in range(2))
    shard(model[0], group, reshard_after_forward=True)
    for each in (plain, model):
        with sl.masked(each, selection, head=("0.4",)) as tuning:
            train(each[0], [*tuning.parameters(), *tuning.dense_parameters()])
    assert_equal(plain[0], model[0])


def assert_equal(plain, model):
    for name, p in plain.named_parameters():
        assert torch.equal(model.get_parameter(name).full_tensor(), p), name


@pytest.mark.parametrize("leave", ["close", "state_dict", "delta"])
def test_what_an_evaluation_left_gathered_is_not_what_is_saved(group, pick, leave):
    """FSDP leaves its root's tensors gathered after a forward that has no backward."""
    plain, model = mlp(), mlp()
    selection = some(plain, pick)
    shard(model, group)
    tunings = [sl.masked(each, selection, head=("4",)) for each in (plain, model)]
    for each, tuning in zip((plain, model), tunings, strict=True):
        train(each, [*tuning.parameters(), *tuning.dense_parameters()])
        with torch.no_grad():
            loss_of(each)
            for p in tuning.parameters():
                p.mul_(2)
    if leave == "state_dict":
        for (name, p), q in zip(
            plain.state_dict().items(), model.state_dict().values(), strict=True
        ):
            assert torch.equal(q.full_tensor(), p), name
    elif leave == "delta":
        ours, theirs = (tuning.delta() for tuning in reversed(tunings))
        for name, value in theirs.values.items():
            assert torch.equal(ours.values[name], value), name
    for tuning in tunings:
        tuning.close()
    assert_equal(plain, model)
    assert torch.equal(loss_of(model), loss_of(plain))


def test_leaving_restores_the_sharded_model(group, pick):
    model = shard(mlp(), group)
    model[3].weight.requires_grad_(False)
    kinds, keys = [type(module) for module in model.modules()], list(model.state_dict())
    parameters = list(model.parameters())
    with sl.masked(model, some(mlp(), pick), head=("4",)) as tuning:
        assert list(model.state_dict()) == keys
        train(model, [*tuning.parameters(), *tuning.dense_parameters()])
    assert [type(module) for module in model.modules()] == kinds
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["3.weight"]
    plain = mlp()
    plain.load_state_dict(sharded.wholes(model))
    plain[3].weight.requires_grad_(False)
    for each in (plain, model):
        train(each, each.parameters())  # as a whole, by FSDP
    assert_equal(plain, model)


@pytest.mark.parametrize("attribute", ["weight", "bias"])
def test_a_tensor_that_is_read_outside_of_a_forward_has_its_values_and_gradient(
    group, pick, attribute
):
    plain, model = mlp(), mlp()
    selection = some(plain, pick)
    shard(model, group)
    grads = []
    for each in (plain, model):
        with sl.masked(each, selection, head=("4",)) as tuning:
            train(each, tuning.parameters())
            tuning.parameters()[0].data.mul_(2)
            penalty = getattr(each[0], attribute).square().sum()
            penalty = penalty if each is plain else penalty.full_tensor()
            (loss_of(each) + penalty).backward()  # the forward writes what the penalty has read
            grads.append([p.grad for p in tuning.parameters()])
            assert any(g.any() for g in grads[-1])
    torch.testing.assert_close(*grads)


def test_a_checkpoint_of_torch_is_an_ordinary_model(group, pick):
    """`torch.distributed.checkpoint` gathers whole tensors and spreads them again."""
    options = StateDictOptions(full_state_dict=True)
    plain, model, again = mlp(), shard(mlp(), group), shard(mlp(), group)
    selection = some(plain, pick)
    tuning = sl.masked(model, selection, head=("4",))
    train(model, [*tuning.parameters(), *tuning.dense_parameters()])
    state = get_model_state_dict(model, options=options)
    tuning.close()
    plain.load_state_dict(state)
    assert_equal(plain, model)
    with sl.masked(again, selection, head=("4",)) as tuning:
        set_model_state_dict(again, state, options=options)
        assert torch.equal(loss_of(again), loss_of(model))
        for p, q in zip(tuning.dense_parameters(), plain[4].parameters(), strict=True):
            assert torch.equal(p, q)


@pytest.mark.parametrize("policy", ["bfloat16 model", "mixed precision"])
def test_half_precision_trains_as_without_sharding(group, pick, policy):
    plain = mlp(torch.bfloat16)
    model, selection = mlp(torch.bfloat16), some(mlp(), pick)
    if policy == "mixed precision":
        model = model.float()
        shard(model, group, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    else:
        shard(model, group)
    found = []
    for each in (plain, model):
        with sl.masked(each, selection, head=("4",)) as tuning:
            train(each, [*tuning.parameters(), *tuning.dense_parameters()])
            assert {p.dtype for p in tuning.dense_parameters()} == {torch.float32}
            found.append(tuning.values(precise=True))
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        assert torch.equal(found[1][name], value), name


@pytest.mark.parametrize("ignored", [False, True], ids=["all", "values are left out"])
@pytest.mark.parametrize("what", ["entries", "whole tensors"])
def test_sharding_inside_masked_training_is_refused(group, pick, what, ignored):
    model = mlp()
    selection = sl.select_tensors(model, lambda name, _: name == "0.bias")
    if what == "entries":
        selection = some(model, pick)
    tuning = sl.masked(model, selection, head=("4",))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    fully_shard(model, mesh=group, ignored_params=set(tuning.parameters()) if ignored else None)
    refused = pytest.raises((ValueError, RuntimeError), match="fully_shard .FSDP2. before masked")
    if what == "entries":  # the first forward says so
        with refused:
            loss_of(model)
    else:
        with refused:
            train(model, [p for p in model.parameters() if p.requires_grad])
    for name, p in model.named_parameters():
        p = p.full_tensor() if hasattr(p, "device_mesh") else p
        assert torch.equal(p, before[name])


def test_a_delta_of_a_model_that_was_sharded_inside_is_refused(group):
    """No optimizer's step looked: whole tensors trained on, and the delta would not know."""
    model = mlp()
    tuning = sl.masked(model, sl.bitfit(model, head=("4",)), head=("4",))
    fully_shard(model, mesh=group)
    loss_of(model).backward()
    with pytest.raises(RuntimeError, match="fully_shard .FSDP2. before masked"):
        tuning.delta()


def test_what_needs_whole_tensors_says_what_to_do(group, pick):
    model, selection = mlp(), some(mlp(), pick)
    delta = sl.diff(sl.snapshot(mlp()), mlp().apply(_double), head=("4",))
    shard(model, group)
    for call in (
        lambda: sl.weights(model, ("4",)),
        lambda: sl.magnitude(model, ("4",)),
        lambda: sl.bitfit(model, head=("4",)),
        lambda: sl.diff(sl.snapshot(mlp()), model, head=("4",)),
    ):
        with pytest.raises(ValueError, match="select before sharding"):
            call()
    with pytest.raises(ValueError, match="shrinks=True"):
        sl.masked(model, selection, head=("4",), shrinks=True)
    with pytest.raises(sl.DeltaError, match="before fully_shard"):
        delta.apply(model)


def _double(module):
    for p in module.parameters(recurse=False):
        p.data.mul_(2)


def test_tensors_that_are_not_sharded_by_rows_are_refused(group, pick):
    model, selection = mlp(), some(mlp(), pick)
    fully_shard(model, mesh=group, shard_placement_fn=lambda p: Shard(1) if p.dim() == 2 else None)
    with pytest.raises(ValueError, match="rows only"):
        sl.masked(model, selection, head=("4",))
    model = mlp()
    columns = torch.distributed.tensor.parallel.ColwiseParallel()
    torch.distributed.tensor.parallel.parallelize_module(model[0], group, columns)
    with pytest.raises(ValueError, match="fully_shard"):
        sl.masked(model, selection, head=("4",))


def test_small_modules_are_trained_if_they_are_not_sharded(group):
    """LoRA beside selected weights, as SPT trains it, on a base that is sharded."""
    selection = sl.Selection({"3.weight": torch.arange(5)}, {"3.weight": (6, 6)})
    deltas = []
    for kind in ("plain", "sharded base", "all sharded"):
        model = mlp()
        sl.add_adapters(model, ("0.weight",), kind="lora", rank=2)
        small = set(model[0].adapter.parameters())
        if kind != "plain":
            ignored = None if kind == "all sharded" else small
            fully_shard(model, mesh=group, ignored_params=ignored)
        if kind == "all sharded":
            with pytest.raises(ValueError, match="ignored_params"):
                sl.masked(model, selection, dense=("0.adapter",), head=("4",))
            continue
        with sl.masked(model, selection, dense=("0.adapter",), head=("4",)) as tuning:
            train(model, [*tuning.parameters(), *tuning.dense_parameters()])
            deltas.append(tuning.delta())
    plain, sharded_base = deltas
    assert plain.metadata == sharded_base.metadata
    for part, piece in plain.modules["0.weight"].items():
        assert torch.equal(sharded_base.modules["0.weight"][part], piece)


class _Partitioned(nn.Parameter):
    """What DeepSpeed ZeRO-3 leaves of a parameter: no values, and a number."""

    ds_id = 0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("engine", ["FSDP1", "ZeRO-3"])
def test_other_engines_that_shard_are_refused_first(group, pick, engine):
    model, selection = mlp(), some(mlp(), pick)
    if engine == "FSDP1":
        model[3] = FullyShardedDataParallel(model[3], device_id=torch.device("cpu"))
    else:
        model[3].weight = _Partitioned(torch.empty(0))
    for call in (
        lambda: sl.weights(model, ("4",)),
        lambda: sl.snapshot(model),
        lambda: sl.masked(model, selection, head=("4",)),
    ):
        with pytest.raises(TypeError, match=f"{engine}.*fully_shard"):
            call()


@pytest.mark.parametrize("leave", ["delta", "close"])
def test_what_a_forward_that_raised_left_gathered_is_not_what_is_saved(
    group, pick, leave, tmp_path
):
    """FSDP leaves the root's tensors gathered, in the dtype of its policy."""
    model, selection = mlp(torch.float32), some(mlp(), pick)
    shard(model, group, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    with sl.masked(model, selection, head=("4",)) as tuning:
        train(model, [*tuning.parameters(), *tuning.dense_parameters()])
        tuning.delta().save(tmp_path / "before")
        weights = {name: p.full_tensor().clone() for name, p in model.state_dict().items()}
        stop = model[4].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            loss_of(model)
        stop.remove()
        assert model[1]._parameters["weight"].dtype == torch.bfloat16
        if leave == "delta":
            tuning.delta().save(tmp_path / "after")
            assert (tmp_path / "after").read_bytes() == (tmp_path / "before").read_bytes()
    for name, p in model.named_parameters():
        assert torch.equal(p.full_tensor(), weights[name]), name


@pytest.mark.parametrize("when", ["before", "inside"])
def test_settings_that_could_not_be_honoured_are_refused(group, pick, when):
    def another_factor(model):
        model[3].set_gradient_divide_factor(8)

    def hook(model):
        model[0].set_all_reduce_hook(torch.Tensor.zero_)

    for set_it, why in (
        (another_factor, "set_gradient_divide_factor .* different .* every module"),
        (hook, "set_all_reduce_hook .* mesh of two dimensions"),
    ):
        model = shard(mlp(), group)
        if when == "before":
            set_it(model)
            with pytest.raises(ValueError, match=why):
                sl.masked(model, some(mlp(), pick), head=("4",))
            continue
        with sl.masked(model, some(mlp(), pick), head=("4",)) as tuning:
            set_it(model)
            with pytest.raises(ValueError, match=why):
                loss_of(model).backward()
            assert all(p.grad is None for p in tuning.parameters())


@pytest.fixture
def counted(monkeypatch):
    """Which rows were written, and how many exchanges there were."""
    written, summed = [], []
    write, all_reduce = Rows.write, dist.all_reduce
    monkeypatch.setattr(Rows, "write", lambda own, *a: written.append(id(own)) or write(own, *a))
    monkeypatch.setattr(dist, "all_reduce", lambda *a, **k: summed.append(1) or all_reduce(*a, **k))
    return written, summed


def test_values_are_written_once_for_a_forward(group, pick, counted):
    written, _ = counted
    model = shard(mlp(), group)
    with sl.masked(model, some(mlp(), pick), head=("4",)) as tuning, torch.no_grad():
        every = len(tuning.parameters()) + len(tuning.dense_parameters())
        loss_of(model)  # FSDP reads every tensor once, at the first forward
        for _ in range(2):
            written.clear()
            loss_of(model)
            assert len(written) == len(set(written)) == every
        for error, part, expected in (
            (KeyboardInterrupt, model, every),
            (ValueError, model[3], 2),  # alone: it is the outermost one now
        ):
            stop = model[4].register_forward_pre_hook(Mock(side_effect=error))
            with pytest.raises(error):
                loss_of(model)
            stop.remove()
            written.clear()
            part(torch.ones(1, 6).double())
            assert len(written) == len(set(written)) == expected


class Checkpointed(nn.Sequential):
    """Layers that run again in the backward: in one of its own, if it is reentrant."""

    def forward(self, x):
        hidden = self[0](x)
        for layer in self[1:]:
            hidden = checkpoint(layer, hidden, use_reentrant=self.reentrant)
        return hidden


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_gradients_are_averaged_once_for_a_backward(group, pick, counted, reentrant):
    _, summed = counted
    layers = mlp()
    model = layers if reentrant is None else Checkpointed(*layers)
    model.reentrant = reentrant
    shard(model, group)
    with sl.masked(model, some(mlp(), pick), head=("4",)) as tuning:
        for times in (1, 2):
            loss_of(model).backward()
            assert len(summed) == times
        stop = tuning.parameters()[0].register_hook(lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            loss_of(model).backward()
        stop.remove()
        model.reset_iter_state()
        assert len(summed) == 2
        loss_of(model).backward()
        assert len(summed) == 3


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("set_requires_gradient_sync", False),
        ("set_requires_all_reduce", False),
        ("set_is_last_backward", False),
        ("set_reshard_after_forward", False),
        ("set_reshard_after_backward", False),
        ("set_reduce_scatter_unused_params", True),
        ("set_force_sum_reduction_for_comms", True),
    ],
)
def test_settings_of_when_and_how_to_exchange_change_nothing(group, pick, name, value):
    plain, model = mlp(), shard(mlp(), group)
    for each in (plain, model):
        with sl.masked(each, some(mlp(), pick), head=("4",)) as tuning:
            if each is model:
                getattr(model, name)(value)
            train(each, [*tuning.parameters(), *tuning.dense_parameters()])
    assert_equal(plain, model)
