"""A TCP proxy between a client and a server, that does to their connections what networks do."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Callable
from enum import Enum
from typing import Self, TypeVar
from urllib.parse import urlsplit

from attrs import define, field

from servers.process import HOST, free_port

T = TypeVar("T")

_CHUNK = 65_536
_ANSWER = 30.0


class Side(Enum):
    """An end of a connection."""

    CLIENT = "client"
    SERVER = "server"


CLIENT, SERVER = Side.CLIENT, Side.SERVER
BOTH = (CLIENT, SERVER)


@define(eq=False)
class _Way:
    """What holds for all bytes *towards* one side."""

    open: asyncio.Event = field(factory=asyncio.Event)
    opens: asyncio.TimerHandle | None = None
    delay: float = 0.0
    cut_after: int | None = None
    """How many bytes a connection passes before it is cut."""
    has_cut: threading.Event = field(factory=threading.Event)


@define(eq=False)
class _Connection:
    ends: dict[Side, socket.socket]
    tasks: list[asyncio.Task[None]] = field(factory=list)
    passed: dict[Side, int] = field(factory=lambda: dict.fromkeys(BOTH, 0))
    """Bytes towards each side, since the connection began or the `Proxy.cut` in force."""
    ended: int = 0
    """How many sides have said all they have to say."""

    def close(self, *, reset: bool = False) -> None:
        for task in self.tasks:
            task.cancel()
        loop = asyncio.get_running_loop()
        for end in self.ends.values():
            # The cancelled tasks come to their turn later: the loop must not know the descriptors any more by then.
            loop.remove_reader(end)
            loop.remove_writer(end)
            if reset:
                _will_reset(end)
            end.close()


class Proxy:
    """Listens on ``port`` of 127.0.0.1 and passes all bytes to and from ``upstream_port``, in a thread of its own.

    Every method may be called from any thread while traffic runs, and has taken effect when it returns. A side given to
    `stall`, `delay` and `cut` is the one that the bytes go *to*: ``stall(CLIENT)`` holds back what the server says.
    """

    def __init__(self, upstream_port: int, upstream_host: str = HOST) -> None:
        self.port = free_port()
        self._upstream = (upstream_host, upstream_port)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"proxy-{self.port}", daemon=True)
        self._ways = {side: _Way() for side in BOTH}
        self._connections: list[_Connection] = []
        self._halves: list[_Connection] = []
        self._accepted = 0
        self._listener: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None

    def start(self) -> Self:
        self._thread.start()
        self._do(self._heal)
        return self

    def close(self) -> None:
        """Reset every connection, refuse new ones, and end the thread."""
        self._do(self._unlisten)
        self._do(self._reset)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(30)
        self._loop.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.close()

    def through(self, url: str) -> str:
        """The address of the server, made one that leads through this proxy."""
        parts = urlsplit(url)
        user, at, _ = parts.netloc.rpartition("@")
        return parts._replace(netloc=f"{user}{at}{HOST}:{self.port}").geturl()

    @property
    def live(self) -> int:
        """How many connections now lead from a client to the server."""
        return self._do(lambda: len(self._connections))

    @property
    def accepted(self) -> int:
        """How many connections clients have made so far."""
        return self._accepted

    # --- to the connections of this moment

    def reset(self) -> int:
        """RST to both ends of every connection. Returns how many there were."""
        return self._do(self._reset)

    def half_open(self, keeps: Side) -> int:
        """One end is gone, and the other does not know.

        ``keeps`` still has its connection, which takes all that it sends and says nothing any more; the other end sees its
        connection closed. So it stays until the end that was kept closes, or `reset`. Returns how many there were.
        """
        return self._do(lambda: self._halve(keeps))

    def cut(self, after: int, to: Side) -> threading.Event:
        """Close the first connection, of now or later, on which ``after`` more bytes have gone to one side: in mid-frame.

        That side gets exactly those bytes, then the end of the stream. It happens once; the answer is set when it has.
        """
        return self._do(lambda: self._arm(after, to))

    # --- to the connections of now and later, until `heal`

    def stall(self, *to: Side, seconds: float | None = None) -> None:
        """A black hole: what goes to these sides (to both, if none is named) waits, for ``seconds`` or until `heal`.

        Nothing is lost, as TCP loses nothing: then it goes on. New connections are made, and hear nothing.
        """
        self._do(lambda: self._stall(to or BOTH, seconds))

    def delay(self, seconds: float, *to: Side) -> None:
        """Every chunk (all that has come, up to 64 KiB) to these sides, or to both, waits so long first."""
        self._do(lambda: self._delay(to or BOTH, seconds))

    def refuse(self) -> None:
        """New connections are refused, as if no server ran. Those that exist stay."""
        self._do(self._unlisten)

    def heal(self) -> None:
        """No stall, delay, refusal, nor cut to come."""
        self._do(self._heal)

    # --- in the thread of the proxy

    def _do(self, act: Callable[[], T]) -> T:
        async def run() -> T:
            return act()

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(_ANSWER)

    def _reset(self) -> int:
        count = len(self._connections)
        for connection in [*self._connections, *self._halves]:
            connection.close(reset=True)
        self._connections.clear()
        self._halves.clear()
        return count

    def _halve(self, keeps: Side) -> int:
        halved, self._connections = self._connections, []
        for connection in halved:
            kept = connection.ends.pop(keeps)
            self._loop.remove_reader(kept)
            self._loop.remove_writer(kept)
            connection.close()
            half = _Connection({keeps: kept})
            half.tasks.append(self._loop.create_task(self._swallow(half, kept)))
            self._halves.append(half)
        return len(halved)

    def _arm(self, after: int, to: Side) -> threading.Event:
        for connection in self._connections:
            connection.passed[to] = 0
        way = self._ways[to]
        way.cut_after, way.has_cut = after, threading.Event()
        return way.has_cut

    def _stall(self, to: tuple[Side, ...], seconds: float | None) -> None:
        for way in (self._ways[side] for side in to):
            self._open(way)
            way.open.clear()
            if seconds is not None:
                way.opens = self._loop.call_later(seconds, way.open.set)

    def _open(self, way: _Way) -> None:
        way.open.set()
        if way.opens is not None:
            way.opens.cancel()
            way.opens = None

    def _delay(self, to: tuple[Side, ...], seconds: float) -> None:
        for side in to:
            self._ways[side].delay = seconds

    def _unlisten(self) -> None:
        if self._listener is not None and self._accepting is not None:
            self._accepting.cancel()
            self._loop.remove_reader(self._listener)
            self._listener.close()
            self._listener = self._accepting = None

    def _heal(self) -> None:
        for way in self._ways.values():
            self._open(way)
            way.delay, way.cut_after = 0.0, None
        if self._listener is None:
            self._listener = socket.create_server((HOST, self.port), backlog=128)
            self._listener.setblocking(False)
            self._accepting = self._loop.create_task(self._accept(self._listener))

    async def _accept(self, listener: socket.socket) -> None:
        while True:
            client, _ = await self._loop.sock_accept(listener)
            self._accepted += 1
            server = socket.socket()
            server.setblocking(False)
            connection = _Connection({CLIENT: client, SERVER: server})
            self._connections.append(connection)
            connection.tasks.append(self._loop.create_task(self._lead(connection, client, server)))

    async def _lead(self, connection: _Connection, client: socket.socket, server: socket.socket) -> None:
        try:
            await self._loop.sock_connect(server, self._upstream)
        except OSError:  # the server is down, which the client is to see
            self._end(connection, reset=True)
            return
        for end in (client, server):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.tasks = [
            self._loop.create_task(self._pass(connection, server, client, CLIENT)),
            self._loop.create_task(self._pass(connection, client, server, SERVER)),
        ]

    async def _pass(self, connection: _Connection, source: socket.socket, target: socket.socket, to: Side) -> None:
        way = self._ways[to]
        try:
            while chunk := await self._loop.sock_recv(source, _CHUNK):
                await self._wait(way)
                passed = connection.passed[to] = connection.passed[to] + len(chunk)
                if way.cut_after is not None and passed >= way.cut_after:
                    surplus, way.cut_after = passed - way.cut_after, None
                    await self._loop.sock_sendall(target, chunk[: len(chunk) - surplus])
                    self._end(connection)
                    way.has_cut.set()
                    return
                await self._loop.sock_sendall(target, chunk)
            await self._wait(way)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            self._end(connection, reset=True)  # one end has reset its connection, or is gone
            return
        connection.ended += 1
        if connection.ended == len(BOTH):
            self._end(connection)

    async def _wait(self, way: _Way) -> None:
        if way.delay:
            await asyncio.sleep(way.delay)
        await way.open.wait()

    async def _swallow(self, half: _Connection, kept: socket.socket) -> None:
        try:
            while await self._loop.sock_recv(kept, _CHUNK):
                pass
        except ConnectionError:
            pass  # the end that was kept is gone too
        self._halves.remove(half)
        kept.close()

    def _end(self, connection: _Connection, *, reset: bool = False) -> None:
        self._connections.remove(connection)
        connection.close(reset=reset)


def _will_reset(end: socket.socket) -> None:
    """Let `close` send RST, and forget what is not sent yet."""
    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
