"""Benchmark: the memory that selecting and masking take beside a model of 1.7 billion weights.

Its shape is SmolLM2-1.7B's, in bfloat16; its values are of no matter, so they are random.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from processes import forget_peak, fresh, peak, resident, settle
from transformers import LlamaConfig, LlamaForCausalLM

import selective_lite as sl
from selective_lite.lab import results

CONFIG = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "vocab_size": 49152,
    "dtype": "bfloat16",
    "budget": 0.005,
}
ROOTS = ["ship/tuning.py:masked", "methods/controls.py:random", "selection.py:select"]


def measure(config: Mapping[str, Any]) -> results.Row:
    """Bytes of the loaded model, of the peaks over it, and of what stays."""
    shape = {key: value for key, value in config.items() if key not in ("dtype", "budget")}
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=True))
    model = model.to(getattr(torch, config["dtype"])).to_empty(device="cpu")
    model.tie_weights()
    for parameter in model.parameters():
        parameter.data.uniform_(-1, 1)
    settle()
    found = {"loaded": resident()}
    forget_peak()
    selection = sl.random(model, config["budget"], seed=0)
    found["peak of selecting, over it"] = peak() - found["loaded"]
    found["selection"] = resident() - found["loaded"]
    settle()
    before = resident()
    forget_peak()
    with sl.masked(model, selection) as tuning:
        found["peak of masking, over both"] = peak() - before
        found["index"] = sl.ledger(model)["index"]
        found["values"] = sum(p.nbytes for p in tuning.parameters())
    return {"weights": selection.total, "selected": selection.count, "bytes": found}


def run(config: Mapping[str, Any]) -> results.Row:
    """The same in a fresh process."""
    return fresh(measure, config)


if __name__ == "__main__":
    (row,) = results.run_missing("large", [CONFIG], run, lambda config: ROOTS)
    print(f"{row['selected']:,} of {row['weights']:,} weights, MiB")
    for what, size in row["bytes"].items():
        print(f"{what:28} {size / 2**20:8,.0f}")
