"""Umbel: a distributed task queue whose every feature is a plugin."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

# Names are imported on first use (PEP 562), so that `import umbel` costs next to nothing; type checkers read these.
if TYPE_CHECKING:
    from umbel.app import Umbel
    from umbel.canvas.compose import chain, chord, group
    from umbel.canvas.results import GroupResult
    from umbel.canvas.signature import Signature
    from umbel.canvas.stamping import StampingVisitor
    from umbel.markers import hookimpl, hookspec
    from umbel.result import AsyncResult
    from umbel.shared import shared_task
    from umbel.task import Task

_LAZY = {
    "Umbel": "umbel.app",
    "shared_task": "umbel.shared",
    "AsyncResult": "umbel.result",
    "GroupResult": "umbel.canvas.results",
    "Signature": "umbel.canvas.signature",
    "StampingVisitor": "umbel.canvas.stamping",
    "chain": "umbel.canvas.compose",
    "chord": "umbel.canvas.compose",
    "group": "umbel.canvas.compose",
    "Task": "umbel.task",
    "hookimpl": "umbel.markers",
    "hookspec": "umbel.markers",
}

__all__ = [
    "AsyncResult",
    "GroupResult",
    "Signature",
    "StampingVisitor",
    "Task",
    "Umbel",
    "chain",
    "chord",
    "group",
    "hookimpl",
    "hookspec",
    "shared_task",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("umbel-core")
    if (module := _LAZY.get(name)) is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(module), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
