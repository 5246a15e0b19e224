from __future__ import annotations

import asyncio
import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from umbel.errors import ResultRefused, ResultStoreUnavailable
from umbel.model import Result
from umbel.ports.clock import VirtualClock
from umbel.ports.result_store import JoinState
from umbel_sqlite import records
from umbel_sqlite.records import Records
from umbel_sqlite.result_store import SqliteResultStore


def result(task_id: str = "1", state: str = "SUCCESS", document: bytes = b"d", **fields: Any) -> Result:
    return Result(task_id=task_id, state=state, document=document, **fields)


def rows(file: Path, table: str) -> int:
    with closing(sqlite3.connect(file)) as connection:
        return int(connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0])


def test_capabilities() -> None:
    c = SqliteResultStore("sqlite:///x.sqlite3").capabilities
    assert c.durable
    assert c.push
    assert c.expires
    assert c.join
    assert c.claim
    assert c.query


def test_results_come_back_as_they_were_and_outlive_their_writer(store: Any) -> None:
    async def main() -> None:
        stored = [
            result("a"),
            result("", "PROGRESS", bytes(range(256)) * 4000, content_type="application/x-msgpack"),
            result("é🐝", "FAILURE", b"", content_encoding="binary"),
        ]
        async with store() as s:
            await s.put([])
            await s.put(stored)
        async with store() as s:
            assert await s.get(["a", "", "é🐝", "none"]) == {r.task_id: r for r in stored}
            assert await s.get([]) == {}
            await s.forget(["a", "none"])
            assert set(await s.get(["a", "é🐝"])) == {"é🐝"}

    asyncio.run(main())


@pytest.mark.parametrize("final", ["SUCCESS", "FAILURE", "REVOKED"])
def test_a_final_state_never_changes(store: Any, final: str) -> None:
    async def main() -> None:
        async with store() as s:
            await s.put([result(state="STARTED", document=b"1"), result(state="RETRY", document=b"2")])
            assert (await s.get(["1"]))["1"].document == b"2"
            await s.put([result(state=final, document=b"3")])
            for later in ("STARTED", "SUCCESS", "FAILURE"):
                await s.put([result(state=later, document=b"4")])
            assert (await s.get(["1"]))["1"] == result(state=final, document=b"3")
            await asyncio.gather(s.put([result("2", final, b"5")]), s.put([result("2", "STARTED", b"6")]))
            assert (await s.get(["2"]))["2"].document == b"5"

    asyncio.run(main())


def test_more_results_than_one_statement_takes(store: Any) -> None:
    async def main() -> None:
        async with store() as s:
            many = [result(str(i), document=str(i).encode()) for i in range(1234)]
            await s.put(many)
            assert await s.get([r.task_id for r in many]) == {r.task_id: r for r in many}

    asyncio.run(main())


def test_expired_records_are_gone_at_once_and_swept_later(
    store: Any, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Records, "sweep_interval", 0.0)
    monkeypatch.setattr(records, "_SWEPT_AT_ONCE", 2)

    async def main() -> None:
        clock = VirtualClock()
        async with store(clock) as s:
            await s.put([result(str(i), expires=10) for i in range(5)])
            await s.claim("lock", "me", lease=10)
            await s.join("group", {"a": b""}, size=2, owner="o", lease=1, expires=10)
            clock.advance(4)
            assert (await s.get(["1"]))["1"].expires == 10
            clock.advance(6)
            assert await s.get(["0", "1"]) == {}
            assert await s.query() == []
            assert await s.members("group") == {}
            assert await s.claims() == []
            assert rows(file, "umbel_results") == 5
            await s.put([result("1", "STARTED")])  # an expired final record is no record
            assert (await s.get(["1"]))["1"].state == "STARTED"
            assert rows(file, "umbel_results") == 3
            await s.put([result("new")])
            assert [rows(file, f"umbel_{name}") for name in ("results", "claims", "joins", "marks")] == [2, 0, 0, 0]

    asyncio.run(main())


