"""How large the kernel is, by part, and of what: a table for the page of decisions."""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from writing import KERNEL, code, page, table

PARTS: Final[Mapping[str, Sequence[str]]] = {
    "contracts": ("errors", "model", "capabilities", "markers", "hookspecs", "ports"),
    "plugin machinery": ("plugins",),
    "settings": ("settings",),
    "messages": ("protocol", "codec", "registry", "routing", "typed", "canvas"),
    "calling and results": (
        "client",
        "gateway",
        "runtime",
        "result",
        "task",
        "declare",
        "shared",
        "uplink",
        "claiming",
        "unique",
        "locks",
        "limit_keys",
        "control",
        "pidbox",
        "revocation",
    ),
    "application": ("__init__", "__main__", "app", "finding"),
    "worker": ("worker",),
    "schedules": ("scheduling", "schedule_store"),
    "command line": ("cli",),
}
BESIDE: Final = ("testing",)
"""In the wheel, and not in the budget."""


def kernel_size() -> str:
    """Lines of each part: code, prose (docstrings and comments), blank."""
    known = {name for names in PARTS.values() for name in names} | set(BESIDE)
    there = {path.relative_to(KERNEL).parts[0].removesuffix(".py") for path in KERNEL.rglob("*.py")}
    assert there <= known, f"to be put under a part in docs/sizes.py: {there - known}"
    rows, total = [], (0, 0, 0)
    for part, names in PARTS.items():
        lines = _sum(counted(path) for name in names for path in _files(name))
        total = _sum((total, lines))
        rows.append((part, ", ".join(code(name) for name in names if list(_files(name))), *_shown(lines)))
    rows.append(("**all**", "", *_shown(total)))
    return page(table(("part", "of `umbel`", "code", "prose", "blank", "together"), rows))


def counted(path: Path) -> tuple[int, int, int]:
    """Lines of code, prose and nothing in one file."""
    text = path.read_text()
    lines = text.splitlines()
    blank = {number for number, line in enumerate(lines, 1) if not line.strip()}
    prose = {
        number
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for number in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT and token.line.lstrip().startswith("#"):
            prose.add(token.start[0])
    prose -= blank
    return len(lines) - len(blank) - len(prose), len(prose), len(blank)


def _files(name: str) -> Iterator[Path]:
    yield from (KERNEL / name).rglob("*.py")
    if (path := KERNEL / f"{name}.py").is_file():
        yield path


def _sum(counts: Iterator[tuple[int, int, int]] | Sequence[tuple[int, int, int]]) -> tuple[int, int, int]:
    code_, prose, blank = (sum(column) for column in zip(*counts, strict=True))
    return code_, prose, blank


def _shown(lines: tuple[int, int, int]) -> tuple[str, ...]:
    return tuple(f"{number:,}" for number in (*lines, sum(lines)))
