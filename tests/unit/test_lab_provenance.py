"""Provenance: a hash changes with what a result follows from, not with names, places and words."""

import re
import shutil
from dataclasses import replace

import pytest

from selective_lite.lab.experiments import movies, provenance, recipes

FILES = {
    "__init__.py": "from .training import step\n",
    "training.py": '''"""Train."""

import warnings
from collections import OrderedDict as Table
from dataclasses import dataclass
from math import sqrt

from . import numbers as constants
from .numbers import rate as _rate

WIDTH, DEPTH = 3, 4
TOO_SMALL = "x={} is too small"


@dataclass
class State:
    """What is kept."""

    count: int = 0
    name: str = "a"

    def grow(self, by: int = 1) -> int:
        """One more."""
        grown = self.count + by
        return grown


def step(x: float, *rest: float, scale: float = 2.0) -> float:
    """One."""
    if x < 0:
        raise ValueError(f"x={x} is negative: give a positive one")
    if x < 1:
        raise ValueError(TOO_SMALL.format(x))
    assert rest is not None, "no rest"
    warnings.warn("it is late", UserWarning, stacklevel=2)
    kept = [item * scale for item in rest]  # one
    first = lambda part: part[0] - part[-1]
    try:
        total: float = sum(kept)
    except TypeError as error:
        total = first(error.args)

    def inner(y):
        nonlocal total
        total = total + y
        return total

    return sqrt(x) + helper(_rate) + WIDTH + constants.base(x) + inner(Table())


def helper(x):
    return -x if x < 1 else helper(x / 2)


def even(x):
    return x == 0 or odd(x - 1)


def odd(x):
    return x != 0 and even(x - 1)


def unused(x):
    return x
''',
    "numbers.py": """rate = 0.1
other = 2


def base(x):
    return 7 * x


def register(function):
    return function


register.known = [base]
""",
    "methods/__init__.py": "",
    "methods/one.py": """import other.package as op

from ..training import even, step
from ..lab.kept import TABLE, write


def one(x):
    from ..training import State

    return write(step(x, Table=TABLE), op.f(even(State().grow())))
""",
    "lab/__init__.py": "",
    "lab/kept.py": """# provenance: apart, reads results
def write(x):
    return x


# provenance: apart, the methods are roots of their own
TABLE = {"one": 1}


def stale(x):
    return makers(x)


# provenance: apart, of pages too
def makers(x):
    return 3 * x
""",
}


def written(folder, files):
    """A package of these files in place of what is in a folder."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    provenance.reread()


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A small package instead of the library; package(change) replaces texts in its files."""
    folder = tmp_path / "package"
    monkeypatch.setattr(provenance, "PACKAGE", folder)

    def change(file, old, new):
        assert old in FILES[file]
        written(folder, {**FILES, file: FILES[file].replace(old, new)})

    written(folder, FILES)
    yield change
    provenance.reread()


def digest(root="methods.one.one"):
    return provenance.code_hash([root])