def test_a_sweep_that_leaves_nothing_over_is_followed_by_a_rest(store: Any, file: Path) -> None:
    async def main() -> None:
        clock = VirtualClock()
        async with store(clock) as s:
            await s.put([result("1", expires=1)])
            clock.advance(2)
            await s.put([result("2")])
            assert rows(file, "umbel_results") == 2

    asyncio.run(main())


def test_two_thousand_waiters_share_one_reader(store: Any) -> None:
    async def main() -> None:
        async with store(poll_interval=60) as s, store() as writer:
            ids = [str(i) for i in range(2000)]
            await writer.put([result(id_) for id_ in ids[:500]])
            waiting = [asyncio.create_task(s.wait(id_)) for id_ in ids]
            await asyncio.gather(*waiting[:500])
            queries: list[str] = []
            s._db._connection.sqlite.set_trace_callback(queries.append)
            for start in range(500, 2000, 100):
                await writer.put([result(id_, "STARTED") for id_ in ids[start : start + 100]])
                await writer.put([result(id_) for id_ in ids[start : start + 100]])
            got = await asyncio.wait_for(asyncio.gather(*waiting), 20)
            assert [(r.task_id, r.state) for r in got] == [(id_, "SUCCESS") for id_ in ids]
            assert len(queries) < 15 * 2 * 10
            assert s._waiters == {}

    asyncio.run(main())


def test_a_result_stored_just_before_after_or_during_the_wait_is_seen(store: Any) -> None:
    async def main() -> None:
        async with store(poll_interval=60) as s, store() as writer:
            for i in range(150):
                waiting = asyncio.create_task(s.wait(str(i)))
                for _ in range(i % 7):
                    await asyncio.sleep(0)
                await writer.put([result(str(i))])
                assert (await asyncio.wait_for(waiting, 5)).task_id == str(i)
            twice = await asyncio.wait_for(asyncio.gather(s.wait("0"), s.wait("0")), 5)
            assert len(twice) == 2

    asyncio.run(main())


def test_news_beyond_one_look_are_read_on(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "_NEWS_AT_ONCE", 3)

    async def main() -> None:
        async with store(poll_interval=60) as s:
            waiting = asyncio.create_task(s.wait("last"))
            await asyncio.sleep(0.05)
            await s.put([*(result(str(i)) for i in range(10)), result("last")])
            await asyncio.wait_for(waiting, 5)

    asyncio.run(main())


def test_a_record_made_after_the_newest_was_forgotten_is_news(store: Any) -> None:
    async def main() -> None:
        async with store(poll_interval=60) as s:
            await s.put([result("1")])
            waiting = asyncio.create_task(s.wait("2"))
            await asyncio.sleep(0.05)
            await s.forget(["1"])
            await s.put([result("2")])
            await asyncio.wait_for(waiting, 5)

    asyncio.run(main())


