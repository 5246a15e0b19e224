"""One start of what may come twice: the calls that joins start, and members of workflows that come again.

A start is a claim of the store: held and renewed while the call runs, and kept once it has ended. A copy that finds it held goes
back to its queue for a while; one that finds it ended is dropped. If the worker that runs it dies, the claim ends by its lease.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final, cast

from umbel.canvas.graph import FIRE, NODE, ONCE, REST, WORKFLOW
from umbel.errors import ResultStoreUnavailable
from umbel.model import Action, Message, Outcome, State, Verdict, evolve
from umbel.ports.result_store import ClaimStore
from umbel.worker.admission import returned

if TYPE_CHECKING:
    from umbel.worker.held import End, Held
    from umbel.worker.worker import Worker

START_LEASE: Final = 12.0
"""Seconds for which a start is claimed, renewed four times as often: after so long another may start what a dead worker ran."""
COPY: Final = "a copy of what has started elsewhere"
"""Detail of the outcome of what is dropped."""
_PATIENCE: Final = 5.0
"""Seconds that the store has to say whether something may start; then it is given back."""
_STARTED: Final = "umbel-started/"
_ENDED: Final = b"ended"


class Copies:
    """A gate of the worker (``Gate``), and what there is to say at a start's end. Belongs on the I/O loop."""

    def __init__(self, worker: Worker, insist: Callable[[Callable[[], Awaitable[Any]]], Awaitable[Any]]) -> None:
        self._worker = worker
        self._insist = insist
        """Repeats a call of the store until it is answered."""
        self._owner = f"{worker.name}/{worker.incarnation}"
        self._running: list[tuple[Held, str, str]] = []
        """What runs here under a claimed start: its delivery, the claim, the claim's owner."""

    @property
    def _claims(self) -> ClaimStore | None:
        gateway = self._worker.gateway
        able = gateway.has_store and gateway.store.capabilities.claim
        return cast("ClaimStore", gateway.store) if able else None

    async def admit(self, batch: Sequence[Held]) -> Sequence[Held]:
        """See ``Gate``."""
        guarded = [held for held in batch if _guarded(held)]
        if not guarded or not self._worker.gateway.has_store:
            return batch
        ready = [held for held in batch if not _guarded(held)]
        undecided = list(guarded)
        try:
            async with asyncio.timeout(_PATIENCE):
                records = await self._worker.gateway.store.get([held.delivery.message.id for held in guarded])
                while undecided:
                    held = undecided[0]
                    record = records.get(held.delivery.message.id)
                    if record is not None and record.final:  # it has ended: only what follows from that may be missing
                        if record.state == State.SUCCESS and REST in held.delivery.message.headers:
                            self._end(held, Outcome(verdict=Verdict.IGNORED, detail=COPY))
                        else:
                            self._end(held, Outcome(verdict=Verdict.IGNORED, results=(record,)))
                    elif await self._claim(held):
                        ready.append(held)
                    del undecided[0]
        except (ResultStoreUnavailable, TimeoutError):
            for held in undecided:
                held.delay = 1.0
                self._worker.settlement.end(held, returned(held))
        return ready

    async def _claim(self, held: Held) -> bool:
        """Whether it may start here. Where not, it is ended: it runs elsewhere, or has run."""
        if (claims := self._claims) is None:
            return True
        name, owner = self._start(held)
        lease = await claims.claim(name, owner, lease=START_LEASE)
        if lease.owner == owner:
            self._running.append((held, name, owner))
            return True
        if lease.value == _ENDED:
            self._end(held, Outcome(verdict=Verdict.IGNORED, detail=COPY))
        else:
            held.delay = max(0.1, min(START_LEASE, lease.until - self._worker.app.clock.time()))
            self._worker.settlement.end(held, returned(held))
        return False

    def _start(self, held: Held) -> tuple[str, str]:
        return _attempt(held.delivery.message), f"{self._owner}/{held.job_id}"

    def _end(self, held: Held, outcome: Outcome) -> None:
        message = held.delivery.message
        self._worker.settlement.end(held, evolve(outcome, task_id=message.id, task=message.task))

    async def renew(self) -> None:
        """Renew the claims of what runs. Raises ``ResultStoreUnavailable``."""
        if (claims := self._claims) is None:
            return
        self._running = [start for start in self._running if start[0].job_id in self._worker.settlement.held]
        for _, name, owner in list(self._running):
            await claims.claim(name, owner, lease=START_LEASE)

    async def ended(self, ends: Sequence[End]) -> None:
        """Keep the claims of what has ended, so that no copy starts; give up those of what goes back to its queue.

        Of a member that goes on as another attempt, this one has ended: it must not run again if its settlement is lost.
        """
        if (claims := self._claims) is None:
            return
        running = {id(held): (name, owner) for held, name, owner in self._running}
        kept = self._worker.settings.workflows.expires
        for end in ends:
            start = running.pop(id(end.held), None)
            if start is None and end.outcome.verdict is Verdict.RETRY and _is_member(end.held.delivery.message):
                start = self._start(end.held)
            if start is None:
                continue
            name, owner = start
            if given_back(end) or end.outcome.verdict is Verdict.FORWARDED:
                await self._insist(partial(claims.release, name, owner))
            else:
                await self._insist(partial(claims.claim, name, owner, lease=kept, value=_ENDED))
        ended = {id(end.held) for end in ends}
        self._running = [start for start in self._running if id(start[0]) not in ended]


def given_back(end: End) -> bool:
    """Whether it goes back to its queue."""
    return end.settlement is not None and end.settlement.action is Action.REQUEUE


def _is_member(message: Message) -> bool:
    return NODE in message.headers and message.task != FIRE


def _guarded(held: Held) -> bool:
    message = held.delivery.message
    return ONCE in message.headers or (held.delivery.count > 1 and _is_member(message))


def _attempt(message: Message) -> str:
    """The claim of one attempt: a retry, and what a task was replaced by, start anew under the same id; so does a workflow
    that is tried again."""
    headers = message.headers
    attempt = f"{headers.get('retries') or 0}/{headers.get('replaced_task_nesting') or 0}"
    return f"{_STARTED}{headers.get(WORKFLOW) or ''}/{message.id}/{attempt}"
