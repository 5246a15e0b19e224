"""Composed calls: what they come to, what their handles say, and that they are as the wire has them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest
from canvas_model import Lab

from umbel import Umbel, chain, chord, group
from umbel.canvas.compose import read
from umbel.canvas.results import GroupResult, workflow_result
from umbel.canvas.signature import Canvas
from umbel.errors import NotSupported, ResultTimeout, TaskRevoked
from umbel.testing.harness import Harness


@pytest.fixture
def lab() -> Lab:
    lab = Lab()

    @lab.app.task(name="add")
    def add(*numbers: int) -> int:
        return sum(numbers)

    @lab.app.task(name="total")
    def total(numbers: list[int]) -> int:
        return sum(numbers)

    lab.add, lab.total = add, total  # type: ignore[attr-defined]  # two tasks more, for these tests
    return lab


@pytest.fixture
def running(lab: Lab) -> Iterator[Harness]:
    with lab.running() as harness:
        yield harness


def value(harness: Harness, canvas: Canvas[Any], *args: Any, **options: Any) -> Any:
    sent = canvas.apply_async(args, **options)
    harness.run_until_idle(20)
    return sent.get(timeout=30)


def test_what_canvases_come_to(lab: Any, running: Harness) -> None:
    add, total, same = lab.add, lab.total, lab.identity
    for canvas, wanted in (
        (add.s(1, 2) | add.s(3) | add.s(4), 10),
        (chain(add.s(1, 2), add.si(5, 5)), 10),
        (group([add.s(1), add.s(2)]), [1, 2]),
        (group(add.s(n) for n in range(3)) | total.s(), 3),
        (chord([add.s(n, n) for n in range(4)], total.s()), 12),
        (chord([add.s(1)], total.s() | add.s(4)), 5),
        (add.s(1) | group([add.s(1), add.s(2)]) | total.s() | add.s(10), 15),
        (group([group([add.s(1), add.s(2)]), add.s(3)]) | same.s(), [1, 2, 3]),
        (group([add.s(1) | group([add.s(1), add.s(2)]), add.s(3)]) | same.s(), [[2, 3], 3]),
        (add.s(1) | group([add.s(1), add.s(2) | group([add.s(1), add.s(2)])]), [2, [4, 5]]),
        (group([chord([add.s(1)], total.s()), chord([add.s(2), add.s(3)], total.s())]) | total.s(), 6),
        (chord([chord([add.s(1)], total.s())], total.s()), 1),
        (group([add.s(1)]) | group([total.s(), same.s()]) | same.s(), [1, [1]]),
        (chain(chain(add.s(1), add.s(1)), chain(add.s(1))), 3),
        (add.s(1) | group([]) | same.s(), []),
        (add.map([1, 2]), [1, 2]),
        (add.starmap([(1, 2), (3, 4)]), [3, 7]),
        (add.chunks(zip(range(5), range(5), strict=True), 2), [[0, 2], [4, 6], [8]]),
        (add.chunks([(1, 1), (2, 2)], 1).group() | same.s(), [[2], [4]]),
        (chord([add.s(1), add.s(2)])(total.s()), None),
    ):
        if wanted is None:
            running.run_until_idle()
            assert canvas.get(timeout=30) == 3, "a chord with its body given is sent"
        else:
            assert value(running, canvas) == wanted, canvas


def test_arguments_of_the_sending_come_in_front_of_what_begins(lab: Any, running: Harness) -> None:
    assert value(running, lab.add.s(1) | lab.add.s(2), 10) == 13
    assert value(running, group([lab.add.s(1), lab.add.s(2)]), 10) == [11, 12]
    assert value(running, chord([lab.add.s(1), lab.add.s(2)], lab.total.s()), 10) == 23
    assert (lab.add.s(1) | lab.add.s(2)).delay(10).id
    assert lab.add.s(1)(2) == 3, "called, a signature runs here and now"


def test_options_reach_every_task_that_has_none_of_its_own(lab: Any, running: Harness) -> None:
    sent = chord([lab.add.s(1), lab.add.s(2).set(priority=1)], lab.total.s())
    assert value(running, sent, priority=7) == 3
    priorities = {(message.task, message.priority) for message in running.published}
    assert priorities >= {("add", 7), ("add", 1), ("total", 7)}
    value(running, lab.add.s(1) | lab.add.s(2), task_id="mine", countdown=0)
    assert running.published[-1].id == "mine"


def test_countdowns_delay_the_beginning_alone(lab: Any, running: Harness) -> None:
    sent = (lab.add.s(1) | group([lab.add.s(1), lab.add.s(2)]) | lab.total.s()).apply_async(countdown=60)
    running.run_until_idle()
    assert not sent.parent.ready()
    running.advance(61)
    assert sent.get(timeout=30) == 5
    skewed = group([lab.add.s(1), lab.add.s(2)]).skew(10, step=10).apply_async()
    running.advance(11)
    assert skewed.completed_count() == 1
    running.advance(10)
    assert skewed.get(timeout=30) == [1, 2]


def test_handles_know_what_is_in_them_and_what_came_before(lab: Any, running: Harness) -> None:
    sent = (lab.add.s(1) | group([lab.add.s(1), lab.add.s(2) | lab.add.s(3)]) | lab.total.s()).apply_async()
    running.run_until_idle()
    header = sent.parent
    assert isinstance(header, GroupResult)
    assert (len(header), [child.get(timeout=30) for child in header]) == (2, [2, 6])
    assert (header[1].get(timeout=30), header[1].parent.get(timeout=30)) == (6, 3)
    assert header.parent.get(timeout=30) == 1
    assert header.parent.parent is None
    assert (header.ready(), header.successful(), header.failed(), header.completed_count()) == (True, True, False, 2)
    assert sorted(found for _, found in header.as_completed(5)) == [2, 6]
    assert [task_id for task_id, _ in header.as_completed(5)] == [*header.ids()]
    header.save()
    restored = GroupResult.restore(header.id, lab.app)
    assert restored is not None
    assert (restored, restored.get(timeout=30)) == (header, [2, 6])
    header.delete()
    assert GroupResult.restore(header.id, lab.app) is None
    assert workflow_result(sent.workflow, lab.app).get(timeout=30) == 8
    with pytest.raises(LookupError, match="workflows"):
        workflow_result("none", lab.app)
    header.forget()
    assert header.waiting()
    with pytest.raises(ResultTimeout):
        list(header.as_completed(0.05, interval=0.01))
    with pytest.raises(ResultTimeout):
        header.get(timeout=0.05)


def test_handles_are_awaited(lab: Any, running: Harness) -> None:
    async def main() -> Any:
        sent = await (group([lab.add.s(1), lab.add.s(2)]) | lab.total.s()).adelay()
        both = group([lab.add.s(3), lab.boom.s()])
        several = await both.aapply_async()
        running_ids = {task_id: found async for task_id, found in several.aas_completed(10)}
        return await sent, await several.aget(5, propagate=False), running_ids

    one, several, completed = asyncio.run(main())
    assert one == 3
    assert (several[0], type(several[1])) == (3, ValueError)
    assert {type(found) for found in completed.values()} == {int, ValueError}


def test_members_from_a_generator_are_made_as_they_are_sent(lab: Any, running: Harness) -> None:
    made = 0

    def members() -> Iterator[Canvas[Any]]:
        nonlocal made
        for number in range(2500):
            made += 1
            yield lab.add.s(number)

    canvas = group(members()) | lab.total.s()
    assert made == 1, "the first is looked at for its app"
    sent = canvas.apply_async()
    assert made == 2500
    running.run_until_idle(60)
    assert sent.get(timeout=30) == sum(range(2500))
    assert (len(sent.parent), sent.parent.shown.members) == (2500, None), "no list of ids is kept"
    assert sent.parent[2499].get(timeout=30) == 2499
    with pytest.raises(ValueError, match="generator"):
        canvas.apply_async()
    mixed = group(lab.add.s(n) if n % 2 else lab.add.s(n) | lab.add.s(1) for n in range(4)) | lab.identity.s()
    assert value(running, mixed) == [1, 1, 3, 3]
    nested = group(chord([lab.add.s(n), lab.add.s(1)], lab.total.s()) for n in range(3)).apply_async()
    running.run_until_idle(20)
    assert nested.get(timeout=30) == [1, 2, 3]
    empty = (group(member for member in ()) | lab.identity.s()).set()
    assert value(running, empty) == []


def test_a_canvas_is_read_back_from_the_wire_as_it_was_written(lab: Any, running: Harness) -> None:
    add, total = lab.add, lab.total
    for canvas in (
        add.s(1).set(queue="q").link(add.s(2)),
        add.s(1) | group([add.s(1), add.si(2)]) | total.s(),
        chord(group([add.s(1)], join=1, on_failure="cancel"), total.s()).on_error(add.s()),
        add.map([1]),
        add.starmap([(1, 2)]),
    ):
        plain = json.loads(json.dumps(canvas.to_plain()))
        assert sorted(plain) == ["args", "immutable", "kwargs", "options", "subtask_type", "task"]
        assert read(plain, lab.app).to_plain() == plain
    kinds = {(add.s(1) | add.s(2)).to_plain()["task"], group([add.s(1)]).to_plain()["task"]}
    assert kinds == {"celery.chain", "celery.group"}
    chunked = {"task": "celery.chunks", "kwargs": {"task": add.s().to_plain(), "it": [[1, 2], [3, 4]], "n": 1},
               "subtask_type": "chunks"}  # fmt: skip
    assert value(running, read(chunked, lab.app)) == [[3], [7]]


def test_stamps_reach_every_task_and_callback(lab: Any, running: Harness) -> None:
    canvas = (lab.add.s(1).link(lab.add.s(5)) | group([lab.add.s(1), lab.add.s(2)]) | lab.total.s()).stamp(
        tenant="acme"
    )
    assert value(running, canvas) == 5
    ours = [message for message in running.published if message.task in ("add", "total")]
    assert len(ours) == 5
    for message in ours:
        assert (message.headers["stamped_headers"], message.headers["stamps"]) == (["tenant"], {"tenant": "acme"})


def test_values_are_not_changed_by_what_is_made_of_them(lab: Any) -> None:
    first = lab.add.s(1)
    first.set(queue="q"), first.link(lab.add.s()), first.link_error(lab.add.s()), first | lab.add.s(2), first.stamp(a=1)
    assert first.to_plain() == lab.add.s(1).to_plain()
    assert first.clone((5,), queue="q").to_plain()["args"] == [5, 1]
    assert first.link(lab.add.s(2)).link(lab.add.s(2)).options["link"] == [lab.add.s(2).to_plain()]


def test_what_is_wrong_is_said_at_the_call(lab: Any) -> None:
    with pytest.raises(TypeError, match="signatures"):
        chain(1)  # type: ignore[arg-type]  # the point of it
    with pytest.raises(ValueError, match="body"):
        chord([lab.add.s(1)]).apply_async()
    with pytest.raises(ValueError, match="no app"):
        group([]).apply_async()
    for join in ("some", 0, True):
        with pytest.raises(ValueError, match="join"):
            group([lab.add.s(1)], join=join)
    with pytest.raises(ValueError, match="chunk"):
        lab.add.chunks([], 0)


def test_a_store_that_cannot_join_refuses_at_the_call() -> None:
    app = Umbel("poor", broker="memory://poor", results="disabled")

    @app.task
    def add(*numbers: int) -> int:
        return sum(numbers)

    with pytest.raises(NotSupported, match=r"\[results\] url"):
        chord([add.s(1)], add.s()).apply_async()
    assert len(group([add.s(1), add.s(2) | add.s(3)]).apply_async()) == 2, "nothing is joined: no store is needed"
    app.close()


def test_revoked_members_end_the_group(lab: Any, running: Harness) -> None:
    waits = lab.add.s(1).set(countdown=60, task_id="revoked one")
    sent = (group([lab.add.s(1), waits]) | lab.total.s()).apply_async()
    running.run_until_idle()
    lab.app.result("revoked one").revoke()
    running.advance(61)
    with pytest.raises(TaskRevoked):
        lab.app.result("revoked one").get(timeout=30)
    assert sent.state == "FAILURE"
    late = (group([lab.add.s(1), lab.add.s(2).set(expires=30, countdown=60)]) | lab.total.s()).apply_async()
    running.advance(100)
    assert late.state == "FAILURE"
