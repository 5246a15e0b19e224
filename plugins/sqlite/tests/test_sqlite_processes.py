"""Several processes on one file: competition, sudden death, forks, wake-ups."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import signal
import sqlite3
import sys
import time
import traceback
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from umbel.errors import BrokerUnavailable
from umbel.model import Action, Message, Result, Settlement
from umbel.ports.transport import Credit, QueueDepth
from umbel_sqlite.bells import MESSAGES, Bell, Ringer
from umbel_sqlite.result_store import SqliteResultStore
from umbel_sqlite.transport import SqliteTransport

CONSUME = """
    t = SqliteTransport(url)
    credit = Credit(7)
    stream = t.consume(["q"], credit=credit, lease=30)
    async for batch in stream:
        say([[d.message.id, d.count] for d in batch])
        if not await asyncio.to_thread(sys.stdin.readline): break
        settled = await t.settle([Settlement(delivery=d, action=Action.ACK) for d in batch])
        assert all(settled)
        credit.give(len(batch))
    await stream.aclose()
    await t.close()
"""


def lines(child: Any) -> list[Any]:
    return [json.loads(line) for line in child.stdout]


def healthy(file: Path) -> bool:
    with closing(sqlite3.connect(file)) as connection:
        return connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def test_competing_processes_never_share_a_message(process: Any, transport: Any, file: Path) -> None:
    consume = """
        t = SqliteTransport(url)
        credit = Credit(5)
        async for batch in t.consume(["q"], credit=credit, lease=60):
            say([d.message.id for d in batch])
            await t.settle([Settlement(delivery=d, action=Action.ACK) for d in batch])
            credit.give(len(batch))
    """

    async def main() -> None:
        async with transport() as t:
            children = [process(consume) for _ in range(3)]
            for start in range(0, 600, 20):
                await t.publish(
                    [Message(queue="q", headers={"id": str(i)}) for i in range(start, start + 20)], timeout=30
                )
            while await t.depth(["q"]) != {"q": QueueDepth()}:  # noqa: ASYNC110  # the event is in other processes
                await asyncio.sleep(0.05)
            for child in children:
                child.kill()
            handed = Counter(id_ for child in children for ids in lines(child) for id_ in ids)
            assert handed == Counter(str(i) for i in range(600))

    asyncio.run(main())
    assert healthy(file)


def test_a_killed_consumer_loses_nothing(process: Any, transport: Any, take: Any, file: Path) -> None:
    async def main() -> None:
        async with transport() as t:
            await t.publish([Message(queue="q", headers={"id": str(i)}) for i in range(5)], timeout=5)
            child = process(CONSUME.replace("lease=30", "lease=2"))
            taken = json.loads(await asyncio.to_thread(child.stdout.readline))
            assert taken == [[str(i), 1] for i in range(5)]
            child.kill()
            child.wait(30)
            assert (await t.depth(["q"]))["q"].leased == 5
            credit = Credit(9)
            async for batch in t.consume(["q"], credit=credit, lease=30):
                assert [(d.message.id, d.count) for d in batch] == [(str(i), 2) for i in range(5)]
                break

    asyncio.run(main())
    assert healthy(file)


def test_a_killed_publisher_has_lost_nothing_that_was_confirmed(process: Any, transport: Any, file: Path) -> None:
    publish = """
        t = SqliteTransport(url)
        number = 0
        async def send():
            nonlocal number
            while True:
                number += 1
                id_ = str(number)
                await t.publish([Message(queue="q", headers={"id": id_}, body=b"x" * 5000)], timeout=30)
                say(id_)
        await asyncio.gather(*(send() for _ in range(8)))
    """

    async def main() -> None:
        for _ in range(2):
            child = process(publish)
            first = json.loads(child.stdout.readline())
            await asyncio.sleep(0.2)
            child.kill()
            whole = [line for line in child.stdout.read().splitlines() if line.endswith('"')]  # the last may be cut off
            confirmed = [first, *map(json.loads, whole)]
            async with transport() as t:
                kept = {m.id for m in await t.peek("q", limit=1_000_000)}
                assert set(confirmed) <= kept
                assert len(confirmed) > 8
                await t.purge("q")
            assert healthy(file)

    asyncio.run(main())


def test_a_message_from_another_process_wakes_a_consumer_before_its_poll(process: Any, transport: Any) -> None:
    async def main() -> None:
        async with transport(poll_interval=60) as t:
            stream = t.consume(["q"], credit=Credit(1), lease=30)
            waiting = asyncio.create_task(anext(stream))
            await asyncio.sleep(0.05)
            process("t = SqliteTransport(url); await t.publish([Message(queue='q')], timeout=5); await t.close()")
            assert len(await asyncio.wait_for(waiting, 20)) == 1

    asyncio.run(main())


def test_without_hints_the_poll_finds_everything(
    transport: Any, store: Any, message: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Ringer, "ring", lambda self, kinds: None)

    async def main() -> None:
        async with transport(poll_interval=0.02) as t, store(poll_interval=0.02) as s:
            delivered = asyncio.create_task(anext(t.consume(["q"], credit=Credit(1), lease=30)))
            heard = asyncio.create_task(anext(t.subscribe("topic")))
            result = asyncio.create_task(s.wait("1"))
            await asyncio.sleep(0.05)
            await t.publish([message()], timeout=5)
            await t.broadcast("topic", b"x")
            await s.put([Result(task_id="1", state="SUCCESS", document=b"")])
            for waiting in (delivered, heard, result):
                assert await asyncio.wait_for(waiting, 3)

    asyncio.run(main())


def test_sockets_of_the_dead_are_swept_and_others_stay(tmp_path: Path) -> None:
    file = str(tmp_path / "q.sqlite3")

    async def main() -> None:
        living, dead, other = Bell(file, MESSAGES), Bell(file, MESSAGES), Bell(file, "results")
        for bell in (living, dead, other):
            bell.open()
            bell.open()
        assert dead._socket is not None
        dead._socket.close()
        ringer = Ringer(file)
        for _ in range(50):  # more than a socket's buffer holds
            ringer.ring({MESSAGES})
        ringer.close()
        await asyncio.wait_for(living.wait(0, 60), 3)
        assert living.count == 1
        assert other.count == 0
        assert len(os.listdir(file + "-listeners")) == 2
        dead._socket = None
        for bell in (living, dead, other):
            bell.close()
            bell.close()
        await living.wait(living.count, 60)
        assert os.listdir(file + "-listeners") == []

    asyncio.run(main())


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere such a path is polled")
def test_a_path_too_long_for_a_socket_is_no_hindrance(tmp_path: Path, message: Any) -> None:
    folder = tmp_path / ("d" * 100) / ("e" * 100)
    folder.mkdir(parents=True)

    async def main() -> None:
        from umbel_sqlite.options import TransportOptions

        t = SqliteTransport(f"sqlite:///{folder}/q.sqlite3", options=TransportOptions(poll_interval=60))
        waiting = asyncio.create_task(anext(t.consume(["q"], credit=Credit(1), lease=30)))
        await asyncio.sleep(0.05)
        await t.publish([message()], timeout=5)
        assert len(await asyncio.wait_for(waiting, 3)) == 1
        await t.close()

    asyncio.run(main())


def test_no_socket_means_polling_with_a_warning(
    transport: Any, message: Any, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Path(f"{file}-listeners").write_text("in the way")

    async def main() -> None:
        async with transport(poll_interval=0.02) as t:
            waiting = asyncio.create_task(anext(t.consume(["q"], credit=Credit(1), lease=30)))
            await asyncio.sleep(0.05)
            await t.publish([message()], timeout=5)
            assert len(await asyncio.wait_for(waiting, 3)) == 1

    asyncio.run(main())
    assert "polling only" in caplog.text
    assert "cannot wake the listeners" in caplog.text


def holds_lock(file: Path) -> bool:
    """Whether the kernel knows of a lock that this very process holds on the file."""
    locks = Path("/proc/locks").read_text().splitlines()
    inode = file.stat().st_ino
    return any(f" {os.getpid()} " in lock and f":{inode} " in lock for lock in locks)


def _in_child(work: Any) -> None:
    """Run ``work()`` in a forked child; what it raises fails the test."""
    child = os.fork()
    if child == 0:
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(30)  # a child that waits for ever would keep its parent waiting
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.skipif(not os.path.exists("/proc/locks"), reason="reads the kernel's list of locks")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_fork_leaves_both_sides_with_locks_of_their_own(file: Path, message: Any) -> None:
    url = f"sqlite:///{file}"

    def child(inherited: SqliteTransport) -> None:
        async def main() -> None:
            with pytest.raises(BrokerUnavailable, match="fork"):
                await inherited.publish([message("never")], timeout=5)
            with pytest.raises(BrokerUnavailable, match="fork"):
                inherited.publish_blocking([message("never")], timeout=5)
            await inherited.close()
            own = SqliteTransport(url)
            await own.publish([message("child")], timeout=5)
            assert holds_lock(file)
            await own.close()

        asyncio.run(main())

    async def main() -> None:
        t, s = SqliteTransport(url), SqliteResultStore(url)
        await t.publish([message("before")], timeout=5)
        await s.put([Result(task_id="1", state="SUCCESS", document=b"d")])
        publishing = [asyncio.create_task(t.publish([message(f"p{i}")], timeout=5)) for i in range(50)]
        await asyncio.sleep(0)
        await asyncio.to_thread(_in_child, lambda: child(t))
        await asyncio.gather(*publishing)
        await t.publish([message("after")], timeout=5)
        assert {m.id for m in await t.peek("q")} == {"before", "child", "after", *(f"p{i}" for i in range(50))}
        assert (await s.get(["1"]))["1"].document == b"d"
        await s.close()
        await t.close()

    asyncio.run(main())
    assert healthy(file)


def test_a_file_replaced_underneath_is_noticed(transport: Any, message: Any, file: Path) -> None:
    async def main() -> None:
        async with transport() as t:
            await t.publish([message("old")], timeout=5)
            for name in (file, f"{file}-wal", f"{file}-shm"):
                os.unlink(name)
            await t.publish([message("new")], timeout=5)
            async with transport() as other:
                assert [m.id for m in await other.peek("q")] == ["new"]

    asyncio.run(main())
    assert healthy(file)


@pytest.mark.parametrize("number", [6])
def test_processes_that_start_at_once_on_no_file_all_succeed(process: Any, file: Path, number: int) -> None:
    go = time.time() + 0.7
    body = f"""
        t, s = SqliteTransport(url), SqliteResultStore(url)
        time.sleep(max(0, {go} - time.time()))
        await asyncio.gather(
            t.publish([Message(queue="q")], timeout=20), s.put([Result(task_id=str(os.getpid()), state="S", document=b"")])
        )
        await t.close(); await s.close()
        say("done")
    """
    children = [process(body) for _ in range(number)]
    assert [lines(child) for child in children] == [["done"]] * number
    with closing(sqlite3.connect(file)) as connection:
        assert connection.execute("SELECT count(*) FROM umbel_messages").fetchone() == (number,)
        assert connection.execute("SELECT count(*) FROM umbel_results").fetchone() == (number,)


def test_settlements_of_a_process_that_was_stopped_too_long_are_refused(
    process: Any, transport: Any, take: Any
) -> None:
    consume = """
        t = SqliteTransport(url)
        async for batch in t.consume(["q"], credit=Credit(1), lease=0.3):
            say("taken")
            sys.stdin.readline()
            say(list(await t.settle([Settlement(delivery=batch[0], action=action) for action in Action])))
            break
        await t.close()
    """

    async def main() -> None:
        async with transport() as t:
            await t.publish([Message(queue="q", headers={"id": "1"})], timeout=5)
            child = process(consume)
            assert await asyncio.to_thread(child.stdout.readline) == '"taken"\n'
            async for [delivery] in t.consume(["q"], credit=Credit(1), lease=30):
                assert delivery.count == 2
                break
            child.stdin.write("\n")
            child.stdin.flush()
            assert await asyncio.to_thread(lines, child) == [[False, False, False]]
            assert await t.settle([Settlement(delivery=delivery, action=Action.ACK)]) == [True]

    asyncio.run(main())


def test_multiprocessing_by_fork_works_beside_a_transport(transport: Any, message: Any) -> None:
    async def main() -> None:
        async with transport() as t:
            await t.publish([message("1")], timeout=5)
            child = multiprocessing.get_context("fork").Process(target=os.getpid)
            child.start()
            await asyncio.to_thread(child.join, 30)
            assert child.exitcode == 0
            assert len(await t.peek("q")) == 1

    asyncio.run(main())
