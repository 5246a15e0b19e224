"""Plugins are imported in children where that is possible: what ends its process is told, and harms no other."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

import pytest

from umbel.plugins.inventory import PluginRecord, inventory

from .conftest import DRIVERS, Install

ODD = """
    from attrs import frozen

    @frozen
    class Odd:
        durable: object = threading.Lock

    FakeTransport.capabilities = Odd()
"""


@pytest.fixture
def birds(install: Install) -> None:
    """Some well-made plugins round two that end the process that imports them."""
    sources = {
        "auk": DRIVERS,
        "exits": "import os; os._exit(3)",
        "heron": DRIVERS,
        "killed": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        "odd": "\n    import threading" + DRIVERS + ODD,
        "wren": DRIVERS,
    }
    for name, source in sources.items():
        install(f"umbel-{name}", {"umbel.transports": {name: f"umbel_{name}:FakeTransport"}}, {f"umbel_{name}": source})


def told() -> dict[str, PluginRecord]:
    return {r.name: r for r in inventory(load=True) if r.target.endswith(":FakeTransport")}


def children() -> set[str]:
    """Processes of ours, the dead that nobody has waited for included; other tests may have left servers running."""
    return {pid for task in Path("/proc/self/task").glob("*/children") for pid in task.read_text().split()}


@pytest.mark.usefixtures("birds")
@pytest.mark.parametrize("processors", [1, 2, 5])
def test_what_ends_its_process_is_told_and_harms_no_other(processors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: processors)
    monkeypatch.setattr(threading, "active_count", lambda: 1)  # the test's own runner may have one beside it
    before = children()
    records = told()
    assert {name: record.state for name, record in records.items()} == {
        "auk": "ok", "exits": "broken", "heron": "ok", "killed": "broken", "odd": "ok", "wren": "ok",
    }  # fmt: skip
    assert records["exits"].reason == (
        "transport 'exits' (umbel-exits 1.0) is broken: importing umbel_exits:FakeTransport ended the process with status 3 "
        "([broker] url)"
    )
    assert "ended the process with signal 9" in records["killed"].reason
    assert records["odd"].capabilities is not None
    assert "lock" in str(records["odd"].capabilities["durable"])
    assert "umbel_auk" not in sys.modules, "a child has imported it"
    assert children() == before


def test_a_process_with_threads_does_not_fork(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("umbel-auk", {"umbel.transports": {"auk": "umbel_auk:FakeTransport"}}, {"umbel_auk": DRIVERS})
    with monkeypatch.context() as elsewhere:
        elsewhere.delattr(os, "fork")
        without = told()
    assert without["auk"].state == "ok"
    over = threading.Event()
    other = threading.Thread(target=over.wait)
    other.start()
    try:
        monkeypatch.setattr(os, "fork", lambda: pytest.fail("forked beside a thread"))
        assert told() == without
    finally:
        over.set()
        other.join(30)
