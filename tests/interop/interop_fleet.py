"""One broker with a worker of each kind on a queue of its own, and a client of each kind; each starts when first asked for."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from attrs import frozen
from cluster import WorkerProcess, toml, until
from interop_matrix import PEERS

HERE = Path(__file__).parent / "peers"
SHOWN = 60
"""Last lines of each worker's log that a failing test shows."""
PATIENCE = 40.0
"""Seconds for whatever takes a moment. Under load, Celery's worker on RabbitMQ now and then pauses for ten by itself."""

COMPRESSORS = ["zlib", "bzip2", "lzma", "brotli", "zstd"]
PRIORITIES = 9
QUEUES: Mapping[str, int | None] = {
    **{f"interop-{peer}": None for peer in PEERS},
    "interop-umbel-priority": PRIORITIES,
    "interop-celery-priority": PRIORITIES,
}
"""Every queue, with its number of priorities; celery-node can only share a queue that has none."""


@frozen(kw_only=True)
class Broker:
    """Where the messages and the results of one fleet are, as each side has it in its settings."""

    name: str
    url: str
    results: str

    @property
    def umbel(self) -> Mapping[str, Any]:
        """Umbel's settings of the broker and its queues."""
        if self.name == "redis":
            # What only Celery's workers read: they keep the time of a delayed message, Umbel's workers do not see it.
            theirs = [queue for queue in QUEUES if queue.startswith("interop-celery")]
            return {"broker": {"url": f"celery+{self.url}", "options": {"eta_queues": theirs}}}
        queues = {
            name: {"type": "classic"} | ({"max_priority": priorities} if priorities else {})
            for name, priorities in QUEUES.items()
        }
        return {"broker": {"url": self.url}, "queues": queues}


