"""Who is told of a failure, and how often: by nesting, place in the chain, number of failures, and policy."""

from __future__ import annotations

import json
from typing import Any

import pytest
from canvas_model import CASES, Lab, Misbehaving, reconciled, table_canvas, table_fails, table_told
from click.testing import CliRunner
from cluster import FULL

from umbel import chain, chord, group
from umbel.canvas.again import cancel, retry
from umbel.canvas.picture import listed, standing
from umbel.canvas.sending import shown_of
from umbel.cli.session import Session
from umbel.cli.workflow import command
from umbel.errors import ChordError, TaskRevoked, UmbelError


@pytest.mark.parametrize("copies", [1, 3])
def test_exact_counts(copies: int) -> None:
    lab = Lab(Misbehaving(copies=copies))
    every = copies == 1 or FULL
    cases = [case for case in CASES if every or (case[0] == 1 and case[1] in ("alone", "middle"))]
    with lab.running() as harness:
        for case in cases:
            lab.calls.clear()
            sent = table_canvas(case, lab.note.si, lab).apply_async((1,))
            harness.run_until_idle(20)
            harness.advance(15)
            once = {what: number for what, number in lab.calls.items() if what != "member"}
            assert once == table_told(case), case
            # A member that is delivered several times fails several times: at least once is what is promised of it.
            failures = case[2]
            assert (lab.calls["member"] >= failures) if copies > 1 else (lab.calls["member"] == failures), case
            assert sent.state == ("FAILURE" if table_fails(case) else "SUCCESS"), case
            if table_fails(case):
                with pytest.raises(ChordError, match="bad"):
                    sent.get(timeout=30)


def test_on_error_of_a_composed_call_is_told_once() -> None:
    lab = Lab()
    ok, boom, tell = lab.identity, lab.boom, lab.note.si("told")
    with lab.running() as harness:
        for canvas in (
            chain(ok.s(1), boom.s(), ok.s()),
            chain(boom.s(), group([ok.s(), ok.s()]), ok.s()),
            chain(ok.s(1), group([boom.s(), boom.s()]), ok.s()),
            chain(ok.s(1), group([ok.s(), ok.s()]), boom.s()),
            group([boom.s(), boom.s(), ok.s(1)]),
            chord([boom.s(), boom.s()], ok.s()),
            chord([ok.s(1), ok.s(1)], boom.s()),
            group([chord([boom.s(), boom.s()], ok.s()), boom.s()]) | ok.s(),
            chain(boom.s(), chain(ok.s(), group([ok.s()]), ok.s()).set(priority=3)),
        ):
            lab.calls.clear()
            canvas.on_error(tell).apply_async()
            harness.run_until_idle(20)
            assert lab.calls == {"told": 1}, canvas.to_plain()
            canvas = chain(ok.s(1), ok.s()).on_error(tell)
            canvas.apply_async()
            harness.run_until_idle(20)
            assert lab.calls == {"told": 1}


def test_link_error_of_a_group_is_each_members_and_of_a_chord_its_bodys() -> None:
    lab = Lab()
    with lab.running() as harness:
        group([lab.boom.s(), lab.boom.s(), lab.identity.s(1)]).link_error(lab.note.si("each")).apply_async()
        chord([lab.boom.s(), lab.boom.s()], lab.identity.s()).link_error(lab.note.si("body")).apply_async()
        harness.run_until_idle(20)
        assert lab.calls == {"each": 2, "body": 1}


def test_settled_gives_results_and_errors_as_values() -> None:
    lab = Lab()
    with lab.running() as harness:
        sent = (group([lab.identity.s(1), lab.boom.s()], join="settled") | lab.identity.s()).apply_async()
        harness.run_until_idle(20)
        error = {"exc_type": "ValueError", "exc_message": ["bad"], "exc_module": "builtins"}
        assert sent.get(timeout=30) == [{"state": "SUCCESS", "result": 1}, {"state": "FAILURE", "error": error}]


def test_the_first_failure_cancels_the_others() -> None:
    lab = Lab()
    with lab.running() as harness:
        waits = [lab.identity.s(n).set(countdown=3600) for n in range(5)]
        sent = (group([*waits, lab.boom.s()], on_failure="cancel") | lab.identity.s()).apply_async()
        harness.run_until_idle(20)
        harness.advance(3601)
        assert sent.state == "FAILURE"
        for child in list(sent.parent)[:5]:
            with pytest.raises(TaskRevoked):
                child.get(timeout=30)
        others = (group([lab.identity.s(1).set(countdown=3600), lab.boom.s()]) | lab.identity.s()).apply_async()
        harness.advance(3601)
        assert others.parent[0].get(timeout=30) == 1, "they wait, unless they are to be cancelled"


