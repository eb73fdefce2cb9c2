"""Provenance: a hash of the code that a result follows from; it survives renames and moves.

What computes counts: formulas, constants, defaults, operators, what is called, and the same of all
that this uses in the package. What does not: comments, layout, docstrings, annotations, the texts
of errors and warnings, the names of local variables, the names of top-level functions, classes and
constants, and the file that they are in (see `normal_form`). A class counts whole, a module that is
used as a value too.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.resources
import sys
import textwrap
from collections.abc import Callable, Collection, Iterable
from functools import cache
from pathlib import Path
from typing import Any

from .normal_form import Origin, Outside, Place, Writer, bound, imported

NAME = __name__.partition(".")[0]
PACKAGE = Path(str(importlib.resources.files(NAME)))
# A comment on the line above a definition says that no row follows from it: the table of all
# recipes (a row names its own), where rows are kept, assets (pinned by their hashes).
APART = "# provenance: apart"
READS = "# provenance: apart, reads results"
# Nor does a page: it asks whether its rows are stale, which takes all code that makes rows.
OF_PAGES = "# provenance: apart, of pages too"

Root = str | Callable[..., Any]


def code_hash(roots: Iterable[Root]) -> str:
    """SHA-256 of what definitions compute, and all that they use in this package.

    Parameters
    ----------
    roots
        Functions or classes of the package, or names of top-level definitions: ``"name"``,
        ``"module.name"`` or ``"folder/file.py:name"``. A name that is not in that module (any more)
        is looked for in modules called the same elsewhere, then in the whole package. A text with
        an equals sign, such as ``"cliff=0.1"``, is a setting, and counts as it is.

    Raises
    ------
    ValueError
        If a root is not there, or several definitions answer to it.

    Examples
    --------
    >>> code_hash(["selection.select"]) == code_hash(["moved/selection.py:select"])
    True
    """
    library, (places, settings) = _library(PACKAGE), _sorted(roots)
    digest = _digest(library, places, library.apart)
    return _sha([digest, *settings]) if settings else digest


def reached(roots: Iterable[Root]) -> set[str]:
    """The definitions that `code_hash` of these roots is made of, each as ``"module.name"``."""
    library, (places, _) = _library(PACKAGE), _sorted(roots)
    return {".".join(place) for place in _reach(library, places, library.apart)}


def page_hash(cells: Iterable[str], files: Iterable[Path] = ()) -> str:
    """SHA-256 of what a page's outputs follow from: its code, what this uses, and results.

    Comments and layout of the cells do not count. A script in a text of the page is followed, as
    are, unlike for a row, definitions that are apart (but for those apart of pages too).

    Parameters
    ----------
    cells
        Sources of the code cells, in order.
    files
        Files of results. If the page reads results, a file counts if its name can be made by
        joining texts out of the page and the code that it reaches; one that is computed in another
        way would be missed.
    """
    library = _library(PACKAGE)
    code = [ast.parse(cell) for cell in cells]
    scripts = [ast.Module([node for tree in code for node in tree.body], [])]
    for text in _texts(code):
        if NAME in text:
            try:
                scripts.append(ast.parse(textwrap.dedent(text)))
            except SyntaxError:  # a command, or prose
                continue
    used = [place for script in scripts for place in library.used(script)]
    places = _reach(library, used, library.apart_of_pages)
    seen = [ast.dump(tree) for tree in code]
    if places & library.readers:
        texts = _texts([*code, *(node for place in places for node in library.nodes(place))])
        seen += [
            f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}"
            for file in sorted(files)
            if _is_joined(file.name, texts)
        ]
    return _sha([*seen, _digest(library, used, library.apart_of_pages)])


class _Module:
    """One file: the statements that make each name of its top level, and what it imports."""

    def __init__(self, name: str, source: str, is_package: bool = False) -> None:
        self.name, self.is_package = name, is_package
        self.body = ast.parse(source).body
        self.imports = {key: self.origin(found) for key, found in imported(self.body).items()}
        self.nodes: dict[str, list[ast.stmt]] = {}
        self.marks: dict[str, str] = {}  # the line above a definition
        lines = ["", *source.splitlines()]
        for node in self.body:
            first = min([node, *getattr(node, "decorator_list", [])], key=lambda part: part.lineno)
            for key in [] if _is_main(node) else bound([node]):
                self.nodes.setdefault(key, []).append(node)
                self.marks.setdefault(key, lines[first.lineno - 1].strip())
        for node in self.body:
            for key in _changed(node):
                if key in self.nodes and node not in self.nodes[key]:
                    self.nodes[key].append(node)

    def origin(self, found: tuple[int, str, str]) -> Origin:
        """What ``(level, module, name)`` imports."""
        level, module, name = found
        if not level:
            top, _, rest = module.partition(".")
            outside = f"{module}.{name}" if name else module
            return Place(rest, name) if top == NAME else Outside(outside)
        parts = self.name.split(".") if self.name else []
        folder = parts[: len(parts) - level + self.is_package]
        return Place(".".join([*folder, *([module] if module else [])]), name)


class _Library:
    """The files of the package, as they were when they were first asked about."""

    def __init__(self, folder: Path) -> None:
        self.modules = {"": _Module("", "", True)}
        for file in sorted(folder.rglob("*.py")):
            is_package, path = file.stem == "__init__", file.relative_to(folder)
            name = ".".join((path.parent if is_package else path.with_suffix("")).parts)
            self.modules[name] = _Module(name, file.read_text(), is_package)
        marks = {
            Place(module.name, name): mark
            for module in self.modules.values()
            for name, mark in module.marks.items()
        }
        self.apart, self.readers, self.apart_of_pages = (
            {place for place, mark in marks.items() if mark.startswith(kind)}
            for kind in (APART, READS, OF_PAGES)
        )
        self._written: dict[Place, tuple[str, list[Place]]] = {}

    def find(self, root: Root) -> Place:
        """The definition that a root means."""
        wanted = root if isinstance(root, str) else _named(root)
        module, _, name = wanted.replace(".py:", ".").replace("/", ".").rpartition(".")
        module = module.removeprefix(f"{NAME}.")
        places = [Place(key, name) for key, held in self.modules.items() if name in held.nodes]
        for found in (
            [place for place in places if place.module == module],
            [place for place in places if place.module.split(".")[-1] == module.split(".")[-1]],
            places,
        ):
            if len(found) == 1:
                return found[0]
        answer = ", ".join(".".join(place) for place in places) or "none"
        raise ValueError(
            f"roots names {wanted!r}; give one top-level definition of the package, "
            f"as 'module.name'; of this name there are: {answer}"
        )

    def nodes(self, place: Place) -> list[ast.stmt]:
        """The statements that make a definition."""
        return self.modules[place.module].nodes.get(place.name, [])

    def resolve(self, place: Place) -> Origin | None:
        """What a name in a module stands for: a definition, a module, or something outside."""
        module, name = place
        if name:
            here = self.modules.get(module)
            if here and name in here.nodes:
                return place
            origin = here.imports.get(name, place) if here else place
            if origin != place:
                return self.resolve(origin) if isinstance(origin, Place) else origin
            module = f"{module}.{name}" if module else name
        return Place(module, "") if module in self.modules else None

    def written(self, place: Place) -> tuple[str, list[Place]]:
        """A definition in normal form, and the definitions that it uses."""
        if place not in self._written:
            module = self.modules[place.module]
            known = {**module.imports, **{name: Place(module.name, name) for name in module.nodes}}
            writer = Writer(known, module.origin, self.resolve, place.name)
            text = "\n".join(writer.definition(node) for node in self.nodes(place))
            if not place.name:  # a module as a value: all that it holds
                held = {self.resolve(Place(place.module, name)) for name in known}
                writer.uses = sorted(found for found in held if isinstance(found, Place))
            self._written[place] = text, writer.uses
        return self._written[place]

    def used(self, script: ast.Module) -> list[Place]:
        """The definitions that code outside the package uses."""
        page = _Module("", "")
        known = {name: page.origin(found) for name, found in imported(script.body).items()}
        writer = Writer(known, page.origin, self.resolve)
        writer.write(script.body)
        return writer.uses


_library = cache(_Library)


def reread() -> None:
    """Read the package again when it is next asked about: its files may have changed since."""
    _library.cache_clear()


def _digest(library: _Library, roots: Iterable[Place], apart: Collection[Place]) -> str:
    """The hash of definitions and of all that they use, whatever their names.

    A definition's colour is the hash of its text and of the colours of those that it uses, again
    and again until no further two can be told apart; recursion needs no special care.
    """
    colours = dict.fromkeys(_reach(library, roots, apart), "")
    while True:
        written = {place: library.written(place) for place in colours}
        finer = {
            place: _sha([text, *("apart" if use in apart else colours[use] for use in uses)])
            for place, (text, uses) in written.items()
        }
        if len(set(finer.values())) == len(set(colours.values())):
            starts = sorted({finer[root] for root in roots})
            return _sha([*starts, "", *sorted(set(finer.values()))])
        colours = finer


def _reach(library: _Library, roots: Iterable[Place], apart: Collection[Place]) -> set[Place]:
    """The roots, all that they use, and so on."""
    found: set[Place] = set()
    waiting = list(roots)
    while waiting:
        place = waiting.pop()
        if place not in found:
            found.add(place)
            waiting += (use for use in library.written(place)[1] if use not in apart)
    return found


def _sorted(roots: Iterable[Root]) -> tuple[list[Place], list[str]]:
    """The definitions among roots, and the settings, which have an equals sign."""
    roots, library = list(roots), _library(PACKAGE)
    settings = sorted(root for root in roots if isinstance(root, str) and "=" in root)
    return [library.find(root) for root in roots if root not in settings], settings


def _named(root: Callable[..., Any]) -> str:
    """A function or class as module and name, that of a script run by ``python -m`` too."""
    module = root.__module__
    if module == "__main__":
        module = getattr(sys.modules[module].__spec__, "name", module)
    return f"{module}.{root.__qualname__.partition('.')[0]}"


def _changed(node: ast.stmt) -> set[str]:
    """The names that a statement changes without binding them: by a registration, patch or call."""
    parts: list[ast.AST] = [
        part.func if isinstance(part, ast.Call) else part
        for part in getattr(node, "decorator_list", [])
    ]
    parts += getattr(node, "targets", [])
    parts = [part for part in parts if isinstance(part, (ast.Attribute, ast.Subscript))]
    if isinstance(node, (ast.Expr, ast.If, ast.For, ast.While, ast.With, ast.Try)):
        parts = [] if _is_main(node) else [node]
    return {name.id for part in parts for name in ast.walk(part) if isinstance(name, ast.Name)}


def _is_main(node: ast.stmt) -> bool:
    """Whether a statement is what a file does as a script."""
    return isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)


def _texts(trees: Iterable[ast.AST]) -> set[str]:
    """The texts in code."""
    nodes = (node for tree in trees for node in ast.walk(tree))
    constants = (node.value for node in nodes if isinstance(node, ast.Constant))
    return {value for value in constants if isinstance(value, str)}


def _is_joined(name: str, texts: Collection[str]) -> bool:
    """Whether a name is made of texts of at least two characters, one after another."""
    return not name or any(
        len(text) > 1 and name.startswith(text) and _is_joined(name[len(text) :], texts)
        for text in texts
    )


def _sha(parts: Iterable[str]) -> str:
    """SHA-256 of texts."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
