"""Task name → task."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from umbel.errors import UnknownTask

if TYPE_CHECKING:
    from umbel.task import Task


class Registry(Mapping[str, "Task[..., Any]"]):
    """The tasks of one app, by name."""

    def __init__(self) -> None:
        self._tasks: dict[str, Task[..., Any]] = {}

    def add(self, task: Task[..., Any]) -> None:
        """Register ``task``; the same function defined again (a reloaded module) replaces the former one.

        Raises ``ValueError`` when two different functions claim one name.
        """
        known = self._tasks.get(task.name)
        if known is not None and (known.run.__module__, known.run.__qualname__) != (
            task.run.__module__,
            task.run.__qualname__,
        ):
            raise ValueError(
                f"two tasks are named {task.name!r}: {known.run.__module__}.{known.run.__qualname__} and "
                f"{task.run.__module__}.{task.run.__qualname__}; give one of them a name=…"
            )
        self._tasks[task.name] = task

    def find(self, name: str) -> Task[..., Any] | None:
        """The task of that name; None if there is none."""
        return self._tasks.get(name)

    def __getitem__(self, name: str) -> Task[..., Any]:
        try:
            return self._tasks[name]
        except KeyError:
            near = difflib.get_close_matches(name, self._tasks, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "; is its module in the settings' app or imports?"
            raise UnknownTask(f"no task is named {name!r}{hint}") from None

    def __contains__(self, name: object) -> bool:
        return name in self._tasks

    def __iter__(self) -> Iterator[str]:
        return iter(self._tasks)

    def __len__(self) -> int:
        return len(self._tasks)
