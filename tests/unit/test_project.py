"""The files about the project agree with each other, the environment and the README."""

import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
EXTRAS = PROJECT["optional-dependencies"]
CONDA_NAMES = {"matplotlib-base": "matplotlib", "pytorch": "torch"}
CUDA_PACKAGES = re.compile(r"cuda|nvidia|triton")  # what torch adds where it is built for a GPU

# What Colab had in August 2026: the floors must admit it, so that a chapter opened there keeps its
# torch.
COLAB = {
    "python": "3.13",
    "torch": "2.11.0",
    "transformers": "5.15.0",
    "ipywidgets": "7.7.1",
    "numpy": "2.1.3",
    "matplotlib": "3.10.0",
}


def direct():
    """Every requirement of pyproject.toml, extras included: name -> Requirement."""
    lines = [*PROJECT["dependencies"], *(line for extra in EXTRAS.values() for line in extra)]
    return {
        canonicalize_name(requirement.name): requirement for requirement in map(Requirement, lines)
    }


def lock():
    """The pins of requirements.lock: name -> version."""
    lines = (
        line.partition("#")[0].strip()
        for line in (ROOT / "requirements.lock").read_text().splitlines()
    )
    pins = [re.fullmatch(r"([\w.-]+)==([\w.]+)", line).groups() for line in lines if line]
    assert len(pins) == len({canonicalize_name(name) for name, _ in pins}), (
        "a package is pinned twice"
    )
    return {canonicalize_name(name): version for name, version in pins}


def closure(requirements):
    """The names of all packages that these requirements bring in.

    The installed packages declare them.
    """
    found, waiting = set(), list(requirements)
    while waiting:
        requirement = waiting.pop()
        for extra in {"", *requirement.extras}:
            key = canonicalize_name(requirement.name), extra
            if key not in found:
                found.add(key)
                inner = map(Requirement, metadata.requires(requirement.name) or [])
                waiting += [
                    other
                    for other in inner
                    if not other.marker or other.marker.evaluate({"extra": extra})
                ]
    return {name for name, _ in found}


def test_lock_admits_every_direct_requirement():
    pins = lock()
    for name, requirement in direct().items():
        assert requirement.specifier.contains(pins[name]), (
            f"{name}=={pins[name]} is outside {requirement.specifier}"
        )


def test_lock_is_what_the_project_needs_and_nothing_else():
    needed = closure([*direct().values(), *map(Requirement, PYPROJECT["build-system"]["requires"])])
    assert set(lock()) == {name for name in needed if not CUDA_PACKAGES.match(name)}


def test_environment_is_the_lock():
    installed = {name: Version(metadata.version(name)).public for name in lock()}
    assert installed == lock()


def test_conda_environment_has_the_requirements_of_pyproject():
    listed = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    entries = [Requirement(entry) for entry in listed if isinstance(entry, str)]
    conda = {entry.name: str(entry.specifier) for entry in entries}
    tools = {name: conda.pop(name, None) for name in ("python", "nodejs", "pip", "setuptools")}
    assert tools["python"] == PROJECT["requires-python"]
    assert None not in tools.values()
    assert {
        CONDA_NAMES.get(name, canonicalize_name(name)): specifier
        for name, specifier in conda.items()
    } == {name: str(requirement.specifier) for name, requirement in direct().items()}


@pytest.mark.parametrize("name", COLAB)
def test_floors_admit_colab(name):
    line = f"python{PROJECT['requires-python']}" if name == "python" else str(direct()[name])
    assert Requirement(line).specifier.contains(COLAB[name])


def test_ground_floor_needs_torch_numpy_and_safetensors_only():
    assert {Requirement(line).name for line in PROJECT["dependencies"]} == {
        "numpy",
        "safetensors",
        "torch",
    }


def test_locks_hold_no_download_address():
    for name in ("requirements.lock", "book/package-lock.json"):
        assert not re.search(r"resolved|\.tgz|\.whl|\.tar\.gz|file:", (ROOT / name).read_text()), (
            name
        )


def test_version_is_the_same_everywhere():
    version = PROJECT["version"]
    assert metadata.version("selective-lite") == version
    assert str(yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"]) == version
    assert (
        re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE).group(1)
        == version
    )


# A tiny base under the name that the README's is loaded by, and what it calls `train`.
BEFORE_THE_README = """
import torch
from transformers import BertConfig, BertModel
torch.manual_seed(0)
shape = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3}
config = BertConfig(vocab_size=53, intermediate_size=20, max_position_embeddings=16, **shape)
BertModel(config).save_pretrained("base")
ids = torch.randint(1, 53, (16, 7))
train = [{"input_ids": row, "labels": row[0] % 2} for row in ids]
"""
AFTER_THE_README = """
pairs = zip(trainer.model.state_dict().items(), model.state_dict().items(), strict=True)
same = all(one == two and torch.equal(a, b) for (one, a), (two, b) in pairs)
print(selection.count, selection.total, delta.count, len(delta.head), same)
"""


def test_readme_example_runs_and_has_ten_lines(tmp_path):
    (example,) = re.findall(
        r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL
    )
    assert sum(bool(line) for line in example.split("\n")) <= 10
    (hub_id,) = re.findall(r'from_pretrained\("(.+?)"\)', example)
    script = BEFORE_THE_README + example.replace(hub_id, "base") + AFTER_THE_README
    no_gpu = "ignore:'pin_memory' argument is set as true"  # torch's, of a Trainer on a CPU
    command = [sys.executable, "-W", "error", "-W", no_gpu, "-c", script]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    said, *_, report = run.stdout.splitlines()
    assert re.search(r"classifier\.weight, classifier\.bias: 26 weights", said)
    count, total, moved, heads, same = report.split()
    assert int(count) == round(0.005 * int(total))
    assert int(moved) == int(count)
    assert heads == "2"
    assert same == "True"  # next month's model is the one that was trained


def test_readme_names_make_targets_and_files_that_exist():
    readme, makefile = (ROOT / "README.md").read_text(), (ROOT / "Makefile").read_text()
    for target in re.findall(r"make (\w+)(?:  |`)", readme):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"README says make {target}"
    for path in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", readme):
        assert (ROOT / path).is_file(), f"README shows {path}"
