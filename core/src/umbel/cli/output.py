"""How commands print: aligned text for people, one JSON document for programs.

What comes from messages is never printed raw: a control character in a task's name must not steer a terminal.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, tzinfo
from itertools import pairwise
from typing import Any

import click


def clean(value: object) -> str:
    """``value`` as one printable line; None is "-"."""
    if value is None:
        return "-"
    text = str(value)
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def clean_lines(text: str) -> str:
    """``text`` with its line ends, every other control character made visible."""
    return "\n".join(clean(line.expandtabs()) for line in text.splitlines())


def shorten(text: str, width: int) -> str:
    """``text`` within ``width`` characters."""
    return text if len(text) <= width else text[: width - 1] + "…"


def table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Aligned columns under their headings; columns of numbers are flush right."""
    cells = [list(row) for row in rows]
    columns = list(zip(*cells, strict=True)) if cells else [()] * len(headings)
    lines = [[heading.upper() for heading in headings], *([clean(cell) for cell in row] for row in cells)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(headings))]
    right = [bool(column) and all(isinstance(cell, int | float) for cell in column) for column in columns]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in lines
    )


def pairs(rows: Iterable[tuple[str, object]]) -> str:
    """Names and values, a line each."""
    known = list(rows)
    width = max((len(name) for name, _ in known), default=0)
    return "\n".join(f"{name:{width}}  {clean(value)}" for name, value in known)


def emit(document: Any) -> None:
    """Print one JSON document. What JSON cannot say is printed as text."""
    click.echo(json.dumps(_plain(document), indent=2, ensure_ascii=False, default=str))


def emit_line(document: Any) -> None:
    """Print one JSON document in one line, at once: one of many."""
    click.echo(json.dumps(_plain(document), ensure_ascii=False, default=str))


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # Infinity and NaN are no JSON
    if isinstance(value, Mapping):
        return {str(name): _plain(below) for name, below in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    return value


def age(seconds: float | None) -> str:
    """A duration in its two largest units: "3m 20s"."""
    if seconds is None:
        return "-"
    whole = max(0, int(seconds))
    for (unit, length), (below, shorter) in pairwise((("d", 86400), ("h", 3600), ("m", 60), ("s", 1))):
        if whole >= length:
            return f"{whole // length}{unit} {whole % length // shorter}{below}"
    return f"{whole}s"


def moment(timestamp: object, zone: tzinfo) -> str:
    """Unix time as local date and time."""
    if not isinstance(timestamp, int | float) or isinstance(timestamp, bool):
        return "-"
    try:
        return datetime.fromtimestamp(timestamp, zone).strftime("%Y-%m-%d %H:%M:%S")
    except (ValueError, OverflowError, OSError):  # a header that says a time no calendar has
        return clean(timestamp)


def count(number: int, thing: str) -> str:
    """The number and the thing: "1 message", "2 messages"."""
    return f"{number} {thing}{'' if number == 1 else 's'}"


def confirm(question: str, *, yes: bool) -> None:
    """Ask before something is deleted. Raises ``click.Abort`` after a no, ``click.UsageError`` where nobody can answer."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise click.UsageError(f"{question} Nobody can be asked here: give --yes.")
    click.confirm(question, abort=True)