class Client:
    """A client in a process of its own, where its libraries' imports and connections are its own business."""

    def __init__(self, command: list[str], *, folder: Path, env: Mapping[str, str], log: Path) -> None:
        self.log = log
        with log.open("wb") as out:
            self._process = subprocess.Popen(
                command, cwd=folder, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=out
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._to, self._from = self._process.stdin, self._process.stdout
        self._heard = selectors.DefaultSelector()
        self._heard.register(self._from, selectors.EVENT_READ)

    def ask(self, do: str, *, patience: float = PATIENCE + 5, **order: Any) -> Mapping[str, Any]:
        self._to.write(json.dumps({"do": do, **order}).encode() + b"\n")
        self._to.flush()
        if not self._heard.select(patience):
            self.close()
            pytest.fail(f"{self.log.stem} does not answer {do} {order}:\n{self.log.read_text()}")
        answer: Mapping[str, Any] = json.loads(self._from.readline() or b'{"broken": "it has ended"}')
        if "broken" in answer:
            pytest.fail(f"{self.log.stem}: {do} {order}:\n{answer['broken']}\n{self.log.read_text()[-3000:]}")
        return answer

    # --- what it can be asked ---

    def send(self, task: str, args: list[Any] | None = None, **options: Any) -> str:
        """Send a task; its id, or that of the last of its chain."""
        return str(self.ask("send", task=task, args=args or [], **options)["id"])

    def get(self, id: str, timeout: float = PATIENCE) -> Any:
        """The value of a task that succeeds."""
        answer = self.ask("get", id=id, timeout=timeout)
        assert "raised" not in answer, answer
        return answer["value"]

    def catch(self, id: str, timeout: float = PATIENCE) -> Mapping[str, Any]:
        """What a task's failure raises here: ``class``, as it was rebuilt, and ``args``."""
        answer = self.ask("get", id=id, timeout=timeout)
        assert "raised" in answer, answer
        raised: Mapping[str, Any] = answer["raised"]
        return raised

    def look(self, id: str) -> Mapping[str, Any]:
        """``state`` and ``children`` as they are stored now."""
        return self.ask("look", id=id)

    def hang_up(self) -> None:
        """Ask for nothing more; it ends by itself."""
        self._to.close()

    def close(self) -> None:
        self.hang_up()
        self._heard.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(30)
        self._from.close()


class Fleet:
    """Workers and clients of every kind on one broker. Each worker runs one task at a time, and holds no other."""

    def __init__(self, folder: Path, broker: Broker, node_modules: Path) -> None:
        self.broker = broker
        self._folder = folder
        self._node = node_modules
        self._notes = folder / "notes"
        self._notes.mkdir()
        self._workers: dict[str, WorkerProcess] = {}
        self._clients: dict[str, Client] = {}
        settings = {
            "app": "on_umbel",
            "default_queue": "interop-umbel",
            "results": {"url": broker.results},
            "codec": {"accept": ["json", "msgpack", "yaml", "pickle"], "accept_compression": COMPRESSORS},
            "worker": {"concurrency": 1, "prefetch": 1, "queues": ["interop-umbel", "interop-umbel-priority"]},
            **broker.umbel,
        }
        (folder / "umbel.toml").write_text(toml(settings))

    @property
    def _env(self) -> Mapping[str, str]:
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("UMBEL_", "CELERY_"))}
        return {
            **clean,
            "INTEROP_BROKER": self.broker.url,
            "INTEROP_RESULTS": self.broker.results,
            "INTEROP_NOTES": str(self._notes),
            "INTEROP_QUEUES": json.dumps(QUEUES),
            "NODE_PATH": str(self._node / "node_modules"),
            "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE), clean.get("PYTHONPATH")])),
            "PYTHONUNBUFFERED": "1",
            "C_FORCE_ROOT": "1",  # a container of CI may have no other user; without it Celery refuses pickle
        }

    def client(self, peer: str) -> Client:
        if peer not in self._clients:
            script = (
                ["node", str(HERE / "client.js")] if peer == "node" else [sys.executable, str(HERE / f"on_{peer}.py")]
            )
            log = self._folder / f"{self.broker.name}-{peer}-client.log"
            self._clients[peer] = Client(script, folder=self._folder, env=self._env, log=log)
        return self._clients[peer]

    def worker(self, peer: str) -> WorkerProcess:
        """The worker, started if it is not; it need not be ready: what is sent to it waits in its queue."""
        if peer not in self._workers:
            queues = ",".join(queue for queue in QUEUES if queue.startswith(f"interop-{peer}"))
            command = {
                "umbel": [sys.executable, "-m", "umbel", "worker"],
                "celery": [
                    *(
                        sys.executable,
                        "-m",
                        "celery",
                        "-A",
                        "on_celery",
                        "worker",
                        "-P",
                        "solo",
                        "-c",
                        "1",
                        "-Q",
                        queues,
                    ),
                    *("-n", "interop@kit", "-l", "INFO", "--without-gossip", "--without-mingle", "--without-heartbeat"),
                ],
                "node": ["node", str(HERE / "worker.js")],
            }[peer]
            log = self._folder / f"{self.broker.name}-{peer}-worker.log"
            self._workers[peer] = WorkerProcess(command, folder=self._folder, env=self._env, log=log)
        worker = self._workers[peer]
        assert worker.running, f"the worker of {peer} has ended:\n{worker.text}"
        return worker

    def wait_for(self, number: int, queue: str) -> None:
        """Until so many messages are in ``queue``, and no worker has them."""
        watcher = self.client("umbel")
        until(lambda: watcher.ask("waiting", queue=queue)["ready"] == number, f"{number} messages wait in {queue}")

    # --- notes ---

    def note(self, name: str) -> Any:
        """What a task has written under ``name``, once it is there."""
        file = self._notes / name
        until(file.exists, f"note {name}", timeout=PATIENCE, every=0.01)
        return json.loads(file.read_text())

    def noted(self, name: str) -> bool:
        return (self._notes / name).exists()

    def let_go(self, name: str) -> None:
        """End ``interop.hold(name)``."""
        (self._notes / f"{name}.go").touch()

    # --- the end ---

    def show(self) -> str:
        """The ends of the workers' logs."""
        logs = [worker.log for worker in self._workers.values()]
        ends = {log.stem: "\n".join(log.read_text(errors="replace").splitlines()[-SHOWN:]) for log in logs}
        return "\n".join(f"--- {name}\n{text}" for name, text in ends.items())

    def close(self) -> None:
        for client in self._clients.values():
            client.hang_up()
        for worker in self._workers.values():
            if worker.running:
                worker.tell(signal.SIGTERM)
        for client in self._clients.values():
            client.close()
        for worker in self._workers.values():
            try:
                worker.process.wait(10)
            except subprocess.TimeoutExpired:
                pass  # it is killed below, and was asked for nothing any more
            worker.kill_all()
