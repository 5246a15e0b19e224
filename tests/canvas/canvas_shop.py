"""Tasks of the workflows that real workers run."""

from __future__ import annotations

from typing import Any

from shop import mark

from umbel import Umbel, chord, group

app = Umbel("canvas_shop")


@app.task
def double(number: int) -> int:
    return 2 * number


@app.task
def total(numbers: list[int]) -> int:
    """Written down, for the tests count how often it starts."""
    mark("body", len(numbers))
    return sum(numbers)


@app.task(bind=True, max_retries=3)
def flaky(self: Any, number: int) -> int:
    if number % 7 == 3 and self.request.retries < 1:
        raise self.retry(countdown=0.05)
    return 2 * number


@app.task(bind=True)
def split(self: Any, number: int) -> Any:
    """Goes on as a chord of its own."""
    raise self.replace(chord([double.s(number), double.s(0)], total.s()))


@app.task
def start(size: int) -> int:
    """Sends a chord from within a task, and does not wait for it."""
    sent = (group(double.s(number) for number in range(size)) | total.s()).set(task_id="from within").apply_async()
    return len(sent.id)