SAME = {
    "a comment": ("training.py", "# one", "# another comment"),
    "a docstring": ("training.py", '"""One."""', '"""Another docstring,\n    longer."""'),
    "no docstring": ("training.py", '    """What is kept."""\n', ""),
    "layout": ("training.py", "sqrt(x) + helper(_rate)", "(sqrt(x) +\n  helper(_rate))"),
    "annotations": ("training.py", "x: float, *rest: float", "x: int, *rest"),
    "a field's type": ("training.py", "count: int = 0", "count: float = 0"),
    "a local's annotation": ("training.py", "total: float = sum", "total = sum"),
    "a local": ("training.py", "kept", "found"),
    "a local of a method": ("training.py", "grown", "larger"),
    "a variable of a comprehension": ("training.py", "item", "one_of_them"),
    "a local that an inner function changes": ("training.py", "total", "sums"),
    "an inner function": ("training.py", "inner", "within"),
    "a lambda's parameter": ("training.py", "part", "piece"),
    "an error's variable": ("training.py", "error", "problem"),
    "other arguments": ("training.py", "rest", "others"),
    "an error's text": ("training.py", "is negative: give a positive one", "must be positive"),
    "an error's text in a constant": ("training.py", "is too small", "must be at least 1"),
    "an error's text as another expression": (
        "training.py",
        'f"x={x} is negative: give a positive one"',
        '"it is negative: " + str(x)',
    ),
    "an assertion's text": ("training.py", "no rest", "where is the rest?"),
    "a warning's text": ("training.py", "it is late", "it is getting late"),
    "an alias": ("training.py", "_rate", "_speed"),
    "a definition that nothing uses": ("training.py", "return x\n", "return 2 * x\n"),
    "a constant that nothing uses": ("numbers.py", "other = 2", "other = 3"),
    "the unused half of a pair": ("training.py", "= 3, 4", "= 3, 5"),
    "what is apart": ("lab/kept.py", "return x", "return 2 * x"),
    "a constant that is apart": ("lab/kept.py", '"one": 1', '"two": 2'),
}
OTHER = {
    "an operator": ("training.py", "sqrt(x) + helper", "sqrt(x) - helper"),
    "a comparison": ("training.py", "x < 1:", "x <= 1:"),
    "a constant of a pair": ("training.py", "= 3, 4", "= 4, 4"),
    "a default": ("training.py", "scale: float = 2.0", "scale: float = 3.0"),
    "a method's default": ("training.py", "by: int = 1", "by: int = 2"),
    "a field's default": ("training.py", "count: int = 0", "count: int = 1"),
    "a field more": ("training.py", "count: int = 0", "count: int = 0\n    more: int = 0"),
    "a field or a constant": ("training.py", "count: int = 0", "count = 0"),
    "a parameter that a call may name": ("training.py", "scale", "factor"),
    "what a lambda does with its parts": (
        "training.py",
        "lambda part: part[0] - part[-1]",
        "lambda part: part[-1] - part[0]",
    ),
    "what is raised": ("training.py", "raise ValueError(TOO", "raise TypeError(TOO"),
    "what is caught": ("training.py", "except TypeError", "except ValueError"),
    "a text that is no docstring": ("training.py", '"""One."""', 'label = """One."""'),
    "a text that is a value": ("training.py", 'name: str = "a"', 'name: str = "b"'),
    "which local": ("training.py", "return total\n", "return y\n"),
    "a callee's formula": ("training.py", "return -x", "return x"),
    "another callee": ("training.py", "helper(_rate)", "unused(_rate)"),
    "another callee outside": ("training.py", "import sqrt", "import exp as sqrt"),
    "another module outside": ("methods/one.py", "other.package", "another.package"),
    "another constant": ("training.py", "import rate", "import other"),
    "a constant of another file": ("numbers.py", "rate = 0.1", "rate = 0.2"),
    "a formula behind a module's name": ("numbers.py", "7 * x", "8 * x"),
    "a mutual recursion": ("training.py", "x != 0 and", "x != 1 and"),
    "a decorator": ("training.py", "@dataclass", "@dataclass(frozen=True)"),
    "an import inside a function": ("methods/one.py", "import State", "import step as State"),
    "a call more": ("methods/one.py", "step(x, Table=TABLE)", "step(step(x, Table=TABLE))"),
}


@pytest.mark.parametrize("case", SAME)
def test_what_computes_nothing_leaves_the_hash(package, case):
    before = digest()
    package(*SAME[case])
    assert digest() == before


@pytest.mark.parametrize("case", OTHER)
def test_what_computes_changes_the_hash(package, case):
    before = digest()
    package(*OTHER[case])
    assert digest() != before


def test_a_definition_may_have_another_name_file_and_import(package, tmp_path):
    before = digest("one")
    moved = "def base(x):\n    return 7 * x\n"
    files = {
        "__init__.py": "",
        "deeper/__init__.py": "from .train import go\n",
        "deeper/train.py": FILES["training.py"]
        .replace("def step", "def go")
        .replace("helper", "assistant")
        .replace("State", "Standing")
        .replace("from . import numbers as constants\n", "import selective_lite.pile\n")
        .replace("constants.base", "selective_lite.pile.base")
        .replace("from .numbers import rate as _rate", "from ..figures import rate")
        .replace("_rate", "rate")
        .replace("WIDTH", "BREADTH"),
        "pile.py": moved,
        "figures.py": FILES["numbers.py"].replace(moved, "from .pile import base\n"),
        "one.py": FILES["methods/one.py"]
        .replace("from ..training import even, step", "from . import deeper, deeper as d")
        .replace("from ..lab", "from selective_lite.lab")
        .replace("from ..training import State", "from .deeper.train import Standing as State")
        .replace("step(x", "deeper.go(x")
        .replace("even(", "d.train.even("),
        "lab/kept.py": FILES["lab/kept.py"].replace("TABLE", "ALL"),
    }
    files["one.py"] = files["one.py"].replace("import TABLE, write", "import ALL as TABLE, write")
    written(tmp_path / "package", files)
    assert digest("one") == before
    assert digest("methods/one.py:one") == before, "an old place"


