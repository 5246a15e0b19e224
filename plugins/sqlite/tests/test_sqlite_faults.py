"""What goes wrong with a file, and the sentence that says so."""

from __future__ import annotations

import asyncio
import gc
import os
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
import time
import warnings
import weakref
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from umbel.errors import BrokerUnavailable, PublishRefused, ResultStoreUnavailable, SettingsError
from umbel.model import Message, Result
from umbel.ports.transport import Credit
from umbel_sqlite.options import Options, TransportOptions, file_of
from umbel_sqlite.result_store import SqliteResultStore
from umbel_sqlite.transport import SqliteTransport

RESULT = Result(task_id="1", state="SUCCESS", document=b"d")


def test_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert file_of("sqlite:///a/b.sqlite3") == str(tmp_path / "a" / "b.sqlite3")
    assert file_of("sqlite:////a/b.sqlite3?synchronous=full") == "/a/b.sqlite3"
    assert file_of("sqlite:////a/b%20c%3F.sqlite3") == "/a/b c?.sqlite3"
    for wrong in ("sqlite://", "sqlite:///", "sqlite:///dir/", "sqlite:///:memory:", "sqlite://host/file"):
        with pytest.raises(SettingsError, match="sqlite:///"):
            file_of(wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"synchronous": "never"},
        {"busy_timeout": 0},
        {"poll_interval": -1},
        {"max_file_size": 0},
        {"max_message_size": 0},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_options_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TransportOptions(**wrong)


@pytest.mark.parametrize(("value", "level"), [("off", 0), ("normal", 1), ("full", 2)])
def test_synchronous_is_set(transport: Any, message: Any, value: str, level: int) -> None:
    async def main() -> None:
        async with transport(synchronous=value) as t:
            await t.publish([message()], timeout=5)
            assert t._db._connection.sqlite.execute("PRAGMA synchronous").fetchone() == (level,)
            assert t._db._connection.sqlite.execute("PRAGMA journal_mode").fetchone() == ("wal",)

    asyncio.run(main())


async def _every_call_fails(url: str, match: str, publish_error: type[Exception]) -> None:
    t = SqliteTransport(url, options=TransportOptions(busy_timeout=0.2))
    s = SqliteResultStore(url, options=Options(busy_timeout=0.2))
    with pytest.raises(publish_error, match=match):
        await t.publish([Message(queue="q")], timeout=0.5)
    with pytest.raises(publish_error, match=match):
        t.publish_blocking([Message(queue="q")], timeout=0.5)
    with pytest.raises(BrokerUnavailable, match=match):
        await anext(t.consume(["q"], credit=Credit(1), lease=1))
    with pytest.raises(BrokerUnavailable, match=match):
        await t.depth()
    for call in (s.put([RESULT]), s.get(["1"]), s.claim("n", "o", lease=1), s.forget(["1"])):
        with pytest.raises(ResultStoreUnavailable, match=match):
            await call
    await t.close()
    await s.close()


def test_a_missing_directory_is_named_and_may_come_later(tmp_path: Path, message: Any) -> None:
    url = f"sqlite:///{tmp_path}/none/q.sqlite3"

    async def main() -> None:
        await _every_call_fails(url, "mkdir -p .*none", BrokerUnavailable)
        t = SqliteTransport(url)
        with pytest.raises(BrokerUnavailable):
            await t.publish([message()], timeout=5)
        (tmp_path / "none").mkdir()
        await t.publish([message()], timeout=5)
        await t.close()

    asyncio.run(main())


def test_what_cannot_be_opened_is_named(file: Path) -> None:
    file.mkdir()
    asyncio.run(_every_call_fails(f"sqlite:///{file}", "cannot be used: unable to open", BrokerUnavailable))


def test_a_connection_that_nobody_has_closed_goes_without_a_word(message: Any, file: Path) -> None:
    t = SqliteTransport(f"sqlite:///{file}")
    t.publish_blocking([message()], timeout=5)
    assert t._db._connection.sqlite is not None
    dropped = weakref.ref(t._db._connection)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        del t
        gc.collect()
    assert dropped() is None
    assert [str(warning.message) for warning in said if "sqlite3" in str(warning.message)] == []


def test_another_kind_of_file_is_refused_and_left_alone(file: Path) -> None:
    file.write_text("not a database\n" * 1000)
    asyncio.run(_every_call_fails(f"sqlite:///{file}", "not a SQLite database", PublishRefused))
    assert file.read_text() == "not a database\n" * 1000


def test_a_newer_schema_is_refused(transport: Any, store: Any, message: Any, file: Path) -> None:
    async def main() -> None:
        async with transport() as t, store() as s:
            await t.publish([message()], timeout=5)
            await s.put([RESULT])
        with closing(sqlite3.connect(file)) as connection, connection:
            connection.execute("UPDATE umbel_schema SET version = version + 1")
        await _every_call_fails(f"sqlite:///{file}", r"version \d+ .* knows \d+", PublishRefused)

    asyncio.run(main())


