"""Events of a real worker, read by Celery's own receiver and state; and what each end of a task becomes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from celery import Celery
from celery_receiver import Monitor
from cluster import Cluster, until

from umbel.model import Action, Delivery, Message, Outcome, Result, Settlement, Verdict
from umbel_celery import events

WORKER = "umbel@kit"


def test_the_life_of_a_worker_and_of_its_tasks(
    fleet: Callable[..., Cluster], app: Celery, tools_url: str, monitor: Monitor
) -> None:
    cluster = fleet(tools_url, plugins__options__celery__events=True, plugins__options__celery__heartbeat=0.5)
    worker = cluster.worker()
    with monitor:
        beat = until(lambda: [each for each in monitor.of("worker-heartbeat") if "active" in each], "one with figures")[
            0
        ]
        assert (beat["hostname"], beat["freq"], beat["sw_ident"], beat["pid"]) == (WORKER, 0.5, "umbel", worker.pid)
        assert {"active", "processed", "loadavg", "sw_ver", "sw_sys", "utcoffset", "clock", "timestamp"} <= beat.keys()

        good = cluster.send("add", 2, 3)
        done = monitor.wait("task-succeeded", good.id)
        assert (done["result"], done["hostname"]) == ("5", WORKER)
        assert 0 <= done["runtime"] < 5
        assert monitor.story(good.id) == ["task-received", "task-started", "task-succeeded"]
        (received,) = monitor.of("task-received", good.id)
        assert (received["name"], received["args"], received["kwargs"], received["retries"]) == (
            "shop.add",
            "(2, 3)",
            "{}",
            0,
        )
        assert (received["root_id"], received["parent_id"], received["eta"]) == (good.id, None, None)
        clocks = [event["clock"] for event in monitor.heard if event.get("uuid") == good.id]
        assert clocks == sorted(set(clocks))

        bad = cluster.send("fail", "ü is bad")
        failed = monitor.wait("task-failed", bad.id)
        assert "ü is bad" in failed["exception"]
        assert "ValueError" in failed["traceback"]

        again = cluster.send("flaky", 1)
        monitor.wait("task-succeeded", again.id)
        assert monitor.story(again.id).count("task-retried") == 1
        assert [each["retries"] for each in monitor.of("task-received", again.id)] == [0, 1]

        rejected = cluster.send("reject", "no good")
        assert monitor.wait("task-rejected", rejected.id)["requeue"] is False
        assert monitor.of("task-failed", rejected.id)

        late = cluster.send("add", 1, 1, expires=-1)
        assert monitor.wait("task-revoked", late.id)["expired"] is True

        states = {each.id: monitor.state.tasks[each.id].state for each in (good, bad, again, late)}
        assert list(states.values()) == ["SUCCESS", "FAILURE", "SUCCESS", "REVOKED"]
        assert monitor.state.tasks[good.id].name == "shop.add"
        assert monitor.state.workers[WORKER].alive

        slow = cluster.send("note", "last words", 1.0)
        monitor.wait("task-started", slow.id)
        assert worker.end() == 0
        monitor.wait("worker-offline")
        assert monitor.story(slow.id)[-1] == "task-succeeded", "the last task of a stopping worker is told too"


@pytest.mark.parametrize("tools_url", ["redis"], indirect=True)
def test_task_events_flow_once_they_are_asked_for(
    fleet: Callable[..., Cluster], app: Celery, tools_url: str, monitor: Monitor
) -> None:
    cluster = fleet(tools_url)
    cluster.worker()
    with monitor:
        assert cluster.send("add", 2, 3).get(timeout=30) == 5
        app.control.enable_events()
        until(
            lambda: app.control.broadcast("enable_events", reply=True, timeout=2, limit=1)[0][WORKER]["ok"].count(
                "already"
            ),
            "on",
        )
        after = cluster.send("add", 2, 4)
        monitor.wait("task-succeeded", after.id)
        assert {event["uuid"] for event in monitor.heard if event["type"].startswith("task-")} == {after.id}


def test_a_candidate_of_an_election_is_acknowledged(
    fleet: Callable[..., Cluster], app: Celery, tools_url: str, monitor: Monitor
) -> None:
    """Otherwise elections among Celery's workers would never end: they count us as alive."""
    cluster = fleet(tools_url)
    cluster.worker()
    with monitor, app.connection() as connection, app.events.Dispatcher(connection, hostname="other@kit") as dispatcher:
        dispatcher.send("worker-elect", id="e1", topic="task", action={"task": "t"}, cver=1)
        monitor.wait("worker-elect")
        acks = until(lambda: monitor.of("worker-elect-ack"), "an acknowledgement")
        assert (acks[0]["id"], acks[0]["hostname"]) == ("e1", WORKER)
        app.control.election("e2", "task", {"task": "t"})
        time.sleep(0.5)
        assert not [each for each in monitor.of("worker-elect") if each["hostname"] == WORKER], "we are no candidate"


