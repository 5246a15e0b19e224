"""Who speaks with whom, over what, about what; and what cannot be, with its reason.

``docs/reference/interop.md`` holds the two tables that this module writes: ``python tests/interop/interop_matrix.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from attrs import frozen

BROKERS: Final = ("redis", "rabbitmq")
PEERS: Final = ("umbel", "celery", "node")
FEATURES: Final = (
    "success",
    "failure",
    "retry",
    "eta",
    "expires",
    "priority",
    "ignore_result",
    "link",
    "errback",
    "chain",
)
FORMS: Final = ("msgpack", "yaml", "pickle", "zlib")
"""Serializers beside json, and a compressor."""

_CALLED = {"umbel": "Umbel", "celery": "Celery", "node": "celery-node", "redis": "Redis", "rabbitmq": "RabbitMQ"}


@frozen
class Cell:
    """One thing that one client asks of one worker on one broker."""

    broker: str
    client: str
    worker: str
    feature: str

    def __str__(self) -> str:
        return f"{self.broker}-{self.client}_client-{self.worker}_worker-{self.feature}"


@frozen(kw_only=True)
class Impossible:
    """Cells that cannot be; an empty tuple means all."""

    brokers: Sequence[str] = ()
    clients: Sequence[str] = ()
    workers: Sequence[str] = ()
    features: Sequence[str]
    why: str

    def holds(self, cell: Cell) -> bool:
        chosen = (
            (self.brokers, cell.broker),
            (self.clients, cell.client),
            (self.workers, cell.worker),
            (self.features, cell.feature),
        )
        return all(not names or name in names for names, name in chosen)


IMPOSSIBLE: Final = (
    Impossible(
        clients=("node",),
        features=("eta", "expires", "priority", "ignore_result", "link", "errback", "chain", *FORMS),
        why="celery-node's calls take arguments and nothing else, and it writes JSON only",
    ),
    Impossible(
        workers=("node",),
        features=("retry",),
        why="celery-node has no retries: a handler's promise ends the task",
    ),
    Impossible(
        workers=("node",),
        features=("ignore_result", "link", "errback", "chain"),
        why="celery-node's worker runs the call and stores its result; it reads no other header and nothing that rides in the "
        "body beside the arguments",
    ),
    Impossible(
        workers=("node",),
        features=("expires",),
        why="celery-node's worker does not read `expires`, and takes messages from the broker as they come, so that RabbitMQ "
        "has no time to drop one",
    ),
    Impossible(
        brokers=("redis",),
        workers=("node",),
        features=("eta",),
        why="celery-node's worker does not read `eta`, and on Redis whoever takes a message must keep its time",
    ),
    Impossible(
        clients=("celery",),
        workers=("node",),
        features=("eta",),
        why="celery-node's worker does not read `eta`, and Celery leaves it to the worker to keep the time",
    ),
    Impossible(
        brokers=("redis",),
        workers=("node",),
        features=("priority",),
        why="celery-node's worker reads the bare list only: what has a priority of 3 or more lies in another list and is "
        "never run, and 0 to 2 are one",
    ),
    Impossible(
        brokers=("rabbitmq",),
        workers=("node",),
        features=("priority",),
        why="celery-node declares its queue without `x-max-priority`; RabbitMQ refuses it one that has",
    ),
    Impossible(
        workers=("node",),
        features=FORMS,
        why="celery-node's worker reads JSON only, not compressed",
    ),
)


def cells(features: Sequence[str]) -> Iterator[Cell]:
    """Every cell that can be."""
    for broker in BROKERS:
        for client in PEERS:
            for worker in PEERS:
                for feature in features:
                    if reason(cell := Cell(broker, client, worker, feature)) is None:
                        yield cell


def reason(cell: Cell) -> str | None:
    """Why a cell cannot be; None where it can."""
    return next((each.why for each in IMPOSSIBLE if each.holds(cell)), None)


def works() -> str:
    """What works, as a table: a row for each pair, a column for each feature."""
    lines = ["| client → worker | " + " | ".join((*FEATURES, *FORMS)) + " |"]
    lines.append("|---" * (1 + len(FEATURES) + len(FORMS)) + "|")
    for client in PEERS:
        for worker in PEERS:
            marks = []
            for feature in (*FEATURES, *FORMS):
                can = [broker for broker in BROKERS if reason(Cell(broker, client, worker, feature)) is None]
                marks.append("both" if len(can) == len(BROKERS) else ", ".join(_CALLED[b] for b in can) or "no")
            lines.append(f"| {_CALLED[client]} → {_CALLED[worker]} | " + " | ".join(marks) + " |")
    return "\n".join(lines)


def cannot() -> str:
    """What cannot be, as a table."""
    lines = ["| broker | client | worker | what | why |", "|---|---|---|---|---|"]
    for each in IMPOSSIBLE:
        who = [", ".join(_CALLED[n] for n in names) or "any" for names in (each.brokers, each.clients, each.workers)]
        lines.append(f"| {' | '.join(who)} | {', '.join(each.features)} | {each.why} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(works(), cannot(), sep="\n\n")
