"""What users do with tasks, on every pool, on the embedded broker and on the one in memory."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from cluster import Cluster, InProcess, Site, until
from shop import define

from umbel import Umbel
from umbel.errors import EncodeError, ResultTimeout, TaskFailed, TaskRevoked
from umbel.model import HEADER_DEAD_CAUSE

SITES = ["prefork on sqlite", "threads on sqlite", "solo on sqlite", "threads on memory"]


@pytest.fixture(scope="module", params=SITES)
def site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Workers with four slots, or two of one slot; they serve every test of this file."""
    pool, _, broker = request.param.partition(" on ")
    folder = tmp_path_factory.mktemp(f"{pool}-{broker}")
    if broker == "memory":
        settings = {"worker.pool": pool, "worker.concurrency": 4, "worker.grace": 5}
        app = Umbel("shop", broker=f"memory://{folder.name}", results=f"memory://{folder.name}", settings=settings)
        inside = InProcess(folder, define(app)).start()
        yield inside
        inside.close()
        return
    cluster = Cluster(folder).configure(worker__pool=pool, worker__concurrency=1 if pool == "solo" else 4)
    try:
        for _ in range(2 if pool == "solo" else 1):
            cluster.worker(wait=False)
        for worker in cluster.workers:
            worker.wait_ready()
        yield cluster
        assert [worker.end() for worker in cluster.workers] == [0] * len(cluster.workers)
    finally:
        cluster.close()


# --- values and errors --------------------------------------------------------------------------


def test_a_result_comes_back(site: Site) -> None:
    result = site.send("add", 2, 3)
    assert result.get(timeout=30) == 5
    assert result.state == "SUCCESS"
    assert result.get(timeout=0.5) == 5
    result.forget()
    assert result.state == "PENDING"


@pytest.mark.parametrize(
    "value",
    [
        None,
        {"nested": [1, 2.5, {"deep": ["é", "\N{BLOSSOM}"]}], "empty": {}},
        datetime(2026, 2, 3, 4, 5, 6, 789, tzinfo=UTC),
        date(2026, 2, 3),
        Decimal("1.10"),
        uuid.UUID(int=7),
        b"\x00\xff",
        "x" * 300_000,
    ],
    ids=lambda value: type(value).__name__,
)
def test_values_travel_as_they_are(site: Site, value: Any) -> None:
    assert site.send("note", value).get(timeout=30) == value


def test_annotated_arguments_arrive_as_annotated(site: Site) -> None:
    assert site.send("next_day", "2026-02-03T00:00:00").get(timeout=30) == datetime(2026, 2, 4)


def test_an_exception_comes_back_as_itself_with_the_workers_traceback(site: Site) -> None:
    result = site.send("fail", "no such order")
    with pytest.raises(ValueError, match="no such order") as raised:
        result.get(timeout=30)
    assert "in fail" in "".join(raised.value.__notes__)
    assert result.state == "FAILURE"
    assert "in fail" in (result.traceback or "")
    assert isinstance(result.get(timeout=30, propagate=False), ValueError)
    assert len(site.ledger.starts(result.id)) == 1


def test_an_exception_beside_the_usual_tree_is_a_failure_and_no_crash(site: Site) -> None:
    result = site.send("raise_unheard", "psst")
    with pytest.raises((TaskFailed, BaseException), match="psst"):
        result.get(timeout=30)
    assert len(site.ledger.starts(result.id)) == 1


def test_wrong_arguments_are_a_failure(site: Site) -> None:
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        site.send("add", 1).get(timeout=30)


def test_an_argument_that_cannot_be_serialised_is_refused_at_the_call_and_nothing_is_sent(site: Site) -> None:
    site.wait_empty()
    with pytest.raises(EncodeError, match=r"shop\.note.*object"):
        site.send("note", object())
    assert site.empty()


def test_a_result_that_does_not_come_is_a_timeout(site: Site) -> None:
    result = site.app.result("no-such-task")
    with pytest.raises(ResultTimeout, match=r"no-such-task.* 0\.2 s"):
        result.get(timeout=0.2)


def test_callers_headers_reach_the_task(site: Site) -> None:
    assert site.send("tell_headers", headers={"tenant": 7}).get(timeout=30)["tenant"] == 7


# --- retries ------------------------------------------------------------------------------------


def test_a_task_that_retries_keeps_its_id_and_counts(site: Site) -> None:
    result = site.send("flaky", 2)
    assert result.get(timeout=30) == 2
    assert [line["retries"] for line in site.ledger.starts(result.id)] == [0, 1, 2]
    assert {line["attempt"] for line in site.ledger.starts(result.id)} == {1}


