"""Provenance: a hash changes with the code that a result follows from, and with no other."""

import pytest

from selective_lite.lab import experiments, provenance

FILES = {
    "training.py": '''"""Train."""

from .params import rate as _rate

WIDTH = 3


def step(x):
    """One."""
    return x + helper(_rate) + WIDTH  # one


def helper(x):
    return -x


def unused(x):
    return x
''',
    "params.py": "rate = 0.1\nother = 2\n",
    "methods/one.py": "from ..train import step\n\n\ndef one(x):\n    return step(x)\n",
    "lab/results.py": "def write(x):\n    return x\n",
    "lab/experiments.py": """from ..methods.one import one
from .results import write


def run(x):
    write(one(x))
""",
}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A small package in place of the library; package(file, old, new) changes a file of it."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(provenance, "PACKAGE", tmp_path)

    def change(file, old, new):
        assert old in FILES[file]
        (tmp_path / file).write_text(FILES[file].replace(old, new))
        provenance._definitions.cache_clear()
        provenance._imports.cache_clear()

    change("training.py", "", "")
    return change


def digest():
    return provenance.code_hash(["lab/experiments.py:run"])


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("training.py", "# one", "# another comment"),
        ("training.py", '"""One."""', '"""Another docstring,\n    longer."""'),
        ("training.py", "x + helper(_rate) + WIDTH", "(x +\n  helper(_rate) + WIDTH)"),
        ("training.py", "def unused(x):\n    return x", "def unused(x):\n    return 2 * x"),
        ("params.py", "other = 2", "other = 3"),
        ("lab/results.py", "return x", "return 2 * x"),
    ],
)
def test_what_no_number_follows_from_leaves_the_hash(package, file, old, new):
    before = digest()
    package(file, old, new)
    assert digest() == before


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("training.py", "x + helper", "x - helper"),
        ("training.py", '"""One."""', 'label = """One."""'),
        ("training.py", "WIDTH = 3", "WIDTH = 4"),
        ("training.py", "return -x", "return x"),
        ("params.py", "rate = 0.1", "rate = 0.2"),
        ("methods/one.py", "step(x)", "step(step(x))"),
        ("lab/experiments.py", "write(one(x))", "write(one(one(x)))"),
        ("training.py", "from .params import rate", "from .params import other"),
    ],
)
def test_what_numbers_follow_from_changes_the_hash(package, file, old, new):
    before = digest()
    package(file, old, new)
    assert digest() != before


def test_an_unknown_root_raises(package):
    with pytest.raises(ValueError, match=r"roots names 'train\.py:stop'"):
        provenance.code_hash(["train.py:stop"])


def test_a_row_follows_from_its_own_method_and_not_from_the_others(monkeypatch):
    looked_at = []
    real = provenance._used
    monkeypatch.setattr(
        provenance, "_used", lambda file, node: looked_at.append((file, node)) or real(file, node)
    )

    def places(method):
        looked_at.clear()
        provenance.code_hash(experiments.roots({"method": method}))
        return {(file, getattr(node, "name", None)) for file, node in looked_at}

    pruned, random = places("unstructured"), places("random")
    shared = {
        ("training.py", "fit"),
        ("layers/sampled.py", "_Linear"),
        ("lab/tasks.py", "Split"),
        ("selection.py", "select"),
    }
    assert shared <= pruned & random
    assert ("methods/calibration.py", "Calibration") in pruned - random
    assert ("scores.py", "random_scores") in random - pruned
