"""Hints between processes: "there is something new in the file".

Whoever listens binds a datagram socket in the directory ``<file>-listeners``; whoever writes sends a byte to each. A hint
may be lost, late or needless: every listener also polls, so nothing but latency depends on it.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import secrets
import socket
import sys
from typing import Final

log = logging.getLogger("umbel.sqlite")

MESSAGES: Final = "messages"
BROADCASTS: Final = "broadcasts"
RESULTS: Final = "results"

_LONGEST_ADDRESS: Final = 100
"""Bytes: ``sun_path`` holds 108 on Linux and 104 elsewhere."""

_NOT_NOW: Final = (errno.EAGAIN, errno.ENOBUFS, errno.EACCES, errno.EPERM, errno.ENOENT, errno.EPROTOTYPE)
"""Full (it has hints enough), another user's, or just gone: its owner polls."""


class _Directory:
    """``<file>-listeners``, whose sockets are reached through a file descriptor where its path is too long for one."""

    def __init__(self, file: str) -> None:
        self.path = file + "-listeners"
        self._descriptor: int | None = None

    def make(self) -> None:
        try:
            os.mkdir(self.path)
        except FileExistsError:
            pass  # whoever listens first makes it

    def address(self, name: str) -> str:
        path = os.path.join(self.path, name)
        if len(os.fsencode(path)) <= _LONGEST_ADDRESS or sys.platform != "linux":
            return path
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        return f"/proc/self/fd/{self._descriptor}/{name}"

    def remove(self, name: str) -> None:
        try:
            os.unlink(os.path.join(self.path, name))
        except (FileNotFoundError, PermissionError):
            pass  # another ringer swept it first, or its owner must

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


class Ringer:
    """Sends hints. For one thread; never blocks on a listener."""

    def __init__(self, file: str) -> None:
        self._directory = _Directory(file)
        self._socket: socket.socket | None = None

    def ring(self, kinds: set[str]) -> None:
        """Wake every listener for one of ``kinds``, and sweep the sockets of listeners that died."""
        try:
            names = os.listdir(self._directory.path)
        except FileNotFoundError:
            return
        for name in names:
            if name.rpartition(".")[2] not in kinds:
                continue
            if self._socket is None:
                self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
                self._socket.setblocking(False)
            try:
                self._socket.sendto(b"!", self._directory.address(name))
            except ConnectionRefusedError:
                self._directory.remove(name)
            except OSError as error:
                if error.errno not in _NOT_NOW:
                    log.warning("cannot wake listener %s of %s: %s", name, self._directory.path, error)

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        self._directory.close()


class Bell:
    """Hears hints of one kind, for any number of waiters on one event loop.

    To miss nothing: read ``count``, look at the file, then ``wait`` with the count read before.
    """

    def __init__(self, file: str, kind: str) -> None:
        self.count = 0
        """Grows with every hint heard."""
        self._directory = _Directory(file)
        self._name = f"{os.getpid()}-{secrets.token_hex(4)}.{kind}"
        self._socket: socket.socket | None = None
        self._armed = self._closed = False
        self._waiters: set[asyncio.Future[None]] = set()

    def open(self) -> None:
        """Listen from now on. Harmless when called twice. Where no socket can be had, polling alone remains."""
        if self._socket is not None or self._closed:
            return
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        listener.setblocking(False)
        try:
            self._directory.make()
            listener.bind(self._directory.address(self._name))
        except OSError as error:
            listener.close()
            log.warning("no wake-ups in %s (%s): polling only", self._directory.path, error)
        else:
            self._socket = listener

    async def wait(self, seen: int, timeout: float) -> None:
        """Return at the first hint after ``count`` was ``seen``, after ``timeout`` seconds, or when closed."""
        if self.count != seen or self._closed:
            return
        loop = asyncio.get_running_loop()
        woken: asyncio.Future[None] = loop.create_future()
        self._waiters.add(woken)
        if self._socket is not None and not self._armed:
            loop.add_reader(self._socket, self._heard, loop)
            self._armed = True
        timer = loop.call_later(max(0.0, timeout), _wake, woken)
        try:
            await woken
        finally:
            timer.cancel()
            self._waiters.discard(woken)

    def _heard(self, loop: asyncio.AbstractEventLoop) -> None:
        assert self._socket is not None
        if not self._waiters:  # a busy process costs its peers nothing: the hint stays in the buffer until it is idle
            loop.remove_reader(self._socket)
            self._armed = False
            return
        try:
            while self._socket.recv(16):
                pass
        except BlockingIOError:
            self.stir()

    def stir(self) -> None:
        """Wake all waiters, as a hint does."""
        self.count += 1
        for woken in self._waiters:
            _wake(woken)

    def close(self) -> None:
        """Stop listening, wake all waiters, remove the socket."""
        self._closed = True
        self.stir()
        if self._socket is not None:
            if self._armed:
                asyncio.get_running_loop().remove_reader(self._socket)
            self._socket.close()
            self._socket = None
            self._directory.remove(self._name)
        self._directory.close()


def _wake(woken: asyncio.Future[None]) -> None:
    if not woken.done():
        woken.set_result(None)
