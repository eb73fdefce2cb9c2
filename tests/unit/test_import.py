"""Importing the library: torch, numpy and safetensors, and no global state.

Saving and loading need nothing else either.
"""

import subprocess
import sys

import pytest

HEAVY = ("transformers", "matplotlib", "ipywidgets", "peft", "selective_lite.lab")


def python(code, *arguments):
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_imports_nothing_heavy_and_sets_no_global_state():
    code = """
import os, random, sys, warnings
import numpy, torch
import safetensors.torch
def state():
    return (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(),
            torch.get_default_device(), torch.get_rng_state().tolist(), random.getstate(),
            repr(numpy.random.get_state()), list(warnings.filters), dict(os.environ), sys.path[:])
before, loaded = state(), set(sys.modules)
import selective_lite
from selective_lite import hf
from selective_lite.methods import guarantees
assert state() == before
new = {name.partition(".")[0] for name in set(sys.modules) - loaded}
heavy = (name for name in sys.argv[1:] if name in sys.modules)
print(*sorted(new - set(sys.stdlib_module_names)), *heavy)
"""
    assert python(code, *HEAVY).split() == ["selective_lite"]


def test_training_saving_and_loading_need_nothing_else(tmp_path):
    # What the lab and the book bring is hidden from the interpreter.
    code = """
import sys
from importlib.machinery import PathFinder
class Bare:
    @staticmethod
    def find_spec(name, path=None, target=None):
        package = name.partition(".")[0]
        hidden = package in ("transformers", "matplotlib", "ipywidgets", "peft", "tqdm", "pandas")
        return None if hidden else PathFinder.find_spec(name, path, target)
sys.meta_path = [Bare if finder is PathFinder else finder for finder in sys.meta_path]
import torch
from torch import nn
import selective_lite as sl
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
base = sl.snapshot(model)
data = [(torch.randn(8, 4), torch.randint(0, 2, (8,)))]
loss = lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1])
selection = sl.select(sl.squared_gradient(model, data, reduction="batch", loss=loss), 10)
sl.fit(model, sl.fixed_mask(model, selection, lr=0.01, epochs=3), data, loss=loss)
sl.diff(base, model).save(sys.argv[1])
model.load_state_dict(base)
with sl.load(sys.argv[1]).apply(model):
    print(sum(int((base[name] != p).sum()) for name, p in model.named_parameters()))
"""
    assert python(code, str(tmp_path / "delta")) == "10\n"


def test_every_public_name_is_there():
    import selective_lite

    names = selective_lite.__all__
    assert len(set(names)) == len(names)
    assert all(getattr(selective_lite, name).__doc__ for name in names)
    assert set(dir(selective_lite)) == {*names, "__version__"}  # what TAB shows
    assert {"fish", "bitfit", "lt_sft", "masked", "diff", "hf"} <= set(names)


@pytest.mark.parametrize(
    ("old", "new"),
    [("uniform", "random_scores"), ("rule", "select_tensors"), ("dense", "full_finetuning")],
)
def test_a_name_of_the_first_edition_still_works_and_says_the_new_one(old, new):
    import selective_lite

    with pytest.warns(DeprecationWarning, match=f"sl.{old} is now sl.{new}"):
        assert getattr(selective_lite, old) is getattr(selective_lite, new)
    with pytest.raises(AttributeError, match="no attribute 'fishes'"):
        _ = selective_lite.fishes
