"""As much of HTTP as a probe needs: one request a connection, a status and a short text."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Final

from attrs import frozen

from umbel.errors import UmbelError

_REQUEST_SECONDS: Final = 5.0
"""How long a whole exchange may take."""
_REQUEST_BYTES: Final = 8192
_CONNECTIONS: Final = 32
"""Most at once: a crowd of probes must not use up the file descriptors of a worker."""


@frozen
class Answer:
    """What is said to one request."""

    status: HTTPStatus
    text: str
    content_type: str = "text/plain; charset=utf-8"


class Server:
    """Serves ``pages``, by path, to GET and HEAD. A page is made anew for each request, and must not block."""

    def __init__(self, pages: Mapping[str, Callable[[], Answer]]) -> None:
        self._pages = pages
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.Task[None]] = set()

    async def start(self, host: str, port: int) -> int:
        """Listen; the port, which was chosen freely for 0. Raises ``UmbelError``."""
        try:
            self._server = await asyncio.start_server(self._accept, host, port, limit=_REQUEST_BYTES)
        except OSError as error:
            raise UmbelError(
                f"health: cannot listen at {host}:{port}: {error.strerror or error}; set host and port in "
                "[plugins.options.health], for each worker of a host its own"
            ) from error
        chosen: int = self._server.sockets[0].getsockname()[1]
        return chosen

    async def stop(self) -> None:
        """Listen no more, and break off what is being served."""
        if self._server is not None:
            self._server.close()
        for task in self._open:
            task.cancel()
        if self._open:
            await asyncio.wait(self._open)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._open) >= _CONNECTIONS:
            writer.close()
            return
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer), name="umbel-health")
        self._open.add(task)
        task.add_done_callback(self._open.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer):
            try:
                async with asyncio.timeout(_REQUEST_SECONDS):
                    await self._exchange(reader, writer)
            except (ConnectionError, TimeoutError, asyncio.IncompleteReadError):
                pass  # whoever asked is gone, or does not ask: there is nobody to tell

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.LimitOverrunError:
            answer, method = Answer(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "too large\n"), "GET"
        else:
            method, answer = self._answer(head.partition(b"\r\n")[0].decode("latin-1"))
        body = answer.text.encode()
        lines = [
            f"HTTP/1.1 {answer.status.value} {answer.status.phrase}",
            f"Content-Type: {answer.content_type}",
            f"Content-Length: {len(body)}",
            "Cache-Control: no-store",
            "Connection: close",
        ]
        writer.write("\r\n".join([*lines, "", ""]).encode() + (b"" if method == "HEAD" else body))
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    def _answer(self, line: str) -> tuple[str, Answer]:
        """The method of a request, and what to say to it."""
        words = line.split(" ")
        if len(words) != 3 or not words[2].startswith("HTTP/1."):
            return "GET", Answer(HTTPStatus.BAD_REQUEST, "this is no request of HTTP/1.1\n")
        method, target, _ = words
        if method not in ("GET", "HEAD"):
            return method, Answer(HTTPStatus.METHOD_NOT_ALLOWED, "only GET and HEAD\n")
        page = self._pages.get(target.partition("?")[0])
        if page is None:
            return method, Answer(HTTPStatus.NOT_FOUND, f"there are {', '.join(self._pages)}\n")
        return method, page()
