"""Real workers as processes in a folder of their own, and what is needed to watch, stop and kill them."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest
from shop import define

from umbel import Umbel
from umbel.model import Message, dead_letter_queue
from umbel.ports.transport import QueueDepth
from umbel.result import AsyncResult

HERE = Path(__file__).parent
READY = " is ready"
FULL = os.environ.pop("UMBEL_TEST_FULL", "") == "1"  # taken out: an app takes every UMBEL_… for a setting
"""Everything at its full length."""
_LOG_SHOWN = 150
"""Last lines of each worker's log that a failing test shows."""

T = TypeVar("T")


def until(condition: Callable[[], T], what: str, *, timeout: float = 60.0, every: float = 0.02) -> T:
    """The first true value of ``condition``. Fails, saying ``what`` did not come, after ``timeout`` seconds."""
    end = time.monotonic() + timeout
    while not (value := condition()):
        if time.monotonic() > end:
            pytest.fail(f"not within {timeout:g} s: {what}; last seen: {value!r}")
        time.sleep(every)
    return value


def toml(settings: Mapping[str, Any], path: tuple[str, ...] = ()) -> str:
    """Nested settings as TOML."""
    plain = {key: value for key, value in settings.items() if not isinstance(value, Mapping)}
    lines = [f"[{'.'.join(json.dumps(part) for part in path)}]"] if path and plain else []
    lines += [f"{key} = {json.dumps(value)}" for key, value in plain.items()]
    tables = [toml(value, (*path, key)) for key, value in settings.items() if isinstance(value, Mapping)]
    return "\n".join([*lines, *tables])


# --- processes ----------------------------------------------------------------------------------


def parents() -> dict[int, int]:
    """Parent by process, of all that live; a zombie lives no more."""
    found = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                state, parent = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[:2]
            except (FileNotFoundError, ProcessLookupError):
                continue  # gone meanwhile
            if state != "Z":
                found[int(entry)] = int(parent)
    return found


def descendants(pid: int) -> list[int]:
    """Every process below ``pid``, parents first."""
    parent_of = parents()
    found, level = [], {pid}
    while level := {child for child, parent in parent_of.items() if parent in level}:
        found += sorted(level)
    return found


def send(pids: Sequence[int], signum: int) -> None:
    """Signal processes; those that are gone are left out."""
    for pid in pids:
        try:
            os.kill(pid, signum)
        except ProcessLookupError:
            pass  # a parent's death has taken it along


class WorkerProcess:
    """``umbel worker`` as a process."""

    def __init__(self, command: Sequence[str], *, folder: Path, env: Mapping[str, str], log: Path) -> None:
        self.log = log
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                command, cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def text(self) -> str:
        """What it has logged."""
        return self.log.read_text(errors="replace")

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    @property
    def family(self) -> list[int]:
        """The worker, its fork server, its children, and what they have started."""
        return [self.pid, *descendants(self.pid)]

    @property
    def children(self) -> list[int]:
        """Processes in which tasks run."""
        below = parents()
        servers = {pid for pid, parent in below.items() if parent == self.pid}
        return sorted(pid for pid, parent in below.items() if parent in servers)

    def wait_ready(self) -> WorkerProcess:
        until(
            lambda: READY in self.text or not self.running, f"worker {self.pid} becomes ready\n{self.text}", timeout=60
        )
        assert self.running, f"the worker ended with {self.process.returncode} at its start:\n{self.text}"
        return self

    def logged(self, text: str, *, timeout: float = 60.0) -> None:
        """Wait until it has logged ``text``."""
        until(lambda: text in self.text, f"{text!r} in {self.log.name}", timeout=timeout)

    def tell(self, signum: int) -> None:
        self.process.send_signal(signum)

    def tell_all(self, signum: int) -> None:
        """To the worker and every process below it, as a terminal or a service manager does."""
        send(self.family, signum)

    def kill_all(self) -> None:
        """SIGKILL to the worker and every process below it, the worker first: nobody can tell of it any more."""
        send(self.family, signal.SIGKILL)
        self.process.wait(10)

    def kill(self) -> None:
        """SIGKILL to the worker alone."""
        self.process.kill()
        self.process.wait(10)

    def end(self, signum: int = signal.SIGTERM, *, within: float = 40.0) -> int:
        """Signal it; the exit status. Fails if it does not end ``within`` seconds."""
        if self.running:
            self.tell(signum)
        return self.wait(within)

    def wait(self, within: float) -> int:
        try:
            return self.process.wait(within)
        except subprocess.TimeoutExpired:
            pytest.fail(f"worker {self.pid} has not ended within {within:g} s")


