"""A server as a child process that can be killed, frozen and started again, and that never outlives the tests."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self

HOST = "127.0.0.1"
_PORTS = range(12_000, 32_000)
"""Below the range from which kernels take the ports of outgoing connections: none takes a port while its server is down."""
_START, _STOP = 110.0, 60.0
_LOG_SHOWN = 100

_given: set[int] = set()
_spawner = ThreadPoolExecutor(1, "servers")
"""The thread that is the parent of every server: the kernel ends them when the *thread* that started them is gone."""


class Missing(Exception):
    """The program of a server is not on this machine."""


class Failed(Exception):
    """A server did not start or stop as it should; the message ends with the last lines of its log."""


def program(name: str) -> str:
    """The path of an executable. Raises `Missing`, naming the command that installs it."""
    # Debian keeps servers where only root looks.
    found = shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/usr/local/sbin")
    if found is None:
        raise Missing(f"no {name} on this machine (make services installs what the tests need)")
    return found


def free_port() -> int:
    """A port of 127.0.0.1 on which nobody listens, and that this process has not been given before."""
    while True:
        port = random.choice(_PORTS)
        if port not in _given:
            _given.add(port)
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind((HOST, port))
                except OSError:
                    continue  # in use
                return port


def refuses(port: int) -> bool:
    """Whether nobody listens on a port of this machine."""
    with socket.socket() as probe:
        probe.settimeout(5)
        return probe.connect_ex((HOST, port)) == errno.ECONNREFUSED


def spawn(
    command: Sequence[str], *, log: Path, folder: Path, env: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start a process that the kernel kills with this one, however this one ends. Both streams are appended to ``log``."""
    mortal = ["setpriv", "--pdeathsig", "KILL", "--"] if shutil.which("setpriv") else []

    def start() -> subprocess.Popen[bytes]:
        with log.open("ab") as out:
            # In a session of its own: the interrupt key ends the tests, which end their servers.
            return subprocess.Popen(
                [*mortal, *command],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                cwd=folder,
                env=env,
                start_new_session=True,
            )

    return _spawner.submit(start).result()


class Server(ABC):
    """One server: its folder and its port stay the same through any number of starts.

    Not started by being made; ``with server:`` starts it and kills it at the end.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder.resolve()
        self.port = free_port()
        self.log = self.folder / "server.log"
        self._process: subprocess.Popen[bytes] | None = None

    @abstractmethod
    def _spawn(self) -> subprocess.Popen[bytes]:
        """Start the process, from the folder as it is."""

    @abstractmethod
    def _ready(self) -> bool:
        """Whether clients are served. Must be quick; an ``OSError`` means no."""

    @property
    def pid(self) -> int:
        return self._running().pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> Self:
        """Start, and block until clients are served. Raises `Failed` when that does not come."""
        if self.running:
            raise Failed(f"{self} runs already")
        try:
            self._process = self._spawn()
            self.wait_until_ready()
        except BaseException:
            self.kill()
            raise
        return self

    def wait_until_ready(self, timeout: float = _START) -> None:
        """Block until clients are served, as after `resume` or when others have brought the server down and up."""
        end = time.monotonic() + timeout
        while not self._is_ready():
            if not self.running:
                raise Failed(f"{self} does not run:\n{self.tail()}")
            if time.monotonic() > end:
                raise Failed(f"{self} serves nobody after {timeout:g} s:\n{self.tail()}")
            time.sleep(0.02)

    def kill(self) -> None:
        """SIGKILL, and block until the process is gone. A server that does not run is left alone."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(_STOP)
            self._process = None

    def stop(self) -> None:
        """An orderly end by SIGTERM. Raises `Failed` when it takes more than a minute (the server is then killed)."""
        process = self._running()
        process.terminate()
        try:
            process.wait(_STOP)
        except subprocess.TimeoutExpired:
            raise Failed(f"{self} did not stop within {_STOP:g} s:\n{self.tail()}") from None
        finally:
            self.kill()

    def restart(self) -> None:
        """An orderly stop, if it runs, and a start on the same port with the same data. ``kill(); start()`` is the rude way."""
        if self.running:
            self.stop()
        self.start()

    def pause(self) -> None:
        """SIGSTOP: connections stay open, and nothing is answered."""
        self._running().send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        self._running().send_signal(signal.SIGCONT)

    def tail(self) -> str:
        """The last lines of the log."""
        if not self.log.exists():
            return "(no log)"
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-_LOG_SHOWN:])

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            raise Failed(f"{self} does not run:\n{self.tail()}")
        return self._process

    def _is_ready(self) -> bool:
        try:
            return self._ready()
        except OSError:
            return False

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.kill()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} at {HOST}:{self.port} in {self.folder}>"
