"""Concurrency limits of the whole fleet: so many calls of a task at once, for each key, kept as leased claims.

Slot ``i`` of a key is the claim ``limit:TASK:KEY:i``. A worker holds one for each call that it runs, renews it with the leases
of its deliveries, and gives it up, or passes it on to the next call of that key in its hands, when the call is settled. A
worker that is killed holds its slots until their leases end, and no longer. A slot that has passed to another, because its
holder was stopped or cut off for a whole lease, ends the call that ran under it as soon as its holder learns of it.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
import time
from collections import Counter, OrderedDict
from collections.abc import Coroutine, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Final, cast

from umbel.ports.result_store import ClaimStore
from umbel.ports.step import Step
from umbel.worker.slot_claims import FAULTS, Key, Place, Slot, SlotClaims

if TYPE_CHECKING:
    from umbel.worker.held import Held
    from umbel.worker.worker import Worker

logger = logging.getLogger("umbel.worker")

_IN_HAND: Final = 0.25
"""Seconds for which a call waits here for a slot of its key that a call of this worker holds, instead of in the queue."""
_FULL: Final = 0.05
"""Seconds for which a key whose slots were all taken is not asked for again, unless one becomes free here."""
_SPARE: Final = 0.1
"""Seconds for which a slot is kept here for the next call of its key, where calls are short: most of what a slot costs is to
be claimed and to be given up."""
_SHORT: Final = 0.5
"""Seconds that a short call takes at most."""
_UNKNOWN: Final = 0.5
"""Seconds for which a call is thought to hold its slot, before one has ended."""
_SOONEST: Final = 0.05
_LONGEST: Final = 5.0
"""Bounds in seconds of the time for which a call without a slot goes back to its queue."""
_FURTHEST: Final = 3600.0
"""Seconds ahead of which no turn is: more, and the clock was set back."""
_LOOKS: Final = 200.0
"""Calls a second, of all keys, that may come only to be put off again: more of them wait longer."""
_REMEMBERED: Final = 100_000
_LAST_WORDS: Final = 5.0
"""Seconds that a stopping worker takes to give its slots up."""


class Slots(Step):
    """The slots of one worker. Starts first and stops last, so that they are renewed as long as anything runs."""

    name: ClassVar[str] = "slots"
    before: ClassVar[tuple[str, ...]] = ("settlement",)

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._lease = worker.settings.broker.lease
        self._claims = SlotClaims(
            lambda: cast("ClaimStore", worker.gateway.store),
            owner=f"{worker.name}/{worker.incarnation}",
            lease=self._lease,
        )
        self._places: dict[Key, Place] = {}
        self._held_for: dict[str, float] = {}
        """By task: for how long its calls hold their slots, on average."""
        self._away: OrderedDict[str, float] = OrderedDict()
        """Ids of calls that went back for want of a slot, and when they come again."""
        self._tasks: set[asyncio.Task[object]] = set()
        self._renewing: asyncio.Task[None] | None = None
        self.held: dict[Held, Slot] = {}
        """The slot of each call that has one."""

    async def start(self, worker: Worker) -> None:
        self._renewing = asyncio.create_task(self._renew_all(), name="umbel-slots")
        worker.watch(self._renewing)

    async def stop(self, worker: Worker) -> None:
        """Give up what is left. What cannot be told in ``_LAST_WORDS`` seconds ends with its lease."""
        if self._renewing is not None:
            self._renewing.cancel()
            await asyncio.wait([self._renewing])
        self.release(list(self.held))
        for place in self._places.values():
            while place.spare:
                self._give_up(place.spare.pop())
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_LAST_WORDS)
            for task in self._tasks:
                task.cancel()

    def stats(self) -> dict[str, int]:
        """How many slots this worker holds, by task."""
        return dict(Counter(slot.place.key[0] for slot in self.held.values()))

    # --- taking ---

    async def take(self, key: Key, limit: int, calls: Sequence[Held]) -> Sequence[Held]:
        """Give a slot to as many of ``calls`` as can have one, and return those; the others are waiting or given back.

        Those that wait are handed to ``Intake.proceed`` when their time comes, or given back. Raises nothing.
        """
        place = self._places.setdefault(key, Place(key, limit))
        place.limit = limit
        slots = self._spare(place, len(calls))
        if len(slots) < len(calls) and time.monotonic() >= place.full_until:
            place.asking += 1
            try:
                slots += await self._claims.claim(place, len(calls) - len(slots))
            except FAULTS as exc:
                logger.warning("no slot of task %s can be had, its calls go back for a moment: %s", key[0], exc)
                for held in calls[len(slots) :]:
                    self._worker.admission.give_back(held, 1.0)
                calls = calls[: len(slots)]
            finally:
                place.asking -= 1
            if len(slots) < len(calls):
                place.full_until = time.monotonic() + _FULL
        for held, slot in zip(calls, slots, strict=False):
            self._give(held, slot)
        rest = calls[len(slots) :]
        room = 0 if self._worker.stopping else self._room_in_hand(place)
        for held in rest[:room]:
            place.waiting.append(held)
            asyncio.get_running_loop().call_later(_IN_HAND, self._lose_patience, place, held)
        for held in rest[room:]:
            self._put_off(place, held)
        return calls[: len(slots)]

    def _spare(self, place: Place, wanted: int) -> list[Slot]:
        """Up to ``wanted`` slots that were kept, and are still good."""
        slots: list[Slot] = []
        while place.spare and len(slots) < wanted:
            slot = place.spare.pop()
            if self._usable(slot, place):
                slots.append(slot)
            else:
                self._give_up(slot)
        return slots

    def _usable(self, slot: Slot, place: Place) -> bool:
        return not slot.given_up and slot.index < place.limit and time.monotonic() < slot.good_until

    def _give(self, held: Held, slot: Slot) -> None:
        self._away.pop(held.delivery.message.id, None)
        self.held[held] = slot
        slot.call, slot.since = held, time.monotonic()

    # --- waiting ---

    def _room_in_hand(self, place: Place) -> int:
        """How many more calls may wait here: none behind long ones, where a queue serves other workers too."""
        if self._held_for.get(place.key[0], 0.0) > _IN_HAND:
            return 0
        return max(0, 2 * len(place.taken) - len(place.waiting))

    def _lose_patience(self, place: Place, held: Held) -> None:
        if held in place.waiting:
            place.waiting.remove(held)
            self._put_off(place, held)

    def _put_off(self, place: Place, held: Held) -> None:
        """Back to the queue until its turn: twice as many come as slots become free, for some will be too late."""
        now, task_id = self._worker.app.clock.time(), held.delivery.message.id
        pace = self._held_for.get(place.key[0], _UNKNOWN) / place.limit / 2
        place.turn = max(min(place.turn, now + _FURTHEST), now) + pace
        while self._away and (len(self._away) > _REMEMBERED or next(iter(self._away.values())) < now - _LONGEST):
            self._away.popitem(last=False)
        delay = min(place.turn - now, max(_LONGEST, len(self._away) / _LOOKS)) * random.uniform(0.75, 1)
        delay = max(delay, _SOONEST)
        self._away[task_id] = now + delay
        self._worker.admission.give_back(held, delay)

    def withdraw(self, held: Held) -> bool:
        """Take a call out of those that wait here for a slot; it is the caller's to end. False: it is none of them."""
        for place in self._places.values():
            if held in place.waiting:
                place.waiting.remove(held)
                return True
        return False

    def give_back_waiting(self) -> None:
        """The worker stops: nothing more is started."""
        for place in self._places.values():
            while place.waiting:
                self._worker.admission.give_back(place.waiting.popleft(), 0.0)

    # --- giving up ---

    def release(self, calls: Sequence[Held]) -> None:
        """These calls are settled, or are not to start after all. Returns at once."""
        for held in calls:
            if (slot := self.held.pop(held, None)) is not None and not slot.given_up:
                self._learn(slot.place.key[0], time.monotonic() - slot.since)
                self._pass_on(slot)

    def _learn(self, task: str, seconds: float) -> None:
        known = self._held_for.get(task, seconds)
        self._held_for[task] = known + 0.2 * (seconds - known)

    def _pass_on(self, slot: Slot) -> None:
        place, unsettled = slot.place, self._worker.settlement.held
        place.full_until = 0.0
        usable = self._usable(slot, place)
        while usable and place.waiting:
            held = place.waiting.popleft()
            if held.job_id in unsettled:
                self._give(held, slot)
                self._worker.admission.got_slot(held)
                return
        if usable and not self._worker.stopping and self._held_for.get(place.key[0], _UNKNOWN) < _SHORT:
            slot.call = None
            place.spare.append(slot)
            asyncio.get_running_loop().call_later(_SPARE, self._let_go, place, slot)
        else:
            self._give_up(slot)

    def _let_go(self, place: Place, slot: Slot) -> None:
        if slot in place.spare:
            place.spare.remove(slot)
            self._give_up(slot)

    def _give_up(self, slot: Slot) -> None:
        if not slot.given_up:
            slot.given_up = True
            self._background(self._claims.release(slot))

    def _background(self, coroutine: Coroutine[Any, Any, object]) -> None:
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # --- keeping ---

    async def _renew_all(self) -> None:
        for turn in itertools.count(1):
            await asyncio.sleep(self._lease / 3)
            if self.held:
                await asyncio.gather(*map(self._keep, list(self.held.values())))
            if turn % 10 == 0:
                self._tidy()

    async def _keep(self, slot: Slot) -> None:
        async with slot.lock:
            if slot.given_up:
                return
            try:
                ours = await self._claims.renew(slot)
            except FAULTS as exc:
                logger.warning("a slot of task %s could not be renewed, trying again: %s", slot.place.key[0], exc)
                return
        if not ours and not slot.given_up:
            slot.given_up = True
            slot.place.taken.discard(slot.index)
            await self._replace(slot)

    async def _replace(self, lost: Slot) -> None:
        """A slot has passed to another: its call goes on under another slot, or is ended."""
        lost.place.asking += 1
        try:
            found = await self._claims.claim(lost.place, 1)
        except FAULTS:
            found = []
        finally:
            lost.place.asking -= 1
        held = lost.call
        if held is None or self.held.get(held) is not lost:  # it has ended meanwhile
            for slot in found:
                self._pass_on(slot)
            return
        if found:
            self._give(held, found[0])
            return
        message = held.delivery.message
        logger.warning(
            "task %s[%s]: its slot has passed to another while this worker was stopped or cut off; it is ended here, and goes "
            "back to its queue",
            message.task,
            message.id,
        )
        if not await self._worker.pool.cancel(held.job_id, force=True):
            logger.error(
                "task %s[%s] cannot be ended by this pool, and runs beside the limit", message.task, message.id
            )

    def _tidy(self) -> None:
        """Forget the keys that nothing is known of any more."""
        now = self._worker.app.clock.time()
        for key, place in list(self._places.items()):
            if not (place.taken or place.waiting or place.asking) and place.turn < now:
                del self._places[key]
