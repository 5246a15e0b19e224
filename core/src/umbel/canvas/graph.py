"""What a workflow is stored as: joins, the branches that each of them starts, and what is shown of the whole.

A *branch* is one task, or several one after the other that ride in one message. Its end is marked in one *slot* of one *join*.
A join is complete when its slots are marked; then it starts its branches with the value, or hands the value on to a slot.
So a message says all about its place in two headers: the workflow, and the slot.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Final

from attrs import define, field, frozen

from umbel.canvas.rules import Need
from umbel.canvas.signature import Signature
from umbel.errors import DecodeError

WORKFLOW: Final = "umbel-workflow"
NODE: Final = "umbel-node"
ONCE: Final = "umbel-once"
"""Headers: the workflow's id; join and slot in which the task's end is marked; that only one copy may start."""

REST: Final = "umbel-rest"
"""Header: ids of the steps of a chain that ride behind the task in its message. Its own success is not the end of its branch."""
_REST_KEPT: Final = 500
"""Ids that are named there, the last ones: a broker bounds what headers may hold."""

TOGETHER: Final = "umbel-cancelled-with"
"""Header of the members of a group that cancels the others when one fails: which group that is."""

FIRE: Final = "umbel.workflows.fire"
"""The task that starts what a complete join starts."""
FIRES: Final = "fire/"
"""What stands before the workflow's id in the header of such a task: it is no part of it, and not cancelled with it."""
SENDING: Final = "sending"
"""Name of the join that holds as long as a workflow is being sent."""
WHY: Final = "why"
"""Its mark that says why sending broke off; the others are names of joins."""

LISTED: Final = 100
"""Members up to which a group's are listed one by one in what is shown of a workflow."""


def derived(*parts: object) -> str:
    """A UUID made of ``parts``: the same each time, so that what is sent twice has one id."""
    h = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=16).hexdigest()
    return f"{h[:8]}-{h[8:12]}-8{h[13:16]}-8{h[17:20]}-{h[20:]}"


@frozen
class Slot:
    """Where an end is marked."""

    join: str
    index: int = 0

    def __str__(self) -> str:
        return f"{self.join}:{self.index}"

    @classmethod
    def read(cls, text: object) -> Slot:
        """Raises ``DecodeError``."""
        join, _, index = str(text).rpartition(":")
        if not join or not index.isdecimal():
            raise DecodeError(f"the header {NODE} is {text!r}, which is no place in a workflow")
        return cls(join, int(index))


