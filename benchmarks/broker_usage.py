"""What processes and servers use: CPU time, memory, commands. Linux."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_TICK: Final = os.sysconf("SC_CLK_TCK")


def tree(pid: int) -> Iterator[int]:
    """The process and all that it has started and not lost, fork servers and their children included."""
    yield pid
    for task in _tasks(pid):
        try:
            children = Path(f"/proc/{pid}/task/{task}/children").read_text().split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        for child in children:
            yield from tree(int(child))


def _tasks(pid: int) -> list[str]:
    try:
        return os.listdir(f"/proc/{pid}/task")
    except FileNotFoundError:
        return []


def cpu_by_process(pid: int) -> dict[int, float]:
    """CPU seconds of each process of the tree, of its threads that have ended too."""
    found: dict[int, float] = {}
    for one in tree(pid):
        try:
            fields = Path(f"/proc/{one}/stat").read_text().rsplit(")", 1)[1].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        found[one] = (int(fields[11]) + int(fields[12])) / _TICK
    return found


def cpu(pid: int) -> float:
    return sum(cpu_by_process(pid).values())


def proportional_memory(pid: int) -> float:
    """MiB of the tree, pages that are shared counted in part in each (PSS)."""
    total = 0
    for one in tree(pid):
        try:
            lines = Path(f"/proc/{one}/smaps_rollup").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError):
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1024
