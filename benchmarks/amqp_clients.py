"""Clients of RabbitMQ on the same work: what a message costs before any task queue is built on it.

    python benchmarks/amqp_clients.py [--url amqp://guest:guest@localhost:5672//] [--messages 20000] [--rounds 3]

Publishes persistent messages with the nineteen headers of a task and a body of 70 bytes, confirmed in hundreds; then consumes
them with a prefetch of 1,000, acknowledging many at once. Every run counts what was delivered. Each client runs in a process
of its own, whose CPU time is told; the clients take turns. A client that is not installed is left out: `umbel-amqp`, `aiormq`,
`aio-pika`, `pika`, `amqp` (Celery's) come with the dependency group `bench`.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Any

CONFIRMED, PREFETCH, ACKED = 100, 1000, 500
BODY = json.dumps([[1, "x" * 8], {}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}]).encode()[:70]
HEADERS: dict[str, Any] = {
    "lang": "py", "task": "shop.tasks.mail", "id": "9a97a032-ec7b-4574-af9a-5da5499faad8", "shadow": None, "eta": None,
    "expires": None, "group": None, "group_index": None, "retries": 0, "timelimit": [None, None],
    "root_id": "9a97a032-ec7b-4574-af9a-5da5499faad8", "parent_id": None, "argsrepr": "(2, 3)", "kwargsrepr": "{}",
    "origin": "gen20711@host", "ignore_result": False, "replaced_task_nesting": 0, "stamped_headers": None, "stamps": {},
}  # fmt: skip

Work = Callable[[str, str, int], Awaitable[int]]


# --- the clients: each publishes, or consumes, `number` messages; consuming returns how many headers it read ----------


async def umbel_publish(url: str, queue: str, number: int) -> int:
    from umbel.model import Message

    async with aclosing(_umbel(url)) as transport:
        properties = {"correlation_id": HEADERS["id"], "reply_to": HEADERS["id"], "delivery_mode": 2}
        message = Message(queue=queue, headers=HEADERS, body=BODY, properties=properties)
        for _ in range(0, number, CONFIRMED):
            await transport.publish([message] * CONFIRMED, timeout=60)
    return number


async def umbel_consume(url: str, queue: str, number: int) -> int:
    from umbel.model import Action, Settlement
    from umbel.ports.transport import Credit

    read = 0
    async with aclosing(_umbel(url)) as transport:
        credit = Credit(PREFETCH)
        async with aclosing(transport.consume([queue], credit=credit, lease=60)) as stream:
            async for batch in stream:
                read += sum(len(delivery.message.headers) for delivery in batch)
                await transport.settle([Settlement(delivery=delivery, action=Action.ACK) for delivery in batch])
                credit.give(len(batch))
                if read >= number * len(HEADERS):
                    return read // len(HEADERS)
    return 0


def _umbel(url: str) -> Any:
    from umbel_amqp.options import TransportOptions
    from umbel_amqp.transport import AmqpTransport

    transport: Any = AmqpTransport(url, options=TransportOptions(queue_type="classic"))
    transport.aclose = transport.close
    return transport


async def aiormq_publish(url: str, queue: str, number: int) -> int:
    import aiormq

    connection = await aiormq.connect(url)
    channel = await connection.channel(publisher_confirms=True)
    properties = aiormq.spec.Basic.Properties(
        headers=HEADERS, delivery_mode=2, content_type="application/json", content_encoding="utf-8"
    )
    for _ in range(0, number, CONFIRMED):
        sends = [channel.basic_publish(BODY, routing_key=queue, properties=properties) for _ in range(CONFIRMED)]
        await asyncio.gather(*sends)
    await connection.close()
    return number


async def aiormq_consume(url: str, queue: str, number: int) -> int:
    import aiormq

    connection = await aiormq.connect(url)
    channel = await connection.channel()
    await channel.basic_qos(prefetch_count=PREFETCH)
    read, done = 0, asyncio.Event()

    async def received(message: Any) -> None:
        nonlocal read
        read += len(message.header.properties.headers) // len(HEADERS)
        if read % ACKED == 0 or read == number:
            await channel.basic_ack(message.delivery.delivery_tag, multiple=True)
        if read == number:
            done.set()

    await channel.basic_consume(queue, received)
    await done.wait()
    await connection.close()
    return read


async def aio_pika_publish(url: str, queue: str, number: int) -> int:
    import aio_pika

    connection = await aio_pika.connect(url)
    channel = await connection.channel(publisher_confirms=True)
    message = aio_pika.Message(BODY, headers=HEADERS, delivery_mode=2, content_type="application/json")
    for _ in range(0, number, CONFIRMED):
        exchange = channel.default_exchange
        await asyncio.gather(*(exchange.publish(message, routing_key=queue) for _ in range(CONFIRMED)))
    await connection.close()
    return number


async def aio_pika_consume(url: str, queue: str, number: int) -> int:
    import aio_pika

    connection = await aio_pika.connect(url)
    channel = await connection.channel()
    await channel.set_qos(prefetch_count=PREFETCH)
    declared = await channel.declare_queue(queue, durable=True, passive=True)
    read, done = 0, asyncio.Event()

    async def received(message: Any) -> None:
        nonlocal read
        read += len(message.headers) // len(HEADERS)
        if read % ACKED == 0 or read == number:
            await message.ack(multiple=True)
        if read == number:
            done.set()

    await declared.consume(received)
    await done.wait()
    await connection.close()
    return read


async def pika_publish(url: str, queue: str, number: int) -> int:
    """Its blocking client confirms one by one; its connection for callbacks would confirm as the others do."""
    import pika

    connection = pika.BlockingConnection(pika.URLParameters(url.removesuffix("//") + "/%2F"))
    channel = connection.channel()
    properties = pika.BasicProperties(headers=HEADERS, delivery_mode=2, content_type="application/json")
    channel.confirm_delivery()
    for _ in range(number):
        channel.basic_publish("", queue, BODY, properties)
    connection.close()
    return number


async def pika_consume(url: str, queue: str, number: int) -> int:
    import pika

    connection = pika.BlockingConnection(pika.URLParameters(url.removesuffix("//") + "/%2F"))
    channel = connection.channel()
    channel.basic_qos(prefetch_count=PREFETCH)
    read = 0
    for method, properties, _ in channel.consume(queue):
        read += len(properties.headers) // len(HEADERS)
        if read % ACKED == 0 or read == number:
            channel.basic_ack(method.delivery_tag, multiple=True)
        if read == number:
            break
    connection.close()
    return read


async def amqp_publish(url: str, queue: str, number: int) -> int:
    connection, channel = _amqp(url)
    confirmed = 0

    def on_ack(tag: int, multiple: bool) -> None:
        nonlocal confirmed
        confirmed = tag if multiple else confirmed + 1

    channel.events["basic_ack"].add(on_ack)
    channel.confirm_select()
    import amqp

    for sent in range(CONFIRMED, number + 1, CONFIRMED):
        for _ in range(CONFIRMED):
            message = amqp.Message(BODY, application_headers=HEADERS, delivery_mode=2, content_type="application/json")
            channel._basic_publish(message, "", queue)
        while confirmed < sent:
            connection.drain_events(timeout=60)
    connection.close()
    return number


async def amqp_consume(url: str, queue: str, number: int) -> int:
    connection, channel = _amqp(url)
    channel.basic_qos(0, PREFETCH, False)
    read = 0

    def received(message: Any) -> None:
        nonlocal read
        read += len(message.headers) // len(HEADERS)
        if read % ACKED == 0 or read == number:
            channel.basic_ack(message.delivery_tag, multiple=True)

    channel.basic_consume(queue, callback=received)
    while read < number:
        connection.drain_events(timeout=60)
    connection.close()
    return read


def _amqp(url: str) -> tuple[Any, Any]:
    from urllib.parse import urlsplit

    import amqp

    parts = urlsplit(url)
    connection = amqp.Connection(
        f"{parts.hostname}:{parts.port or 5672}", userid=parts.username or "guest", password=parts.password or "guest"
    )
    connection.connect()
    return connection, connection.channel()


CLIENTS: dict[str, tuple[str, Work, Work]] = {
    "umbel-amqp": ("umbel_amqp", umbel_publish, umbel_consume),
    "aiormq": ("aiormq", aiormq_publish, aiormq_consume),
    "aio-pika": ("aio_pika", aio_pika_publish, aio_pika_consume),
    "pika (confirms one by one)": ("pika", pika_publish, pika_consume),
    "py-amqp": ("amqp", amqp_publish, amqp_consume),
}


# --- measuring ------------------------------------------------------------------------------------------------------


def measure(client: str, what: str, url: str, queue: str, number: int) -> None:
    """In this process: print the seconds, and the CPU seconds."""
    work = CLIENTS[client][1 if what == "publish" else 2]
    before, begun = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    done = asyncio.run(work(url, queue, number))
    elapsed, after = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(json.dumps({"done": done, "seconds": elapsed, "cpu": cpu}))


def depth(url: str, queue: str, *, delete: bool = False) -> int:
    connection, channel = _amqp(url)
    found = channel.queue_declare(queue, durable=True, auto_delete=False).message_count
    if delete:
        channel.queue_delete(queue)
    connection.close()
    return int(found)


def run(client: str, what: str, options: argparse.Namespace, queue: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--one", client, what, queue, "--url", options.url]
    done = subprocess.run(
        [*command, "--messages", str(options.messages)], capture_output=True, text=True, timeout=600, check=False
    )
    if done.returncode:
        sys.exit(f"{client} cannot {what}:\n{done.stderr}")
    measured: dict[str, float] = json.loads(done.stdout)
    if measured["done"] != options.messages:
        sys.exit(f"{client} says {measured['done']} of {options.messages} messages")
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--url", default="amqp://guest:guest@localhost:5672//", help="a broker; vhost / (default: local)"
    )
    parser.add_argument("--messages", type=int, default=20_000, help="messages a run (default: 20,000)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each client (default: 3)")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        client, what, queue = options.one
        measure(client, what, options.url, queue, options.messages)
        return
    queue = f"umbel-bench-{os.getpid()}"
    here = [name for name, (module, _, _) in CLIENTS.items() if importlib.util.find_spec(module)]
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    depth(options.url, queue)
    try:
        for _ in range(options.rounds):
            for client in here:
                for what, left in (("publish", options.messages), ("consume", 0)):
                    took = run(client, what, options, queue)
                    time.sleep(0.3)
                    if (remaining := depth(options.url, queue)) != left:
                        sys.exit(f"{client} has {what}ed, and {remaining} messages are in the queue instead of {left}")
                    number = options.messages
                    found.setdefault((what, client), []).append((number / took["seconds"], took["cpu"] / number * 1e6))
    finally:
        depth(options.url, queue, delete=True)
    print("| | messages/s | client µs CPU a message |\n|---|---|---|")
    for what in ("publish", "consume"):
        for client in here:
            rates, costs = zip(*found[what, client], strict=True)
            print(f"| {what}, {client} | {statistics.median(rates):,.0f} | {statistics.median(costs):.1f} |")


if __name__ == "__main__":
    main()
