"""The demo: index the Python standard library, one task a file, on two worker processes of the embedded default.

    python demo/run.py [FILES]

Starts a worker from ``umbel.toml`` in this folder, sends every file (or the first so many), watches the results come in, and
sums up.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import click

from umbel import AsyncResult
from umbel.errors import ResultTimeout

HERE = Path(__file__).resolve().parent
BROKEN_ON_PURPOSE = {"data", "tokenizedata"}
"""Folders of the standard library whose files test what a parser must refuse."""


def sources() -> Iterator[str]:
    """Every Python file of the standard library of this interpreter."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = set(path.relative_to(root).parts)
        if not parts & BROKEN_ON_PURPOSE and "site-packages" not in parts and "dist-packages" not in parts:
            yield str(path)


def main() -> None:
    os.chdir(HERE)
    sys.path.insert(0, str(HERE))
    for leftover in HERE.glob("demo.sqlite3*"):
        if leftover.is_file():
            leftover.unlink()

    from indexer import FileIndex, app, index_file

    files = [*islice(sources(), int(sys.argv[1]) if sys.argv[1:] else None), str(HERE / "broken.txt")]
    indexes: list[FileIndex] = []
    failures: list[BaseException] = []
    with running_worker() as worker:
        started = time.perf_counter()
        handles = index_file.map_delay([(path,) for path in files])
        click.echo(f"sent {len(files):,} tasks in {time.perf_counter() - started:.2f} s; two processes index them:\n")
        with click.progressbar(handles, width=50, show_pos=True) as bar:
            for handle in bar:
                outcome = outcome_of(handle, worker)
                (failures if isinstance(outcome, BaseException) else indexes).append(outcome)
        summarise(indexes, failures, time.perf_counter() - started)
        show_dead_letters()
    app.close()
    click.echo(f"\nthe worker has stopped with status {worker.returncode}")
    if worker.returncode != 0 or len(indexes) != len(files) - 1 or len(failures) != 1:
        sys.exit("the demo did not end as it should")


@contextmanager
def running_worker() -> Iterator[subprocess.Popen[bytes]]:
    """A worker as a user starts one, stopped at the end. What it said is shown if it did not answer."""
    with tempfile.TemporaryFile("w+") as log:
        worker = subprocess.Popen([sys.executable, "-m", "umbel", "worker"], cwd=HERE, stderr=log)
        try:
            yield worker
        except ResultTimeout as error:
            log.seek(0)
            sys.exit(f"{error}; the status of the worker is {worker.poll()}, and it said:\n{log.read()}")
        finally:
            worker.send_signal(signal.SIGTERM)
            worker.wait(timeout=60)


def outcome_of(handle: AsyncResult[Any], worker: subprocess.Popen[bytes]) -> Any:
    """A task's value or its exception. Raises ``ResultTimeout``, and does not wait for a worker that is gone."""
    deadline = time.monotonic() + 120
    while True:
        try:
            return handle.get(timeout=2, propagate=False)
        except ResultTimeout:
            if worker.poll() is not None or time.monotonic() > deadline:
                raise


def summarise(indexes: list, failures: list, seconds: float) -> None:  # type: ignore[type-arg]  # types live in the demo's own app
    """Print the table of what was found."""
    longest = max(indexes, key=lambda index: index.longest_function[1])
    name, length = longest.longest_function
    rows = [
        ("files indexed", f"{len(indexes):,}"),
        ("lines", f"{sum(i.lines for i in indexes):,}"),
        ("functions", f"{sum(i.functions for i in indexes):,}"),
        ("classes", f"{sum(i.classes for i in indexes):,}"),
        ("imports", f"{sum(i.imports for i in indexes):,}"),
        ("longest function", f"{name}, {length:,} lines, in {Path(longest.path).name}"),
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
