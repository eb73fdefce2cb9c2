"""Masked training under `accelerate`: the plain loop's weights; state is saved and loaded."""

import pytest
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import selective_lite as sl


@pytest.fixture(autouse=True)
def fresh_state():
    """accelerate keeps its state in the process; another test's precision must not stay in it."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def prepared(build, batches, pick, kind, shard=lambda model: model):
    model, selection = shard(build(kind)), pick(build(kind))
    training = sl.masked(model, selection, dense=tuple(sl.head_weights(model)))
    examples = [{k: v[0] for k, v in b.items()} for b in batches(kind, 16, size=1)]
    loader = torch.utils.data.DataLoader(examples, batch_size=2)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1
    )
    return model, training, loader, optimizer


def train(accelerator, model, optimizer, loader):
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()


def trained_by_hand(reference, training, loader, optimizer):
    for number, batch in enumerate(loader, 1):
        (reference(**batch).loss / 2).backward()
        if number % 2 == 0:
            nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
    training.close()
    return reference


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_accelerate_trains_as_a_plain_loop_does(build, batches, pick, kind):
    base, training, loader, optimizer = prepared(build, batches, pick, kind)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer, loader = accelerator.prepare(base, optimizer, loader)
    train(accelerator, model, optimizer, loader)
    assert accelerator.unwrap_model(model) is base
    training.close()

    reference = trained_by_hand(*prepared(build, batches, pick, kind))
    for (name, p), q in zip(base.named_parameters(), reference.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert any(
        not torch.equal(p, q)
        for p, q in zip(base.parameters(), build(kind).parameters(), strict=True)
    )


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_loaded_state_goes_on_with_the_same_bits(build, batches, pick, tmp_path, kind, safe):
    ends = []
    for first in (True, False):
        base, training, loader, optimizer = prepared(build, batches, pick, kind)
        accelerator = Accelerator(cpu=True)
        model, optimizer, loader = accelerator.prepare(base, optimizer, loader)
        if first:
            train(accelerator, model, optimizer, loader)
            accelerator.save_state(tmp_path, safe_serialization=safe)
        else:
            accelerator.load_state(tmp_path)
        train(accelerator, model, optimizer, loader)
        training.close()
        ends.append(sl.snapshot(base))
    assert {name for name, p in ends[0].items() if not torch.equal(p, ends[1][name])} == set()


@pytest.fixture
def fsdp(monkeypatch):
    """An accelerator that shards what it prepares, in a process group of this process only."""
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")  # the plugin sets it
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="no_wrap", cpu_ram_efficient_loading=False
    )
    # accelerate itself asks for GPUs before it takes a plugin
    vars(accelerator.state).update(distributed_type=DistributedType.FSDP, fsdp_plugin=plugin)
    yield accelerator
    dist.destroy_process_group()


@pytest.mark.parametrize("whole", [False, True], ids=["entries", "whole tensors"])
def test_a_model_that_accelerate_shards_is_refused_before_a_step(build, batches, pick, fsdp, whole):
    model = build("bert")
    before = sl.snapshot(model)
    training = sl.masked(model, sl.bitfit(model) if whole else pick(model))
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    model, optimizer = fsdp.prepare(model, optimizer)
    batch = batches("bert", 1)[0]
    if whole:
        fsdp.backward(model(**batch).loss)
    with pytest.raises((ValueError, RuntimeError), match="fully_shard .* accelerate .* NO_WRAP"):
        optimizer.step() if whole else model(**batch)
    for name, p in training.model.named_parameters():
        assert name not in before or torch.equal(p.full_tensor(), before[name]), name


def test_accelerate_trains_a_model_that_was_sharded_first(build, batches, pick, fsdp):
    def shard(model):
        for layer in model.bert.encoder.layer:
            fully_shard(layer)
        return fully_shard(model)

    base, training, loader, optimizer = prepared(build, batches, pick, "bert", shard)
    model, optimizer, loader = fsdp.prepare(base, optimizer, loader)
    train(fsdp, model, optimizer, loader)
    training.close()
    reference = trained_by_hand(*prepared(build, batches, pick, "bert"))
    for (name, p), q in zip(base.named_parameters(), reference.parameters(), strict=True):
        assert torch.equal(p.full_tensor(), q), name
