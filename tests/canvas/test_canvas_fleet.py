"""Generated canvases and the error rules on real brokers and stores, each message thrice, amid kills and cut connections."""

from __future__ import annotations

import os
import random
import time

import pytest
from canvas_fleet import PAIRS, Fleet, Sent, fleet, shown  # noqa: F401  # a fixture among them
from canvas_model import CASES, drawn
from cluster import FULL, cluster  # noqa: F401  # a fixture, that the one above needs

SEED = int(os.environ.get("CANVAS_SEED", "0")) or (random.SystemRandom().randrange(1, 2**31) if FULL else 7)
"""Of the canvases, the cases and the kills; printed by a run that draws its own."""
CANVASES, LARGEST, WORKERS = (200, 60, 3) if FULL else (6, 15, 2)


@pytest.mark.slow
@pytest.mark.timeout(700 if FULL else 300)
@pytest.mark.parametrize("fleet", PAIRS, indirect=True, ids="-".join)
def test_each_canvas_ends_as_it_must_amid_kills_and_cuts(fleet: Fleet) -> None:  # noqa: F811  # the fixture
    chance = random.Random(f"{SEED} {fleet.cluster.settings}")
    trees = drawn(CANVASES, SEED, depth=5 if FULL else 3, width=20 if FULL else 5, largest=LARGEST)
    cases = chance.sample(CASES, len(CASES) // 20 if FULL else 2)
    fleet.misbehave(copies=3, late=2.0 if FULL else 0.5, faults=0.01)
    begun = time.monotonic()
    for _ in range(WORKERS):
        fleet.worker()
    sent = Sent(fleet)
    sent.send(trees, cases)
    for worker in [*fleet.workers.values()]:
        worker.wait_ready()
    kills, cuts = ((2, 5), (1, 4)) if FULL else ((0.2, 0.5), (0.1, 0.5))
    with (
        fleet.killing(chance, every=kills, most=10**9 if FULL else 1),
        fleet.cutting(chance, every=cuts, most=10**9 if FULL else 2),
    ):
        sent.wait(timeout=400 if FULL else 120)
    ended = time.monotonic()
    fleet.wait_until_idle(timeout=180 if FULL else 120)
    figures = sent.check()
    fleet.check_nothing_is_kept_for_ever()
    took = {"ended after": round(ended - begun, 1), "idle after": round(time.monotonic() - begun, 1)}
    print(shown({"seed": SEED, **figures, **took}))