def test_a_workflow_is_cancelled_as_a_whole() -> None:
    lab = Lab()
    with lab.running() as harness:
        later = [lab.note.s(n).set(countdown=60) for n in range(3)]
        sent = (lab.identity.s(0) | group(later) | lab.note.s("end")).apply_async()
        harness.run_until_idle(20)
        assert cancel(lab.app, sent.workflow)
        harness.advance(61)
        harness.advance(15)
        assert not lab.calls
        record = shown_of(lab.app, sent.workflow)
        assert record is not None
        assert record.state == "FAILURE"
        assert sent.state == "FAILURE"
        found = standing(lab.app, sent.workflow)
        assert found is not None
        assert sorted(found.states.values()) == ["FAILURE", "REVOKED", "REVOKED", "REVOKED", "SUCCESS"]


def flawed(lab: Lab) -> Any:
    """A task that fails as long as it stands in ``lab.flaws``."""
    lab.flaws = set()  # type: ignore[attr-defined]  # for these tests alone

    @lab.app.task(name="flawed")
    def run(value: Any, name: str) -> Any:
        lab.calls[name] += 1
        if name in lab.flaws:  # type: ignore[attr-defined]  # see above
            raise ValueError(name)
        return value

    return run


def test_a_workflow_is_retried_from_what_has_failed() -> None:
    lab = Lab()
    task = flawed(lab)
    with lab.running() as harness:
        lab.flaws |= {"b", "c"}  # type: ignore[attr-defined]  # see `flawed`
        inner = group([task.s("a"), task.s("b") | task.s("b2"), task.s("c")]) | task.s("body")
        sent = (task.s(7, "first") | group([inner, task.s("other")]) | task.s("end")).apply_async()
        harness.run_until_idle(20)
        assert sent.state == "FAILURE"
        ran = dict(lab.calls)
        assert ran == {"first": 1, "a": 1, "b": 1, "c": 1, "other": 1}
        lab.flaws.clear()  # type: ignore[attr-defined]  # see `flawed`
        new, number = retry(lab.app, sent.workflow)
        assert number == 2
        harness.run_until_idle(20)
        assert sent.get(timeout=30) == [[7, 7, 7], 7]
        assert lab.calls == {**ran, "b": 2, "c": 2, "b2": 1, "body": 1, "end": 1}
        found = standing(lab.app, new)
        assert found is not None
        assert (found.state, set(found.states.values())) == ("SUCCESS", {"SUCCESS"})
        with pytest.raises(UmbelError, match="no failed task"):
            retry(lab.app, new)
        with pytest.raises(UmbelError, match="no workflow"):
            retry(lab.app, "none")


def test_one_task_is_retried_and_what_still_fails_is_told_of() -> None:
    lab = Lab()
    task = flawed(lab)
    with lab.running() as harness:
        lab.flaws |= {"a", "b"}  # type: ignore[attr-defined]  # see `flawed`
        sent = (group([task.s(1, "a"), task.s(2, "b")]) | task.s("end")).apply_async()
        harness.run_until_idle(20)
        lab.flaws.clear()  # type: ignore[attr-defined]  # see `flawed`
        first, number = retry(lab.app, sent.workflow, sent.parent[0].id)
        harness.run_until_idle(20)
        assert (number, sent.state, sent.parent[0].get(timeout=30)) == (1, "FAILURE", 1)
        second, _ = retry(lab.app, first)
        harness.run_until_idle(20)
        assert (sent.get(timeout=30), lab.calls["a"], lab.calls["b"]) == ([1, 2], 2, 2)
        assert len({sent.workflow, first, second}) == 3


