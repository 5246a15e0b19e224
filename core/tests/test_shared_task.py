"""Tasks of libraries that have no app."""

from __future__ import annotations

import gc

import pytest

from umbel import shared as shared_module
from umbel import shared_task
from umbel.errors import UmbelError
from umbel.task import Task

from .conftest import MakeApp
from .fakes import Fakes
from .test_task import Inside


@pytest.fixture(autouse=True)
def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test here shares, and the apps that it shares it with, are its own."""
    gc.collect()
    monkeypatch.setattr(shared_module, "shared_tasks", [])
    monkeypatch.setattr(shared_module, "live_apps", type(shared_module.live_apps)())


def job(x: int = 1) -> int:
    """Work."""
    return x + 1


def test_it_is_registered_in_apps_made_before_it_and_after_it(make_app: MakeApp) -> None:
    before = make_app()
    shared = shared_task(name="lib.job")(job)
    after = make_app()
    assert before.tasks["lib.job"].app is before
    assert after.tasks["lib.job"].app is after
    assert (shared.__name__, shared.__doc__) == ("job", "Work.")


def test_it_may_be_written_without_options(make_app: MakeApp) -> None:
    shared_task(job)
    assert list(make_app().tasks) == [f"{__name__}.job"]


def test_its_options_hold_in_every_app_and_each_apps_settings_override_them(make_app: MakeApp) -> None:
    shared_task(name="lib.job", queue="lib", max_retries=9)(job)
    plain, routed = make_app(), make_app({"tasks": {"lib.*": {"queue": "mine"}}})
    assert (plain.tasks["lib.job"].options.queue, routed.tasks["lib.job"].options.queue) == ("lib", "mine")
    assert routed.tasks["lib.job"].options.max_retries == 9


def test_calling_it_runs_the_function_with_no_app_at_all() -> None:
    assert shared_task(job)(4) == 5


def test_with_one_app_it_is_that_apps_task(make_app: MakeApp, fakes: Fakes) -> None:
    shared = shared_task(name="lib.job")(job)
    app = make_app()
    handle = shared.delay(4)
    assert handle.app is app
    assert [m.task for m in fakes.broker.messages()] == ["lib.job"]
    assert shared.name == "lib.job"
    assert shared.s(1).app is app


def test_with_no_app_or_two_it_says_what_to_do(make_app: MakeApp) -> None:
    shared = shared_task(job)
    with pytest.raises(UmbelError, match="shared task job belongs to 0 apps; make an app first"):
        shared.delay()
    apps = make_app(), make_app()
    with pytest.raises(UmbelError, match=r"belongs to 2 apps; use app\.tasks\[name\] to say which"):
        shared.delay()
    assert len(apps) == 2


def test_inside_a_task_it_is_the_task_of_that_tasks_app(make_app: MakeApp, fakes: Fakes) -> None:
    shared = shared_task(name="lib.job")(job)
    one, two = make_app({"default_queue": "one"}), make_app({"default_queue": "two"})
    for app, queue in ((one, "one"), (two, "two")):
        with Inside(app.tasks["lib.job"]):
            assert shared.delay().app is app
        assert len(fakes.broker.messages(queue)) == 1


def test_a_bound_one_gets_the_task_in_force(make_app: MakeApp) -> None:
    @shared_task(bind=True)
    def whose(self: Task[..., str]) -> str:
        return self.app.name

    make_app(name="only")
    assert whose() == "only"


def test_an_app_that_is_gone_does_not_count(make_app: MakeApp, fakes: Fakes) -> None:
    from umbel import Umbel

    shared = shared_task(job)
    kept = make_app()
    gone = Umbel("gone", plugins=[fakes])
    assert len(shared_module.live_apps) == 2
    del gone
    gc.collect()
    assert shared.delay().app is kept
