"""Replies: to Celery's clients and from Celery's workers, and what becomes of them when nobody listens."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest

from umbel.errors import ResultStoreUnavailable
from umbel.model import Result
from umbel_amqp.result_store import RpcOptions, RpcResultStore


def result(task_id: str, reply_to: str | None, state: str = "SUCCESS", **fields: Any) -> Result:
    document = {"task_id": task_id, "status": state, "result": 5, "traceback": None, "children": [], "date_done": None}
    fields.setdefault("document", json.dumps(document).encode())
    return Result(task_id=task_id, state=state, reply_to=reply_to, **fields)


@asynccontextmanager
async def opened(*urls: str, **options: Any) -> AsyncIterator[list[RpcResultStore]]:
    async with AsyncExitStack() as stack:
        stores = [RpcResultStore(url, options=RpcOptions(**options)) for url in urls]
        for store in stores:
            stack.push_async_callback(store.close)
        yield stores


CLIENT = """
import sys
from celery import Celery
app = Celery(broker=sys.argv[1], backend="rpc://")
sent = app.send_task("shop.add", (2, 3))
print(sent.id, app.thread_oid, flush=True)
print(sent.get(timeout=30))
"""
WORKER = """
import sys
from celery import Celery
from kombu import Producer
app = Celery(broker=sys.argv[1])
with app.connection_for_write() as connection:
    for status in ("STARTED", "SUCCESS"):
        meta = {"status": status, "result": 5, "traceback": None, "children": [], "task_id": "t1"}
        options = dict(exchange="", serializer="json", correlation_id="t1", delivery_mode=1)
        Producer(connection).publish(meta, routing_key=sys.argv[2], **options)
"""


def test_a_client_of_celery_gets_its_result(rabbitmq_url: str) -> None:
    with subprocess.Popen([sys.executable, "-c", CLIENT, rabbitmq_url], stdout=subprocess.PIPE, text=True) as client:
        assert client.stdout is not None
        sent, oid = client.stdout.readline().split()

        async def reply() -> None:
            async with opened(rabbitmq_url) as (store,):
                await store.put([result(sent, oid, "STARTED"), result(sent, oid, correlation_id=sent)])

        asyncio.run(reply())
        assert client.communicate(timeout=40)[0].strip() == "5"


def test_a_result_of_celerys_worker_is_read(rabbitmq_url: str) -> None:
    async def live() -> None:
        async with opened(rabbitmq_url) as (store,):
            waiting = asyncio.ensure_future(store.wait("t1"))
            await store.get(["t1"])
            program = [sys.executable, "-c", WORKER, rabbitmq_url, store.reply_to]
            await asyncio.to_thread(subprocess.run, program, check=True, timeout=60)
            async with asyncio.timeout(10):
                found = await waiting
            assert (found.task_id, found.state, json.loads(found.document)["result"]) == ("t1", "SUCCESS", 5)

    asyncio.run(live())


def test_a_result_that_comes_before_anybody_listens_is_kept(rabbitmq_url: str) -> None:
    async def live() -> None:
        async with opened(rabbitmq_url, rabbitmq_url) as (worker, client):
            await worker.put([result(str(n), client.reply_to, expires=60.0) for n in range(50)])
            found = await client.get(["0", "49", "50"])
            assert set(found) == {"0", "49"}
            assert found["0"].expires == 60.0

    asyncio.run(live())


def test_a_result_for_nobody_goes_nowhere(rabbitmq_url: str) -> None:
    async def live() -> None:
        async with opened(rabbitmq_url, rabbitmq_url) as (worker, client):
            await worker.put([result("1", None), result("2", "of-a-client-that-is-gone"), result("3", client.reply_to)])
            assert set(await client.get(["1", "2", "3"])) == {"3"}

    asyncio.run(live())


def test_what_the_document_does_not_say_is_told_beside_it(rabbitmq_url: str) -> None:
    async def live() -> None:
        async with opened(rabbitmq_url, rabbitmq_url) as (worker, client):
            sent = result("1", client.reply_to, "FAILURE", document=b"\x93", content_type="application/x-msgpack")
            await worker.put([sent])
            assert await client.get(["1"]) == {"1": sent}

    asyncio.run(live())


def test_only_so_many_results_are_kept(rabbitmq_url: str) -> None:
    async def live() -> None:
        async with opened(rabbitmq_url, rabbitmq_url, max_records=10) as (worker, client):
            await worker.put([result(str(n), client.reply_to) for n in range(30)])
            assert set(await client.get([str(n) for n in range(30)])) == {str(n) for n in range(20, 30)}

    asyncio.run(live())


def test_a_wrong_password_ends_a_wait(rabbitmq_url: str) -> None:
    async def live() -> None:
        async with opened(rabbitmq_url.replace("guest:guest@", "guest:wrong@")) as (store,):
            with pytest.raises(ResultStoreUnavailable, match="password"):
                async with asyncio.timeout(10):
                    await store.wait("1")
            with pytest.raises(ResultStoreUnavailable, match="password"):
                await store.put([result("1", "q")])

    asyncio.run(live())


def test_the_broker_may_be_named_by_an_option(rabbitmq_url: str) -> None:
    async def live() -> None:
        async with opened("rpc://", "rpc://", broker=rabbitmq_url) as (worker, client):
            await worker.put([result("1", client.reply_to)])
            assert set(await client.get(["1"])) == {"1"}

    asyncio.run(live())
