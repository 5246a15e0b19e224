"""What systemd hears, from a notifier and from real workers."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from cluster import Cluster, until

from umbel.errors import UmbelError
from umbel_systemd.hook import SystemdOptions
from umbel_systemd.notifier import Notifier, take_from


class Manager:
    """The socket of the service manager."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind("\0" + name[1:] if name.startswith("@") else name)
        self.socket.setblocking(False)
        self.heard: list[dict[str, str]] = []

    def listen(self) -> list[dict[str, str]]:
        """Everything heard so far, a datagram each."""
        while True:
            try:
                text = self.socket.recv(4096).decode()
            except BlockingIOError:
                return self.heard
            self.heard.append(dict(line.split("=", 1) for line in text.splitlines()))

    def of(self, field: str) -> list[str]:
        return [told[field] for told in self.listen() if field in told]


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Manager]:
    made = Manager(str(tmp_path / "notify") if request.param == "path" else f"@umbel-test-{secrets.token_hex(8)}")
    with made.socket:
        yield made


def test_a_datagram_a_telling(manager: Manager) -> None:
    notifier = Notifier(manager.name)
    notifier.send(READY=1, STATUS="two\nlines")
    notifier.send(WATCHDOG=1)
    notifier.close()
    assert manager.listen() == [{"READY": "1", "STATUS": "two lines"}, {"WATCHDOG": "1"}]


def test_nobody_who_listens_is_no_trouble_and_is_logged_once(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    notifier = Notifier(str(tmp_path / "absent"))
    for _ in range(3):
        notifier.send(WATCHDOG=1)
    notifier.close()
    assert [record.message.partition(":")[0] for record in caplog.records] == ["systemd does not hear at NOTIFY_SOCKET"]


def test_a_manager_that_comes_late_holds_nobody_up_and_hears_what_still_counts(
    caplog: pytest.LogCaptureFixture, manager: Manager
) -> None:
    notifier = Notifier(manager.name)
    for number in range(2000):
        notifier.send(WATCHDOG=1, STATUS=number)
    notifier.send(READY=1, WATCHDOG=1)
    assert len(caplog.records) == 1
    assert manager.of("READY") == []
    manager.heard.clear()
    notifier.send()
    assert manager.listen() == [{"READY": "1", "STATUS": "1999"}]
    notifier.send()
    notifier.close()
    assert len(manager.listen()) == 1


@pytest.mark.parametrize(
    ("environment", "watchdog"),
    [
        ({"NOTIFY_SOCKET": "/run/x"}, None),
        ({"NOTIFY_SOCKET": "/run/x", "WATCHDOG_USEC": "3000000"}, 3.0),
        ({"NOTIFY_SOCKET": "/run/x", "WATCHDOG_USEC": "3000000", "WATCHDOG_PID": str(os.getpid())}, 3.0),
        ({"NOTIFY_SOCKET": "/run/x", "WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "1"}, None),
        ({"NOTIFY_SOCKET": "/run/x", "WATCHDOG_USEC": "0"}, None),
        ({"NOTIFY_SOCKET": "/run/x", "WATCHDOG_USEC": "soon"}, None),
    ],
)
def test_the_environment_is_read_and_emptied(environment: dict[str, str], watchdog: float | None) -> None:
    notifier, seconds = take_from(environment)
    assert notifier is not None
    notifier.close()
    assert (seconds, environment) == (watchdog, {})


def test_without_systemd_there_is_nobody_to_tell() -> None:
    assert take_from({"WATCHDOG_USEC": "1"}) == (None, None)
    with pytest.raises(UmbelError, match=r"'vsock:2:1', which is no socket of this host.*\[plugins\] hooks"):
        take_from({"NOTIFY_SOCKET": "vsock:2:1"})
    with pytest.raises(ValueError, match="restart_after must be more than 0"):
        SystemdOptions(restart_after=0)


def test_the_life_of_a_worker_is_told(cluster: Cluster, manager: Manager) -> None:
    cluster.configure(plugins__hooks=["systemd"], worker__concurrency=1, worker__grace=20, worker__start_timeout=45)
    worker = cluster.worker(env={"NOTIFY_SOCKET": manager.name, "WATCHDOG_USEC": "400000"})
    until(lambda: manager.of("READY") == ["1"], "ready")
    assert manager.heard[0] == {"STATUS": "starting", "EXTEND_TIMEOUT_USEC": "60000000"}
    until(lambda: len(manager.of("WATCHDOG")) > 3, "signs of life")
    task = cluster.send("gated", str(cluster.folder / "gate"))
    until(lambda: "1 running, 0 waiting" in manager.of("STATUS"), "the status")
    for pid in worker.family[1:]:
        assert b"NOTIFY_SOCKET" not in Path(f"/proc/{pid}/environ").read_bytes(), "children are not the service"
    worker.tell(signal.SIGTERM)
    until(lambda: manager.of("STOPPING"), "stopping")
    (last,) = [told for told in manager.heard if "STOPPING" in told]
    assert (last["EXTEND_TIMEOUT_USEC"], last["STATUS"]) == ("35000000", "stopping: 1 running, 0 waiting")
    signs = len(manager.of("WATCHDOG"))
    until(lambda: len(manager.of("WATCHDOG")) > signs, "signs of life while it drains")
    (cluster.folder / "gate").touch()
    assert worker.wait(40) == 0
    assert task.get(timeout=30) is None


@pytest.mark.parametrize("manager", ["path"], indirect=True)
def test_a_worker_that_hangs_gives_no_sign_of_life(cluster: Cluster, manager: Manager) -> None:
    cluster.configure(plugins__hooks=["systemd"])
    worker = cluster.worker(env={"NOTIFY_SOCKET": manager.name, "WATCHDOG_USEC": "200000"})
    until(lambda: manager.of("WATCHDOG"), "signs of life")
    cluster.freeze(worker)
    signs = len(manager.of("WATCHDOG"))
    time.sleep(0.5)
    assert len(manager.of("WATCHDOG")) == signs
    worker.tell_all(signal.SIGCONT)
    until(lambda: len(manager.of("WATCHDOG")) > signs, "signs of life again")


@pytest.mark.parametrize("manager", ["path"], indirect=True)
def test_a_broker_that_is_silent_too_long_ends_the_signs_of_life_where_that_is_asked_for(
    cluster: Cluster, manager: Manager
) -> None:
    cluster.configure(plugins__hooks=["systemd"], plugins__options__systemd__restart_after=6.0)
    cluster.worker(env={"NOTIFY_SOCKET": manager.name, "WATCHDOG_USEC": "200000"})
    until(lambda: manager.of("WATCHDOG"), "signs of life")
    with closing(sqlite3.connect(cluster.folder / "broker.sqlite3", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")

        def silent() -> bool:
            before = len(manager.of("WATCHDOG"))
            time.sleep(0.6)
            return len(manager.of("WATCHDOG")) == before

        until(silent, "no sign of life")
        other.execute("ROLLBACK")
    signs = len(manager.of("WATCHDOG"))
    until(lambda: len(manager.of("WATCHDOG")) > signs, "signs of life again")


def test_a_worker_that_systemd_has_not_asked_runs_as_ever(cluster: Cluster) -> None:
    cluster.configure(plugins__hooks=["systemd"])
    worker = cluster.worker()
    assert "NOTIFY_SOCKET is not set" in worker.text
    assert worker.end() == 0
