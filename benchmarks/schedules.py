"""100,000 periodic entries before one scheduler: how late runs are sent, and how soon a change takes effect.

    python benchmarks/schedules.py                      # SQLite, in a temporary folder
    python benchmarks/schedules.py --url redis://localhost:6379/9    # an empty database

A scheduler process leads over ``--entries`` entries, of which ``--due`` a second are due; each sending is a message in the
broker. Meanwhile entries are made, changed and paused through the API. Lateness is the time of the broker's acceptance, as
the hook ``umbel_after_publish`` hears of it, after the due time that the message carries. Nothing runs the tasks: a worker
on the same two cores would be measured with it.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

APP = """
import json, os, time
from umbel import Umbel, hookimpl
from umbel.protocol import parse_time

class Lateness:
    def __init__(self):
        self.file = open(os.environ["LATENESS"], "a", buffering=1 << 16)
        self.flushed = 0.0

    @hookimpl
    def umbel_after_publish(self, messages):
        now = time.time()
        lines = [f"{m.headers['umbel-schedule']} {now:.6f} {now - parse_time(m.headers['umbel-due']):.6f}" for m in messages
                 if "umbel-schedule" in m.headers]
        self.file.write("\\n".join(lines) + "\\n" if lines else "")
        if now - self.flushed > 0.05 or any(line.startswith("probe") for line in lines):
            self.file.flush()
            self.flushed = now

app = Umbel("bench", broker=os.environ["URL"], results=os.environ["URL"], plugins=[Lateness()])
"""


def main() -> None:
    """Fill the store, start a scheduler, watch it for a while, and change entries meanwhile."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="broker and store; default: SQLite in a temporary folder")
    parser.add_argument("--entries", type=int, default=100_000)
    parser.add_argument("--due", type=float, default=200.0, help="entries due in a second")
    parser.add_argument("--seconds", type=float, default=30.0)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder), chosen.url or f"sqlite:///{folder}/bench.sqlite3", chosen)


def measure(folder: Path, url: str, chosen: argparse.Namespace) -> None:
    from umbel import Umbel

    (folder / "bench_app.py").write_text(APP)
    lateness = folder / "lateness"
    lateness.touch()
    app = Umbel("bench", broker=url, results=url)
    fill(app, chosen.entries, chosen.entries / chosen.due)
    environment = {**os.environ, "URL": url, "LATENESS": str(lateness), "PYTHONPATH": str(folder)}
    scheduler = subprocess.Popen(
        [sys.executable, "-m", "umbel", "-A", "bench_app", "scheduler", "-l", "WARNING"], cwd=folder, env=environment
    )
    try:
        while app.schedules.leader() is None:
            time.sleep(0.05)
        until_punctual(lateness)
        lateness.write_text("")
        before, begun = cpu(scheduler.pid), time.monotonic()
        effects: list[float] = []
        while time.monotonic() < begun + chosen.seconds:
            effects.append(effect_of_a_new_entry(app, lateness, len(effects)))
        load = (cpu(scheduler.pid) - before) / (time.monotonic() - begun)
    finally:
        scheduler.terminate()
        scheduler.wait()
    stopped = effect_of_a_pause(app)
    late = sorted(float(line.split()[2]) for line in lateness.read_text().splitlines() if not line.startswith("probe"))
    print(f"{chosen.entries} entries, {len(late) / chosen.seconds:.0f} sent a second, {len(late)} in all")
    print(f"lateness   p50 {at(late, 0.5):7.1f} ms   p99 {at(late, 0.99):7.1f} ms   most {late[-1] * 1000:7.1f} ms")
    effects.sort()
    print(
        f"a change   p50 {at(effects, 0.5):7.1f} ms   most {effects[-1] * 1000:7.1f} ms until it took effect ({len(effects)})"
    )
    print(f"scheduler  {load:.0%} of a CPU, {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024:.0f} MiB")
    print(f"pausing one of them takes {stopped * 1000:.1f} ms")
    app.close()


def fill(app: object, entries: int, every: float) -> None:
    """Entries that are due every ``every`` seconds, their times spread evenly over it."""
    from attrs import evolve

    from umbel.schedule_store import to_plain
    from umbel.scheduling.entries import make_entry, planned

    begun = time.monotonic()
    one = make_entry(app, "entry", "bench.task", every=every)  # type: ignore[arg-type]  # an app
    for first in range(0, entries, 1000):
        part = []
        for n in range(first, min(entries, first + 1000)):
            schedule = {**one.schedule, "start": 1e9 + every * n / entries}
            entry = evolve(one, name=f"entry-{n}", schedule=schedule, args=(n,))
            part.append(to_plain(planned(app, entry)))  # type: ignore[arg-type]  # an app
        app.gateway.ask("schedules.upsert", part)  # type: ignore[attr-defined]  # an app
    print(f"{entries} entries made in {time.monotonic() - begun:.1f} s", file=sys.stderr)


def until_punctual(lateness: Path) -> None:
    """Wait until what became due while the store was filled has been sent."""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        lines = lateness.read_text().splitlines()
        if len(lines) > 10 and all(float(line.split()[2]) < 0.25 for line in lines[-10:]):
            return
        time.sleep(0.2)
    raise SystemExit("what became due at first is not sent within 120 s")


def effect_of_a_new_entry(app: object, lateness: Path, number: int) -> float:
    """Seconds from the call that makes an entry, which is due at once, until it is sent."""
    name = f"probe-{number}"
    called = time.time()
    app.schedules.create(name, "bench.task", every=0.05, max_runs=1)  # type: ignore[attr-defined]  # an app
    while True:
        sent = [line.split() for line in lateness.read_text().splitlines() if line.startswith(f"{name} ")]
        if sent:
            break
        time.sleep(0.01)
        if time.time() > called + 20:
            raise SystemExit(f"{name} was not sent within 20 s")
    app.schedules.delete(name)  # type: ignore[attr-defined]  # an app
    time.sleep(0.3)
    return float(sent[0][1]) - called


def effect_of_a_pause(app: object) -> float:
    begun = time.monotonic()
    app.schedules.pause("entry-0")  # type: ignore[attr-defined]  # an app
    return time.monotonic() - begun


def cpu(pid: int) -> float:
    """Seconds of CPU that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def at(values: Sequence[float], quantile: float) -> float:
    """A quantile of sorted seconds, in milliseconds."""
    return values[min(len(values) - 1, int(len(values) * quantile))] * 1000 if values else float("nan")


if __name__ == "__main__":
    main()