def test_an_exception_that_retries_by_itself_fails_when_the_retries_are_spent(site: Site) -> None:
    result = site.send("unreachable")
    with pytest.raises(ConnectionError, match="nobody answers"):
        result.get(timeout=30)
    assert len(site.ledger.starts(result.id)) == 3


def test_the_state_retry_shows_while_a_retry_waits(site: Site) -> None:
    result = site.send("flaky", 1, 1.0)
    until(lambda: result.state == "RETRY", "the state RETRY")
    assert result.get(timeout=30) == 1


# --- when and whether ---------------------------------------------------------------------------


def test_a_countdown_is_never_early(site: Site) -> None:
    delays = [0.3, 0.6, 0.45]
    sent = [(time.time(), delay, site.send("note", delay, countdown=delay)) for delay in delays]
    for at, delay, result in sent:
        result.get(timeout=30)
        assert site.ledger.starts(result.id)[0]["at"] >= at + delay


def test_an_eta_is_never_early(site: Site) -> None:
    due = datetime.now(UTC) + timedelta(seconds=0.5)
    result = site.send("note", 1, eta=due)
    result.get(timeout=30)
    assert site.ledger.starts(result.id)[0]["at"] >= due.timestamp()


def test_what_has_expired_is_not_run(site: Site) -> None:
    results = [site.send("note", 1, expires=-1), site.send("note", 1, countdown=0.4, expires=0.1)]
    for result in results:
        with pytest.raises(TaskRevoked, match="expired"):
            result.get(timeout=30)
        assert result.state == "REVOKED"
        assert site.ledger.starts(result.id) == []


# --- states -------------------------------------------------------------------------------------


def test_an_ignored_result_is_not_stored(site: Site) -> None:
    results = [site.send("silent"), site.send("add", 1, 1, ignore_result=True)]
    for result in results:
        site.ledger.wait_start(result.id)
    site.wait_empty()
    for result in results:
        assert result.record() is None
        with pytest.raises(ResultTimeout):
            result.get(timeout=0.1)


def test_started_is_told_where_it_is_wanted(site: Site) -> None:
    gate = site.folder / "tracked"
    result = site.send("tracked", str(gate))
    until(lambda: result.state == "STARTED", "the state STARTED")
    assert result.info["pid"] == site.ledger.starts(result.id)[0]["pid"]
    gate.touch()
    assert result.get(timeout=30) == "done"
    gate.unlink()


def test_progress_is_seen_by_others_while_the_task_runs(site: Site) -> None:
    gate = site.folder / "progress"
    result = site.send("progress", str(gate))
    until(lambda: result.state == "PROGRESS", "the state PROGRESS")
    assert result.info == {"done": 3, "of": 10}
    assert not result.ready()
    gate.touch()
    assert result.get(timeout=30) == "all"
    gate.unlink()


def test_a_task_may_say_ignore_me(site: Site) -> None:
    result = site.send("ignore")
    site.ledger.wait_start(result.id)
    site.wait_empty()
    assert result.record() is None


def test_a_rejected_task_is_a_dead_letter(site: Site) -> None:
    result = site.send("reject", "not for me")
    with pytest.raises(Exception, match="not for me"):
        result.get(timeout=30)
    letter = until(lambda: next((m for m in site.dead() if m.id == result.id), None), "the dead letter")
    assert "rejected" in letter.headers[HEADER_DEAD_CAUSE]
    assert "not for me" in letter.headers[HEADER_DEAD_CAUSE]


def test_a_task_rejected_back_to_its_queue_runs_again(site: Site) -> None:
    gate = site.folder / "accept"
    result = site.send("requeue_until", str(gate))
    site.ledger.wait_start(result.id, number=2)
    gate.touch()
    assert result.get(timeout=30) == "now"
    assert result.id not in [letter.id for letter in site.dead()]
    gate.unlink()


# --- tasks and tasks ----------------------------------------------------------------------------


def test_tasks_send_tasks(site: Site) -> None:
    parent = site.send("send_notes", 5)
    children = parent.get(timeout=30)
    assert [site.app.result(child).get(timeout=30) for child in children] == list(range(5))
    record = parent.record()
    assert record is not None
    assert record["children"] == [[[child, None], None] for child in children]


def test_a_task_waits_for_the_task_it_sent(site: Site) -> None:
    assert site.send("ask_for_sum", 20, 22).get(timeout=30) == 42


