"""`make chaos`: random disasters over a mixed load, on every durable broker; what was lost, repeated, stuck, and for how long.

Exit status 0 if nothing was lost, nothing is stuck, every task ended in the state it must, and every repetition is one that
"at least once" allows: a fault struck the worker or the process that ran the task the first time.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
for folder in (HERE.parent / "support", HERE.parent / "faults", HERE):
    sys.path.insert(0, str(folder))

from disasters import DISASTERS  # noqa: E402  # found by the lines above
from load import mixed  # noqa: E402  # as above
from servers.rabbitmq import RabbitServer  # noqa: E402  # as above
from stage import staged  # noqa: E402  # as above
from verdict import Verdict, judge  # noqa: E402  # as above

DRAIN = 180.0
"""Seconds in which all that is left must end after the last disaster."""


def run(
    folder: Path,
    broker: str,
    *,
    seed: int,
    tasks: int,
    disasters: int,
    kinds: Sequence[str] = (),
    first: Sequence[str] = (),
    step: float = 90.0,
    drain: float = DRAIN,
    rabbit: RabbitServer | None = None,
) -> Verdict:
    """One run on one broker. The same seed draws the same load and the same disasters; their moments are the machine's.

    ``first``: disasters that are never left out, of those that there are. ``step``: of clocks, back, in seconds.
    """
    chance = random.Random(f"{seed}:{broker}")
    possible = [one for one in DISASTERS[broker] if not kinds or one.__name__ in kinds]
    # Each once, as far as they go, then at random.
    order = chance.sample(possible, len(possible))
    order.sort(key=lambda one: one.__name__ not in first)
    order = order[:disasters] + chance.choices(possible, k=max(0, disasters - len(order)))
    with staged(folder, broker, rabbit, step=step) as stage:
        calls = mixed(chance, tasks, folder)
        stage.raise_curtain()
        stage.perform(calls, order, chance)
        stage.let_it_end(drain)
        return judge(stage.evidence())


def tell(broker: str, verdict: Verdict, seconds: float) -> None:
    """For people."""
    after_end = sum(each.after_end for each in verdict.again)
    print(f"{broker}: {'good' if verdict.good else 'BAD'}, {verdict.sent} tasks in {seconds:.0f} s")
    print(
        f"  lost {len(verdict.lost)}, stuck {len(verdict.stuck)}, in a wrong state {len(verdict.wrong)}, dead {verdict.dead}"
    )
    print(f"  at most once: {verdict.lost_at_most_once} taken along by a fault")
    print(
        f"  run again {len(verdict.again)}, of these after their end {after_end}, unexplained {len(verdict.unexplained)}"
    )
    print(f"  longest stall {verdict.longest_stall:.2f} s, outside the faults {verdict.longest_stall_calm:.2f} s")
    for kind, number in verdict.faults.items():
        print(f"  {number:3} x {kind:24} recovered within {verdict.recovery.get(kind, 0.0):.2f} s")
    for what, ids in (("lost", verdict.lost), ("stuck", verdict.stuck), ("wrong", verdict.wrong)):
        for each in ids[:5]:
            print(f"  {what}: {each}")
    for again in verdict.unexplained[:5]:
        print(f"  unexplained: {again}")


def main(arguments: Sequence[str] | None = None) -> int:
    known = sorted({one.__name__ for every in DISASTERS.values() for one in every})
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, help="draws load and disasters; else one at random, which is printed")
    parser.add_argument("--tasks", type=int, default=3000)
    parser.add_argument("--disasters", type=int, default=20, help="how many, one after another")
    parser.add_argument(
        "--duration", type=float, default=0.0, help="again and again with the next seeds for so many seconds"
    )
    parser.add_argument("--brokers", default="sqlite,redis,rabbitmq")
    parser.add_argument("--only", default="", help=f"some of: {', '.join(known)}")
    parser.add_argument("--json", action="store_true", help="one JSON document")
    parser.add_argument("--keep", action="store_true", help="leave logs and ledgers where they are")
    given = parser.parse_args(arguments)
    seed = random.randrange(1 << 32) if given.seed is None else given.seed
    kinds = tuple(filter(None, given.only.split(",")))
    if unknown := set(kinds) - set(known):
        parser.error(f"no such disaster: {', '.join(sorted(unknown))}")
    end, documents, good = time.monotonic() + given.duration, [], True
    while True:
        for broker in given.brokers.split(","):
            folder, began = Path(tempfile.mkdtemp(prefix=f"chaos-{broker}-")), time.monotonic()
            with (
                (folder / "end.log").open("w") as log,
                redirect_stdout(log),
            ):  # where the workers' logs are shown at the end
                verdict = run(folder, broker, seed=seed, tasks=given.tasks, disasters=given.disasters, kinds=kinds)
            seconds = time.monotonic() - began
            document: dict[str, Any] = {"seed": seed, "broker": broker, "seconds": round(seconds, 1)}
            documents.append({**document, **verdict.to_plain()})
            good = good and verdict.good
            if not given.json:
                print(f"seed {seed}", end=" ")
                tell(broker, verdict, seconds)
            if given.keep or not verdict.good:
                print(f"  logs and ledger: {folder}", file=sys.stderr)
            else:
                shutil.rmtree(folder)
        if time.monotonic() >= end:
            break
        seed += 1
    if given.json:
        print(json.dumps(documents, indent=2))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
