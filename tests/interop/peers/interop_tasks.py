"""The tasks that every worker has, whoever runs them. ``worker.js`` has those that celery-node can run."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from interop_errors import Boom

NOTES = Path(os.environ["INTEROP_NOTES"])
PATIENCE = 30.0


def write(name: str, value: Any = None) -> None:
    """A note for the test, there as a whole or not at all."""
    draft = NOTES / f"{name}.draft"
    draft.write_text(json.dumps(value))
    draft.rename(NOTES / name)


def define(task: Callable[..., Callable[[Callable[..., Any]], Any]]) -> None:
    """Register the tasks with ``task``, the ``app.task`` of Umbel or of Celery: here they are one."""

    @task(name="interop.add")
    def add(x: Any, y: Any) -> Any:
        return x + y

    @task(name="interop.echo")
    def echo(value: Any) -> Any:
        return value

    @task(name="interop.describe")
    def describe(value: Any) -> str:
        """What arrived, as only Python can say it."""
        return repr(value)

    @task(name="interop.note")
    def note(value: Any, name: str) -> Any:
        write(name, value)
        return value

    @task(name="interop.on_error")
    def on_error(task_id: str) -> None:
        """One argument: then Celery sends it as a message instead of calling it on the spot."""
        write(f"error-{task_id}", task_id)

    @task(name="interop.fail")
    def fail(kind: str) -> None:
        raise {"Boom": Boom("broken", 42), "ValueError": ValueError("bad"), "KeyError": KeyError("missing")}[kind]

    @task(name="interop.flaky", bind=True, max_retries=3)
    def flaky(self: Any, failures: int) -> int:
        if self.request.retries < failures:
            raise self.retry(countdown=0.1)
        return int(self.request.retries)

    @task(name="interop.hopeless", bind=True, max_retries=1)
    def hopeless(self: Any) -> None:
        raise self.retry(countdown=0.1)

    @task(name="interop.clock")
    def clock() -> float:
        """When it ran."""
        return time.time()

    @task(name="interop.priority", bind=True)
    def priority(self: Any) -> list[Any]:
        """The priority it came with, and when it ran."""
        return [self.request.delivery_info["priority"], time.time()]

    @task(name="interop.hold")
    def hold(name: str) -> None:
        """Keeps the worker, which runs one task at a time, until the test lets go."""
        write(f"{name}.begun")
        end = time.monotonic() + PATIENCE
        while not (NOTES / f"{name}.go").exists() and time.monotonic() < end:
            time.sleep(0.01)

    # The tasks that the captured messages name.

    @task(name="wire.add")
    def wire_add(x: Any, y: Any) -> Any:
        return x + y

    @task(name="wire.mul")
    def wire_mul(x: Any, y: Any) -> Any:
        return x * y

    @task(name="wire.echo")
    def wire_echo(*args: Any, **kwargs: Any) -> Any:
        return [list(args), kwargs]

    @task(name="wire.xsum")
    def wire_xsum(numbers: Any) -> Any:
        return sum(numbers)

    @task(name="wire.retryme", bind=True)
    def wire_retryme(self: Any) -> int:
        return int(self.request.retries)

    @task(name="wire.onerr1")
    def wire_onerr1(task_id: str) -> str:
        return task_id

    @task(name="other.lang.task")
    def other_lang_task(*args: Any, **kwargs: Any) -> Any:
        return [list(args), kwargs]
