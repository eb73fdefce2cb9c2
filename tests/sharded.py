"""Masked training under FSDP2 in two processes, and in one without it, for `test_sharded`.

``python -m tests.sharded RANK FOLDER`` is one of two; each trains on its half of every batch.
"""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

import selective_lite as sl
from selective_lite import hf

STEPS, ACCUMULATED, SAMPLES = 4, 2, 8
# What is trained, and how it is sharded: by layers and what is left of the model; only the layers;
# over one dimension of a mesh, and replicated over the other; all in one. And how FSDP was set: to
# add up gradients, with no exchange but in the last backward before a step.
WHERE = ("bert", "llama", "experts", "bert partly", "bert hybrid", "routed", "routed in one")
PART = "bert with a part of its head"
KINDS = (*WHERE, "bert summed", "bert unsynced", PART)

HOW = {"delta": "bert", "state": "bert", "callback": PART}  # what a training goes on from


class Experts(nn.Module):
    """Three experts: the first samples go to one, the last ones to another, none to the third."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Linear(5, 5)
        self.experts = nn.ModuleList(nn.Linear(5, 3) for _ in range(3))

    def forward(self, x, labels):
        hidden, loss = self.start(x).tanh(), 0.0
        for number, expert in enumerate(self.experts):
            if (chosen := x[:, 0] == number).any():
                out = expert(hidden[chosen])
                loss = loss + nn.functional.cross_entropy(out, labels[chosen], reduction="sum")
        return SimpleNamespace(loss=loss / len(x))


class Block(nn.Module):
    """Two experts, and for every sample the number of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(5, 5) for _ in range(2))

    def forward(self, x, route):
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            if (chosen := (route == number).nonzero().squeeze(1)).numel():
                out = out.index_add(0, chosen, expert(x[chosen]))
        return x + out.tanh()


class Routed(nn.Module):
    """Only an expert of the first half of the samples is trained: the other process has none."""

    chosen = "layers.0.experts.0."

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x, labels):
        hidden = x
        for layer in self.layers:
            hidden = layer(hidden, x[:, 0])
        return SimpleNamespace(loss=nn.functional.cross_entropy(hidden, labels))


def build(kind):
    """A tiny model in float64, the same at every call."""
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        LlamaConfig,
        LlamaForCausalLM,
    )

    size = {"vocab_size": 53, "num_hidden_layers": 2, "intermediate_size": 20}
    size |= {"max_position_embeddings": 16}
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    torch.manual_seed(0)
    if kind.startswith("bert"):
        config = BertConfig(**size, **still, hidden_size=15, num_attention_heads=3, num_labels=3)
        model = BertForSequenceClassification(config)
    elif kind == "llama":  # its output layer is its word table
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        model = LlamaForCausalLM(
            LlamaConfig(**size, **heads, hidden_size=16, tie_word_embeddings=True)
        )
    else:
        model = Routed() if kind.startswith("routed") else Experts()
    return model.double()


def batches(kind):
    """``STEPS * ACCUMULATED`` batches of `SAMPLES`."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(STEPS * ACCUMULATED):
        ids = torch.randint(3, 53, (SAMPLES, 7), generator=generator)
        labels = torch.randint(0, 3, (SAMPLES,), generator=generator)
        x = torch.randn(SAMPLES, 5, generator=generator).double()
        x[:, 0] = torch.arange(SAMPLES) // (SAMPLES // 2)
        texts = {"input_ids": ids, "labels": ids if kind == "llama" else labels}
        found.append(texts if kind.startswith(("bert", "llama")) else {"x": x, "labels": labels})
    return found


def choose(model, kind=""):
    """Some positions of every tensor, and two tensors whole: a matrix and a vector."""
    generator, indices, shapes = torch.Generator().manual_seed(2), {}, {}
    named, start = sl.weights(model, () if kind == PART else None), getattr(model, "chosen", "")
    for name, p in ((name, p) for name, p in named.items() if name.startswith(start)):
        count = p.numel() if name.endswith(("0.weight", "norm.bias")) else min(7, p.numel())
        indices[name] = torch.randperm(p.numel(), generator=generator)[:count].sort().values
        shapes[name] = tuple(p.shape)
    return sl.Selection(indices, shapes)


def shard(model, kind="", **options):
    """Layer by layer, then what is left; as FSDP's own users do."""
    base = getattr(model, getattr(model, "base_model_prefix", ""), model)
    layers = getattr(getattr(base, "encoder", base), "layer", getattr(base, "layers", ()))
    for layer in layers if "in one" not in kind else ():
        fully_shard(layer, **options)
    return model if "partly" in kind else fully_shard(model, **options)