# --- the ledger ---------------------------------------------------------------------------------


class Ledger:
    """What the tasks themselves wrote down."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def lines(self, what: str | None = None, *, id: str | None = None, task: str | None = None) -> list[dict[str, Any]]:
        if not self.file.exists():
            return []
        every = map(json.loads, self.file.read_text().splitlines())
        return [
            line
            for line in every
            if what in (None, line["what"]) and id in (None, line["id"]) and task in (None, line["task"])
        ]

    def starts(self, id: str | None = None, *, task: str | None = None) -> list[dict[str, Any]]:
        return self.lines("start", id=id, task=task)

    def ends(self, id: str | None = None) -> list[dict[str, Any]]:
        return self.lines("end", id=id)

    def wait_start(self, id: str, *, number: int = 1, timeout: float = 60.0) -> dict[str, Any]:
        """The ``number``-th start of a task."""
        until(lambda: len(self.starts(id)) >= number, f"start {number} of task {id}", timeout=timeout)
        return self.starts(id)[number - 1]


# --- the whole ----------------------------------------------------------------------------------


class Site:
    """One application, one broker, one result store; where its workers run is the business of the subclasses."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ledger = Ledger(folder / "ledger.jsonl")

    @property
    def app(self) -> Umbel:
        """The app that sends."""
        raise LookupError("a site is one of its subclasses")

    # --- the sender's side ---

    def send(self, task: str, *args: Any, **options: Any) -> AsyncResult[Any]:
        return self.app.send_task(f"shop.{task}", args, **options)

    def send_many(self, task: str, calls: Sequence[Sequence[Any]], **options: Any) -> list[AsyncResult[Any]]:
        return self.app.tasks[f"shop.{task}"].map_delay(calls, timeout=30, **options)

    def publish(self, *messages: Message) -> None:
        """Messages as they are, however wrong."""
        self.app.client.send(messages)

    # --- the broker's side ---

    def depth(self, queue: str = "default") -> QueueDepth:
        gateway = self.app.gateway
        return gateway.runtime.call(gateway.transport.depth([queue]))[queue]  # type: ignore[attr-defined, no-any-return]  # a test's process has a gateway of its own

    def empty(self, queue: str = "default") -> bool:
        """Whether nothing waits and nothing is held."""
        depth = self.depth(queue)
        return not (depth.ready or depth.delayed or depth.leased)

    def dead(self, queue: str = "default") -> list[Message]:
        """The dead letters of a queue."""
        gateway = self.app.gateway
        peek = gateway.transport.peek(dead_letter_queue(queue), limit=10_000)  # type: ignore[attr-defined]  # as above
        return list(gateway.runtime.call(peek))  # type: ignore[attr-defined]  # as above

    def wait_empty(self, *, timeout: float = 60.0, queue: str = "default") -> None:
        until(lambda: self.empty(queue), f"queue {queue} is empty: {self.depth(queue)}", timeout=timeout, every=0.05)


