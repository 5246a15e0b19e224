"""The fork server: a process with one thread that imports the application once and forks children on request.

It is started by exec, so it inherits neither threads nor held locks of the worker, and its children share its memory
until they write to it. It is told of nothing but children: no job ever passes through it. Signals go through it too,
because it alone knows for sure that a process id still belongs to the child that is meant.
"""

from __future__ import annotations

import ctypes
import gc
import os
import select
import signal
import socket
import sys
import threading
import traceback
from collections import deque
from pkgutil import resolve_name
from types import FrameType
from typing import Any, Final, NoReturn

from umbel.ports.pool import ExecutorFactory
from umbel_children import channel
from umbel_children.cells import Cell
from umbel_children.runner import Nature, Runner, leave

_PR_SET_PDEATHSIG: Final = 1


def main(fd: int) -> NoReturn:
    """Serve the parent at the other end of the socket ``fd`` until it closes, then kill every child and exit."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        # The worker decides when this process and its children stop. With handlers, not with SIG_IGN, which the
        # programs that a task starts would inherit.
        signal.signal(signum, _nothing)
    _die_with_parent()
    ForkServer(socket.socket(fileno=fd)).run()


class ForkServer:
    """State of the fork server."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._decoder = channel.Decoder()
        self._fds: deque[int] = deque()
        self._pids: dict[int, int] = {}
        self._wakeup, self._waker = os.pipe()

    def run(self) -> NoReturn:
        """Import the application, then fork, signal and reap until the parent closes the socket."""
        _, target, arguments, nature = self._first_frame()
        self._factory = ExecutorFactory(target=target, arguments=arguments)
        self._nature = Nature.from_plain(nature)
        try:
            self._runner: type[Runner] = resolve_name(self._nature.runner)
            if self._runner.preloads and (preload := getattr(resolve_name(target), "preload", None)):
                preload(**arguments)
        except BaseException:
            self._send(channel.FAILED, traceback.format_exc())
            leave(1)
        # Collected and frozen, the imported objects are not written to by the children's collectors: pages stay shared.
        gc.collect()
        gc.freeze()
        for end in (self._wakeup, self._waker):
            os.set_blocking(end, False)
        signal.signal(signal.SIGCHLD, _nothing)
        signal.set_wakeup_fd(self._waker, warn_on_full_buffer=False)
        threads = [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]
        self._send(channel.READY, threads)
        while True:
            readable, _, _ = select.select([self._sock.fileno(), self._wakeup], [], [])
            if self._wakeup in readable:
                os.read(self._wakeup, 4096)
                self._reap(os.WNOHANG)
            if self._sock.fileno() in readable:
                self._receive()

    def _first_frame(self) -> tuple[Any, ...]:
        while chunk := self._sock.recv(1 << 16):
            if frames := self._decoder.feed(chunk):
                return frames[0]
        return leave(0)

    def _receive(self) -> None:
        try:
            chunk, fds, _, _ = socket.recv_fds(self._sock, 1 << 16, 64)
        except ConnectionError:
            chunk, fds = b"", []
        if not chunk:
            for number in self._pids:
                self._signal(number, signal.SIGKILL)
            self._reap(0)
            leave(0)
        self._fds.extend(fds)
        for kind, number, *rest in self._decoder.feed(chunk):
            if kind == channel.SPAWN:
                self._spawn(number, rest[0], self._fds.popleft(), self._fds.popleft())
            elif number in self._pids:
                self._signal(number, rest[0])

    def _spawn(self, number: int, slots: int, sock_fd: int, cell_fd: int) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        try:
            pid = os.fork()
        except OSError as error:
            pid = -1
            self._send(channel.EXITED, number, f"cannot fork: {error}")
        if pid == 0:
            self._become_child(slots, sock_fd, cell_fd)
        os.close(sock_fd)
        os.close(cell_fd)
        if pid > 0:
            _own_group(pid)
            self._pids[number] = pid
            self._send(channel.SPAWNED, number, pid)

    def _become_child(self, slots: int, sock_fd: int, cell_fd: int) -> NoReturn:
        try:
            _die_with_parent()
            _own_group(0)
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.register_at_fork(after_in_child=_restore_signals)
            for fd in (self._wakeup, self._waker, *self._fds):
                os.close(fd)
            self._sock.close()
            cell = Cell(cell_fd, self._nature.rows)
            os.close(cell_fd)
            self._runner.prepare(self._nature.options)
            self._runner(socket.socket(fileno=sock_fd), cell, self._nature, slots).run(self._factory)
        except BaseException:
            traceback.print_exc()
        leave(1)

    def _signal(self, number: int, signum: int) -> None:
        """Signal a child; to kill it is to kill its process group, so that what a task started does not outlive it."""
        pid = self._pids[number]
        try:
            if signum == signal.SIGKILL:
                os.killpg(pid, signum)
            else:
                os.kill(pid, signum)
        except (ProcessLookupError, PermissionError):
            pass  # dead and not yet reaped, which some systems report so

    def _reap(self, flags: int) -> None:
        # One by one: whatever else the application has started at import is not ours to wait for.
        for number, pid in list(self._pids.items()):
            done, status = os.waitpid(pid, flags)
            if done:
                del self._pids[number]
                self._send(channel.EXITED, number, os.waitstatus_to_exitcode(status))

    def _send(self, *frame: Any) -> None:
        try:
            self._sock.sendall(channel.encode(frame))
        except ConnectionError:
            pass  # the parent is gone; the next read says so and ends everything


def _restore_signals() -> None:
    """For what a task forks: a process of its own, that stops like any other."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for signum in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(signum, signal.SIG_DFL)


def _nothing(signum: int, frame: FrameType | None) -> None:
    pass


def _own_group(pid: int) -> None:
    try:
        os.setpgid(pid, pid)
    except OSError:
        pass  # both sides do it, so that it is done before either goes on; the second may find it done or the child dead


def _die_with_parent() -> None:
    """Linux kills this process when the thread that started it ends, however that comes about.

    Elsewhere, and for a parent that died before this call, the closed socket tells: at once when idle, after the
    running job otherwise.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
