"""What cannot be run: each has a written destination, tells why in one line, and harms nobody else."""

from __future__ import annotations

import asyncio
import json
import pickle
import resource
import time
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster, InProcess, until
from shop import define

from umbel import Umbel
from umbel.errors import BrokerUnavailable, ContentRefused, DecodeError, EncodeError, PublishError, UnknownTask
from umbel.model import HEADER_DEAD_CAUSE, Action, Message, Settlement
from umbel.ports.clock import VirtualClock
from umbel.ports.transport import Credit

LIMIT = 100_000


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One worker that gets all the bad messages of this file, and must be well at the end."""
    cluster = Cluster(tmp_path_factory.mktemp("bad")).configure(
        codec__max_body_size=LIMIT, codec__accept_compression=["zlib"]
    )
    try:
        worker = cluster.worker()
        yield cluster
        assert cluster.send("add", 1, 2).get(timeout=30) == 3
        cluster.wait_empty()
        assert worker.end() == 0
    finally:
        cluster.close()


def message(task: str = "shop.note", body: object = None, **fields: Any) -> Message:
    id = str(uuid.uuid4())
    headers = {"lang": "py", "task": task, "id": id, "root_id": id, "retries": 0, **fields.pop("headers", {})}
    raw = body if isinstance(body, bytes) else json.dumps([[1], {}, {}] if body is None else body).encode()
    return Message(queue="default", headers=headers, body=raw, **fields)


def dead_letter(cluster: Cluster, id: str) -> Message:
    return until(lambda: next((m for m in cluster.dead() if m.id == id), None), f"the dead letter of {id}")


class Intruder:
    """Leaves a file where it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


