"""How long `umbel plugins` takes with forty plugins more than are installed here, three of them broken in different ways.

    python benchmarks/inventory.py [--plugins 40] [--rounds 15]

Each run is a process of its own, as when a person types the command; its output must list every plugin and tell the trouble
of the three. Bytecode is compiled once, before the first run, as an installation does it. For comparison: the same
interpreter doing nothing, and importing what the command line itself needs.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

SERIALIZER = """\
from umbel.ports.serializer import Serializer

class Made(Serializer):
    api_version = {version}
    name = "{name}"
    content_type = "application/x-{name}"
    content_encoding = "binary"

    def dumps(self, value):
        return repr(value).encode()

    def loads(self, data):
        return data
"""
TRANSPORT = """\
import asyncio
from umbel.capabilities import TransportCapabilities
from umbel.ports.transport import Transport

class Made(Transport):
    api_version = {version}
    capabilities = TransportCapabilities()

    async def publish(self, messages, *, timeout): ...
    def consume(self, queues, *, credit, lease): ...
    async def settle(self, settlements): ...
    async def renew(self, deliveries, *, lease, starting=False): ...
    async def declare(self, queues): ...
    async def purge(self, queue): ...
    async def depth(self, queues=()): ...
    async def peek(self, queue, *, limit=100, offset=0): ...
    async def close(self): ...
"""
BROKEN = {
    7: ("1 / 0\n", "raised ZeroDivisionError: division by zero"),
    19: ("import feathers\n" + SERIALIZER, "needs the module 'feathers', which is not installed"),
    31: (SERIALIZER.replace("{version}", "(9, 0)"), "is for plugin API 9.0"),
}
"""What three of the plugins are, all offered as serializers, and what is to be told of them."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plugins", type=int, default=40, help="plugins to write (default: 40)")
    parser.add_argument("--rounds", type=int, default=15, help="runs of each command (default: 15)")
    options = parser.parse_args()
    if options.plugins <= max(BROKEN):
        parser.error(f"{max(BROKEN) + 1} plugins or more, for number {max(BROKEN)} is one of the broken ones")

    with tempfile.TemporaryDirectory() as folder:
        names = [f"bird{number:02}" for number in range(options.plugins)]
        for number, name in enumerate(names):
            write(Path(folder, "site"), name, number)
        commands: Mapping[str, list[str]] = {
            "an interpreter that does nothing": ["-c", ""],
            "umbel --version": ["-m", "umbel", "--version"],
            "umbel plugins": ["-m", "umbel", "plugins"],
        }
        times: dict[str, list[float]] = {title: [] for title in commands}
        work: dict[str, list[float]] = {title: [] for title in commands}
        for round_ in range(-1, options.rounds):  # the one before the first fills the cache of bytecode
            for title, arguments in commands.items():
                seconds, worked, said = run(folder, arguments)
                if title == "umbel plugins":
                    check(said, names)
                if round_ >= 0:
                    times[title].append(seconds)
                    work[title].append(worked)
    print(f"{'':34}{'median':>10}{'best':>10}{'worst':>10}{'processor':>12}   ({options.rounds} runs)")
    for title, taken in times.items():
        shown = (statistics.median(taken), min(taken), max(taken))
        print(f"{title:34}{''.join(f'{seconds:8.3f} s' for seconds in shown)}{statistics.median(work[title]):10.3f} s")


def write(site: Path, name: str, number: int) -> None:
    """One installed distribution: metadata and a module, every other one a transport."""
    source, kind = (SERIALIZER, "serializers") if number % 2 else (TRANSPORT, "transports")
    if number in BROKEN:
        source, _ = BROKEN[number]
    (info := site / f"umbel_{name}-1.0.dist-info").mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: umbel-{name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[umbel.{kind}]\n{name} = umbel_{name}.made:Made\n")
    (package := site / f"umbel_{name}").mkdir()
    (package / "__init__.py").touch()
    (package / "made.py").write_text(source.format(name=name, version="(1, 0)"))


def run(folder: str, arguments: list[str]) -> tuple[float, float, str]:
    """Seconds on the clock, seconds of a processor, which other load does not change, and the output."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("UMBEL_", "PYTHON"))}
    environment |= {"PYTHONPATH": os.path.join(folder, "site"), "PYTHONPYCACHEPREFIX": os.path.join(folder, "bytecode")}
    started, worked = time.perf_counter(), processor()
    done = subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    seconds = time.perf_counter() - started
    if done.returncode:
        sys.exit(f"{' '.join(arguments)} has ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return seconds, processor() - worked, done.stdout


def processor() -> float:
    """What the processes run so far have used."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def check(said: str, names: list[str]) -> None:
    missing = [name for name in names if f" {name} " not in said]
    untold = [sentence for _, sentence in BROKEN.values() if sentence not in said]
    if missing or untold:
        sys.exit(f"not listed: {missing}, not told: {untold}, in:\n{said}")


if __name__ == "__main__":
    main()