@pytest.mark.parametrize("tools_url", ["redis"], indirect=True)
def test_a_talkative_fleet_does_not_keep_a_new_worker_from_its_own_events(
    fleet: Callable[..., Cluster], app: Celery, tools_url: str, monitor: Monitor
) -> None:
    """It asks the others what is revoked; that they go on talking of other things is no answer to wait for."""
    quiet = threading.Event()
    cluster = fleet(tools_url, plugins__options__celery__heartbeat=0.5)
    with app.connection() as connection, app.events.Dispatcher(connection, hostname="other@kit") as dispatcher:

        def talk() -> None:
            while not quiet.wait(0.2):
                dispatcher.send("worker-heartbeat", freq=2.0)

        talking = threading.Thread(target=talk, daemon=True)
        talking.start()
        try:
            cluster.worker()
            with monitor:
                until(
                    lambda: [
                        each
                        for each in monitor.of("worker-heartbeat")
                        if (each["hostname"], each["freq"]) == (WORKER, 0.5)
                    ],
                    "a heartbeat of its own",
                )
        finally:
            quiet.set()
            talking.join(10)


# --- one by one -----------------------------------------------------------------------------------


def end(
    verdict: Verdict, action: Action = Action.ACK, *, id: str = "1", **fields: Any
) -> list[tuple[str, dict[str, Any]]]:
    message = Message(queue="q", headers={"id": id, "task": "t"} if id else {})
    settlement = Settlement(delivery=Delivery(message=message, queue="q", token=None), action=action)
    outcome = Outcome(verdict=verdict, task_id="1", task="t", **fields)
    return [(event.type, dict(event.fields)) for event in events.ended(settlement, outcome)]


@pytest.mark.parametrize("verdict", [Verdict.RETURNED, Verdict.CANCELLED, Verdict.LOST, Verdict.UNKNOWN_TASK])
def test_what_goes_back_to_its_queue_has_not_ended(verdict: Verdict) -> None:
    assert end(verdict, Action.REQUEUE) == []


@pytest.mark.parametrize("verdict", list(Verdict))
def test_every_end_is_told_or_left_out_on_purpose(verdict: Verdict) -> None:
    told = {kind for kind, _ in end(verdict)}
    assert bool(told) != (verdict in (Verdict.IGNORED, Verdict.RETURNED, Verdict.FORWARDED))


def test_a_revoked_task_says_whether_it_ran() -> None:
    assert end(Verdict.REVOKED, detail="terminated") == [
        ("task-revoked", {"uuid": "1", "terminated": True, "signum": None, "expired": False})
    ]
    assert end(Verdict.REVOKED, detail="revoked")[0][1]["terminated"] is False


def test_a_lost_task_that_is_not_tried_again_has_failed() -> None:
    assert end(Verdict.LOST, Action.DEAD, detail="signal 9") == [
        ("task-failed", {"uuid": "1", "exception": "signal 9"})
    ]


def test_the_result_is_told_as_python_writes_it_and_is_bounded() -> None:
    def result(text: str, content_type: str = "application/json") -> str:
        record = Result(task_id="1", state="SUCCESS", document=text.encode(), content_type=content_type)
        message = Message(queue="q", headers={"id": "1"})
        settlement = Settlement(delivery=Delivery(message=message, queue="q", token=None), action=Action.ACK)
        outcome = Outcome(verdict=Verdict.SUCCESS, task_id="1", results=(record,))
        (event,) = events.ended(settlement, outcome)
        assert "result" not in event.fields, "decoded on the worker's loop"
        return str(events.on_wire(event, hostname="h", clock=1)["result"])

    assert result('{"result": {"a": "ü"}}') == "{'a': 'ü'}"
    assert len(result('{"result": "' + "x" * 9000 + '"}')) == 1024
    assert result('{"result": "' + "x" * 900_000 + '"}') == "<900014 bytes>"
    assert result("\x80", "application/x-python-serialize") == ""


def test_a_task_whose_name_only_the_body_knew_is_introduced_first() -> None:
    first, second = end(Verdict.SUCCESS, id="")
    assert (first[0], first[1]["uuid"], first[1]["name"]) == ("task-received", "1", "t")
    assert second[0] == "task-succeeded"
