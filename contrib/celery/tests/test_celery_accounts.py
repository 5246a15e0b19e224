"""The account of a chord in Redis, kept by Celery's own backend and by ours in turn, wherever results may lie."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
from celery import Celery
from celery.app.task import Context
from celery_receiver import let_go
from redis import Redis
from servers.proxy import Proxy
from servers.redis import RedisSentinel, RedisServer

from umbel import Umbel
from umbel.errors import DecodeError, NotSupported, ResultStoreUnavailable
from umbel.protocol import Embed
from umbel.settings.schema import ResultSettings
from umbel.worker.followups import check_supported
from umbel.worker.worker import Worker
from umbel_celery.chords import AccountStep, send
from umbel_celery.hook import CeleryHook
from umbel_celery.result_server import ResultServer

GROUP = "group-of-the-test"


def server_of(url: str, **options: Any) -> ResultServer:
    found = ResultServer.of(ResultSettings(url=url, options=options))
    assert found is not None
    return found


def ask(server: ResultServer, *verbs: tuple[Any, ...], ordered: bool = True) -> list[Any]:
    """What a worker's step answers to its tasks."""

    async def answers() -> list[Any]:
        worker = SimpleNamespace(gateway=SimpleNamespace(added={}))
        step = AccountStep(server, ordered=ordered)
        await step.start(cast("Worker", worker))
        try:
            return [await worker.gateway.added["celery-chord"](verb) for verb in verbs]
        finally:
            await step.stop(cast("Worker", worker))

    return asyncio.run(answers())


def part(task_id: str, index: int | None, value: Any = None) -> tuple[Any, ...]:
    return "part", GROUP, index, task_id, json.dumps([1, task_id, "SUCCESS", value]).encode()


# --- with Celery ----------------------------------------------------------------------------------


class Peer:
    """Celery's backend, as its workers use it at the end of a member."""

    def __init__(self, url: str, *, ordered: bool) -> None:
        self.app = Celery("peer", broker="memory://", backend=url, set_as_current=False)
        self.app.conf.result_backend_transport_options = {"result_chord_ordered": ordered, "global_keyprefix": "kit"}
        self.sent: list[Any] = []
        self.app.amqp._retry_publish = lambda _, parts: self.sent.append(parts)

    def part(self, task_id: str, index: int | None, value: Any) -> None:
        chord = self.app.signature("shop.sum", options={"task_id": "body"})
        request = Context(id=task_id, group=GROUP, group_index=index, chord=dict(chord))
        self.app.backend.on_chord_part_return(request, "SUCCESS", value)


