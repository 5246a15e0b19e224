"""The parent's side of one fork server."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any, Final

from umbel.errors import UmbelError
from umbel.ports.pool import PoolContext
from umbel_children import channel
from umbel_children.channel import Channel, Frame, encode
from umbel_children.runner import Nature

_CLOSE_SECONDS: Final = 5.0
"""How long a fork server may take to end by itself."""


class ForkServer:
    """One fork server process. Any fault ends it whole, children included, and the pool makes another."""

    def __init__(
        self,
        on_frame: Callable[[int, int, Any], None],
        on_end: Callable[[ForkServer, str], None],
    ) -> None:
        """Calls ``on_frame(kind, number, value)`` for news of a child, and ``on_end`` once when the process fails."""
        self.alive = False
        self.ready = False
        """Whether it can make children."""
        self.pid = 0
        self._on_frame = on_frame
        self._on_end = on_end
        self._started: asyncio.Future[list[str]] = asyncio.get_running_loop().create_future()

    async def start(self, context: PoolContext, nature: Nature) -> list[str]:
        """Start the process and import the application in it; the names of threads that the import has started.

        Raises ``UmbelError`` with the traceback of the import, or when ``start_timeout`` passes.
        """
        factory = context.factory
        try:
            begin = encode((channel.BEGIN, factory.target, dict(factory.arguments), nature.to_plain()))
        except ValueError as error:
            raise UmbelError(f"the arguments of {factory.target} cannot be sent to a process: {error}") from error
        self._pool = nature.pool
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = _launch(theirs.fileno())
        self.pid = self._process.pid
        self.alive = True
        self._channel = Channel(ours, self._receive, self._end)
        self._channel.send(begin)
        try:
            return await asyncio.wait_for(self._started, context.start_timeout)
        except TimeoutError:
            raise UmbelError(
                f"the fork server has not imported {factory.target} within {context.start_timeout:g} s;"
                " make the import faster or raise the pool's start timeout"
            ) from None

    def spawn(self, child_socket: socket.socket, cell_fd: int, number: int, slots: int) -> bool:
        """Ask for a child; False if the process does not take requests any more."""
        return self._channel.send_fds(encode((channel.SPAWN, number, slots)), (child_socket.fileno(), cell_fd))

    def signal(self, number: int, signum: int) -> None:
        """Signal a child (its whole process group, to kill it), unless it has ended."""
        if self.alive:
            self._channel.send(encode((channel.SIGNAL, number, int(signum))))

    def give_up(self, why: str) -> None:
        """End the process because it does not do its work."""
        if self.alive:
            self._end(why)

    async def close(self) -> None:
        """End the process, and with it every child. Returns when it is reaped."""
        self.alive = self.ready = False
        if not self.pid:
            return
        self._channel.close()
        loop = asyncio.get_running_loop()
        kill_at = loop.time() + _CLOSE_SECONDS
        while self._process.poll() is None:
            if loop.time() >= kill_at:
                self._process.kill()
            await asyncio.sleep(0.002)

    def _receive(self, frames: Sequence[Frame]) -> None:
        for kind, number, *rest in frames:
            if kind == channel.READY:
                self._settle(number)
            elif kind == channel.FAILED:
                self._settle(UmbelError(f"the application cannot be imported:\n{number}"))
            else:
                self._on_frame(kind, number, rest[0])

    def _settle(self, answer: list[str] | UmbelError) -> None:
        if self._started.done():
            return
        if isinstance(answer, UmbelError):
            self._started.set_exception(answer)
        else:
            self.ready = True
            self._started.set_result(answer)

    def _end(self, why: str = "") -> None:
        was_ready = self.ready
        self.alive = self.ready = False
        self._channel.close()
        self._process.kill()
        try:
            how = describe_exit(self._process.wait(0.1))
        except subprocess.TimeoutExpired:
            how = "does not end"  # `close` goes on waiting
        if was_ready:
            self._on_end(self, f"the fork server died: {why or how}")
        self._settle(UmbelError(f"the fork server of the {self._pool} pool died at its start: {how}"))


def _launch(fd: int) -> subprocess.Popen[bytes]:
    # Not `-m`: the path must be ours before anything is imported, however this process came by it.
    code = f"import sys; sys.path[:] = {sys.path!r}; from umbel_children.server import main; main({fd})"
    flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]  # as multiprocessing does
    command = [sys.executable, *flags, "-c", code]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=(fd,), process_group=0)


def describe_exit(code: int | str) -> str:
    """How a process ended, in the words of ``Ending.LOST``."""
    if isinstance(code, str):
        return code
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {-code} ({signal.Signals(-code).name})"
    except ValueError:
        return f"signal {-code}"  # a real-time signal has no name
