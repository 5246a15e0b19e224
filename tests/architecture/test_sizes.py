"""The budgets that keep the kernel a kernel. Crossing one is a design discussion, and its outcome is written here."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Mapping
from pathlib import Path

import pytest

import umbel.ports

ROOT = Path(__file__).resolve().parents[2]

KERNEL, MODULE, PLUGIN = 4500, 400, 600
"""Lines, docstrings and blank lines included; the kernel without ``umbel.testing``."""
METHODS = 8
"""Abstract methods of a port."""

AGREED: Mapping[str, tuple[int, str]] = {
    "umbel": (
        23_100,
        "a third is prose and blank lines; workflows (senders that die, unique calls, stamping), schedules, limits, revocation, "
        "unique calls and locks are decided in the kernel, for every driver alike; what could leave, and why it has not, is in "
        "docs/explanation/decisions.md",
    ),
    "umbel/model.py": (
        600,
        "one value after another, each field with its sentence, and their makers by position; a split would part what is read "
        "together",
    ),
    "umbel/protocol.py": (
        550,
        "the wire format in both directions, with the trap beside each line, and what is usual read at once; one file to compare",
    ),
    "umbel/app.py": (
        470,
        "the composition root: one property for each component, and what people call on an app",
    ),
    "umbel/task.py": (
        500,
        "what a call may say, and a task with every way to send it, once for threads and once for event loops",
    ),
    "umbel/settings/schema.py": (
        520,
        "every setting of the kernel, each with its help, which is the reference; one file to look them up in",
    ),
    "umbel_amqp": (
        3700,
        "leases, exact counts (of two kinds of server), delays and one-step moves on a broker that has none "
        "of them; the next leader of a queue is found; and the frames of the protocol, with short ways for deliveries and their "
        "headers: three times as quick",
    ),
    "umbel_celery": (
        3450,
        "a transport, a serializer, remote control with events, the account of chords, and a table of settings, in one word",
    ),
    "umbel_memory": (1250, "transport, result store and scheduler store with every ability: the official test double"),
    "umbel_memory/broker.py": (410, "one structure under one lock: what the test double promises is read in one place"),
    "umbel_children": (
        2950,
        "fork server, channel, shared memory, both sides of children that run one job or many, or a last start; "
        "and what pools without children take of it",
    ),
    "umbel_redis": (
        3550,
        "transport, result store and scheduler store on single servers, Sentinel and Cluster; a third are scripts",
    ),
    "umbel_sqlite": (2250, "three stores for several processes, with wake-ups that sqlite does not have"),
    "Transport": (9, "eight verbs, and the `close` that every port has"),
}
"""What is over its budget: up to which size, and why."""


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def distributions() -> dict[str, dict[str, int]]:
    """The modules of each distribution, and their sizes."""
    packages = sorted(
        path for part in ("core", "shared/*", "plugins/*", "contrib/*") for path in ROOT.glob(f"{part}/src/umbel*")
    )
    return {
        package.name: {
            str(path.relative_to(package.parent)): lines(path)
            for path in sorted(package.rglob("*.py"))
            if not path.is_relative_to(ROOT / "core/src/umbel/testing")
        }
        for package in packages
    }


def ports() -> dict[str, int]:
    """The abstract classes of ``umbel.ports``, and how many methods each leaves to its drivers."""
    modules = [
        importlib.import_module(f"umbel.ports.{port.name}") for port in pkgutil.iter_modules(umbel.ports.__path__)
    ]
    return {
        name: len(cls.__abstractmethods__)
        for module in modules
        for name, cls in inspect.getmembers(module, inspect.isabstract)
        if cls.__module__ == module.__name__
    }


def measured() -> dict[str, tuple[int, int]]:
    """Everything with a budget: its size, and its budget."""
    sizes = {}
    for package, modules in distributions().items():
        sizes[package] = (sum(modules.values()), KERNEL if package == "umbel" else PLUGIN)
        sizes |= {module: (size, MODULE) for module, size in modules.items()}
    return sizes | {port: (size, METHODS) for port, size in ports().items()}


def test_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = measured()
    told = [name for name, (size, budget) in sizes.items() if "/" not in name or size > budget]
    with capsys.disabled():
        print("\n")
        for name in told:
            size, budget = sizes[name]
            print(f"  {name:32} {size:5} of {budget:4}  {'over' if size > budget else ''}")
    over = {
        name: f"{size}, budget {budget}, agreed {AGREED.get(name, (budget, ''))[0]}"
        for name, (size, budget) in sizes.items()
        if size > AGREED.get(name, (budget, ""))[0]
    }
    assert not over, "make it smaller, or agree on why not, in AGREED"


def test_nothing_is_agreed_that_is_not_needed() -> None:
    sizes = measured()
    assert not [name for name in AGREED if name not in sizes or sizes[name][0] <= sizes[name][1]]
    assert all(reason for _, reason in AGREED.values())
