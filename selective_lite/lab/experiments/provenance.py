"""Provenance: a hash of the code that a result follows from, and of no other code."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2]
# Not followed into: a recipe is a root of its own rows alone, what keeps rows makes no numbers,
# assets are pinned.
APART = (
    "lab/experiments/recipes.py",
    "lab/experiments/results.py",
    "lab/experiments/provenance.py",
    "lab/data/assets.py",
)


def code_hash(roots: Iterable[str]) -> str:
    """SHA-256 of definitions and of all that they use in this package; comments, docstrings and layout do not count.

    Parameters
    ----------
    roots
        Top-level definitions as ``"file.py:name"``, the file relative to the package.

    Raises
    ------
    ValueError
        If a root is not there.
    """
    seen: dict[str, str] = {}
    waiting = list(roots)
    while waiting:
        file, _, name = (place := waiting.pop()).partition(":")
        if place in seen:
            continue
        statement = _definitions(PACKAGE, file).get(name)
        if statement is None:
            raise ValueError(
                f"roots names {place!r}, which is no top-level definition of the package"
            )
        seen[place] = ast.dump(statement)
        for used in _used(file, statement):
            target = used.partition(":")[0]
            if target == file or target not in APART:
                waiting.append(used)
    return hashlib.sha256(
        "\n".join(f"{place} {seen[place]}" for place in sorted(seen)).encode()
    ).hexdigest()


def _used(file: str, statement: ast.stmt) -> Iterator[str]:
    """What a definition uses of this package, as places; a name that a local one shadows counts too."""
    names = {node.id for node in ast.walk(statement) if isinstance(node, ast.Name)}
    yield from (f"{file}:{name}" for name in names if name in _definitions(PACKAGE, file))
    yield from (place for name, place in _imports(PACKAGE, file).items() if name in names)


@cache
def _definitions(package: Path, file: str) -> dict[str, ast.stmt]:
    """A file's top-level functions, classes and constants, without their docstrings."""
    tree = ast.parse((package / file).read_text())
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if (
            isinstance(body, list)
            and body
            and isinstance(body[0], ast.Expr)
            and _is_text(body[0].value)
        ):
            node.body = body[1:]  # type: ignore[attr-defined]
    found: dict[str, ast.stmt] = {}
    for statement in tree.body:
        if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
            found[statement.name] = statement
        elif isinstance(statement, (ast.Assign, ast.AnnAssign)):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            found |= {target.id: statement for target in targets if isinstance(target, ast.Name)}
    return found


@cache
def _imports(package: Path, file: str) -> dict[str, str]:
    """The names that a file imports from this package, and their places."""
    found: dict[str, str] = {}
    for node in ast.parse((package / file).read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = (package / file).parents[node.level - 1]
            module = folder.joinpath(*(node.module or "__init__").split(".")).with_suffix(".py")
            if module.is_file() and node.module:  # `from . import module` names no definition
                place = module.relative_to(package).as_posix()
                found |= {
                    alias.asname or alias.name: f"{place}:{alias.name}" for alias in node.names
                }
    return found


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)
