"""The harness of ``umbel.testing`` and schedules: entries run as time is let pass."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from umbel import Umbel
from umbel.ports.clock import VirtualClock
from umbel.testing.harness import in_memory

MIDNIGHT = datetime(2026, 3, 1, tzinfo=UTC).timestamp()


def office() -> tuple[Umbel, list[tuple[str, float]]]:
    app = Umbel("office", broker="redis://production", results="redis://production")
    runs: list[tuple[str, float]] = []

    @app.schedule(every="1h")
    @app.task(name="tidy")
    def tidy() -> None:
        runs.append(("tidy", app.clock.time()))

    @app.task(name="report", bind=True, max_retries=2, retry_delay=120)
    def report(self: Any) -> None:
        runs.append(("report", datetime.fromisoformat(self.request.headers["umbel-due"]).timestamp()))
        if len(runs) < 9:
            raise self.retry()

    @app.task(name="plan")
    def plan() -> None:
        app.schedules.create("later", "tidy", at=app.clock.time() + 90, max_runs=1)

    app.schedule(app.tasks["report"], crontab="30 6 * * *")
    return app, runs


def test_entries_run_at_their_own_times() -> None:
    app, runs = office()
    with in_memory(app, clock=VirtualClock(MIDNIGHT)) as harness, harness.worker():
        harness.advance(3600)
        assert runs == [("tidy", MIDNIGHT + 3600)]
        harness.advance(hours=23)
    assert [at for what, at in runs if what == "tidy"] == [MIDNIGHT + 3600 * n for n in range(1, 25)]
    due = MIDNIGHT + 6.5 * 3600
    assert [at for what, at in runs if what == "report"] == [due] * 3, "its retries know its due time too"


def test_an_entry_that_a_task_makes_runs_too() -> None:
    app, runs = office()
    with in_memory(app, clock=VirtualClock(MIDNIGHT)) as harness, harness.worker():
        app.tasks["plan"].delay()
        harness.advance(minutes=5)
        assert runs == [("tidy", MIDNIGHT + 90)]
        app.schedules.pause("tidy")
        harness.advance(hours=2)
        assert len(runs) == 1


def test_schedules_can_be_left_out() -> None:
    app, runs = office()
    with in_memory(app, clock=VirtualClock(MIDNIGHT)) as harness, harness.worker(schedules=False):
        harness.advance(days=1)
    assert runs == []
