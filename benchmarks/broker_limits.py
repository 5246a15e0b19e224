"""The raw limits beside the systems: what a client library, and what the server, can do with the same messages.

No tasks, no encoding, nothing kept: the bytes of one message in, out, and acknowledged, in batches of 100.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Sequence
from typing import Any, Final
from urllib.parse import urlsplit

import hiredis

BATCH: Final = 100
HEAD: Final = b"h" * 420
BODY: Final = b'[[1234567], {}, {"callbacks": null, "errbacks": null, "chain": null, "chord": null}]'
"""About as long as what Umbel and Celery send for a task of one number."""

Run = Callable[[Sequence[tuple[Any, ...]]], list[Any]]


def redis_py(url: str, count: int) -> dict[str, float]:
    """redis-py's pipelines."""
    import redis

    with redis.Redis.from_url(url) as client:

        def run(commands: Sequence[tuple[Any, ...]]) -> list[Any]:
            pipeline = client.pipeline(transaction=False)
            for command in commands:
                pipeline.execute_command(*command)
            answers: list[Any] = pipeline.execute()
            return answers

        return _streams(run, count)


def hiredis_socket(url: str, count: int) -> dict[str, float]:
    """hiredis on a blocking socket: what Python can do at most."""
    parts = urlsplit(url)
    with socket.create_connection((str(parts.hostname), int(parts.port or 6379))) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        reader = hiredis.Reader()

        def run(commands: Sequence[tuple[Any, ...]]) -> list[Any]:
            sock.sendall(b"".join([hiredis.pack_command(command) for command in commands]))
            answers: list[Any] = []
            while len(answers) < len(commands):
                answer = reader.gets()
                if answer is False:
                    reader.feed(sock.recv(1 << 16))
                else:
                    answers.append(answer)
            return answers

        run([("SELECT", parts.path.strip("/") or "0")])
        return _streams(run, count)


def _streams(run: Run, count: int) -> dict[str, float]:
    """XADD in pipelines; then XREADGROUP, and XACK with XDEL, a batch at a time. Messages a second, each way."""
    count -= count % BATCH
    run([("DEL", "raw"), ("XGROUP", "CREATE", "raw", "g", "0", "MKSTREAM")])
    add = ("XADD", "raw", "*", HEAD, BODY)
    started = time.perf_counter()
    for _ in range(0, count, BATCH):
        run([add] * BATCH)
    sent = time.perf_counter() - started
    got = 0
    done: list[Any] = []
    started = time.perf_counter()
    while got < count:
        commands: list[tuple[Any, ...]] = [("XREADGROUP", "GROUP", "g", "c", "COUNT", BATCH, "STREAMS", "raw", ">")]
        if done:
            commands = [("XACK", "raw", "g", *done), ("XDEL", "raw", *done), *commands]
        answer = run(commands)[-1]
        entries = answer[0][1] if isinstance(answer, list) else next(iter(answer.values()))
        done = [entry[0] for entry in entries]
        got += len(done)
    run([("XACK", "raw", "g", *done), ("XDEL", "raw", *done)])
    taken = time.perf_counter() - started
    assert got == count, f"{got} of {count} came"
    run([("DEL", "raw")])
    return {"publish": count / sent, "consume": count / taken}


def py_amqp(url: str, count: int) -> dict[str, float]:
    """The library under Celery: publishes unconfirmed, consumes with a prefetch of 1,000, acknowledges by hundreds."""
    import amqp  # type: ignore[import-untyped]  # py-amqp's gap

    parts = urlsplit(url)
    count -= count % BATCH
    with amqp.Connection(f"{parts.hostname}:{parts.port}", parts.username, parts.password) as connection:
        channel = connection.channel()
        channel.queue_declare("raw", durable=True, auto_delete=False)
        body = amqp.Message(BODY, delivery_mode=2, application_headers={"h": HEAD.decode()})
        started = time.perf_counter()
        for _ in range(count):
            channel.basic_publish(body, routing_key="raw")
        while channel.queue_declare("raw", passive=True).message_count < count:
            time.sleep(0.005)
        sent = time.perf_counter() - started
        got = 0

        def on_message(message: Any) -> None:
            nonlocal got
            got += 1
            if got % BATCH == 0:
                channel.basic_ack(message.delivery_tag, multiple=True)

        channel.basic_qos(0, 1000, False)
        started = time.perf_counter()
        consumer = channel.basic_consume("raw", callback=on_message)
        while got < count:
            connection.drain_events(timeout=20)
        taken = time.perf_counter() - started
        channel.basic_cancel(consumer)
        channel.queue_delete("raw")
    return {"publish": count / sent, "consume": count / taken}


CLIENTS: Final = {
    "redis": {"redis-py, pipelines": redis_py, "hiredis on a socket": hiredis_socket},
    "rabbitmq": {"py-amqp": py_amqp},
}
