"""The fenced blocks of a page, and what a comment before one says of it.

Comments, each on a line of its own directly before a block::

    <!-- file: tasks.py -->         the block is written into that file, and not run
    <!-- compiled only: REASON -->  Python that this machine cannot run, or that needs a server
    <!-- not settings -->           TOML of another kind
    <!-- run -->                    the commands are run, and what they print is compared with what the page says
    <!-- run: exits with 1 -->      likewise, with that exit status
    <!-- run: in background -->     a worker is started, and waited for until it is ready

and anywhere::

    <!-- port: 18640 -->           stands for a free port wherever the page says it: pages may run beside each other
    <!-- start: umbel -A tasks worker -P threads -->   as ``run: in background``, unseen by readers
    <!-- stop the worker -->                           TERM, and its exit status must be 0
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from attrs import frozen

_PIECE = re.compile(
    r"^(?P<indent> *)(?P<fence>```+)(?P<language>\{?[\w-]*\}?)[^\n]*\n(?P<body>.*?)^(?P=indent)(?P=fence) *$"
    r"|^ *<!-- (?P<comment>.*?) -->",
    re.MULTILINE | re.DOTALL,
)


@frozen
class Block:
    """A fenced block, or a comment that stands for an act (``language`` is then ``act``)."""

    language: str
    text: str
    line: int
    """Of the block's first line of text."""
    note: str = ""
    """The comment before it."""


def blocks(page: Path) -> Iterator[Block]:
    """The blocks of a page in order."""
    yield from blocks_of(page.read_text())


def blocks_of(text: str) -> Iterator[Block]:
    note, note_end = "", -1
    for match in _PIECE.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        if match["comment"] is not None:
            note, note_end = match["comment"], match.end()
            if note.startswith(("start:", "stop ")):
                yield Block("act", note, line)
            continue
        indent = len(match["indent"])
        body = "".join(row[indent:] if row.strip() else row.lstrip(" ") for row in match["body"].splitlines(True))
        before = note if not text[note_end : match.start()].strip() and note_end >= 0 else ""
        yield Block(match["language"], body, line + 1, before)
        note_end = -1


def commands(text: str) -> Iterator[tuple[str, str]]:
    """Each ``$ command`` of a console block, continued lines joined, and the text below it."""
    for piece in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        command, _, output = piece.replace("\\\n", " ").partition("\n")
        yield command, output