def test_a_registration_belongs_to_what_it_changes(package):
    before, other = digest("numbers.register"), digest("numbers.rate")
    package("numbers.py", "register.known = [base]", "register.known = [rate]")
    assert digest("numbers.register") != before
    assert digest("numbers.rate") == other


def test_a_module_that_is_used_as_a_value_counts_whole(package):
    package("methods/one.py", "step(x,", "step(vars(x),")
    before = digest()
    package("training.py", "constants.base(x)", "getattr(constants, 'base')(x)")
    whole = digest()
    written(
        provenance.PACKAGE,
        {
            **FILES,
            "training.py": FILES["training.py"].replace(
                "constants.base(x)", "getattr(constants, 'base')(x)"
            ),
            "numbers.py": FILES["numbers.py"].replace("other = 2", "other = 3"),
        },
    )
    assert len({before, whole, digest()}) == 3


def test_swapping_two_definitions_is_seen(package):
    before = digest()
    package("methods/one.py", "even, step", "even as step, step as even")
    assert digest() != before


@pytest.mark.parametrize(
    ("root", "there"), [("train.py:stop", "none"), ("grow.step", "training.step"), ("f", "none")]
)
def test_a_root_that_is_not_there_raises(package, root, there):
    if there != "none":
        assert digest(root) == digest("training.step"), "found in another module"
        written(provenance.PACKAGE, {**FILES, "twice.py": "def step():\n    return 1\n"})
        there = "training.step, twice.step"
    with pytest.raises(ValueError, match=rf"roots names '{re.escape(root)}'.*: {there}$"):
        digest(root)


def test_a_setting_counts_as_it_is(package):
    plain = digest()
    found = [provenance.code_hash([setting, "one.one"]) for setting in ("cliff=0.1", "cliff=0.2")]
    assert len({plain, *found}) == 3
    assert provenance.code_hash(["one.one", "cliff=0.1"]) == found[0], "in any order"
    package("training.py", "return -x", "return x")
    assert provenance.code_hash(["one.one", "cliff=0.1"]) != found[0]
    assert provenance.reached(["one.one", "cliff=0.1"]) == provenance.reached(["one.one"])


@pytest.mark.parametrize("change", [{"cliff": 0.2}, {"lower": True}])
def test_a_sweep_follows_from_its_cliff_and_direction_and_a_run_does_not(change):
    run, sweep = {"method": "fish", "lr": 1e-2}, {"method": "fish", "grid": [1e-3]}
    other = replace(movies.STUDY, **change)
    before, after = (
        [provenance.code_hash(study.roots(config)) for config in (run, sweep)]
        for study in (movies.STUDY, other)
    )
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False]


def page(*cells, files=()):
    return provenance.page_hash(cells, files)


CELLS = (
    "import selective_lite as sl\nfrom selective_lite.training import even",
    "even(sl.step(3))",
)


@pytest.mark.parametrize("case", [key for key in SAME if SAME[key][0] == "training.py"])
def test_a_page_stays_with_what_computes_nothing(package, case):
    before = page(*CELLS)
    package(*SAME[case])
    assert page(*CELLS) == before


@pytest.mark.parametrize(
    ("file", "old", "new", "changes"),
    [
        ("training.py", "return -x", "return x", True),
        ("numbers.py", "7 * x", "8 * x", True),
        ("training.py", "x != 0 and", "x != 1 and", True),
        ("training.py", "self.count + by", "self.count - by", False),
        ("methods/one.py", "step(x,", "step(2 * x,", False),
        ("__init__.py", "import step", "import helper as step", True),
    ],
)
def test_a_page_follows_from_what_it_reaches(package, file, old, new, changes):
    before = page(*CELLS)
    package(file, old, new)
    assert (page(*CELLS) != before) == changes


@pytest.mark.parametrize(
    ("old", "new", "changes"),
    [
        ("return x", "return 2 * x", True),
        ('"one": 1', '"one": 2', True),
        ("return makers(x)", "return -makers(x)", True),
        ("3 * x", "4 * x", False),
    ],
)
def test_a_page_follows_from_what_is_apart_for_rows_only(package, old, new, changes):
    cell = "from selective_lite.lab import kept\nkept.write(kept.TABLE, kept.stale(1))"
    before = page(cell)
    package("lab/kept.py", old, new)
    assert (page(cell) != before) == changes