def test_waiting_goes_on_after_a_fault(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        from umbel_sqlite.options import Options

        s = SqliteResultStore(f"sqlite:///{tmp_path}/later/r.sqlite3", options=Options(poll_interval=0.02))
        waiting = asyncio.create_task(s.wait("1"))
        await asyncio.sleep(0.05)
        (tmp_path / "later").mkdir()
        await s.put([result("1")])
        assert await asyncio.wait_for(waiting, 5) == result("1")
        await s.close()

    asyncio.run(main())
    assert "waiting for results continues" in caplog.text


def test_a_cancelled_wait_leaves_nothing_and_close_cancels_the_rest(store: Any) -> None:
    async def main() -> None:
        async with store() as s:
            one, other = asyncio.create_task(s.wait("1")), asyncio.create_task(s.wait("1"))
            await asyncio.sleep(0.05)
            one.cancel()
            await asyncio.wait([one])
            assert list(s._waiters) == ["1"]
            await s.close()
            await s.close()
            with pytest.raises(asyncio.CancelledError):
                await other
            assert s._waiters == {}
            for call in (s.put([result()]), s.get(["1"]), s.wait("1"), s.claims()):
                with pytest.raises(ResultStoreUnavailable, match="closed"):
                    await call

    asyncio.run(main())


def test_query_finds_by_state_newest_first(store: Any) -> None:
    async def main() -> None:
        async with store() as s:
            for id_, state in [
                ("a", "SUCCESS"),
                ("b", "FAILURE"),
                ("c", "STARTED"),
                ("d", "SUCCESS"),
                ("c", "SUCCESS"),
            ]:
                await s.put([result(id_, state)])
            assert [r.task_id for r in await s.query()] == ["c", "d", "b", "a"]
            assert [r.task_id for r in await s.query(state="SUCCESS", limit=2, offset=1)] == ["d", "a"]
            assert await s.query(state="STARTED") == []

    asyncio.run(main())


# --- joins -----------------------------------------------------------------------------------------------------------


def test_a_join_counts_each_member_once_and_fires_once(store: Any) -> None:
    async def main() -> None:
        async with store() as s:

            async def mark(marks: dict[str, bytes], size: int | None = None, owner: str = "o") -> JoinState:
                state: JoinState = await s.join("k", marks, size=size, owner=owner, lease=60)
                return state

            assert await mark({"a": b"1"}) == JoinState(count=1, size=None, fires=False)
            assert await mark({"a": b"2", "b": b"3"}, size=3) == JoinState(count=2, size=3, fires=False)
            assert await mark({"c": b"4"}, owner="me") == JoinState(count=3, size=3, fires=True)
            assert await mark({"c": b"5"}) == JoinState(count=3, size=3, fires=False)
            assert (await mark({"c": b"5"}, owner="me")).fires  # its first answer may have been lost
            assert await s.members("k") == {"a": b"1", "b": b"3", "c": b"4"}
            assert await s.members("other") == {}
            assert not await s.fired("k", "o")
            assert await s.fired("k", "me")
            assert not (await mark({"d": b""}, owner="me")).fires
            assert await s.unfired() == []
            assert (await s.join("empty", {}, size=0, owner="o", lease=1)).fires

    asyncio.run(main())


def test_the_right_to_fire_passes_on_when_its_lease_ends(store: Any) -> None:
    async def main() -> None:
        clock = VirtualClock()
        async with store(clock) as s:
            assert (await s.join("k", {"a": b""}, size=1, owner="first", lease=10)).fires
            assert await s.unfired() == []
            clock.advance(10)
            assert await s.unfired() == ["k"]
            assert (await s.join("k", {}, size=None, owner="second", lease=10)).fires
            assert not await s.fired("k", "first")
            assert await s.unfired() == []
            assert await s.fired("k", "second")
            clock.advance(100)
            assert await s.unfired() == []
            assert not (await s.join("k", {}, size=None, owner="third", lease=10)).fires

    asyncio.run(main())


def test_a_join_that_no_mark_reaches_in_time_is_forgotten(store: Any) -> None:
    async def main() -> None:
        clock = VirtualClock()
        async with store(clock) as s:
            for member, expires in [("a", 10), ("b", None)]:
                await s.join("k", {member: b""}, size=9, owner="o", lease=1, expires=expires)
                clock.advance(9)
            assert set(await s.members("k")) == {"a", "b"}
            await s.join("k", {}, size=None, owner="o", lease=1)  # no mark
            clock.advance(2)
            state = await s.join("k", {"c": b""}, size=None, owner="o", lease=1)
            assert state == JoinState(count=1, size=None, fires=False)

    asyncio.run(main())


def test_a_join_fires_in_one_of_many_processes(process: Any, store: Any) -> None:
    body = """
        s = SqliteResultStore(url)
        fires = 0
        for i in range(40):
            state = await s.join("k", {str(i): b""}, size=40, owner=str(os.getpid()), lease=60)
            fires += state.fires
        say(fires)
        await s.close()
    """
    children = [process(body) for _ in range(4)]
    assert sum(json.loads(child.stdout.read()) for child in children) == 1

    async def main() -> None:
        async with store() as s:
            assert len(await s.members("k")) == 40

    asyncio.run(main())


# --- claims ----------------------------------------------------------------------------------------------------------


def test_a_claim_is_one_owners_until_released_or_run_out_and_its_fence_grows(store: Any) -> None:
    async def main() -> None:
        clock = VirtualClock()
        async with store(clock) as s:
            first = await s.claim("n", "a", lease=10, value=b"v")
            assert (first.owner, first.until, first.value) == ("a", clock.time() + 10, b"v")
            assert await s.claim("n", "b", lease=10) == first
            clock.advance(5)
            renewed = await s.claim("n", "a", lease=10, value=b"w")
            assert (renewed.fence, renewed.until, renewed.value) == (first.fence, clock.time() + 10, b"w")
            assert await s.claims() == [renewed]
            assert await s.claim("n", "a", lease=10) == renewed, "a renewal without a value keeps it"
            assert (await s.claim("n", "a", lease=10, value=b"")).value == b""
            assert not await s.release("n", "b")
            clock.advance(11)
            assert await s.claims() == []
            assert not await s.release("n", "a")
            second = await s.claim("n", "b", lease=10)
            assert (second.owner, second.value) == ("b", b"")
            assert second.fence > first.fence
            assert await s.release("n", "b")
            third = await s.claim("n", "a", lease=10)
            assert third.fence > second.fence
            clock.advance(11)
            assert (await s.claim("n", "a", lease=10)).fence > third.fence

    asyncio.run(main())


def test_claims_lists_by_prefix(store: Any) -> None:
    async def main() -> None:
        async with store() as s:
            for name in ("unique:1", "unique:2", "uniqué", "lock:1", "_%"):
                await s.claim(name, "o", lease=60)
            assert [lease.name for lease in await s.claims("unique:")] == ["unique:1", "unique:2"]
            assert [lease.name for lease in await s.claims("_%")] == ["_%"]
            assert len(await s.claims()) == 5

    asyncio.run(main())


def test_one_of_many_processes_gets_a_claim(process: Any) -> None:
    body = """
        s = SqliteResultStore(url)
        me = str(os.getpid())
        say((await s.claim("n", me, lease=60)).owner == me)
        await s.close()
    """
    children = [process(body) for _ in range(4)]
    assert sum(json.loads(child.stdout.read()) for child in children) == 1


def test_entries_of_one_call_are_as_if_put_one_after_the_other(store: Any) -> None:
    def result(task_id: str, state: str, document: bytes = b"") -> Result:
        return Result(task_id=task_id, state=state, document=document)

    async def main() -> None:
        async with store() as s:
            first, second = result("a", "SUCCESS", b"1"), result("a", "SUCCESS", b"2")
            calls = [[result("a", "STARTED"), first, second, result("a", "STARTED")], [second]]
            await asyncio.gather(*(s.put(call) for call in calls))
            await s.put([result("b", "STARTED"), result("b", "RETRY")])
            got = await s.get(["a", "b"])
            assert (got["a"].document, got["b"].state) == (b"1", "RETRY")

    asyncio.run(main())


def test_a_record_that_no_file_could_hold_is_refused_and_harms_no_other(store: Any) -> None:
    odd = Result(task_id="\ud800", state="SUCCESS", document=b"")
    good = [Result(task_id=f"{n}", state="SUCCESS", document=b"") for n in range(3)]

    async def main() -> None:
        async with store() as s:
            ends = await asyncio.gather(
                s.put([good[0]]), s.put([good[1], odd]), s.put([good[2]]), return_exceptions=True
            )
            assert [type(end) for end in ends] == [type(None), ResultRefused, type(None)]
            assert (await s.get(["0", "1", "2"])).keys() == {"0", "2"}

    asyncio.run(main())
