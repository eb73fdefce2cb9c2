"""Normal form: a definition as text in which only what it computes is left.

Comments, layout, docstrings, annotations, imports and the texts of errors and warnings are gone,
and local variables are numbered as they come. Definitions of the package and names from elsewhere
stand for what they are, however they were imported.

Names of parameters stay, because a call may use them as keywords: had they been numbered, swapping
two of them would go unseen. Those that no call names (positional-only ones, ``*args``,
``**kwargs``, those of a lambda) are local. Attributes stay, since whose they are is known only when
the code runs.
"""

from __future__ import annotations

import ast
import builtins
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
NOTHING = (ast.Import, ast.ImportFrom, ast.Pass, ast.Global, ast.Nonlocal)
# Fields that compute nothing, and those that hold the name of a variable.
IGNORED = {"ctx", "kind", "type_comment", "returns", "type_params"}
NAMED = {"ExceptHandler": "name", "MatchAs": "name", "MatchStar": "name", "MatchMapping": "rest"}
FIELD_KINDS = {"ClassVar", "InitVar", "KW_ONLY"}  # annotations that a dataclass acts on


class Place(NamedTuple):
    """A top-level definition, or with the name "" a module, which is relative to the package."""

    module: str
    name: str


class Outside(NamedTuple):
    """A name of another package, dotted."""

    name: str


Origin = Place | Outside
# A variable of a scope: its text, None until it is first seen, or what is imported under its name.
Scope = dict[str, "str | Origin | None"]


class Writer:
    """Writes the statements of one definition.

    Parameters
    ----------
    known
        Names of the module's top level, as origins.
    origin
        ``(level, module, name) -> origin`` of an import in this module.
    resolve
        What a place stands for: a definition or a module, something outside, or None.
    own
        Name of the definition itself.

    Attributes
    ----------
    uses
        The definitions of the package that the text refers to, in order.
    """

    def __init__(
        self,
        known: Mapping[str, Origin],
        origin: Callable[[tuple[int, str, str]], Origin],
        resolve: Callable[[Place], Origin | None],
        own: str = "",
    ) -> None:
        self.known, self.origin, self.resolve, self.own = known, origin, resolve, own
        self.uses: list[Place] = []
        self._scopes: list[tuple[str, Scope]] = []
        self._count = 0

    def definition(self, node: ast.stmt) -> str:
        """A top-level statement; of ``a, b = 1, 2`` the part that binds the definition's name."""
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):
            target, values = node.targets[0], node.value.elts
            if isinstance(target, ast.Tuple) and len(target.elts) == len(values):
                for name, value in zip(target.elts, values, strict=True):
                    if isinstance(name, ast.Name) and name.id == self.own:
                        return f"Assign(targets=[own],value={self.write(value)})"
        return self.write(node)

    def write(self, node: Any) -> str:
        """Any part of a syntax tree."""
        if isinstance(node, list):
            return f"[{','.join(self.write(part) for part in node if not self._is_silent(part))}]"
        if not isinstance(node, ast.AST):
            return repr(node)
        if isinstance(node, COMPREHENSIONS):
            return self._comprehended(node)
        if isinstance(node, FUNCTIONS):
            return self._function(node)
        return getattr(self, f"_{type(node).__name__}", self._fields)(node)

    def _fields(self, node: ast.AST) -> str:
        """A node as its kind and fields, in the same form on every version of Python."""
        kind = type(node).__name__
        parts = [
            f"{key}={self._name(value) if NAMED.get(kind) == key else self.write(value)}"
            for key, value in ast.iter_fields(node)
            if key not in IGNORED and value is not None and value != []
        ]
        return f"{kind}({','.join(parts)})"

    def _is_silent(self, node: Any) -> bool:
        """Whether a statement computes nothing: an import, a docstring, a declaration."""
        return (
            isinstance(node, NOTHING)
            or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
            or (isinstance(node, ast.AnnAssign) and not node.value and not self._in_class())
        )

    def _in_class(self) -> bool:
        return bool(self._scopes) and self._scopes[-1][0] == "class"

    def _name(self, name: str, attributes: Iterable[str] = ()) -> str:
        """A variable, with attributes of it."""
        for depth, (kind, scope) in enumerate(reversed(self._scopes)):
            if name in scope and (kind != "class" or depth == 0):
                found = scope[name] = scope[name] or self._number()
                break
        else:
            found = "own" if name == self.own else self.known.get(name, name)
        if isinstance(found, str):
            return ".".join([found, *attributes])
        return self._imported(found, list(attributes))

    def _number(self) -> str:
        """The next local variable."""
        self._count += 1
        return f"local {self._count}"

    def _imported(self, origin: Origin, attributes: list[str]) -> str:
        """What an origin stands for, with attributes of it."""
        found = self.resolve(origin) if isinstance(origin, Place) else origin
        while isinstance(found, Place) and not found.name and attributes:
            inner = self.resolve(Place(found.module, attributes[0]))
            if inner is None:
                break
            found, attributes = inner, attributes[1:]
        if isinstance(found, Place):
            self.uses.append(found)
        text = "use" if isinstance(found, Place) else found.name if found else "absent"
        return ".".join([text, *attributes])

    def _Name(self, node: ast.Name) -> str:
        return self._name(node.id)

    def _Attribute(self, node: ast.Attribute) -> str:
        attributes = [node.attr]
        base: ast.expr = node.value
        while isinstance(base, ast.Attribute):
            attributes.insert(0, base.attr)
            base = base.value
        if isinstance(base, ast.Name):
            return self._name(base.id, attributes)
        return ".".join([self.write(base), *attributes])

    def _Raise(self, node: ast.Raise) -> str:
        """What is raised, without what it says; a StopIteration says a result."""
        raised = node.exc
        if isinstance(raised, ast.Call) and getattr(raised.func, "id", "") != "StopIteration":
            raised = raised.func
        return f"Raise({self.write(raised)})"

    def _Assert(self, node: ast.Assert) -> str:
        return f"Assert({self.write(node.test)})"

    def _Call(self, node: ast.Call) -> str:
        """A call; of a warning, or an error that is made and raised later, without its text."""
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        made = getattr(builtins, name, None)
        is_error = isinstance(made, type) and issubclass(made, Exception)
        if name == "warn" or is_error or name.endswith(("Error", "Warning")):
            return f"Call({self.write(node.func)},{self.write(node.args[1:])})"
        return self._fields(node)

    def _AnnAssign(self, node: ast.AnnAssign) -> str:
        """As an assignment; in a class a field, whatever its type."""
        target, value = self.write(node.target), self.write(node.value)
        if not self._in_class():
            return f"Assign(targets=[{target}],value={value})"
        parts = ast.walk(node.annotation)
        kinds = {getattr(part, "attr", getattr(part, "id", "")) for part in parts}
        return f"Field({target},{sorted(kinds & FIELD_KINDS)},{value})"

    def _ClassDef(self, node: ast.ClassDef) -> str:
        head = [self.write(part) for part in (node.decorator_list, node.bases, node.keywords)]
        head.append(self._name(node.name))
        scope: Scope = {name: f".{name}" for name in bound(node.body)}  # attributes
        return f"ClassDef({','.join(head)},{self._inside('class', scope, node.body)})"

    def _function(self, node: Any) -> str:
        """A function or lambda: decorators and defaults outside, the rest in a scope of its own."""
        arguments: ast.arguments = node.args
        outside = [getattr(node, "decorator_list", []), arguments.defaults, arguments.kw_defaults]
        head = [self.write(part) for part in outside]
        body, local, named = [node.body], arguments.posonlyargs + arguments.args, []
        if not isinstance(node, ast.Lambda):
            head.append(self._name(node.name))
            body, local, named = node.body, arguments.posonlyargs, arguments.args
        several = [part for part in (arguments.vararg, arguments.kwarg) if part]
        scope: Scope = dict.fromkeys(bound(body))
        scope |= {part.arg: f"parameter {part.arg}" for part in [*named, *arguments.kwonlyargs]}
        scope |= {part.arg: self._number() for part in [*local, *several]}
        head += [
            f"{kind}={[scope[part.arg] for part in parts if part]}"
            for kind, parts in (
                ("only by place", local),
                ("named", named),
                ("only by name", arguments.kwonlyargs),
                ("*", [arguments.vararg]),
                ("**", [arguments.kwarg]),
            )
        ]
        return f"{type(node).__name__}({','.join(head)},{self._inside('function', scope, body)})"

    def _comprehended(self, node: Any) -> str:
        """A comprehension: its first iterable outside, the rest in a scope of its own."""
        first, *others = node.generators
        outside = self.write(first.iter)
        results = [getattr(node, key) for key in ("elt", "key", "value") if hasattr(node, key)]
        scope: Scope = dict.fromkeys(bound(part.target for part in node.generators))
        parts = [first.target, *first.ifs, first.is_async, *others, *results]
        return f"{type(node).__name__}({outside},{self._inside('function', scope, parts)})"

    def _inside(self, kind: str, scope: Scope, parts: list[Any]) -> str:
        """Parts of a syntax tree in a scope of their own."""
        imports = {name: self.origin(found) for name, found in imported(parts).items()}
        self._scopes.append((kind, {**scope, **imports}))
        text = self.write(parts)
        self._scopes.pop()
        return text


