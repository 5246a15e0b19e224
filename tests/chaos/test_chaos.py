"""A short chaos on every durable broker, from a fixed seed. `make chaos` is the long one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cluster import FULL
from run import run, tell
from servers.process import Missing
from servers.rabbitmq import RabbitServer

SEED = int(os.environ.get("CHAOS_SEED") or 11)
TASKS, DISASTERS = (5000, 30) if FULL else (240, 5)
FIRST = {
    "sqlite": ("step_the_clock_back",),
    "redis": ("step_the_clock_back", "kill_the_broker"),
    "rabbitmq": ("step_the_clock_back", "kill_the_broker"),
}
"""What no short run leaves out."""
STEP = 90.0 if FULL else 4.0
"""A delayed task that a worker with a clock so far behind is given comes again so much later: too long for a short run."""


@pytest.fixture(scope="module")
def own_rabbitmq(tmp_path_factory: pytest.TempPathFactory, absent: Callable[[str], object]) -> Iterator[RabbitServer]:
    server = RabbitServer(tmp_path_factory.mktemp("chaos"))
    try:
        server.start()
    except Missing as reason:
        absent(str(reason))
    yield server
    server.kill()


@pytest.mark.slow
@pytest.mark.timeout(3600 if FULL else 300)
@pytest.mark.parametrize("broker", ["sqlite", "redis", "rabbitmq"])
def test_f03_f05_f13_nothing_is_lost_stuck_or_repeated_without_a_reason(
    broker: str, tmp_path: Path, request: pytest.FixtureRequest, redis_url: str
) -> None:
    """F1 to F6, F12, F13, F16: everything ends as it must, whatever is done to processes, disks, clocks and networks."""
    rabbit: RabbitServer | None = request.getfixturevalue("own_rabbitmq") if broker == "rabbitmq" else None
    verdict = run(
        tmp_path,
        broker,
        seed=SEED,
        tasks=TASKS,
        disasters=DISASTERS,
        first=FIRST[broker],
        step=STEP,
        drain=120.0,
        rabbit=rabbit,
    )
    tell(broker, verdict, 0.0)
    assert verdict.good, verdict
