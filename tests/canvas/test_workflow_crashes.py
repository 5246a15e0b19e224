"""A worker that dies between any two words to the outside: what it was at is finished by another, once."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from umbel import Umbel, chord, group, hookimpl
from umbel.canvas.graph import ONCE
from umbel.canvas.sending import shown_of
from umbel.testing.harness import Harness, in_memory

FULL = os.environ.get("UMBEL_TEST_FULL") == "1"
EFFECTS = {
    "transport": ("publish", "publish_blocking", "settle"),
    "store": ("put", "join", "fired", "claim", "release"),
}
STEP = 1 if FULL else 13
"""Of so many places to die at, one is tried."""


class Died(Exception):
    """What all calls of a process that has died end with."""


class Dying:
    """A plugin: after the ``last``-th call that changes anything, nothing gets through any more."""

    def __init__(self) -> None:
        self.last: int | None = None
        self.calls = 0
        self._lock = threading.Lock()

    def reset(self, last: int | None) -> None:
        self.last, self.calls = last, 0

    @property
    def died(self) -> bool:
        return self.last is not None and self.calls >= self.last

    @hookimpl(wrapper=True)
    def umbel_make_transport(self) -> Iterator[None]:
        return (yield from self._wrapped("transport"))

    @hookimpl(wrapper=True)
    def umbel_make_result_store(self) -> Iterator[None]:
        return (yield from self._wrapped("store"))

    def _wrapped(self, kind: str) -> Any:
        driver = yield
        for name in EFFECTS[kind]:
            call = getattr(driver, name)
            setattr(driver, name, self._blocking(call) if name == "publish_blocking" else self._asynchronous(call))
        return driver

    def _asynchronous(self, call: Any) -> Any:
        async def called(*args: Any, **kwargs: Any) -> Any:
            self._check()
            answer = await call(*args, **kwargs)
            self._count()
            return answer

        return called

    def _blocking(self, call: Any) -> Any:
        def called(*args: Any, **kwargs: Any) -> Any:
            self._check()
            answer = call(*args, **kwargs)
            self._count()
            return answer

        return called

    def _check(self) -> None:
        if self.died:
            raise Died

    def _count(self) -> None:
        with self._lock:
            self.calls += 1
        self._check()


class Lab:
    """An app whose tasks count their starts."""

    def __init__(self) -> None:
        self.dying = Dying()
        self.app = Umbel("lab", plugins=[self.dying], settings={"worker.concurrency": 2})
        self.starts: Counter[str] = Counter()
        self.bodies: Counter[tuple[str, int, int]] = Counter()

        @self.app.task(bind=True, max_retries=3)
        def step(self_: Any, *given: Any, kind: str = "ok", name: str) -> Any:
            request = self_.request
            self.starts[name] += 1
            if ONCE in request.message.headers:
                attempt = (request.id, request.retries, request.invocation.replaced_task_nesting)
                self.bodies[attempt] += 1
            if kind == "retry" and request.retries < 1:
                raise self_.retry(countdown=1)
            if kind == "replace":
                inner = [step.s(name=f"{name}.{number}") for number in (1, 2)]
                raise self_.replace(chord(inner, step.s(name=f"{name}.body")))
            if kind == "fail":
                raise ValueError(name)
            return [name, *given]

        self.step = step

    def canvas(self, fails: bool) -> Any:
        step = self.step
        members = [
            step.s(kind="retry", name="retry"),
            step.s(kind="replace", name="replace"),
            step.s(name="first") | step.s(kind="fail" if fails else "ok", name="second"),
        ]
        body = step.s(kind="retry", name="body").link_error(step.si(name="told of the body"))
        return (group(members) | body).on_error(step.si(name="told"))


def died_worker(lab: Lab, harness: Harness, last: int) -> bool:
    """Run a worker until it dies after its ``last``-th call, or all is done; whether it has died."""
    lab.dying.reset(last)
    worker = lab.app.worker()
    worker.queues = [lab.app.settings.default_queue]
    ended = threading.Event()

    def run() -> None:
        try:
            worker.run()
        except Died:
            pass  # it is expected to
        finally:
            ended.set()

    thread = threading.Thread(target=run, name="dying-worker")
    thread.start()
    for _ in range(400):
        if ended.wait(0.02) or (not lab.dying.died and idle(lab, harness)):
            break
        harness.clock.set(harness.clock.time() + 0.5)
    died = lab.dying.died
    worker.request_stop()
    worker.request_stop()
    thread.join(30)
    assert not thread.is_alive()
    lab.dying.reset(None)
    return died


def idle(lab: Lab, harness: Harness) -> bool:
    depths = lab.app.runtime.call(lab.app.gateway.transport.depth([lab.app.settings.default_queue]), timeout=5)  # type: ignore[attr-defined]  # this process has its own connections
    return not any(depth.ready or depth.leased or depth.delayed for depth in depths.values())


@pytest.mark.parametrize("fails", [False, True], ids=["succeeds", "fails"])
def test_whatever_a_worker_dies_between_another_finishes_it_once(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UMBEL_TEST_FULL", raising=False)  # no setting
    last, died = 1, True
    while died:
        lab = Lab()
        with in_memory(lab.app, settings={"broker.lease": 30.0, "worker.grace": 0.1}) as harness:
            sent = lab.canvas(fails).apply_async()
            died = died_worker(lab, harness, last)
            harness.clock.set(harness.clock.time() + 40)  # past what it held
            with harness.worker() as worker:
                for _ in range(5):
                    harness.advance(40, timeout=20)
                    lab.app.runtime.call(worker.workflows.reconcile(), timeout=10)
                    harness.run_until_idle(20)
                record = shown_of(lab.app, sent.workflow)
                assert record is not None
                assert record.state == ("FAILURE" if fails else "SUCCESS"), last
                assert sent.state == record.state, last
                if not fails:
                    replaced = ["replace.body", [["replace.1"], ["replace.2"]]]
                    value = ["body", [["retry"], replaced, ["second", ["first"]]]]
                    assert sent.get(timeout=30) == value, last
                assert bool(lab.starts["told"]) is bool(lab.starts["told of the body"]) is fails, last
                # What ran when its process died has not ended, and starts again: one for each slot of that worker.
                again = {attempt: number for attempt, number in lab.bodies.items() if number > 1}
                assert len(again) <= 2 * died, (last, again)
                assert all(number == 2 for number in again.values()), (last, again)
        last += STEP
    assert last > 30