def test_a_page_s_own_code_counts_but_not_its_comments_and_layout(package):
    before = page(*CELLS)
    assert page(CELLS[0] + "  # the library\n", "\neven( sl.step(3) )") == before
    assert page(CELLS[0], "even(sl.step(4))") != before
    assert page(CELLS[0] + "\n" + CELLS[1], "") != before


def test_a_page_follows_the_scripts_that_it_runs(package):
    script = 'run("python", "-c", """\\n    import selective_lite as sl\\n    sl.step(1)\\n""")'
    before = page(script)
    package("numbers.py", "7 * x", "8 * x")
    assert page(script) != before


def test_a_page_follows_from_the_results_that_it_reads(package, tmp_path):
    files = [tmp_path / name for name in ("movies.json", "movies_rates.json", "tweets.json")]

    def changed(*cells):
        """The files that a page's hash depends on."""
        found = []
        for file in files:
            for each in files:
                each.write_text("[]")
            before = page(*cells, files=files)
            file.write_text("[1]")
            if page(*cells, files=files) != before:
                found.append(file.stem)
        return found

    reads = "from selective_lite.lab.kept import write as read\n"
    assert changed(reads + 'read("movies" + ".json")') == ["movies"]
    assert changed(reads + 'name = "movies"; read(f"{name}_rates.json")') == ["movies_rates"]
    assert changed('print("movies.json")') == []


# The library itself: rows of every method.
ROOTS = {name: movies.STUDY.roots({"method": name}) for name in recipes.RECIPES}


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A copy of the library instead of it; copy(file, old, new, ...) changes a file of it."""
    folder = tmp_path / "selective_lite"
    shutil.copytree(provenance.PACKAGE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(provenance, "PACKAGE", folder)

    def change(file, old, new):
        text = (folder / file).read_text()
        assert re.search(old, text), old
        (folder / file).write_text(re.sub(old, new, text))
        provenance.reread()

    provenance.reread()
    yield change
    provenance.reread()


def hashes():
    return {name: provenance.code_hash(roots) for name, roots in ROOTS.items()}


def test_no_row_is_stale_after_a_local_s_new_name_an_error_s_new_words_and_a_move(copy):
    before = hashes()
    copy("params.py", r"\bfound\b", "kept")
    copy("params.py", r'(raise (?:Value|Type)Error\(\s*f?")', r"\1In other words: ")
    text = (provenance.PACKAGE / "params.py").read_text()
    moved = re.search(r"def resolve_budget.*?(?=\n\n\n)", text, re.DOTALL)[0]
    copy("params.py", re.escape(moved), "from .budgets import resolve_budget")
    (provenance.PACKAGE / "budgets.py").write_text(f"import operator\n\n\n{moved}\n")
    assert hashes() == before
    copy("budgets.py", re.escape("round(budget * total)"), "int(budget * total)")
    after = hashes()
    assert (after["random"] == before["random"], after["full"] == before["full"]) == (False, True)


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("training.py", r"(\w+)\.backward\(\)", r"(2 * \1).backward()"),
        ("training.py", "fused=True", "fused=False"),
    ],
)
def test_every_row_is_stale_after_a_change_of_the_training_step(copy, file, old, new):
    before = hashes()
    copy(file, old, new)
    after = hashes()
    assert not [name for name in ROOTS if after[name] == before[name]]


def test_a_row_follows_from_its_own_method_and_not_from_the_others_or_the_keeping_of_rows():
    pruned, random = (provenance.reached(ROOTS[name]) for name in ("unstructured", "random"))
    shared = {"training.fit", "lab.data.sentiment.Split", "selection.select"}
    assert shared <= pruned & random
    assert "methods.diff_pruning.calibration.Calibration" in pruned - random
    assert "methods.controls.random_scores" in random - pruned
    kept = {"lab.experiments.provenance", "lab.data.assets"}
    assert not [name for name in pruned | random if name.rpartition(".")[0] in kept]


def test_a_page_of_the_book_follows_from_what_its_code_names(copy):
    cells = ["import selective_lite as sl\nfrom selective_lite.lab import plots, results"]
    gates = [*cells, "sl.hard_concrete(0)"]
    rows = [*cells, 'results.read("movies")']
    before = page(*gates), page(*rows)
    copy("methods/hard_concrete.py", r"torch\.sigmoid", "2 * torch.sigmoid")
    assert page(*gates) != before[0]
    assert page(*rows) == before[1]
