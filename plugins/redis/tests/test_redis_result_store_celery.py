"""Results go both ways between Umbel and Celery."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import celery
import celery.exceptions
import pytest
from servers.redis import RedisServer

from umbel import Umbel
from umbel.errors import ContentRefused, DecodeError
from umbel.model import Result
from umbel_redis.result_store import RedisResultStore, ResultStoreOptions

MakeCelery = Callable[..., celery.Celery]

pytestmark = pytest.mark.filterwarnings("ignore:Call to deprecated setex:DeprecationWarning")  # Celery's own call

SERIALIZERS = ["json", "msgpack", "pickle", "yaml"]


@pytest.fixture
def make_celery(redis_url: str) -> Iterator[MakeCelery]:
    made: list[celery.Celery] = []

    def make(serializer: str = "json", **settings: Any) -> celery.Celery:
        app = celery.Celery(backend=redis_url, set_as_current=False)
        app.conf.update(result_serializer=serializer, accept_content=SERIALIZERS, result_accept_content=SERIALIZERS)
        app.conf.update(settings)
        made.append(app)
        return app

    yield make
    for app in made:
        app.backend.result_consumer.stop()
        app.backend.client.close()
        app.close()


def use(url: str, do: Callable[[RedisResultStore], Awaitable[Any]], **options: Any) -> Any:
    async def main() -> Any:
        store = RedisResultStore(url, options=ResultStoreOptions(**options))
        try:
            return await asyncio.wait_for(do(store), 20)
        finally:
            await store.close()

    return asyncio.run(main())


def record(task_id: str, state: str, value: Any, **fields: Any) -> Result:
    """As the kernel makes them."""
    done = "2026-11-22T11:11:59.316783+00:00" if state in ("SUCCESS", "FAILURE", "REVOKED") else None
    plain = {"status": state, "result": value, "traceback": None, "children": [], "date_done": done} | fields
    document = json.dumps(plain | {"task_id": task_id}).encode()
    return Result(task_id=task_id, state=state, document=document, expires=86400.0)


def raised(exc: BaseException, module: str | None = None) -> dict[str, Any]:
    return {
        "exc_type": type(exc).__qualname__,
        "exc_message": list(exc.args),
        "exc_module": module or type(exc).__module__,
    }


# --- Celery reads ours ---------------------------------------------------------------------------


def test_celery_gets_our_value(redis_url: str, make_celery: MakeCelery) -> None:
    put = record("t1", "SUCCESS", {"a": [1, "ü"]}, children=[[["c1", None], None]], parent_id="p", group_id="g")
    use(redis_url, lambda store: store.put([put]))
    handle = make_celery().AsyncResult("t1")
    assert handle.get(timeout=10) == {"a": [1, "ü"]}
    assert handle.state == "SUCCESS"
    assert [child.id for child in handle.children] == ["c1"]
    assert handle.date_done.isoformat() == "2026-11-22T11:11:59.316783+00:00"


@pytest.mark.parametrize(
    ("state", "exc"),
    [
        ("FAILURE", KeyError("k")),
        ("FAILURE", ZeroDivisionError("division by zero")),
        ("FAILURE", celery.exceptions.ChordError("Dependency x raised")),
        ("REVOKED", celery.exceptions.TaskRevokedError("terminated")),
    ],
    ids=repr,
)
def test_celery_raises_our_exception(redis_url: str, make_celery: MakeCelery, state: str, exc: BaseException) -> None:
    use(redis_url, lambda store: store.put([record("t1", state, raised(exc), traceback="Traceback: it was there")]))
    handle = make_celery().AsyncResult("t1")
    with pytest.raises(type(exc)) as caught:
        handle.get(timeout=10)
    assert caught.value.args == exc.args
    assert handle.state == state
    assert handle.traceback == "Traceback: it was there"


def test_celery_sees_progress_and_retries(redis_url: str, make_celery: MakeCelery) -> None:
    retried = record("t2", "RETRY", raised(KeyError("first")))
    use(redis_url, lambda store: store.put([record("t1", "PROGRESS", {"done": 3}), retried]))
    app = make_celery()
    assert (app.AsyncResult("t1").state, app.AsyncResult("t1").info) == ("PROGRESS", {"done": 3})
    assert app.AsyncResult("t2").state == "RETRY"
    assert isinstance(app.AsyncResult("t2").info, KeyError)


def test_celery_is_woken_by_what_we_publish(redis_url: str, make_celery: MakeCelery, redis_server: RedisServer) -> None:
    app = make_celery()
    handle = app.AsyncResult("t1")
    consumer = app.backend.result_consumer
    consumer.start("t1")
    assert consumer._pubsub.get_message(timeout=5) is None  # subscribed
    use(redis_url, lambda store: store.put([record("t1", "SUCCESS", 5)]))
    message = consumer._pubsub.get_message(timeout=5)
    assert json.loads(message["data"])["result"] == 5
    assert handle.get(timeout=10) == 5
    lifetime = redis_server.command("PTTL", "celery-task-meta-t1", database=int(redis_url.rpartition("/")[2]))
    assert 86_300_000 < lifetime <= 86_400_000


def test_celery_finds_results_behind_its_own_prefix(redis_url: str, make_celery: MakeCelery) -> None:
    use(redis_url, lambda store: store.put([record("t1", "SUCCESS", 5)]), prefix="shop")
    app = make_celery(result_backend_transport_options={"global_keyprefix": "shop"})
    assert app.AsyncResult("t1").get(timeout=10) == 5
    assert make_celery().AsyncResult("t1").state == "PENDING"


# --- we read Celery's ----------------------------------------------------------------------------


@pytest.mark.parametrize("serializer", SERIALIZERS)
def test_we_get_what_celery_stored(redis_url: str, make_celery: MakeCelery, serializer: str) -> None:
    app = make_celery(serializer)
    app.backend.store_result("ok", {"a": 1}, "SUCCESS")
    app.backend.store_result("bad", KeyError("k"), "FAILURE", traceback="Traceback: it was there")
    app.backend.store_result("again", KeyError("k"), "RETRY")
    app.backend.store_result("half", {"done": 3}, "PROGRESS")
    names = ["ok", "bad", "again", "half"]
    found = use(redis_url, lambda store: store.get(names), foreign_serializer=serializer)
    assert {name: found[name].state for name in names} == {
        "ok": "SUCCESS",
        "bad": "FAILURE",
        "again": "RETRY",
        "half": "PROGRESS",
    }
    for name in names:
        assert found[name].document == app.backend.get(f"celery-task-meta-{name}")
        read = app.backend.decode(found[name].document)
        assert (read["status"], found[name].content_type) == (found[name].state, app.backend.content_type)


@pytest.mark.parametrize("serializer", SERIALIZERS)
def test_we_wait_for_what_celery_stores(redis_url: str, make_celery: MakeCelery, serializer: str) -> None:
    app = make_celery(serializer)

    async def wait(store: RedisResultStore) -> Result:
        waiting = asyncio.ensure_future(store.wait("t1"))
        await asyncio.sleep(0.2)
        app.backend.store_result("t1", {"done": 3}, "PROGRESS")
        await asyncio.sleep(0.1)
        assert not waiting.done()
        app.backend.store_result("t1", 5, "SUCCESS")
        return await asyncio.wait_for(waiting, 5)

    assert use(redis_url, wait, foreign_serializer=serializer, poll_interval=60).state == "SUCCESS"


@pytest.mark.parametrize("serializer", SERIALIZERS)
@pytest.mark.parametrize("state", ["SUCCESS", "FAILURE", "REVOKED"])
def test_a_final_state_of_celerys_never_changes(
    redis_url: str, make_celery: MakeCelery, serializer: str, state: str
) -> None:
    app = make_celery(serializer)
    app.backend.store_result("t1", 5 if state == "SUCCESS" else KeyError("k"), state)
    app.backend.store_result("t2", {"done": 3}, "PROGRESS")
    before = app.backend.get("celery-task-meta-t1")

    async def put(store: RedisResultStore) -> Any:
        await store.put([record(name, "SUCCESS", "ours") for name in ("t1", "t2")])
        await store.put([record("t1", "STARTED", "ours")])
        return await store.get(["t2"])

    found = use(redis_url, put, foreign_serializer=serializer)
    assert app.backend.get("celery-task-meta-t1") == before
    assert json.loads(found["t2"].document)["result"] == "ours"


def test_celery_never_changes_our_success(redis_url: str, make_celery: MakeCelery) -> None:
    put = record("t1", "SUCCESS", 5)
    use(redis_url, lambda store: store.put([put]))
    make_celery().backend.store_result("t1", KeyError("k"), "FAILURE")
    assert use(redis_url, lambda store: store.get(["t1"])) == {"t1": put}


@pytest.mark.parametrize(
    ("document", "state"),
    [
        (b'{"status":"SUCCESS","result":5,"traceback":5,"children":[],"task_id":"t1","date_done":"x"}', "SUCCESS"),
        (b'{"status":"FAILURE","result":null,"traceback":{},"children":[],"task_id":"t1"}', "FAILURE"),
        (b'{"task_id":"t1","status":"SUCCESS","traceback":null,"result":5,"children":null}', "SUCCESS"),
        (b'{"result": {"status": "FAILURE"}, "status": "SUCCESS", "task_id": "t1"}', "SUCCESS"),
    ],
    ids=["celery-node", "celery-node failure", "gocelery", "another order"],
)
def test_workers_of_other_languages_that_publish_nothing_are_heard(
    redis_url: str, redis_server: RedisServer, document: bytes, state: str
) -> None:
    async def wait(store: RedisResultStore) -> Result:
        waiting = asyncio.ensure_future(store.wait("t1"))
        await asyncio.sleep(0.2)
        redis_server.command("SET", "celery-task-meta-t1", document, database=int(redis_url.rpartition("/")[2]))
        found = await waiting
        await store.put([record("t1", "STARTED", None), record("t1", "SUCCESS", "late")])
        assert await store.get(["t1"]) == {"t1": found}
        return found

    found = use(redis_url, wait, poll_interval=0.2)
    assert found == Result(task_id="t1", state=state, document=document)


@pytest.mark.parametrize(("compression", "plugin"), [("gzip", "zlib"), ("bzip2", "bzip2"), ("lzma", "lzma")])
def test_a_record_that_celery_compressed_is_read_where_the_settings_say_so(
    redis_url: str, make_celery: MakeCelery, compression: str, plugin: str
) -> None:
    backend = make_celery(result_compression=compression).backend
    backend.store_result("t1", {"rows": [7] * 5000}, "SUCCESS")
    backend.store_result("t2", {"done": 1}, "STARTED")
    refused = pytest.raises(ContentRefused, match=rf'add "{plugin}" to \[results\] accept_compression')
    with Umbel("reads", broker="memory://", results=redis_url) as app, refused:
        app.result("t1").get(timeout=5)
    settings = {"results.accept_compression": [plugin]}
    with Umbel("reads", broker="memory://", results=redis_url, settings=settings) as app:
        assert app.result("t1").get(timeout=5) == {"rows": [7] * 5000}
        assert app.result("t2").state == "STARTED"
        app.gateway.put([record("t2", "SUCCESS", 9)])
        assert app.result("t2").get(timeout=5) == 9


def test_a_record_in_an_unknown_form_is_an_error_for_who_asks_for_it(redis_url: str, make_celery: MakeCelery) -> None:
    make_celery("pickle").backend.store_result("t1", 5, "SUCCESS")
    make_celery(result_compression="zstd").backend.store_result("t2", 5, "SUCCESS")

    async def ask(store: RedisResultStore) -> None:
        for name, remedy in (("t1", "foreign_serializer"), ("t2", "result_compression")):
            for call in (lambda name=name: store.get([name]), lambda name=name: store.wait(name)):
                with pytest.raises(DecodeError, match=remedy):
                    await call()
        await store.put([record("t3", "SUCCESS", 5)])
        assert (await store.wait("t3")).final

    use(redis_url, ask)