def test_async_tasks_run_send_and_await(site: Site) -> None:
    assert site.send("async_sum", 1, 2).get(timeout=30) == 3
    assert site.send("async_sleep", 0.05, "slept").get(timeout=30) == "slept"


def test_callbacks_get_the_result(site: Site) -> None:
    app = site.app
    link_ids = [str(uuid.uuid4()) for _ in range(2)]
    links = [
        app.signature("shop.add", (10,)).set(task_id=link_ids[0]),
        app.signature("shop.add", (20,)).set(task_id=link_ids[1]).to_plain(),
    ]
    result = site.send("add", 1, 2, link=links)
    assert result.get(timeout=30) == 3
    assert [app.result(id).get(timeout=30) for id in link_ids] == [13, 23]


def test_errbacks_get_the_failed_tasks_id_and_callbacks_are_not_called(site: Site) -> None:
    never = str(uuid.uuid4())
    errback = site.app.signature("shop.errback")
    link = site.app.signature("shop.add", (1,)).set(task_id=never)
    result = site.send("fail", "oh", link=link, link_error=errback)
    with pytest.raises(ValueError, match="oh"):
        result.get(timeout=30)
    until(lambda: [line for line in site.ledger.lines("errback") if line["value"] == result.id], "the errback")
    assert site.ledger.starts(never) == []


def test_a_chain_hands_its_results_on(site: Site) -> None:
    """The wire has a chain in reverse: what comes next is last."""
    ids = [str(uuid.uuid4()) for _ in range(3)]
    steps = [
        site.app.signature("shop.add", (n,)).set(task_id=id).to_plain()
        for n, id in zip((10, 100, 1000), ids, strict=True)
    ]
    result = site.send("add", 1, 1, chain=list(reversed(steps)))
    assert result.get(timeout=30) == 2
    assert [site.app.result(id).get(timeout=30) for id in ids] == [12, 112, 1112]


def test_a_chain_ends_with_its_first_failure_and_waiting_for_its_end_says_so(site: Site) -> None:
    ids = [str(uuid.uuid4()) for _ in range(2)]
    chain = [
        site.app.signature("shop.add", (1,)).set(task_id=ids[1]).to_plain(),
        site.app.signature("shop.fail", ("half way",)).set(task_id=ids[0]).to_plain() | {"immutable": True},
    ]
    result = site.send("add", 1, 1, chain=chain)
    assert result.get(timeout=30) == 2
    for id in ids:
        with pytest.raises(ValueError, match="half way"):
            site.app.result(id).get(timeout=30)
    assert site.ledger.starts(ids[1]) == []


# --- limits that every pool keeps ---------------------------------------------------------------


def test_a_soft_limit_interrupts(site: Site) -> None:
    began = time.monotonic()
    assert site.send("soft", 20).get(timeout=30) == "interrupted"
    assert site.send("unlimited", 20, soft_time_limit=0.2).get(timeout=30) == "interrupted"
    assert time.monotonic() - began < 15
    assert site.send("soft", 0.05).get(timeout=30) == "slept"


# --- many ---------------------------------------------------------------------------------------


def test_five_hundred_in_one_publish(site: Site) -> None:
    results = site.send_many("add", [(n, 1) for n in range(500)])
    assert [result.get(timeout=30) for result in results] == [n + 1 for n in range(500)]


def test_sending_and_waiting_inside_a_running_loop(site: Site) -> None:
    add = site.app.tasks["shop.add"]

    async def one(n: int) -> Any:
        return await (await add.adelay(n, n))

    async def main() -> tuple[list[Any], list[Any]]:
        together = await asyncio.gather(*map(one, range(50)))
        results = await add.amap_delay([(n, 1) for n in range(50)])
        return together, [await result.aget(timeout=10) for result in results]

    assert asyncio.run(main()) == ([2 * n for n in range(50)], [n + 1 for n in range(50)])


def test_a_sender_that_does_not_know_the_task_leaves_its_options_to_the_worker(site: Site) -> None:
    """Of a task sent by name alone, the worker's own ``ignore_result`` holds."""
    with Umbel("stranger") as stranger:
        if isinstance(site, InProcess):
            stranger.configure(command_line={"broker.url": site.url, "results.url": site.url})
        else:
            stranger.configure(file=site.folder / "umbel.toml")
        result = stranger.send_task("shop.silent")
        site.ledger.wait_start(result.id)
        site.wait_empty()
        assert result.record() is None
