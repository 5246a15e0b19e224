"""As much of HTTP as a probe needs, and nothing that a stranger could do to the worker through it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from http import HTTPStatus

import pytest

from umbel.errors import UmbelError
from umbel_health import server
from umbel_health.server import Answer, Server


@asynccontextmanager
async def serving(pages: dict[str, Callable[[], Answer]] | None = None) -> AsyncIterator[int]:
    """A server; its port."""
    one = Server(pages or {"/": lambda: Answer(HTTPStatus.OK, "ö\n"), "/bad": lambda: Answer(HTTPStatus(503), "no\n")})
    try:
        yield await one.start("127.0.0.1", 0)
    finally:
        await one.stop()


async def ask(port: int, request: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request)
        return await asyncio.wait_for(reader.read(), 10)
    finally:
        writer.close()


@pytest.mark.parametrize(
    ("request_", "first", "body"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"HTTP/1.1 200 OK", "ö\n".encode()),
        (b"GET / HTTP/1.0\r\n\r\n", b"HTTP/1.1 200 OK", "ö\n".encode()),
        (b"GET /?a=b HTTP/1.1\r\n\r\n", b"HTTP/1.1 200 OK", "ö\n".encode()),
        (b"HEAD / HTTP/1.1\r\n\r\n", b"HTTP/1.1 200 OK", b""),
        (b"GET /bad HTTP/1.1\r\n\r\n", b"HTTP/1.1 503 Service Unavailable", b"no\n"),
        (b"GET /x HTTP/1.1\r\n\r\n", b"HTTP/1.1 404 Not Found", b"there are /, /bad\n"),
        (b"POST / HTTP/1.1\r\nContent-Length: 1\r\n\r\n", b"HTTP/1.1 405 Method Not Allowed", b"only GET and HEAD\n"),
        (b"\xff\xfe\r\n\r\n", b"HTTP/1.1 400 Bad Request", b"this is no request of HTTP/1.1\n"),
        (b"GET / FTP/1\r\n\r\n", b"HTTP/1.1 400 Bad Request", b"this is no request of HTTP/1.1\n"),
    ],
)
def test_requests(request_: bytes, first: bytes, body: bytes) -> None:
    async def main() -> None:
        async with serving() as port:
            head, _, text = (await ask(port, request_)).partition(b"\r\n\r\n")
            lines = head.split(b"\r\n")
            assert (lines[0], text) == (first, body)
            assert b"Connection: close" in lines
            length = len(body or "ö\n".encode())
            assert b"Content-Length: %d" % length in lines

    asyncio.run(main())


def test_a_head_without_end_is_refused_and_a_silent_client_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_REQUEST_SECONDS", 0.3)

    async def main() -> None:
        async with serving() as port:
            assert (await ask(port, b"GET / HTTP/1.1\r\nX: " + b"x" * 20_000)).startswith(b"HTTP/1.1 431 ")
            assert await ask(port, b"GET / HT") == b""

    asyncio.run(main())


def test_a_crowd_is_turned_away_and_comes_in_again_when_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_CONNECTIONS", 2)

    async def main() -> None:
        async with serving() as port:
            idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
            await asyncio.sleep(0.05)
            assert await ask(port, b"GET / HTTP/1.1\r\n\r\n") == b""
            for _, writer in idle:
                writer.close()
            await asyncio.sleep(0.05)
            assert (await ask(port, b"GET / HTTP/1.1\r\n\r\n")).startswith(b"HTTP/1.1 200 ")

    asyncio.run(main())


def test_to_stop_breaks_off_what_is_served_and_leaves_nothing() -> None:
    async def main() -> None:
        async with serving() as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            await asyncio.sleep(0.05)
        assert await asyncio.wait_for(reader.read(), 5) == b""
        writer.close()
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(main())


def test_a_port_that_is_taken_is_one_sentence_that_names_the_setting() -> None:
    async def main() -> None:
        async with serving() as port:
            with pytest.raises(UmbelError, match=rf"cannot listen at 127.0.0.1:{port}: .*\[plugins.options.health\]"):
                await Server({}).start("127.0.0.1", port)

    asyncio.run(main())
