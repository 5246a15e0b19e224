"""Exceptions as text, for logs, records and dead letters: whatever a user's class does when it is asked."""

from __future__ import annotations

import traceback
from collections.abc import Container


def text(value: object) -> str:
    """``str(value)``, cut short."""
    try:
        return str(value)[:1000]
    except Exception:  # a user's __str__ may raise anything
        return "<unprintable>"


def line(exc: BaseException) -> str:
    """Its class and what it says, in a line."""
    return f"{type(exc).__name__}: {text(exc)}"[:1000]


def format_exception(exc: BaseException, own_files: Container[str | None]) -> str:
    """The traceback as text, from the task's own frames on: the first ones, of ``own_files``, are left out.

    Turned to text at once: frames keep their locals alive.
    """
    frames = exc.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename in own_files and frames.tb_next is not None:
        frames = frames.tb_next
    try:
        return "".join(traceback.format_exception(type(exc), exc, frames))
    except Exception:  # a user's __str__ or __cause__ may raise anything
        return type(exc).__name__