class Wire(TorchDispatchMode):
    """Counts of values that are summed over the processes."""

    def __init__(self) -> None:
        super().__init__()
        self.summed: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d" and func.overloadpacket.__name__ == "allreduce_":
            self.summed.append(sum(t.numel() for t in args[0]))
        assert func.namespace != "c10d" or "scatter" not in func.overloadpacket.__name__
        return func(*args, **(kwargs or {}))


def optimizer_of(model):
    return torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0.1
    )


def steps(model, optimizer, data, mine=slice(None), times=1, unsynced=False):
    """Train with accumulation and clipping; the norms before clipping."""
    norms = []
    for number, batch in enumerate(data, 1):
        if unsynced:
            model.set_requires_gradient_sync(number % ACCUMULATED == 0)
        loss = model(**{key: value[mine] for key, value in batch.items()}).loss
        (loss * times).backward()
        if number % ACCUMULATED == 0:
            norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.5))
            optimizer.step()
            optimizer.zero_grad()
    return torch.stack(norms)


def wholes(model):
    """Every tensor of a model, whole."""
    return {
        n: p.full_tensor() if hasattr(p, "device_mesh") else p
        for n, p in sl.snapshot(model).items()
    }


def alone(kind, folder):
    """Train in this process with the whole batches; what came of it."""
    model = build(kind)
    before, selection = sl.snapshot(model), choose(model, kind)
    with sl.masked(model, selection) as tuning:
        times = 2 if "summed" in kind else 1
        norms = steps(model, optimizer_of(model), batches(kind), times=times)
        tuning.delta().save(folder / f"{kind}-alone.safetensors")
    found = {"before": before, "masks": selection.masks(), "after": sl.snapshot(model)}
    return {**found, "norms": norms, "heads": list(sl.head_weights(model))}


def together(kind, rank, folder):
    """Train with half of every batch; what came of it, and what was sent."""
    model, data, mine = build(kind), batches(kind), half(rank)
    selection = choose(model, kind)
    shape, names = ((2, 1), ("copy", "shard")) if "hybrid" in kind else ((2,), ("shard",))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    shard(model, kind, mesh=mesh)
    with sl.masked(model, selection) as tuning, Wire() as wire:
        for module in model.modules() if "summed" in kind else ():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1)
        trained = [*tuning.parameters(), *tuning.dense_parameters()]
        norms = steps(model, optimizer_of(model), data, mine, unsynced="unsynced" in kind)
        tuning.delta().save(folder / f"{kind}-{rank}.safetensors")
    wire = {
        "summed": wire.summed,
        "trained": sum(p.numel() for p in trained),
        "tensors": len(trained),
    }
    return {"norms": norms, "after": wholes(model), "type": type(model).__name__, **wire}


def interrupted(how, rank, folder, mesh):
    """The same for a BERT that stops in the middle, and goes on in a new model."""
    data, mine = batches("bert"), half(rank)
    model, selection = build("bert"), choose(build("bert"), HOW[how])
    tuning = sl.masked(shard(model, mesh=mesh), selection)
    optimizer = optimizer_of(model)
    steps(model, optimizer, data[: len(data) // 2], mine)
    at = SimpleNamespace(global_step=2, is_world_process_zero=rank == 0, output_dir=folder)
    if how == "callback":
        hf.SaveDelta().on_save(at, at, None, model=model)
        dist.barrier()
    delta, state = tuning.delta(precise=True), model.state_dict()
    again = shard(build("bert"), mesh=mesh)
    with sl.masked(again, delta.selection(again) if how == "delta" else selection) as tuning:
        if how == "delta":
            tuning.resume(delta)
        elif how == "callback":
            hf.SaveDelta().on_train_begin(at, at, None, model=again)
        else:
            again.load_state_dict(state)
        resumed = optimizer_of(again)
        resumed.load_state_dict(optimizer.state_dict())
        steps(again, resumed, data[len(data) // 2 :], mine)
    return {"after": wholes(again)}


def half(rank):
    return slice(rank * SAMPLES // 2, (rank + 1) * SAMPLES // 2)


def main(rank, folder):
    torch.set_num_threads(1)
    options = {"init_method": f"file://{folder}/meet", "timeout": timedelta(seconds=60)}
    dist.init_process_group("gloo", rank=rank, world_size=2, **options)
    mesh = init_device_mesh("cpu", (2,))
    found = {kind: together(kind, rank, folder) for kind in KINDS}
    found |= {how: interrupted(how, rank, folder, mesh) for how in HOW}
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