@pytest.fixture(params=[True, False], ids=["ordered", "list"])
def ordered(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def peer(redis_url: str, ordered: bool) -> Iterator[Peer]:
    peer = Peer(redis_url, ordered=ordered)
    yield peer
    let_go(peer.app)
    peer.app.close()


@pytest.mark.parametrize("last", ["ours", "celery"])
@pytest.mark.parametrize("first", ["ours", "celery"])
def test_parts_of_both_are_counted_once(redis_url: str, ordered: bool, peer: Peer, first: str, last: str) -> None:
    """Whoever begins, whoever ends: the last of four has all of them, by their place or in the order of their ends."""
    server = server_of(redis_url, prefix="kit")
    sides = [first, "ours", "celery", last]
    places = [2, 0, None, 1]

    def end(number: int) -> Any:
        if sides[number] == "celery":
            return peer.part(f"m{number}", places[number], number)
        return ask(server, part(f"m{number}", places[number], number), ordered=ordered)[0]

    ask(server, ("open", GROUP, 4))
    for number in (0, 1, 1, 2, 0):  # some have ended twice
        assert not end(number)
    won = end(3)
    expected = [1, 3, 0, 2] if ordered else [0, 1, 2, 3]
    if last == "celery":
        assert peer.sent == [expected]
    else:
        assert [json.loads(each)[3] for each in won] == expected
        assert end(3) == won, "asked again, it wins again"
        ask(server, ("sent", GROUP))
    assert not end(0)
    assert not end(3)
    with Redis.from_url(redis_url, decode_responses=True) as client:
        assert {key: client.get(key) for key in client.scan_iter("*taskset*")} == {
            f"kit_celery-taskset-meta-{GROUP}.c": "done"
        }


def test_what_is_kept_already_says_how(redis_url: str, ordered: bool, peer: Peer) -> None:
    """Settings that differ do not break a chord that Celery has begun."""
    server = server_of(redis_url, prefix="kit")
    ask(server, ("open", GROUP, 2))
    peer.part("m0", 0, 0)
    (won,) = ask(server, part("m1", 1, 1), ordered=not ordered)
    assert [json.loads(each)[3] for each in won] == [0, 1]


def test_members_that_come_before_the_size_and_such_as_were_added_are_awaited(redis_url: str) -> None:
    server = server_of(redis_url)
    with Redis.from_url(redis_url) as client:
        client.set(f"celery-taskset-meta-{GROUP}.t", 1)
    early, _, again, last = ask(server, part("m0", 0), ("open", GROUP, 1), part("m0", 0), part("m1", None))
    assert (early, again, len(last)) == (None, None, 2)


# --- where results lie ----------------------------------------------------------------------------


def test_the_server_is_found_wherever_results_may_lie(make_redis: Callable[..., RedisServer]) -> None:
    server = make_redis(password="kit", tls=True)
    assert server.certificates is not None
    urls = [
        server.url_of(3),
        f"redis+socket://:{server.password}@{server.socket}?virtual_host=3&prefix=kit",
        f"unix://:{server.password}@{server.socket}?db=3",
        server.tls_url.replace("/0", f"/3?ssl_ca_certs={server.certificates.ca}"),
    ]
    for url in urls:
        found = server_of(url)
        assert ask(found, ("open", GROUP, 1), part("m", 0))[1]
        with found.connected_blocking() as client:
            assert client.get(f"{found.prefix}celery-taskset-meta-{GROUP}.s") == b"1"
            client.flushdb()
    assert not server.command("KEYS", "*"), "in the database that the URL names"


def test_the_server_is_found_through_sentinels(redis_sentinel: RedisSentinel) -> None:
    urls = [f"{redis_sentinel.url};{redis_sentinel.url}", f"sentinel://{redis_sentinel.hosts[0]}/0"]
    for url in urls:
        found = server_of(url, master=redis_sentinel.name)
        assert ask(found, ("open", GROUP, 1), part("m", 0))[1]
        with found.connected_blocking() as client:
            assert client.get(f"celery-taskset-meta-{GROUP}.s") == b"1"
            client.flushdb()


def test_a_server_that_is_away_is_waited_for_and_one_that_refuses_is_not(
    make_redis: Callable[..., RedisServer], make_proxy: Callable[[int], Proxy]
) -> None:
    server = make_redis()
    proxy = make_proxy(server.port)
    worker = cast("Worker", SimpleNamespace(gateway=SimpleNamespace(added={})))

    async def run() -> None:
        step = AccountStep(server_of(proxy.through(server.url)), ordered=True)
        await step.start(worker)
        assert await step.answer(("open", GROUP, 1))
        proxy.refuse()
        proxy.reset()
        answering = asyncio.create_task(step.answer(part("m", 0)))
        done, _ = await asyncio.wait([answering], timeout=0.3)
        assert not done, "the member has ended, and somebody has to be told"
        proxy.heal()
        assert await asyncio.wait_for(answering, 30)
        server.command("SET", f"celery-taskset-meta-{GROUP}.d", "no set")
        with pytest.raises(ResultStoreUnavailable, match="WRONGTYPE"):
            await step.answer(part("n", 0))
        await step.stop(worker)
        proxy.refuse()
        with pytest.raises(ResultStoreUnavailable):
            await step.answer(part("m", 0))

    asyncio.run(run())


def test_the_account_is_open_until_the_last_task_has_ended(redis_url: str) -> None:
    with Umbel("kit", broker=redis_url, results=redis_url, settings={"plugins.hooks": ["celery"]}) as app:
        worker = app.worker()
        worker.make_steps()
        names = [step.name for step in worker.steps]
        assert names.index("celery-chords") < names.index("pool"), "stopped after it"


def test_in_a_cluster_nobody_keeps_an_account() -> None:
    """Celery keeps no results there: a message of its chords went astray."""
    settings = {"plugins.hooks": ["celery"], "results.options": {"cluster": True}}
    with Umbel("kit", broker="redis://", results="redis://127.0.0.1:1", settings=settings) as app:
        _ = app.plugins
        assert app.chords is None
        with pytest.raises(DecodeError, match="Cluster"):
            check_supported(Embed(chord={"task": "shop.sum"}), chords_kept=app.chords is not None)
        with pytest.raises(NotSupported, match="one server"):
            send(app, cast("Any", None))


def test_elsewhere_than_in_redis_celery_looks_for_the_members_by_a_task() -> None:
    with Umbel("kit", broker="redis://", results="memory://", plugins=[CeleryHook()]) as app:
        _ = app.plugins
        assert app.chords is not None
        assert app.chords.part(GROUP, 0, "m", b"") is None
        assert app.chords.open(GROUP, 1) is False
