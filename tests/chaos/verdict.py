"""What became of everything that was sent, told from what the tasks themselves wrote down. Pure functions of plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from attrs import asdict, field, frozen

ON_THE_WAY = 1.0
"""Seconds that an acknowledgement may be on its way, through the sockets and the queues of a busy server, to its disk."""


@frozen(kw_only=True)
class Sent:
    """One task that the broker has accepted."""

    id: str
    kind: str
    """Which line of the load it is of."""
    at: float = 0.0
    """When it was sent; Unix time."""
    state: str = "SUCCESS"
    """In which it must end."""
    once: bool = False
    """Acknowledged before its start: it may be lost by a fault, and is never run twice."""
    fatal: bool = False
    """Its own first start kills its process: it is run again."""


@frozen(kw_only=True)
class Struck:
    """One fault that was done."""

    kind: str
    began: float
    ended: float
    workers: frozenset[str] | None = frozenset()
    """Names of the workers whose tasks it may have made run again; None: any."""
    pids: frozenset[int] = frozenset()
    """Processes that it killed."""
    deafens: bool = False
    """Acknowledgements that were on their way may not have arrived, and nobody is told: RabbitMQ confirms none."""

    def touches(self, line: Mapping[str, Any]) -> bool:
        return self.workers is None or line["worker"] in self.workers or line["pid"] in self.pids


@frozen(kw_only=True)
class Again:
    """A task that was started once more."""

    id: str
    kind: str
    after_end: bool
    """Its former execution had come to its end: only the word of it was lost."""
    because: str
    """The fault that explains it; empty: nothing does."""


@frozen(kw_only=True)
class Verdict:
    """The whole of one run."""

    sent: int
    starts: int
    lost: Sequence[str]
    """Accepted, without an end, and nobody has them any more."""
    lost_at_most_once: int
    """Of those acknowledged early: what a fault may take along."""
    stuck: Sequence[str]
    """Without an end when time was up, and still in the broker."""
    wrong: Sequence[str]
    """Ended in another state than they must, each as ``id: state``."""
    again: Sequence[Again]
    longest_stall: float
    """Seconds in which nothing started or ended anywhere, while something was left to do."""
    longest_stall_calm: float
    """Likewise, but outside the faults themselves."""
    recovery: Mapping[str, float]
    """By kind of fault: seconds from its end to the next sign of life, at most."""
    faults: Mapping[str, int]
    dead: int = 0

    @property
    def unexplained(self) -> Sequence[Again]:
        return [each for each in self.again if not each.because]

    @property
    def good(self) -> bool:
        return not (self.lost or self.stuck or self.wrong or self.unexplained or self.dead)

    def to_plain(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "good": self.good,
            "duplicated": len(self.again),
            "duplicated_after_end": sum(each.after_end for each in self.again),
            "unexplained": [asdict(each) for each in self.unexplained],
        }


@frozen(kw_only=True)
class Evidence:
    """All that a run has left behind."""

    sent: Sequence[Sent]
    lines: Sequence[Mapping[str, Any]]
    """The ledger."""
    states: Mapping[str, str]
    """As the result store has them, by id; those without a record are missing."""
    faults: Sequence[Struck] = ()
    left: int = 0
    """Messages that the broker still has."""
    dead: int = 0
    perhaps: frozenset[str] = field(default=frozenset())
    """Ids whose sending raised: nobody knows whether they arrived."""


def judge(evidence: Evidence) -> Verdict:
    """What there is to say."""
    lines = sorted(evidence.lines, key=lambda line: line["at"])
    starts: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    ends: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for line in lines:
        table = starts if line["what"] == "start" else ends if line["what"] == "end" else None
        if table is not None:
            table.setdefault((line["id"], line["retries"]), []).append(line)
    missing, wrong, taken = [], [], 0
    for one in evidence.sent:
        state = evidence.states.get(one.id)
        if state == one.state:
            continue
        if state is None or state not in ("SUCCESS", "FAILURE", "REVOKED"):
            if one.once:
                taken += 1
            else:
                missing.append(one.id)
        elif not (one.once and state == "FAILURE"):  # its process was killed, which is a failure
            wrong.append(f"{one.id}: {state}")
    known = {one.id: one for one in evidence.sent}
    begun: dict[str, list[Mapping[str, Any]]] = {}
    for line in lines:
        if line["what"] == "start":
            begun.setdefault(line["id"], []).append(line)
    return Verdict(
        sent=len(evidence.sent),
        starts=sum(map(len, starts.values())),
        lost=[] if evidence.left else missing,
        lost_at_most_once=taken,
        stuck=missing if evidence.left else [],
        wrong=wrong,
        again=[
            _again(
                known.get(key[0], Sent(id=key[0], kind="?")), begun[key[0]], pair, ends.get(key, ()), evidence.faults
            )
            for key, lines_of_it in starts.items()
            for pair in pairwise(lines_of_it)
        ],
        longest_stall=max((gap for gap, _ in _gaps(lines)), default=0.0),
        longest_stall_calm=max((_calm(lines[i]["at"], gap, evidence.faults) for gap, i in _gaps(lines)), default=0.0),
        recovery=_recovery(lines, evidence.faults),
        faults={
            kind: sum(1 for one in evidence.faults if one.kind == kind)
            for kind in sorted({f.kind for f in evidence.faults})
        },
        dead=evidence.dead,
    )


def _again(
    one: Sent,
    begun: Sequence[Mapping[str, Any]],
    pair: tuple[Mapping[str, Any], Mapping[str, Any]],
    ends: Sequence[Mapping[str, Any]],
    faults: Sequence[Struck],
) -> Again:
    """A fault explains it that struck one who had run it before: it may as well have doubled the message on its way back to
    the queue, or to its retry. A fault of the broker may have done so since it was sent, and so may one that struck a worker
    which had it in hand all the time and starts it last, for it was handed out first."""
    earlier, later = pair
    was_in_hand = later.get("attempt", 1) < earlier.get("attempt", 1)
    after_end = any(end["pid"] == earlier["pid"] and earlier["at"] <= end["at"] <= later["at"] for end in ends)
    because = ""
    for fault in faults:
        always = fault.workers is None or (was_in_hand and fault.touches(later))
        since = [one.at] if always else [line["at"] for line in begun if fault.touches(line)]
        if since and fault.began <= later["at"] and fault.ended >= min(since):
            because = fault.kind
            break
    if one.once:  # it was acknowledged before its start: nothing explains another, but that this was not heard
        because = next((f.kind for f in faults if f.deafens and _unheard(f, one, earlier)), "")
    elif one.fatal and not after_end:
        because = because or "its own death"
    return Again(id=one.id, kind=one.kind, after_end=after_end, because=because)


def _unheard(fault: Struck, one: Sent, start: Mapping[str, Any]) -> bool:
    """Whether the acknowledgement that came before ``start`` may have met with ``fault``."""
    return fault.began - ON_THE_WAY <= start["at"] and one.at <= fault.ended


def _gaps(lines: Sequence[Mapping[str, Any]]) -> list[tuple[float, int]]:
    return [(later["at"] - earlier["at"], i) for i, (earlier, later) in enumerate(pairwise(lines))]


def _calm(began: float, gap: float, faults: Sequence[Struck]) -> float:
    """What is left of a gap beside the faults that fall into it."""
    ended = began + gap
    return max(0.0, gap - sum(max(0.0, min(f.ended, ended) - max(f.began, began)) for f in faults))


def _recovery(lines: Sequence[Mapping[str, Any]], faults: Sequence[Struck]) -> dict[str, float]:
    found: dict[str, float] = {}
    for fault in faults:
        if (after := next((line["at"] for line in lines if line["at"] > fault.ended), None)) is not None:
            found[fault.kind] = max(found.get(fault.kind, 0.0), round(after - fault.ended, 3))
    return found
