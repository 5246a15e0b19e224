"""Frames between the processes of a pool, and the parent's end of a socket on its event loop.

A frame is four bytes of length and a ``marshal`` body: both ends are the same interpreter, and the values are plain
data. For 32 jobs with protocol-2 headers marshal takes 37 µs to write and 109 µs to read, pickle 83 and 142.
"""

from __future__ import annotations

import asyncio
import marshal
import socket
import struct
from collections.abc import Callable, Sequence
from typing import Any, Final

_LENGTH: Final = struct.Struct("=I")
CHUNK: Final = 1 << 16
"""Bytes read at once. Above 128 KiB each read maps memory anew: 13 KB then cost 2.4 µs a job, and 1.7 so."""

# Between the parent and a child.
JOBS: Final = 1
"""``first, payloads``: jobs numbered ``first``, ``first + 1``, …"""
REPLY: Final = 2
"""``call, good, value``: the answer to an upcall, or the error that ``errors.to_plain`` made."""
READY: Final = 3
FAILED: Final = 4
"""``traceback``: the child (or the fork server) cannot start."""
ENDED: Final = 5
"""``sequence, runtime, payload, None | (ending, detail)``: what the executor returned, or how else the job ended. One
that the child found recalled ends as RETURNED; the parent has taken it back already or, if it could not tell, learns it
from this."""
RETIRING: Final = 6
"""``""``: everything is reported; no other job will be started."""
UPCALL: Final = 7
"""``call, verb, payload``"""
INTERRUPT: Final = 8
"""``sequence, cancel``: raise in that job of a child that runs many; what it has not begun is skipped, if cancelled."""
SLOTS: Final = 9
"""``slots``: how many jobs a child that runs many may run at once from now on."""
FULL: Final = 10
"""``""``: the child has grown too large; it begins no job that it is given from now on, and ends those it has begun."""
# Between the parent and the fork server. A child has a number that is never used twice.
BEGIN: Final = 20
"""``target, arguments, nature``: what every child will run, and how."""
SPAWN: Final = 21
"""``number, slots``; with the child's socket and its cell as file descriptors."""
SIGNAL: Final = 22
"""``number, signal``"""
SPAWNED: Final = 23
"""``number, pid``"""
EXITED: Final = 24
"""``number, exit code`` (negative: the signal), or text where it could not be forked."""


Frame = tuple[Any, ...]


def encode(frame: Frame) -> bytes:
    """The bytes of a frame. Raises ``ValueError`` where a value is not plain data."""
    body = marshal.dumps(frame)
    return _LENGTH.pack(len(body)) + body


class Decoder:
    """Cuts a stream of bytes into frames."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        """Of a frame that is not complete."""
        self._missing = 0
        """Bytes without which it cannot be: a large one is joined once, not at each chunk."""

    def feed(self, chunk: bytes) -> Sequence[Frame]:
        """The frames that ``chunk`` completes."""
        if self._pieces:
            self._pieces.append(chunk)
            self._missing -= len(chunk)
            if self._missing > 0:
                return []
            chunk, self._pieces = b"".join(self._pieces), []
        frames: list[Frame] = []
        start, size, length, loads = 0, len(chunk), _LENGTH.unpack_from, marshal.loads
        while start < size:
            end = start + 4 + (length(chunk, start)[0] if size - start >= 4 else 0)
            if end > size:
                self._pieces, self._missing = [chunk[start:]], end - size
                break
            frames.append(loads(chunk[start + 4 : end]))  # a slice of bytes costs less than one of a memoryview
            start = end
        return frames


class Channel:
    """The parent's end of a socket pair. Never blocks; everything happens on the event loop."""

    def __init__(
        self,
        sock: socket.socket,
        on_frames: Callable[[Sequence[Frame]], None],
        on_end: Callable[[], None],
    ) -> None:
        """Calls ``on_frames`` with what has come, in order, and ``on_end`` once when the other side has closed."""
        sock.setblocking(False)
        self.open = True
        """The other side has not closed."""
        self._sock = sock
        self._on_frames = on_frames
        self._on_end = on_end
        self._decoder = Decoder()
        self._unsent = bytearray()
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(sock, self._read)

    def send(self, data: bytes) -> None:
        """Send, or keep until there is room. What is sent to a dead process is lost; its end is told by ``on_end``."""
        if not self._unsent:
            sent = self._try(data)
            if sent == len(data):
                return
            self._loop.add_writer(self._sock, self._write)
            data = data[sent:]
        self._unsent += data

    def send_fds(self, data: bytes, fds: Sequence[int]) -> bool:
        """Send a small frame with file descriptors at once; False if there is no room. To a dead process as ``send``."""
        try:
            return not self._unsent and socket.send_fds(self._sock, [data], fds) == len(data)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def drain(self) -> None:
        """Deliver all that a dead process has sent."""
        while self._sock.fileno() >= 0 and self.open and self._read():
            pass

    def finish(self) -> None:
        """Tell the other side that nothing more will come."""
        if self.open:
            try:
                self._sock.shutdown(socket.SHUT_WR)
            except OSError:
                pass  # the other side is gone already, and on_end says so

    def close(self) -> None:
        """Free the socket; no callback comes any more. Harmless when called twice."""
        if self._sock.fileno() >= 0:
            self._loop.remove_reader(self._sock)
            self._loop.remove_writer(self._sock)
            self._sock.close()
        self.open = False

    def _try(self, data: bytes | bytearray) -> int:
        try:
            return self._sock.send(data)
        except BlockingIOError:
            return 0
        except OSError:
            return len(data)

    def _write(self) -> None:
        del self._unsent[: self._try(self._unsent)]
        if not self._unsent:
            self._loop.remove_writer(self._sock)

    def _read(self) -> bool:
        try:
            chunk = self._sock.recv(CHUNK)
        except BlockingIOError:
            return False
        except ConnectionError:
            chunk = b""  # it closed with unread frames in its buffer
        if chunk:
            self._on_frames(self._decoder.feed(chunk))
            return True
        self._loop.remove_reader(self._sock)
        self.open = False
        self._on_end()
        return False
