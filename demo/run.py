"""The demo: index the Python standard library, one task a file, on two worker processes of the embedded default.

Starts a worker from ``umbel.toml`` in this folder, sends every file, watches the results come in, and sums up.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import click

HERE = Path(__file__).resolve().parent
BROKEN_ON_PURPOSE = {"data", "tokenizedata"}
"""Folders of the standard library whose files test what a parser must refuse."""


def sources() -> Iterator[str]:
    """Every Python file of the standard library of this interpreter, and one that is not Python."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = set(path.relative_to(root).parts)
        if not parts & BROKEN_ON_PURPOSE and "site-packages" not in parts and "dist-packages" not in parts:
            yield str(path)
    yield str(HERE / "broken.txt")


def main() -> None:
    os.chdir(HERE)
    sys.path.insert(0, str(HERE))
    for leftover in HERE.glob("demo.sqlite3*"):
        if leftover.is_file():
            leftover.unlink()

    from indexer import FileIndex, app, index_file

    worker = subprocess.Popen([sys.executable, "-m", "umbel", "worker"], cwd=HERE, stderr=subprocess.DEVNULL)
    try:
        files = list(sources())
        started = time.perf_counter()
        handles = index_file.map_delay([(path,) for path in files])
        click.echo(f"sent {len(files):,} tasks in {time.perf_counter() - started:.2f} s; two processes index them:\n")
        indexes: list[FileIndex] = []
        failures: list[BaseException] = []
        with click.progressbar(handles, width=50, show_pos=True) as bar:
            for handle in bar:
                outcome = handle.get(timeout=120, propagate=False)
                (failures if isinstance(outcome, BaseException) else indexes).append(outcome)
        seconds = time.perf_counter() - started
        summarise(indexes, failures, seconds)
        show_dead_letters()
    finally:
        worker.send_signal(signal.SIGTERM)
        status = worker.wait(timeout=60)
        app.close()
    click.echo(f"\nthe worker has stopped with status {status}")
    if status != 0 or len(indexes) != len(files) - 1 or len(failures) != 1:
        sys.exit("the demo did not end as it should")


def summarise(indexes: list, failures: list, seconds: float) -> None:  # type: ignore[type-arg]  # types live in the demo's own app
    """Print the table of what was found."""
    longest = max(indexes, key=lambda index: index.longest_function[1])
    name, length, path = *longest.longest_function, longest.path
    rows = [
        ("files indexed", f"{len(indexes):,}"),
        ("lines", f"{sum(i.lines for i in indexes):,}"),
        ("functions", f"{sum(i.functions for i in indexes):,}"),
        ("classes", f"{sum(i.classes for i in indexes):,}"),
        ("imports", f"{sum(i.imports for i in indexes):,}"),
        ("longest function", f"{name}, {length:,} lines, in {Path(path).name}"),
        ("failed for good", f"{len(failures)}"),
        ("time", f"{seconds:.1f} s"),
        (
            "throughput",
            f"{len(indexes) / seconds:,.0f} files/s, {sum(i.lines for i in indexes) / seconds:,.0f} lines/s",
        ),
    ]
    click.echo()
    for label, value in rows:
        click.echo(f"  {label:<18} {value}")


def show_dead_letters() -> None:
    """Show the one that failed, as a user would look at it."""
    click.echo("\n$ umbel dead-letters list")
    subprocess.run([sys.executable, "-m", "umbel", "dead-letters", "list"], cwd=HERE, check=True)


if __name__ == "__main__":
    main()
