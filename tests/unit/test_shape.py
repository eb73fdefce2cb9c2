"""The house keeps its shape: short floors, short method files.

No import climbs or goes in a circle.
"""

import ast
import io
import tokenize
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "selective_lite"
FLOORS = ("kernels", "", "ship", "hf", "methods", "lab")  # upwards; "" is the ground
DOOR = Path("__init__.py")  # it gives what the floors hold, and is on none
LAYOUT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


def code_lines(text):
    """How many lines hold code: neither blank, nor a comment, nor a docstring."""
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in LAYOUT:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if (
            isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
            and ast.get_docstring(node) is not None
        ):
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


def imports(text, place):
    """The modules of the package that the file at `place` imports, as paths without a suffix."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            folder = place.parts[: -node.level] if node.level else ()
            path = (*folder, *(node.module or "").split("."))
            path = path if node.level else path[1:] if path[0] == "selective_lite" else None
            if path is not None:
                module = [part for part in path if part]
                found |= {"/".join([*module, alias.name]) for alias in node.names} | {
                    "/".join(module)
                }
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            found |= {"/".join(name[1:]) for name in names if name[0] == "selective_lite"}
    return found


def floor(module):
    folder = module.split("/")[0].removesuffix(".py")
    return FLOORS.index(folder if folder in FLOORS else "")


def climbing(text, place):
    """The imports of a file that lie on a floor above its own."""
    if place == DOOR:
        return set()
    own = floor(place.as_posix())
    return {module for module in imports(text, place) if floor(module) > own}


def sources(pattern):
    return {path.relative_to(PACKAGE): path.read_text() for path in sorted(PACKAGE.glob(pattern))}


def test_lines_of_code_are_counted_without_docstrings_comments_and_blank_lines():
    text = '"""Doc.\n\nMore."""\n\n# comment\nX = """a\nb"""  # both count\n\n\n'
    text += 'def f(\n    a,\n):\n    "Doc."\n    return a\n'
    assert code_lines(text) == 6
    assert code_lines(text + "\n\nclass C:\n    '''Doc.'''\n\n    y: int = 1\n") == 8


def test_the_ground_floor_with_its_layers_has_less_than_1400_lines():
    texts = {**sources("*.py"), **sources("layers/*.py")}
    ground = {path: text for path, text in texts.items() if path not in (DOOR, Path("hf.py"))}
    counts = {str(path): code_lines(text) for path, text in ground.items()}
    assert {"params.py", "selection.py", "training.py"} <= set(counts)
    assert sum(counts.values()) < 1400, counts


def test_the_kernels_have_at_most_900_lines():
    counts = {str(path): code_lines(text) for path, text in sources("kernels/*.py").items()}
    assert "kernels/sampled.py" in counts
    assert sum(counts.values()) <= 900, counts


def test_the_ship_has_at_most_1350_lines():
    # 1,200 before chains, and before values that need the base to be decoded: who may look, when
    counts = {str(path): code_lines(text) for path, text in sources("ship/*.py").items()}
    assert "ship/delta.py" in counts
    assert sum(counts.values()) <= 1350, counts


def test_a_method_has_at_most_150_lines():
    counts = {str(path): code_lines(text) for path, text in sources("methods/**/*.py").items()}
    assert len(counts) > 10
    assert {path: count for path, count in counts.items() if count > 150} == {}


@pytest.mark.parametrize(
    ("place", "text", "found"),
    [
        ("training.py", "from .methods.fish import fish\n", {"methods/fish", "methods/fish/fish"}),
        ("kernels/sampled.py", "from ..params import weights", {"params", "params/weights"}),
        ("params.py", "from .kernels.sampled import rows", set()),
        ("training.py", "def f():\n    from . import lab\n", {"lab"}),
        ("training.py", "import selective_lite.lab.tasks\n", {"lab/tasks"}),
        ("training.py", "from .select import select\nimport os\nfrom pathlib import Path\n", set()),
        ("training.py", "from .ship.delta import Delta\n", {"ship/delta", "ship/delta/Delta"}),
        ("methods/__init__.py", "from ..lab import tasks\n", {"lab", "lab/tasks"}),
        ("__init__.py", "from .ship.delta import Delta\n", set()),
        (
            "ship/delta.py",
            "from ..methods.fish import fish\n",
            {"methods/fish", "methods/fish/fish"},
        ),
        ("ship/delta.py", "from ..params import weights\nfrom .gaps import pack\n", set()),
        ("methods/fish.py", "from ..lab import tasks\n", {"lab", "lab/tasks"}),
        (
            "methods/fish.py",
            "from selective_lite.lab.tasks import Task\n",
            {"lab/tasks", "lab/tasks/Task"},
        ),
        ("methods/fish.py", "from ..select import select\nfrom .sweep import tau_for\n", set()),
        ("lab/plots.py", "from ..methods.fish import fish\nfrom ..select import select\n", set()),
    ],
)
def test_an_import_that_climbs_is_seen(place, text, found):
    assert climbing(text, Path(place)) == found


def test_no_import_climbs():
    found = {str(path): climbing(text, path) for path, text in sources("**/*.py").items()}
    assert len(found) > 30
    assert {path: modules for path, modules in found.items() if modules} == {}


def circle(graph):
    """The modules that import each other in a circle, directly or not.

    They are what is left when the leaves are taken off.
    """
    left = {module: set(used) & set(graph) for module, used in graph.items()}
    while leaves := {module for module, used in left.items() if not used}:
        left = {module: used - leaves for module, used in left.items() if module not in leaves}
    return set(left)


def test_no_import_goes_in_a_circle():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": set(), "e": {"d"}}) == {"a", "b", "c"}
    graph = {
        path.with_suffix("").as_posix(): imports(text, path)
        for path, text in sources("**/*.py").items()
    }
    assert circle(graph) == set()
