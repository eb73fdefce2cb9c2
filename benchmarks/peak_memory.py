"""Benchmark: peak memory of a SmolLM2-135M step over the loaded model, each way of training in a fresh process."""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, ShiraConfig, get_peft_model
from torch import nn

import selective_lite as sl
from selective_lite.lab import results
from selective_lite.lab.models import load_language_model

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONFIG = {"model": "smollm2", "batch": 4, "tokens": 64, "budget": 0.005, "rank": 8, "steps": 3}
ROOTS = ["masked.py:masked", "select.py:select", "scores.py:uniform"]
WAYS = ("forward alone", "full AdamW", "peft LoRA", "peft SHiRA", "selective_lite")


def prepared(model: nn.Module, way: str, config: Mapping[str, Any]) -> nn.Module:
    """The model, with what this way of training adds to it, and only what it trains requiring gradients."""
    if way == "forward alone":
        return model.requires_grad_(False)
    if way == "peft LoRA":
        return get_peft_model(model, LoraConfig(r=config["rank"], target_modules=LINEAR))
    if way == "peft SHiRA":
        return get_peft_model(model, ShiraConfig(r=config["rank"], target_modules=LINEAR))
    if way == "selective_lite":
        sl.masked(model, sl.select(sl.uniform(model, 0), config["budget"]))
    return model


def peak(way: str, config: Mapping[str, Any]) -> dict[str, int]:
    """Bytes over the loaded model at the worst moment of some steps, and how many weights were trained."""
    torch.manual_seed(0)
    model, _ = load_language_model(config["model"])
    device = next(model.parameters()).device
    ids = torch.randint(10, 40_000, (config["batch"], config["tokens"]), device=device)
    before = _resident()
    model = prepared(model.train(), way, config)
    _restart()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained) if trained else None
    for _ in range(config["steps"]):
        loss = model(input_ids=ids, labels=ids).loss
        if optimizer is not None:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return {"peak": _peak() - before, "trained": sum(p.numel() for p in trained)}


def _status(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def _resident() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else _status("VmRSS")


def _peak() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _status("VmHWM")


def _restart() -> None:
    """Give freed memory back and forget the peak so far: loading a model and drawing a selection have their own."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def run(config: Mapping[str, Any]) -> results.Row:
    """Every way in a process of its own."""
    found = {}
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    for way in WAYS:
        command = [sys.executable, __file__, way, json.dumps(config)]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        found[way] = json.loads(done.stdout.splitlines()[-1])
    return {key: {way: found[way][key] for way in WAYS} for key in ("peak", "trained")}


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(json.dumps(peak(sys.argv[1], json.loads(sys.argv[2]))))
    else:
        (row,) = results.run_missing("peak_memory", [CONFIG], run, lambda config: ROOTS)
        for way in WAYS:
            print(f"{way:16} {row['peak'][way] / 2**20:8.1f} MiB over the model, {row['trained'][way]:11,} trained")