def test_a_file_that_is_not_writable_is_named() -> None:
    script = """
        import asyncio, os, sys
        from umbel.errors import BrokerUnavailable, PublishRefused, ResultStoreUnavailable
        from umbel.model import Message, Result
        from umbel_sqlite.result_store import SqliteResultStore
        from umbel_sqlite.transport import SqliteTransport
        async def main(url):
            if os.geteuid() == 0:  # root may write everywhere
                os.setresuid(65534, 65534, 65534)
            t, s = SqliteTransport(url), SqliteResultStore(url)
            for call, error in [
                (t.publish([Message(queue="q")], timeout=5), PublishRefused),
                (t.depth(), BrokerUnavailable),
                (s.put([Result(task_id="1", state="S", document=b"")]), ResultStoreUnavailable),
            ]:
                try:
                    await call
                except error as caught:
                    assert "not writable by user" in str(caught), caught
                else:
                    raise SystemExit("no error")
            await t.close()
            await s.close()
        asyncio.run(main(sys.argv[1]))
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "q.sqlite3")
        sqlite3.connect(file).close()
        file.touch()
        os.chmod(file, 0o444)
        os.chmod(folder, 0o555)
        try:
            subprocess.run([sys.executable, "-c", textwrap.dedent(script), f"sqlite:///{file}"], cwd="/", check=True)
        finally:
            os.chmod(folder, 0o755)


def test_a_full_disk_refuses_messages_and_still_lets_them_go(
    transport: Any, store: Any, take: Any, message: Any
) -> None:
    async def main() -> None:
        async with transport(max_file_size=400_000) as t, store(max_file_size=400_000) as s:
            sent = 0

            async def fill() -> None:
                nonlocal sent
                while sent < 1000:
                    await t.publish([message(str(sent), body=b"x" * 5000)], timeout=5)
                    sent += 1

            with pytest.raises(BrokerUnavailable, match="max_file_size"):
                await fill()
            with pytest.raises(ResultStoreUnavailable, match="max_file_size"):
                await s.put([Result(task_id="1", state="SUCCESS", document=b"x" * 500_000)])
            small, large = await asyncio.gather(
                t.publish([message("small", queue="small")], timeout=5),
                t.publish([message("large", body=b"x" * 500_000)], timeout=5),
                return_exceptions=True,
            )
            assert isinstance(large, BrokerUnavailable)
            assert small is None or isinstance(small, PublishRefused)
            assert sent > 10
            assert (await t.depth(["q"]))["q"].ready == sent
            assert await t.purge("q") == sent
            await t.publish([message("again")], timeout=5)

    asyncio.run(main())


def test_a_foreign_lock_is_waited_for_within_the_deadline(transport: Any, store: Any, message: Any, file: Path) -> None:
    async def main() -> None:
        async with transport(busy_timeout=0.2) as t, store(busy_timeout=0.2) as s:
            await t.publish([message("1")], timeout=5)
            await s.put([RESULT])
            foreign = sqlite3.connect(file, isolation_level=None)
            foreign.execute("BEGIN IMMEDIATE")
            started = time.monotonic()
            with pytest.raises(BrokerUnavailable, match="is locked by another process"):
                await t.publish([message("2")], timeout=0.3)
            assert 0.2 < time.monotonic() - started < 4
            with pytest.raises(BrokerUnavailable, match="is locked by another process"):
                t.publish_blocking([message("2")], timeout=0.1)
            with pytest.raises(BrokerUnavailable, match="locked"):
                await anext(t.consume(["q"], credit=Credit(1), lease=1))
            with pytest.raises(ResultStoreUnavailable, match="locked"):
                await s.put([RESULT])
            assert (await t.depth(["q"]))["q"].ready == 1  # readers are not kept out
            waiting = asyncio.create_task(t.publish([message("3")], timeout=20))
            await asyncio.sleep(0.1)
            foreign.execute("COMMIT")
            foreign.close()
            await waiting
            assert [m.id for m in await t.peek("q")] == ["1", "3"]

    asyncio.run(main())


def test_close_does_not_wait_for_a_foreign_lock(transport: Any, message: Any, file: Path) -> None:
    async def main() -> None:
        async with transport() as t:
            await t.publish([message("1")], timeout=5)
            foreign = sqlite3.connect(file, isolation_level=None)
            foreign.execute("BEGIN IMMEDIATE")
            waiting = asyncio.create_task(t.publish([message("2")], timeout=60))
            await asyncio.sleep(0.05)
            await asyncio.wait_for(t.close(), 5)
            with pytest.raises(BrokerUnavailable, match="locked"):
                await waiting
            foreign.close()

    asyncio.run(main())


def test_a_disk_that_hangs_does_not_hold_a_publisher_beyond_its_deadline(transport: Any, message: Any) -> None:
    async def main() -> None:
        async with transport() as t:
            await t.publish([message("1")], timeout=5)
            t._db._connection.gate.acquire()
            try:
                with pytest.raises(BrokerUnavailable, match="deadline"):
                    t.publish_blocking([message("blocking")], timeout=0.1)
                for id_ in ("begun", "in line"):
                    with pytest.raises(BrokerUnavailable, match="deadline"):
                        await t.publish([message(id_)], timeout=0.1)
            finally:
                t._db._connection.gate.release()
            await t.publish([message("2")], timeout=5)
            assert not {"blocking", "in line"} & {m.id for m in await t.peek("q")}

    asyncio.run(main())


def test_a_result_that_comes_when_the_loop_is_gone_harms_nothing(file: Path, message: Any) -> None:
    t = SqliteTransport(f"sqlite:///{file}")

    async def leave() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
        t._db._connection.gate.acquire()
        t._db.submit(t._messages.publish, [message("1")], write=True)
        await asyncio.sleep(0.01)

    async def look() -> list[str]:
        again = SqliteTransport(f"sqlite:///{file}")
        found = [m.id for m in await again.peek("q")]
        await again.close()
        return found

    asyncio.run(leave())
    t._db._connection.gate.release()
    t._db._inbox.put(None)
    assert t._db._thread is not None
    t._db._thread.join(5)
    assert not t._db._thread.is_alive()
    assert asyncio.run(look()) == ["1"]