def test_the_command_draws_lists_cancels_and_retries() -> None:
    lab = Lab()
    task = flawed(lab)
    with lab.running() as harness:
        lab.flaws |= {"b"}  # type: ignore[attr-defined]  # see `flawed`
        many = group(lab.note.s(n) for n in range(120))
        sent = (group([task.s(1, "a"), task.s(2, "b")]) | many | lab.identity.s()).apply_async()
        harness.run_until_idle(20)

        def umbel(*arguments: str) -> Any:
            session = Session()
            session._app = lab.app
            return CliRunner().invoke(command, arguments, obj=session)

        shown = umbel("show", sent.workflow)
        assert (shown.exit_code, "✗ flawed  FAILURE" in shown.output) == (1, True)
        assert "group of 120" in shown.output
        assert "120 FAILURE" in shown.output
        chart = umbel("show", sent.workflow, "--mermaid").output
        assert chart.startswith("flowchart TD")
        assert chart.count("-->") == 3
        assert '["flawed"]:::failure' in chart
        steps = json.loads(umbel("show", sent.workflow, "--json").output)["steps"]
        assert [len(steps), steps[1]["states"], steps[2]["state"]] == [3, {"FAILURE": 120}, "FAILURE"]
        assert umbel("show", "none").exit_code == 3
        assert [workflow for _, workflow, _ in listed(lab.app)] == [sent.workflow]
        assert sent.workflow in umbel("list").output
        assert json.loads(umbel("list", "--json").output)[0]["id"] == sent.workflow
        lab.flaws.clear()  # type: ignore[attr-defined]  # see `flawed`
        assert "1 task sent again" in umbel("retry", sent.workflow).output
        harness.run_until_idle(20)
        assert sent.get(timeout=30) == list(range(120))
        assert umbel("cancel", sent.workflow).exit_code == 0


def test_what_a_crash_interrupted_is_finished() -> None:
    """The right to fire was given, and whoever had it is gone: its lease ends, and another takes it."""
    lab = Lab()
    with lab.running() as harness:
        lost: list[Any] = []
        store = lab.app.gateway.store  # type: ignore[attr-defined]  # this process has its own connections
        join = store.join

        async def forgetful(key: str, *args: Any, **kwargs: Any) -> Any:
            state = await join(key, *args, **kwargs)
            if state.fires and not key.endswith("/sending") and len(lost) < 3:
                lost.append(key)
                return type(state)(count=state.count, size=state.size, fires=False)
            return state

        store.join = forgetful
        sent = (lab.identity.s(1) | group([lab.identity.s(), lab.identity.s()]) | lab.identity.s()).apply_async()
        harness.run_until_idle(20)
        assert not sent.ready()
        reconciled(lab, harness)
        assert sent.get(timeout=30) == [1, 1]
        assert len(lost) == 3


def growing(lab: Lab) -> Any:
    """A task that adds as many members as it is told to, in two goes."""

    @lab.app.task(name="grow", bind=True, max_retries=2)
    def grow(self: Any, number: int, then: str = "") -> int:
        self.add_to_group(*(lab.identity.s(100 * number + n) for n in range(number)))
        self.add_to_group(lab.identity.s(7) | lab.note.s("added"))
        if then == "retry" and self.request.retries < 1:
            raise self.retry(countdown=1)
        if then == "fail":
            raise ValueError(number)
        return number

    return grow


@pytest.mark.parametrize("copies", [1, 3])
def test_a_running_member_adds_others_to_its_group(copies: int) -> None:
    lab = Lab(Misbehaving(copies=copies))
    grow = growing(lab)
    with lab.running() as harness:
        sent = (group([lab.identity.s(0), grow.s(2), grow.s(1, "retry")]) | lab.identity.s()).apply_async()
        harness.run_until_idle(20)
        harness.advance(20)
        assert sent.get(timeout=30) == [0, 2, 200, 201, "added", 1, 100, "added"]
        failed = (group([grow.s(1, "fail")]) | lab.identity.s()).apply_async()
        harness.run_until_idle(20)
        assert failed.state == "FAILURE"
        early = (group([grow.s(1), lab.boom.s()], join=1) | lab.identity.s()).apply_async()
        harness.advance(20)
        assert early.get(timeout=30) == [1, 100, "added"]


def test_what_cannot_be_added_is_said() -> None:
    lab = Lab()
    said: list[str] = []

    @lab.app.task(name="wrong", bind=True)
    def wrong(self: Any, *_: Any) -> None:
        try:
            self.add_to_group(group([lab.identity.s(1)]))
        except UmbelError as exc:
            said.append(str(exc))

    with lab.running() as harness:
        wrong.delay()
        (group([wrong.s() | lab.identity.s()]) | lab.identity.s()).apply_async()
        (group([wrong.s()]) | lab.identity.s()).apply_async()
        harness.run_until_idle(20)
    assert [any(part in text for text in said) for part in ("no member", "last task", "chains of tasks")] == [True] * 3
