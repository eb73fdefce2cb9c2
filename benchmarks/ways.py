"""Ways of training that the benchmarks compare: each prepares a model and makes its optimizer."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, ShiraConfig, get_peft_model
from torch import nn

import selective_lite as sl

WAYS = ("full AdamW", "full AdamW, fused", "peft LoRA", "peft SHiRA", "selective_lite", "floor")
LINEAR = {  # every linear layer, the output apart
    "bert": ["query", "key", "value", "dense"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


def trained(
    way: str, model: Any, *, budget: float, rank: int
) -> tuple[nn.Module, torch.optim.Optimizer | None]:
    """The model, ready to train in one of `WAYS`, and its optimizer; the floor trains nothing."""
    targets = LINEAR[model.config.model_type]
    if way == "peft LoRA":
        model = get_peft_model(model, LoraConfig(r=rank, target_modules=targets))
    elif way == "peft SHiRA":
        model = get_peft_model(model, ShiraConfig(r=rank, target_modules=targets))
    elif way == "selective_lite":
        sl.masked(model, sl.random(model, budget, seed=0))
    elif way == "floor":  # forward and every input gradient, down to the output of the embedding
        model.requires_grad_(False)
        embedding = getattr(model.base_model, "embeddings", model.get_input_embeddings())
        embedding.register_forward_hook(lambda module, inputs, output: output.requires_grad_())
        return model, None
    if way.startswith("peft"):
        for parameter in sl.head_weights(model.get_base_model()).values():
            parameter.requires_grad_(True)
    moved = [p for p in model.parameters() if p.requires_grad]
    # As `fit` and Trainer do by default; only full training is shown without it, too.
    return model, torch.optim.AdamW(moved, lr=1e-4, fused=way != "full AdamW")