def bound(nodes: Iterable[Any]) -> list[str]:
    """The names that a scope binds, other than by imports."""
    found: dict[str, None] = {}
    outer: set[str] = set()
    for node in _scope(nodes):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            found[node.id] = None
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found[node.name] = None
        elif isinstance(node, (ast.Global, ast.Nonlocal)):
            outer |= set(node.names)
        elif name := getattr(node, NAMED.get(type(node).__name__, ""), None):
            found[name] = None
    return [name for name in found if name not in outer]


def imported(nodes: Iterable[Any]) -> dict[str, tuple[int, str, str]]:
    """The names that a scope imports, each as (level, module, name)."""
    found = {}
    for node in _scope(nodes):
        for alias in getattr(node, "names", []) if isinstance(node, NOTHING[:2]) else []:
            if isinstance(node, ast.ImportFrom):
                found[alias.asname or alias.name] = (node.level, node.module or "", alias.name)
            elif alias.asname:
                found[alias.asname] = (0, alias.name, "")
            else:
                top = alias.name.partition(".")[0]
                found[top] = (0, top, "")
    return found


def _scope(nodes: Iterable[Any]) -> Iterator[ast.AST]:
    """The nodes of one scope, not those inside functions and classes; ``:=`` binds outside."""
    for node in nodes:
        if isinstance(node, ast.AST):
            yield node
            if isinstance(node, COMPREHENSIONS):
                inside = (part for part in ast.walk(node) if isinstance(part, ast.NamedExpr))
                yield from (part.target for part in inside)
            elif not isinstance(node, (*FUNCTIONS, ast.ClassDef)):
                yield from _scope(ast.iter_child_nodes(node))
