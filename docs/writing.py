"""Reading sources and writing Markdown: what every generated page needs."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Final

import umbel

ROOT: Final = Path(__file__).resolve().parents[1]
KERNEL: Final = Path(umbel.__file__).parent
PROPERTIES: Final = frozenset({"property", "cached_property"})

Function = ast.FunctionDef | ast.AsyncFunctionDef


# --- reading sources ------------------------------------------------------------------------------


@cache
def source(module: str) -> tuple[str, ast.Module]:
    """Text and tree of a kernel module: ``ports.transport``."""
    text = KERNEL.joinpath(*module.split(".")).with_suffix(".py").read_text()
    return text, ast.parse(text)


def classes(module: str) -> list[ast.ClassDef]:
    """The public classes of a module, in the order of the source."""
    return [n for n in source(module)[1].body if isinstance(n, ast.ClassDef) and not n.name.startswith("_")]


def signature(function: Function) -> str:
    """A function's first line as it is written, on one line and without ``self``; a property's name and type."""
    returns = ast.unparse(function.returns) if function.returns else "Any"
    if decorators(function) & PROPERTIES:
        return f"{function.name}: {returns}"
    prefix = "async def" if isinstance(function, ast.AsyncFunctionDef) else "def"
    return f"{prefix} {function.name}({', '.join(_parameters(function.args))}) -> {returns}"


def _parameters(arguments: ast.arguments) -> Iterator[str]:
    plain = [*arguments.posonlyargs, *arguments.args]
    defaults: list[ast.expr | None] = [*[None] * (len(plain) - len(arguments.defaults)), *arguments.defaults]
    for position, (argument, default) in enumerate(zip(plain, defaults, strict=True)):
        if argument.arg not in ("self", "cls") or argument.annotation:
            yield _parameter(argument, default)
        if arguments.posonlyargs and position == len(arguments.posonlyargs) - 1 and argument.arg not in ("self", "cls"):
            yield "/"
    if arguments.vararg:
        yield f"*{_parameter(arguments.vararg, None)}"
    elif arguments.kwonlyargs:
        yield "*"
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        yield _parameter(argument, default)
    if arguments.kwarg:
        yield f"**{_parameter(arguments.kwarg, None)}"


def _parameter(argument: ast.arg, default: ast.expr | None) -> str:
    annotation = f": {ast.unparse(argument.annotation)}" if argument.annotation else ""
    return f"{argument.arg}{annotation}" + (f" = {ast.unparse(default)}" if default else "")


def decorators(node: Function | ast.ClassDef) -> set[str]:
    return {ast.unparse(d).partition("(")[0] for d in node.decorator_list}


def docs_of(node: ast.AST) -> str:
    return ast.get_docstring(node) or ""  # type: ignore[arg-type]  # called with nodes that can have one


def fields_of(cls: ast.ClassDef) -> Iterator[tuple[str, str, str, str]]:
    """Name, type, default and documentation of the annotated attributes of a class."""
    following: Sequence[ast.stmt | None] = [*cls.body[1:], None]
    for node, after in zip(cls.body, following, strict=True):
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        if node.target.id.startswith("_"):
            continue
        docs = ""
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and isinstance(after.value.value, str):
            docs = inspect.cleandoc(after.value.value)
        yield node.target.id, ast.unparse(node.annotation), _default(node.value), docs


def _default(value: ast.expr | None) -> str:
    if value is None:
        return ""
    if isinstance(value, ast.Call) and ast.unparse(value.func) in ("field", "attrs.field"):
        known = {k.arg: ast.unparse(k.value) for k in value.keywords}
        return known.get("default") or (f"{known['factory']}()" if "factory" in known else "")
    return ast.unparse(value)


# --- writing Markdown -----------------------------------------------------------------------------


def cell(text: str) -> str:
    """Text for one cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


def code(text: str) -> str:
    return f"`{text}`" if text else ""


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [list(headings), ["---"] * len(headings), *([cell(value) for value in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def fence(text: str, language: str = "text") -> str:
    return f"```{language}\n{text}\n```"


def page(*parts: str) -> str:
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


def function_parts(function: Function, level: int, title: str | None = None) -> Iterator[str]:
    yield f"{'#' * level} {title or function.name}"
    mark = "@property\n" if decorators(function) & PROPERTIES else ""
    mark += "@classmethod\n" if "classmethod" in decorators(function) else ""
    yield fence(mark + signature(function), "py")
    yield docs_of(function)


def class_parts(cls: ast.ClassDef, level: int, *, methods: bool = True) -> Iterator[str]:
    """A class: its docstring, a table of its fields, a section for each public method."""
    bases = ", ".join(ast.unparse(base) for base in cls.bases)
    yield f"{'#' * level} {cls.name}"
    yield fence(f"class {cls.name}({bases})" if bases else f"class {cls.name}", "py")
    yield docs_of(cls)
    if "Enum" in bases:
        yield _members(cls)
    if rows := [(code(n), code(t), code(d), docs) for n, t, d, docs in fields_of(cls)]:
        yield table(("attribute", "type", "default", "meaning"), rows)
    if not methods:
        return
    for node in cls.body:
        if not isinstance(node, Function) or "overload" in decorators(node):
            continue
        if node.name.startswith("_") and not (node.name == "__init__" and docs_of(node)):
            continue
        yield from function_parts(
            node, level + 1, f"{cls.name}.{node.name}" if node.name != "__init__" else f"{cls.name}()"
        )


def _members(cls: ast.ClassDef) -> str:
    rows = []
    for node, after in zip(cls.body, [*cls.body[1:], None], strict=True):
        if isinstance(node, ast.Assign):
            told = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            docs = inspect.cleandoc(str(after.value.value)) if told else ""  # type: ignore[union-attr]  # told says what it is
            rows.append((code(ast.unparse(node.targets[0])), code(ast.unparse(node.value)), docs))
    return table(("member", "value", "meaning"), rows)
