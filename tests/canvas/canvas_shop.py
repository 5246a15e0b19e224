"""Tasks of the workflows that real workers run, and the faults that their environment asks for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from canvas_work import Crashing, Misbehaving, brief, perform
from shop import mark

from umbel import Umbel, group
from umbel.canvas import sender
from umbel.canvas.graph import ONCE
from umbel.canvas.signature import Signature
from umbel.worker import copies, workflows


def _plugins() -> list[object]:
    times, faults, late = (float(os.environ.get(f"CANVAS_{name}", "0")) for name in ("COPIES", "FAULTS", "LATE"))
    found: list[object] = []
    if times > 1 or faults:
        found.append(Misbehaving(copies=int(times) or 1, faults=faults, late=late, seed=os.getpid()))
    if point := os.environ.get("CANVAS_CRASH"):
        found.append(Crashing(point, Path(os.environ["CANVAS_CRASHED"])))
    return found


if lease := os.environ.get("CANVAS_LEASE"):  # what a crash interrupts is finished sooner than users need it
    for module, name in ((copies, "START_LEASE"), (workflows, "START_LEASE"), (workflows, "LEASE"), (sender, "LEASE")):
        assert hasattr(module, name)
        setattr(module, name, float(lease))
    workflows.RECONCILE = 1.0  # type: ignore[misc]  # final for everybody else

app = Umbel("canvas_shop", plugins=_plugins())


@app.task(bind=True, max_retries=5)
def work(self: Any, *given: Any, kind: str, label: int, canvas: int) -> Any:
    """A task of a generated canvas; what it is given is written down."""
    request = self.request
    once = bool(request.message.headers.get(ONCE))
    mark("work", [canvas, label, brief(list(given)), request.invocation.replaced_task_nesting, once])

    def again(kind: str, label: int) -> Signature:
        call: Signature = work.s(kind=kind, label=label, canvas=canvas)
        return call

    return perform(self, again, given, kind=kind, label=label)


@app.task
def note(*what: Any) -> Any:
    mark("note", what)
    return what[-1]


@app.task
def identity(value: Any = None) -> Any:
    return value


@app.task
def boom(*_: Any) -> None:
    raise ValueError("bad")


@app.task
def double(number: int) -> int:
    return 2 * number


@app.task
def total(numbers: list[int]) -> int:
    """Written down, for the tests count how often it starts."""
    mark("body", len(numbers))
    return sum(numbers)


@app.task
def start(size: int) -> int:
    """Sends a chord from within a task, and does not wait for it."""
    sent = (group(double.s(number) for number in range(size)) | total.s()).set(task_id="from within").apply_async()
    return len(sent.id)