def tasks_in(chain: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """The signatures of tasks that have an id, of a chain as a message has it, those in groups and chains within among them."""
    for plain in chain:
        if plain.get("subtask_type") in ("chain", "group"):
            yield from tasks_in((plain.get("kwargs") or {}).get("tasks") or ())
        elif (plain.get("options") or {}).get("task_id"):
            yield from tasks_in(plain["options"].get("chain") or ())
            yield plain


def riding(chain: Iterable[Mapping[str, Any]]) -> list[str]:
    """Ids of the tasks of ``chain``, which is in reverse as a message has it; the last of them, where they are many."""
    return [str(plain["options"]["task_id"]) for plain in islice(tasks_in(chain), _REST_KEPT)]


def join_key(workflow: str, join: str) -> str:
    """The key under which the ends of a join's members are marked."""
    return f"{PREFIX}{workflow}/{join}"


def plan_id(workflow: str, join: str = "") -> str:
    """The id of the record that says what a join starts; without ``join``, of the one that shows the workflow."""
    return f"{PREFIX}{workflow}/{join}/plan" if join else f"{PREFIX}{workflow}"


PREFIX: Final = "umbel-workflow/"
CANCELS: Final = "!"
"""Last character of the name of a join that cancels its other members when one fails."""
ENOUGH: Final = "+"
"""In the name of a join, before the number of successes that complete it before all its members have ended."""


def enough_of(join: str) -> int | None:
    """How many successes complete ``join`` early; None: its members are all awaited."""
    _, plus, number = join.rstrip(CANCELS).partition(ENOUGH)
    return int(number) if plus else None


@frozen
class Branch:
    """Tasks one after the other that ride in one message, each ready to be sent: with its id, and options of a call."""

    steps: tuple[Signature, ...]
    end: Slot | None = None

    def to_plain(self) -> list[Any]:
        return [[step.to_plain() for step in self.steps], None if self.end is None else str(self.end)]

    @classmethod
    def from_plain(cls, plain: Sequence[Any]) -> Branch:
        steps, end = plain
        return cls(tuple(Signature.from_plain(step) for step in steps), None if end is None else Slot.read(end))


@define(kw_only=True)
class Join:
    """Members whose ends are awaited, and what follows."""

    id: str
    listed: bool
    """Its value is the list of its members' values; else the value of its one member."""
    size: int | None = 1
    """None: not known yet, for its members are being sent."""
    need: Need = "all"
    starts: Sequence[Branch] = ()
    to: Slot | None = None
    """Where its value is marked in its turn, if it starts nothing."""
    errbacks: Sequence[Mapping[str, Any]] = ()
    """Sent once if it fails."""
    last: bool = False
    """The workflow ends with it."""
    spread: bool = False
    """Its value takes as many places in the list of the join that it is handed to as it has members."""

    def to_plain(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "listed": self.listed,
            "size": self.size,
            "need": self.need,
            "starts": [branch.to_plain() for branch in self.starts],
            "to": None if self.to is None else str(self.to),
            "errbacks": list(self.errbacks),
            "last": self.last,
            "spread": self.spread,
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Join:
        return cls(
            id=plain["id"],
            listed=plain["listed"],
            size=plain["size"],
            need=plain["need"],
            starts=[Branch.from_plain(branch) for branch in plain["starts"]],
            to=None if plain["to"] is None else Slot.read(plain["to"]),
            errbacks=plain["errbacks"],
            last=plain["last"],
            spread=plain["spread"],
        )


@define(kw_only=True)
class Shown:
    """A task or a group of a workflow as people see it: its id, what came before it, what is in it."""

    id: str
    task: str = ""
    """Name of the task; of a group that is not listed, of its first member. Empty: a listed group."""
    slot: str = ""
    """The slot in which the end of its branch is marked."""
    before: Shown | None = None
    members: list[Shown] | None = None
    """Of a group."""
    count: int | None = None
    """Of a group whose members are not listed: how many they are, in order, with ids derived from the group's."""

    @property
    def is_group(self) -> bool:
        return self.members is not None or self.count is not None

    def ids(self) -> Iterator[str]:
        """Ids of the tasks in it, in order, without what came before it."""
        if self.count is not None:
            yield from (derived(self.id, index) for index in range(self.count))
        elif self.members is not None:
            for member in self.members:
                yield from member.ids()
        else:
            yield self.id

    def line(self) -> list[Shown]:
        """What came before it, first to last, and it."""
        found: list[Shown] = []
        one: Shown | None = self
        while one is not None:
            found.append(one)
            one = one.before
        return found[::-1]

    def every(self) -> Iterator[Shown]:
        """It, what is in it, and what came before."""
        for one in self.line():
            yield one
            for member in one.members or ():
                yield from member.every()

    def to_plain(self) -> list[dict[str, Any]]:
        plain = []
        for one in self.line():
            node: dict[str, Any] = {"id": one.id, "task": one.task, "slot": one.slot}
            if one.count is not None:
                node["count"] = one.count
            if one.members is not None:
                node["members"] = [member.to_plain() for member in one.members]
            plain.append(node)
        return plain

    @classmethod
    def from_plain(cls, plain: Sequence[Mapping[str, Any]]) -> Shown:
        """Raises ``DecodeError``."""
        last: Shown | None = None
        for node in plain:
            members = node.get("members")
            last = cls(
                id=node["id"],
                task=node["task"],
                slot=node["slot"],
                count=node.get("count"),
                members=None if members is None else [cls.from_plain(member) for member in members],
                before=last,
            )
        if last is None:
            raise DecodeError("what is shown of a workflow is empty")
        return last


@define(kw_only=True)
class Plan:
    """A workflow, compiled."""

    workflow: str
    shown: Shown
    heads: Iterator[Branch]
    """What is sent at once. Reading it may add to ``joins``, and sets ``open.size`` at its end."""
    joins: list[Join] = field(factory=list)
    """What is to be stored before the heads that were read so far are sent."""
    open: Join | None = None
    """The join whose size is known only once all heads are read."""
    names: list[str] = field(factory=list)
    """Of every join, so that what is stored can be found again."""
    stored: bool = True
    """False: nothing is joined, and so nothing needs a store."""