class Cluster(Site):
    """One application, one broker file, one result store, any number of workers."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.workers: list[WorkerProcess] = []
        self.settings: dict[str, Any] = {}
        self._family = f"{folder}#{secrets.token_hex(4)}"
        self._app: Umbel | None = None
        self.configure()

    def configure(self, **settings: Any) -> Cluster:
        """Write ``umbel.toml``: dotted keys over the defaults, with two underscores for each dot."""
        chosen: dict[str, Any] = {
            "app": "shop",
            "broker__url": f"sqlite:///{self.folder}/broker.sqlite3",
            "results__url": f"sqlite:///{self.folder}/results.sqlite3",
            "worker__concurrency": 2,
            "worker__grace": 10,
        }
        self.settings = {}
        for key, value in {**chosen, **settings}.items():
            *tables, name = key.split("__")
            table = self.settings
            for part in tables:
                table = table.setdefault(part, {})
            table[name] = value
        (self.folder / "umbel.toml").write_text(toml(self.settings))
        return self

    @property
    def env(self) -> dict[str, str]:
        """The environment of every process of this cluster."""
        clean = {key: value for key, value in os.environ.items() if not key.startswith("UMBEL_")}
        python_path = os.pathsep.join(filter(None, [str(HERE), clean.get("PYTHONPATH", "")]))
        return {
            **clean,
            "LEDGER": str(self.ledger.file),
            "PYTHONPATH": python_path,
            "PYTHONUNBUFFERED": "1",
            "TESTBED_FAMILY": self._family,
        }

    @property
    def app(self) -> Umbel:
        """An app of the test's own process."""
        if self._app is None:
            self._app = define(Umbel("shop"))
            self._app.configure(file=self.folder / "umbel.toml")
        return self._app

    # --- workers ---

    def worker(self, *arguments: str, wait: bool = True, env: Mapping[str, str] | None = None) -> WorkerProcess:
        """Start ``umbel worker``; return when it is ready unless told not to wait."""
        command = [sys.executable, "-m", "umbel", "worker", *arguments]
        log = self.folder / f"worker-{len(self.workers) + 1}.log"
        worker = WorkerProcess(command, folder=self.folder, env={**self.env, **(env or {})}, log=log)
        self.workers.append(worker)
        return worker.wait_ready() if wait else worker

    def freeze(self, worker: WorkerProcess, *, children: bool = True) -> None:
        """SIGSTOP to a worker, but not while it holds the lock of a file, which would freeze the whole cluster."""
        frozen = worker.family if children else [worker.pid]

        def between_locks() -> bool:
            send(frozen, signal.SIGSTOP)
            # Each thread stops in its own time, and may take a lock until then.
            until(lambda: all(map(_stands, frozen)), "that every thread stands still", every=0)
            free = all(map(_lockable, self.folder.glob("*-lock")))
            if not free:
                send(frozen, signal.SIGCONT)
            return free

        until(between_locks, f"a moment in which worker {worker.pid} holds no lock", timeout=60, every=0.001)

    def umbel(self, *arguments: str, timeout: float = 60.0) -> subprocess.CompletedProcess[str]:
        """Run one command of ``umbel`` to its end."""
        return self.run("-m", "umbel", *arguments, timeout=timeout)

    def run(
        self, *arguments: str, timeout: float = 60.0, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run Python in this cluster's folder to its end."""
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=self.folder,
            env={**self.env, **(env or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    # --- the end ---

    def stragglers(self) -> list[int]:
        """Processes of this cluster that live, whoever their parent is now."""
        sign = f"TESTBED_FAMILY={self._family}".encode()
        found = []
        for pid in parents():
            try:
                if pid != os.getpid() and sign in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                    found.append(pid)
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue  # gone meanwhile, or another user's: not ours
        return found

    def _all_killed(self) -> bool:
        left = self.stragglers()
        send(left, signal.SIGKILL)
        for worker in self.workers:
            worker.process.poll()
        return not left

    def close(self) -> None:
        """End every process, and show the ends of the logs (which pytest prints only for a failed test)."""
        if self._app is not None:
            self._app.close()
        until(self._all_killed, "every process of the cluster is gone", timeout=30, every=0.01)
        for worker in self.workers:
            worker.process.wait(10)
            lines = worker.text.splitlines()
            print(f"--- {worker.log.name} (exit {worker.process.returncode}, {len(lines)} lines)")
            print("\n".join(lines[-_LOG_SHOWN:]))


def _stands(pid: int) -> bool:
    """Whether every thread of a process is stopped, or it is gone."""
    try:
        threads = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/stat")]
    except (FileNotFoundError, ProcessLookupError):
        return False  # a thread ended just now: look again
    return all(stat.rpartition(")")[2].split()[0] in "TtZX" for stat in threads)


def _lockable(file: Path) -> bool:
    end = time.monotonic() + 0.2  # another process may hold it for a moment
    with file.open("rb") as opened:
        while True:
            try:
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if time.monotonic() > end:
                    return False


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """A cluster without workers; every process of it is ended after the test, however the test ends."""
    made = Cluster(tmp_path)
    yield made
    made.close()


class InProcess(Site):
    """A worker in a thread of the test's own process: for brokers that live in one process, and for virtual clocks."""

    def __init__(self, folder: Path, app: Umbel) -> None:
        super().__init__(folder)
        self._app = app
        self.url = app.settings.broker.url
        self.worker = app.worker()
        self._thread = threading.Thread(target=self.worker.run, name="worker")

    @property
    def app(self) -> Umbel:
        return self._app

    def start(self) -> InProcess:
        os.environ["LEDGER"] = str(self.ledger.file)
        self._thread.start()
        until(self.worker.pool_started.is_set, "the worker starts")
        return self

    def close(self) -> None:
        if self._thread.is_alive():
            self.worker.request_stop()
            self._thread.join(40)
        os.environ.pop("LEDGER", None)
        self._app.close()
        assert not self._thread.is_alive(), "the worker does not stop"
