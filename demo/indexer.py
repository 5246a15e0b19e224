"""The demo's tasks: index one Python source file."""

from __future__ import annotations

import ast
import warnings
from pathlib import Path

import attrs

from umbel import Umbel

app = Umbel("indexer")


@attrs.frozen
class FileIndex:
    """What one source file holds."""

    path: str
    lines: int
    functions: int
    classes: int
    imports: int
    longest_function: tuple[str, int]
    """Name and length in lines."""


@app.task(typed=True, autoretry_for=(SyntaxError,), max_retries=2, retry_delay=0.5, dead_letter=True)
def index_file(path: str) -> FileIndex:
    """Parse ``path`` and count. Raises ``SyntaxError`` for what is not Python: retried twice, then a dead letter."""
    source = Path(path).read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's files are not our business
        tree = ast.parse(source, path)
    nodes = list(ast.walk(tree))
    functions = [n for n in nodes if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    lengths = [(f.name, (f.end_lineno or f.lineno) - f.lineno + 1) for f in functions]
    return FileIndex(
        path=path,
        lines=source.count(b"\n"),
        functions=len(functions),
        classes=sum(isinstance(n, ast.ClassDef) for n in nodes),
        imports=sum(isinstance(n, (ast.Import, ast.ImportFrom)) for n in nodes),
        longest_function=max(lengths, key=lambda item: item[1], default=("", 0)),
    )
