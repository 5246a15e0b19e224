"""Prints every public signature of the plugin API::

    python tests/architecture/plugin_api.py > tests/architecture/plugin_api.txt

One line for each name that a plugin can depend on, sorted, so that a change of the API is a changed line in review. Read
from the sources, not from live objects: the text is the same under every Python, and needs nothing installed.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

KERNEL = Path(__file__).resolve().parents[2] / "core" / "src" / "umbel"
MODULES = ("capabilities", "errors", "hookspecs", "markers", "model", "ports")
"""What a plugin may import, and what it implements. A folder stands for every module in it."""

Function = ast.FunctionDef | ast.AsyncFunctionDef
TELLING = ("hookspec", "frozen", "define", "abstractmethod", "property", "classmethod", "staticmethod")
"""Decorators that say how a name may be used."""


def sources() -> Iterator[tuple[str, ast.Module]]:
    """Name and tree of each module of the API."""
    for name in MODULES:
        place = KERNEL / name
        for path in sorted(place.glob("*.py")) if place.is_dir() else [place.with_suffix(".py")]:
            dotted = ".".join(path.relative_to(KERNEL.parent).with_suffix("").parts).removesuffix(".__init__")
            yield dotted, ast.parse(path.read_text())


def signatures() -> Iterator[str]:
    """A line for each public name, by module and name."""
    for module, tree in sources():
        for name, told in sorted(_of_module(tree)):
            yield f"{module}.{name}: {told}"


def exported(tree: ast.Module) -> list[str] | None:
    """What ``__all__`` lists; None: there is none."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names: list[str] = ast.literal_eval(node.value)
            return names
    return None


def _of_module(tree: ast.Module) -> Iterator[tuple[str, str]]:
    passed_on = exported(tree) or ()
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (name := alias.asname or alias.name) in passed_on:
                    yield name, f"from {node.module}"
        else:
            yield from _of(node, "")


def _of(node: ast.stmt, prefix: str) -> Iterator[tuple[str, str]]:
    match node:
        case ast.ClassDef() if public(node.name):
            bases = ", ".join(ast.unparse(base) for base in [*node.bases, *node.keywords])
            yield f"{prefix}{node.name}", f"{_decorators(node)}class({bases})"
            for below in node.body:
                yield from _of(below, f"{prefix}{node.name}.")
        case ast.FunctionDef() | ast.AsyncFunctionDef() if public(node.name):
            word = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
            returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
            yield f"{prefix}{node.name}", f"{_decorators(node)}{word}({ast.unparse(node.args)}){returns}"
        case ast.AnnAssign() if public(name := ast.unparse(node.target)):
            value = f" = {ast.unparse(node.value)}" if node.value else ""
            yield f"{prefix}{name}", f"{ast.unparse(node.annotation)}{value}"
        case ast.Assign() if public(name := ast.unparse(node.targets[0])) and name != "__all__":
            yield f"{prefix}{name}", f"= {ast.unparse(node.value)}"


def public(name: str) -> bool:
    return not name.startswith("_") or (name.startswith("__") and name.endswith("__"))


def _decorators(node: Function | ast.ClassDef) -> str:
    told = [ast.unparse(decorator) for decorator in node.decorator_list]
    return "".join(f"@{text} " for text in told if text.partition("(")[0] in TELLING)


if __name__ == "__main__":
    print("\n".join(signatures()))
