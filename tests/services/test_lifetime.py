"""Servers end with the tests that started them, however those end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cluster import until
from servers.rabbitmq import RabbitServer
from servers.redis import RedisServer

SUPPORT = Path(__file__).parents[1] / "support"

STARTS = """\
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background of a shell inherits that it is ignored
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
sys.path.insert(0, {support!r})
from servers.rabbitmq import RabbitServer
from servers.redis import RedisServer

def start():
    for kind in {kinds}:
        kind(Path(kind.__name__)).start()

with ThreadPoolExecutor() as threads:  # which end: it is the process that matters
    threads.submit(start).result()
print("started", flush=True)
{then}
"""


def of_folder(folder: Path) -> list[str]:
    """The living processes whose arguments or environment name ``folder``."""
    found, mark = [], os.fsencode(folder)
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and entry.name != str(os.getpid()):
            try:
                command = (entry / "cmdline").read_bytes()
                about = command + (entry / "environ").read_bytes() + os.fsencode(os.readlink(entry / "cwd"))
            except OSError:
                continue  # gone meanwhile
            if mark in about:
                found.append(f"{entry.name}: {command.decode(errors='replace')[:100]}")
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kinds", "then", "end"),
    [
        ("[RedisServer, RabbitServer]", "time.sleep(600)", signal.SIGKILL),
        ("[RedisServer]", "time.sleep(600)", signal.SIGINT),
        ("[RedisServer]", "", None),
    ],
    ids=["killed", "interrupted", "ended"],
)
def test_no_process_outlives_the_one_that_started_it(
    kinds: str, then: str, end: signal.Signals | None, tmp_path: Path, rabbitmq: RabbitServer, redis_server: RedisServer
) -> None:
    script = STARTS.format(support=str(SUPPORT), kinds=kinds, then=then)
    with subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "started\n"
            if end is not None:
                assert len(of_folder(tmp_path)) > 1  # the script, and what it started
                process.send_signal(end)
                process.wait(90)
        finally:
            process.kill()
    until(lambda: not of_folder(tmp_path), f"nothing of {tmp_path} is left")
    assert rabbitmq.running
    assert redis_server.running


def test_killing_a_node_leaves_none_of_its_helpers(make_rabbitmq: Callable[..., RabbitServer]) -> None:
    server = make_rabbitmq()
    assert len(of_folder(server.folder)) > 1
    server.kill()
    until(lambda: not of_folder(server.folder), f"nothing of {server} is left")
