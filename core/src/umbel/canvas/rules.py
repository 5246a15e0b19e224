"""What becomes of a group, and who is told of its failure: one table, which the documentation shows and the tests walk.

========================  ==================================  ===========================================
``join``                  the group succeeds                  its value
========================  ==================================  ===========================================
``"all"``                 when all have succeeded             their results
``"settled"``             when all have ended, however        ``{"state", "result"}`` or ``{"state", "error"}`` of each
``n``                     as soon as ``n`` have succeeded     the results of the first ``n`` of those that are there
========================  ==================================  ===========================================

Otherwise it has failed, once every member has ended; and at once, whatever ``join`` says, where its workflow was not sent whole.
A member has ended when it has succeeded, failed for good, was revoked, expired, or became a dead letter.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Any, Final, Literal

from attrs import frozen

SUCCESS: Final = "SUCCESS"
UNSENT: Final = -1
"""The slot that tells that a join's workflow was given up while it was being sent."""

Need = Literal["all", "settled"] | int
"""When a group has succeeded: all its members have; all have ended, however; so many have succeeded."""


class Verdict(enum.Enum):
    """What is to be done about a join now."""

    WAIT = "wait"
    SUCCEED = "succeed"
    FAIL = "fail"


@frozen(kw_only=True)
class Decision:
    """The verdict, and which members it rests on: those whose results count, or those that have failed; in order."""

    verdict: Verdict
    members: tuple[int, ...] = ()


def decide(need: Any, size: int | None, states: Mapping[int, str]) -> Decision:
    """What becomes of a group of ``size`` members (None: not known yet) of which those in ``states`` have ended."""
    succeeded = sorted(slot for slot, state in states.items() if state == SUCCESS)
    failed = sorted(slot for slot, state in states.items() if state != SUCCESS)
    if isinstance(need, int) and len(succeeded) >= need:
        return Decision(verdict=Verdict.SUCCEED, members=tuple(succeeded[:need]))
    if UNSENT in states:
        return Decision(verdict=Verdict.FAIL, members=(UNSENT,))
    if size is None or len(states) < size:
        return Decision(verdict=Verdict.WAIT)
    if need == "settled":
        return Decision(verdict=Verdict.SUCCEED, members=tuple(sorted(states)))
    if isinstance(need, int):  # fewer than it needs have succeeded, and no more are to come
        return Decision(verdict=Verdict.FAIL, members=tuple(failed))
    if failed:
        return Decision(verdict=Verdict.FAIL, members=tuple(failed))
    return Decision(verdict=Verdict.SUCCEED, members=tuple(succeeded))


class Told(enum.Enum):
    """Whom a failure is told to."""

    MEMBER = "the link_error of the task that failed"
    BODY = "the link_error of the body that is not started, once"
    NODE = "the on_error of what has failed, once"


TELLS: Mapping[str, tuple[Told, ...]] = {
    "a task fails": (Told.MEMBER,),
    "a task in a chain fails": (Told.MEMBER,),
    "a group fails, and a body waits for it": (Told.BODY,),
    "a call with an on_error fails": (Told.NODE,),
    "a task is not started, because the one before it failed": (),
}
"""The error rules. ``on_error`` of a task, or of a chain of plain tasks, is the ``link_error`` of each of them: one of them can
fail. ``link_error`` of a group is that of each of its members; of a chord, that of its body."""