CHAIN_OF_LISTS = b"[" * 50_000 + b"]" * 50_000
BAD = {
    "no JSON": (message(body=b"\xff{not json"), DecodeError, "JSON"),
    "empty": (message(body=b""), DecodeError, ""),
    "not three": (message(body=[1, 2]), DecodeError, "[args, kwargs, embed]"),
    "args no list": (message(body=["x", {}, {}]), DecodeError, "args must be a list"),
    "kwargs no object": (message(body=[[], 7, {}]), DecodeError, "kwargs must be an object"),
    "embed no object": (message(body=[[], {}, 7]), DecodeError, "embed"),
    "errbacks no signatures": (message(body=[[1], {}, {"errbacks": [7]}]), DecodeError, "errbacks"),
    "too deep": (message(body=CHAIN_OF_LISTS), DecodeError, ""),
    "expires no time": (message(headers={"expires": "tomorrow"}), DecodeError, "'tomorrow'"),
    "time limit no number": (message(headers={"timelimit": ["long", None]}), DecodeError, "timelimit"),
    "yaml": (message(content_type="application/x-yaml"), ContentRefused, 'add "yaml" to [codec] accept'),
    "unheard of": (message(content_type="text/x-runes"), ContentRefused, "'text/x-runes'"),
    "compression": (message(headers={"compression": "application/x-bz2"}), ContentRefused, 'add "bzip2"'),
    "not compressed": (message(headers={"compression": "application/zlib"}), DecodeError, ""),
    "too long": (message(body=[["x" * LIMIT], {}, {}]), ContentRefused, "max_body_size"),
    "too long when unpacked": (
        message(body=zlib.compress(b'[["' + b"x" * 100 * LIMIT + b'"],{},{}]'), headers={"compression": "zlib"}),
        DecodeError,
        "",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_message_that_cannot_be_read_is_a_dead_letter_and_its_failure_is_stored(shared: Cluster, name: str) -> None:
    bad, error, fragment = BAD[name]
    shared.publish(bad)
    with pytest.raises(error) as raised:
        shared.app.result(bad.id).get(timeout=30)
    assert fragment in str(raised.value)
    letter = dead_letter(shared, bad.id)
    assert letter.headers[HEADER_DEAD_CAUSE].startswith("unreadable: ")
    assert fragment in letter.headers[HEADER_DEAD_CAUSE]
    assert "\n" not in letter.headers[HEADER_DEAD_CAUSE]
    assert letter.body == bad.body
    assert shared.ledger.starts(bad.id) == []


def test_pickle_is_refused_unread_naming_the_setting(shared: Cluster) -> None:
    trap = shared.folder / "trap"
    body = pickle.dumps([[Intruder(trap)], {}, {}])
    bad = message(body=body, content_type="application/x-python-serialize", content_encoding="binary")
    shared.publish(bad)
    with pytest.raises(ContentRefused, match=r'add "pickle" to \[codec\] accept'):
        shared.app.result(bad.id).get(timeout=30)
    dead_letter(shared, bad.id)
    assert not trap.exists()


def test_a_message_that_names_neither_task_nor_id_is_a_dead_letter(shared: Cluster) -> None:
    before = len(shared.dead())
    shared.publish(Message(queue="default", body=b"{}"), Message(queue="default", headers={"foo": "bar"}, body=b"[]"))
    until(lambda: len(shared.dead()) == before + 2, "two dead letters")


def test_an_oversize_body_is_refused_at_the_call(shared: Cluster) -> None:
    with pytest.raises(EncodeError, match="max_body_size"):
        shared.send("note", "x" * LIMIT)
    with pytest.raises(EncodeError, match=r"shop\.note"):
        shared.send("note", {1, 2, object()})


def test_a_result_that_cannot_be_serialised_is_a_failure(shared: Cluster) -> None:
    shared.send("add", 1, 2).get(timeout=30)
    result = shared.send("unspeakable")
    with pytest.raises(EncodeError, match=r"the result of task 'shop\.unspeakable' cannot be stored"):
        result.get(timeout=30)
    assert len(shared.ledger.starts(result.id)) == 1


# --- unknown tasks ------------------------------------------------------------------------------


def test_f20_an_unknown_task_waits_for_a_worker_that_knows_it(cluster: Cluster) -> None:
    """A rolling deploy: the newer release sends, an older worker gets it first."""
    cluster.worker("--name", "older")
    result = cluster.app.send_task("shop.newcomer")
    until(lambda: cluster.depth().delayed == 1, "given back with a pause")
    assert result.state == "PENDING"
    cluster.workers[0].end()
    cluster.worker("--name", "newer", env={"NEWCOMER": "1"})
    assert result.get(timeout=30) == "known here"
    assert cluster.dead() == []


def test_a_task_that_stays_unknown_is_a_dead_letter(cluster: Cluster) -> None:
    """The last of its tries; how long the others take is told by the clock of the next test."""
    result = cluster.app.send_task("shop.nowhere")

    async def hand_out(times: int) -> None:
        transport = cluster.app.gateway.transport  # type: ignore[attr-defined]  # a test's process has a gateway of its own
        for _ in range(times):
            stream = transport.consume(["default"], credit=Credit(1), lease=5)
            batch = await anext(stream)
            await transport.settle([Settlement(delivery=batch[0], action=Action.REQUEUE)])
            await stream.aclose()

    cluster.app.gateway.runtime.call(hand_out(5))  # type: ignore[attr-defined]  # as above
    cluster.worker()
    with pytest.raises(UnknownTask, match=r"no task is named 'shop\.nowhere'"):
        result.get(timeout=30)
    cause = dead_letter(cluster, result.id).headers[HEADER_DEAD_CAUSE]
    assert cause.startswith("unknown task: no task is named 'shop.nowhere'")


@pytest.fixture
def timeless(tmp_path: Path) -> Iterator[tuple[InProcess, VirtualClock]]:
    """A worker, a broker and a store in memory, whose time the test moves."""
    clock = VirtualClock()
    settings = {"worker.pool": "threads", "worker.concurrency": 1, "worker.grace": 5, "broker.lease": "1d"}
    app = Umbel(
        "shop", broker=f"memory://{tmp_path.name}", results=f"memory://{tmp_path.name}", settings=settings, clock=clock
    )
    inside = InProcess(tmp_path, define(app)).start()
    yield inside, clock
    inside.close()


def test_an_unknown_task_is_tried_six_times_in_half_a_minute(timeless: tuple[InProcess, VirtualClock]) -> None:
    """No count of crashes applies to it, for nothing of it runs."""
    site, clock = timeless
    result = site.app.send_task("shop.nowhere")
    for pause in (1, 2, 4, 8, 16):
        until(lambda: site.depth().delayed == 1, f"a pause of {pause} s")
        clock.advance(pause - 0.5)
        time.sleep(0.05)
        assert site.depth().delayed == 1
        assert result.state == "PENDING"
        clock.advance(0.6)
    with pytest.raises(UnknownTask):
        result.get(timeout=30)
    (letter,) = until(site.dead, "the dead letter")
    assert letter.headers[HEADER_DEAD_CAUSE].startswith("unknown task")


def test_a_task_due_in_three_hours_runs_once_after_three_hours(timeless: tuple[InProcess, VirtualClock]) -> None:
    """F2: a delayed task is under nobody's lease."""
    site, clock = timeless
    result = site.send("note", 1, countdown=3 * 3600)
    for _ in range(3):
        clock.advance(3599)
        time.sleep(0.05)
        assert site.depth().delayed == 1
        assert site.ledger.starts() == []
    clock.advance(10)
    assert result.get(timeout=30) == 1
    assert len(site.ledger.starts()) == 1


# --- no room ------------------------------------------------------------------------------------


def test_a_full_broker_refuses_the_sender_and_loses_nothing_it_has_accepted(cluster: Cluster) -> None:
    cluster.configure(broker__options__max_file_size=1_000_000)
    accepted: list[Any] = []

    def fill() -> None:
        while len(accepted) < 100:
            accepted.append(cluster.send("note", [len(accepted), "x" * 50_000]))

    with pytest.raises(BrokerUnavailable, match=r"no room.*max_file_size"):
        fill()
    assert 5 < len(accepted) < 25
    assert cluster.depth().ready == len(accepted)
    cluster.worker()
    assert [result.get(timeout=20)[0] for result in accepted] == list(range(len(accepted)))
    cluster.wait_empty()
    assert cluster.send("note", "x" * 50_000).get(timeout=30) == "x" * 50_000


def test_a_file_that_may_not_grow_refuses_the_sender_and_is_not_damaged(cluster: Cluster) -> None:
    """The system's own limit, at whatever write it strikes."""
    assert cluster.send("note", "before")
    script = (
        "import resource\nfrom shop import app\nfrom umbel.errors import PublishError\n"
        "note = app.tasks['shop.note']\nnote.delay('warm')\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, resource.RLIM_INFINITY))\n"
        "sent = 0\n"
        "try:\n"
        "    for _ in range(100):\n"
        "        note.apply_async(('x' * 50_000,), timeout=1)\n"
        "        sent += 1\n"
        "except PublishError as error:\n"
        "    print(sent, type(error).__name__, error)\n"
    )
    assert resource.RLIMIT_FSIZE is not None
    done = cluster.run("-c", script)
    assert done.returncode == 0, done.stderr
    sent, _, sentence = done.stdout.partition(" ")
    assert str(cluster.folder / "broker.sqlite3") in sentence
    assert cluster.depth().ready == 2 + int(sent)
    cluster.worker()
    cluster.wait_empty()
    assert len(cluster.ledger.ends()) == 2 + int(sent)


def test_results_that_have_no_room_are_kept_until_there_is(cluster: Cluster) -> None:
    """Law 5: nothing runs twice for it, however short the lease."""
    cluster.configure(results__options__max_file_size=600_000, broker__lease=3)
    worker = cluster.worker()
    old = [cluster.send("note", "x" * 40_000) for _ in range(10)]
    cluster.wait_empty()
    new = [cluster.send("note", [n, "x" * 40_000]) for n in range(8)]
    worker.logged("result store unavailable")
    until(lambda: len(cluster.ledger.ends()) == 18, "every task has run")
    time.sleep(4)
    for result in old:
        result.forget()
    assert [result.get(timeout=20)[0] for result in new] == list(range(8))
    cluster.wait_empty()
    assert len(cluster.ledger.starts()) == 18


def test_a_broker_that_cannot_be_reached_is_an_error_within_the_deadline(cluster: Cluster) -> None:
    cluster.configure(broker__url=f"sqlite:///{cluster.folder}/nowhere/broker.sqlite3")
    began = time.monotonic()
    with pytest.raises(PublishError, match="mkdir -p"):
        cluster.send("note", 1, timeout=1.0)
    assert time.monotonic() - began < 5

    async def inside_a_loop() -> None:
        with pytest.raises(PublishError, match="mkdir -p"):
            await cluster.app.tasks["shop.note"].aapply_async((1,), timeout=0.5)

    asyncio.run(inside_a_loop())


def test_a_result_that_the_store_can_never_take_stops_nobody_else(cluster: Cluster) -> None:
    """An id that no text encoding holds: the worker must not wait for ever with all its other results."""
    cluster.worker()
    bad = message(headers={"id": "\ud800"})
    cluster.publish(bad)
    assert [cluster.send("add", n, n).get(timeout=30) for n in range(3)] == [0, 2, 4]
