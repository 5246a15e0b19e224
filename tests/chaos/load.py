"""A mixed load, drawn from a seed: what a real queue holds, and what people should not send but do."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import field, frozen
from verdict import Sent


@frozen
class Call:
    """One task to send."""

    kind: str
    task: str
    args: Sequence[Any] = ()
    options: Mapping[str, Any] = field(factory=dict)
    state: str = "SUCCESS"
    once: bool = False
    fatal: bool = False

    def sent(self, task_id: str, at: float) -> Sent:
        return Sent(id=task_id, at=at, kind=self.kind, state=self.state, once=self.once, fatal=self.fatal)


MIX: Mapping[str, int] = {
    "quick": 50,
    "short": 16,
    "long": 4,
    "computing": 2,
    "async": 6,
    "early": 4,
    "retried": 5,
    "failing": 3,
    "delayed": 4,
    "dying": 2,
    "segfaulting": 1,
    "out of memory": 1,
    "forking": 1,
    "forking with a lock": 1,
}
"""Kinds of tasks, and how many of a hundred are of each."""


def mixed(chance: random.Random, number: int, folder: Path) -> list[Call]:
    """``number`` calls in random order; files that some of them need lie in ``folder``."""
    kinds = chance.choices(list(MIX), weights=list(MIX.values()), k=number)
    return [_call(kind, n, chance, folder) for n, kind in enumerate(kinds)]


def _call(kind: str, n: int, chance: random.Random, folder: Path) -> Call:
    match kind:
        case "quick":
            return Call(kind, "note", (n, 0.0))
        case "short":
            return Call(kind, "note", (n, chance.uniform(0.002, 0.02)))
        case "long":
            return Call(kind, "note", (n, chance.uniform(0.2, 0.6)))
        case "computing":
            return Call(kind, "spin", (0.05,))
        case "async":
            return Call(kind, "async_sleep", (chance.uniform(0.001, 0.05), n))
        case "early":
            return Call(kind, "early", (n, 0.005), once=True)
        case "retried":
            return Call(kind, "flaky", (chance.randint(1, 2), chance.uniform(0.01, 0.3)))
        case "failing":
            return Call(kind, "fail", ("as it must",), state="FAILURE")
        case "delayed":
            return Call(kind, "note", (n, 0.001), {"countdown": chance.uniform(0.2, 2.0)})
        case "dying" | "segfaulting":
            way = "segfaults" if kind == "segfaulting" else chance.choice(["exits", "kills itself", "aborts"])
            return Call(kind, "perish_once", (str(folder / f"flag-{n}"), way), fatal=True)
        case "out of memory":
            return Call(kind, "perish", ("runs out of memory",), state="FAILURE")
        case "forking":
            return Call(kind, "breed", (3, 4, 0.3))
        case _:
            return Call(kind, "fork_with_a_lock")
