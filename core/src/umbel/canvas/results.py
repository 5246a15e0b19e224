"""Handles on composed calls. Making one does no I/O."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Generator, Iterator, Mapping, Sequence
from itertools import dropwhile, islice
from typing import TYPE_CHECKING, Any, Final

from attrs import field, frozen

from umbel import protocol
from umbel.canvas.compile import compiled
from umbel.canvas.graph import Shown, derived
from umbel.canvas.sending import begin, read_shown, shown_of
from umbel.canvas.signature import Canvas
from umbel.errors import ResultTimeout
from umbel.model import Result, State
from umbel.result import AsyncResult, decode

if TYPE_CHECKING:
    from umbel.app import Umbel

_LOOKED_AT: Final = 500
"""Records asked for at once."""
_LOOK_AGAIN: Final = 0.02
"""Seconds between two looks for what is missing while a group is waited for."""
_SAVED: Final = "umbel-group/"


class _Known:
    """Final records of a group's tasks, as they come: whoever has to wait for one looks for the next that are missing first."""

    def __init__(self) -> None:
        self.records: dict[str, Result] = {}
        self._looked = 0.0

    def to_look_up(self, ids: Iterator[str], missing: str) -> list[str]:
        """The next ids from ``missing`` on that are not known; none if such a look was just made."""
        if time.monotonic() - self._looked < _LOOK_AGAIN:
            return []
        self._looked = time.monotonic()
        rest = dropwhile(lambda task_id: task_id != missing, ids)
        return list(islice((task_id for task_id in rest if task_id not in self.records), _LOOKED_AT))

    def add(self, records: Sequence[Result]) -> None:
        self.records |= {record.task_id: record for record in records if record.final}

    def check(self, app: Umbel, task_id: str, propagate: bool) -> None:
        """Raise what the task raised, if that is wanted: before others are waited for."""
        record = self.records[task_id]
        if propagate and record.state != State.SUCCESS:
            AsyncResult[Any](task_id, app)._conclude(record, True)


@frozen(eq=False)
class NodeResult(AsyncResult[Any]):
    """The result of a task of a workflow: it knows what came before it."""

    before: Shown | None = field(default=None, repr=False)
    workflow: str | None = None
    """Id of the workflow, for ``umbel workflow show``; None: nothing is joined in it."""

    @property
    def parent(self) -> AsyncResult[Any] | GroupResult | None:
        """The handle of what ran before it; None: it was the first."""
        return None if self.before is None else handle_of(self.before, self.app, self.workflow)


@frozen(eq=False)
class GroupResult:
    """The results of a group: a list in the order of its members, whenever each ends. Thread-safe, fork-safe.

    It holds the ids of its members, or none at all where they derive from its own: then it is small however many there are.
    """

    app: Umbel = field(repr=False)
    shown: Shown = field(repr=False)
    workflow: str | None = None
    """Id of the workflow, for ``umbel workflow show``; None: nothing is joined in it."""

    # --- what is in it ---

    @property
    def id(self) -> str:
        """The group's id, which its members' messages carry."""
        return self.shown.id

    def __str__(self) -> str:
        return self.id

    def __repr__(self) -> str:
        return f"GroupResult({self.id!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GroupResult) and other.id == self.id

    def __hash__(self) -> int:
        return hash(self.id)

    @property
    def parent(self) -> AsyncResult[Any] | GroupResult | None:
        """The handle of what ran before the group."""
        before = self.shown.before
        return None if before is None else handle_of(before, self.app, self.workflow)

    def __len__(self) -> int:
        """How many members it has."""
        return self.shown.count if self.shown.count is not None else len(self.shown.members or ())

    def __iter__(self) -> Iterator[AsyncResult[Any] | GroupResult]:
        """Handles of its members, in order."""
        if self.shown.count is not None:
            for index in range(self.shown.count):
                yield NodeResult(derived(self.id, index), self.app, workflow=self.workflow)
        for member in self.shown.members or ():
            yield handle_of(member, self.app, self.workflow)

    @property
    def children(self) -> list[AsyncResult[Any] | GroupResult]:
        """Handles of its members, in order."""
        return list(self)

    results = children

    def __getitem__(self, index: int) -> AsyncResult[Any] | GroupResult:
        return next(islice(iter(self), range(len(self))[index], None))

    def ids(self) -> Iterator[str]:
        """Ids of the tasks that its value is made of, in order."""
        return self.shown.ids()

    # --- waiting ---

    def get(self, timeout: float | None = None, *, propagate: bool = True) -> list[Any]:
        """Wait up to ``timeout`` seconds for every member's end, and return their values in order.

        Raises what the first member in order that has failed raised (``propagate=False``: it stands in the list), and as
        ``AsyncResult.get``.
        """
        end, known, gateway = None if timeout is None else time.monotonic() + timeout, _Known(), self.app.gateway
        for task_id in self.ids():
            if task_id not in known.records:
                if missing := known.to_look_up(self.ids(), task_id):
                    known.add(self._records(missing))
                if task_id not in known.records:
                    known.add([gateway.wait(task_id, _left(end))])
            known.check(self.app, task_id, propagate)
        return self._values(known, propagate)

    join = get

    async def aget(self, timeout: float | None = None, *, propagate: bool = True) -> list[Any]:
        """``get`` for event loops."""
        import asyncio  # not at import: whoever only sends needs no event loop

        end, known, gateway = None if timeout is None else time.monotonic() + timeout, _Known(), self.app.gateway
        for task_id in self.ids():
            if task_id not in known.records:
                if missing := known.to_look_up(self.ids(), task_id):
                    known.add(await asyncio.to_thread(self._records, missing))
                if task_id not in known.records:
                    known.add([await gateway.await_(task_id, _left(end))])
            known.check(self.app, task_id, propagate)
        return self._values(known, propagate)

    def _values(self, known: _Known, propagate: bool) -> list[Any]:
        return [
            member._values(known, propagate)
            if isinstance(member, GroupResult)
            else member._conclude(known.records[member.id], propagate)
            for member in self
        ]

    def __await__(self) -> Generator[Any, None, list[Any]]:
        return self.aget().__await__()

    def as_completed(self, timeout: float | None = None, *, interval: float = 0.05) -> Iterator[tuple[str, Any]]:
        """Id and value of each task as it ends; of one that failed, its exception. Blocks between two.

        It asks the store for all that are missing, every ``interval`` seconds and up to twenty times as long while nothing
        ends. Raises ``ResultTimeout``.
        """
        end = None if timeout is None else time.monotonic() + timeout
        missing, pause = dict.fromkeys(self.ids()), interval
        while missing:
            found = [record for record in self._records(missing) if record.final]
            for record in found:
                del missing[record.task_id]
                yield record.task_id, AsyncResult[Any](record.task_id, self.app)._conclude(record, False)
            if missing and not found:
                pause = min(pause * 1.5, interval * 20)
                time.sleep(_pause(pause, end, self.id))
            else:
                pause = interval

    async def aas_completed(
        self, timeout: float | None = None, *, interval: float = 0.05
    ) -> AsyncIterator[tuple[str, Any]]:
        """``as_completed`` for event loops."""
        import asyncio  # not at import: whoever only sends needs no event loop

        end = None if timeout is None else time.monotonic() + timeout
        missing, pause = dict.fromkeys(self.ids()), interval
        while missing:
            found = [record for record in await asyncio.to_thread(self._records, list(missing)) if record.final]
            for record in found:
                del missing[record.task_id]
                yield record.task_id, AsyncResult[Any](record.task_id, self.app)._conclude(record, False)
            if missing and not found:
                pause = min(pause * 1.5, interval * 20)
                await asyncio.sleep(_pause(pause, end, self.id))
            else:
                pause = interval

    # --- looking; each blocks for one look at the store ---

    def _records(self, task_ids: Iterator[str] | Mapping[str, None] | Sequence[str]) -> list[Result]:
        rest = iter(task_ids)
        found: list[Result] = []
        while part := list(islice(rest, _LOOKED_AT)):
            found += self.app.gateway.get(part).values()
        return found

    def completed_count(self) -> int:
        """How many of its tasks have succeeded."""
        return sum(1 for record in self._records(self.ids()) if record.state == State.SUCCESS)

    def ready(self) -> bool:
        """Whether all have ended."""
        ids = list(self.ids())
        return sum(1 for record in self._records(ids) if record.final) == len(set(ids))

    def successful(self) -> bool:
        """Whether all have ended well."""
        return self.completed_count() == len(set(self.ids()))

    def failed(self) -> bool:
        """Whether one has failed."""
        return any(record.final and record.state != State.SUCCESS for record in self._records(self.ids()))

    def waiting(self) -> bool:
        """Whether one has not ended."""
        return not self.ready()

    def forget(self) -> None:
        """Delete the stored records of its tasks."""
        rest = self.ids()
        while part := list(islice(rest, _LOOKED_AT)):
            self.app.gateway.forget(part)

    # --- by id ---

    def save(self) -> None:
        """Keep what the group consists of in the result store, for ``restore``, as long as results are kept."""
        document = protocol.result_document(_SAVED + self.id, "GROUP", self.shown.to_plain())
        encoded = self.app.result_codec.encode(document)
        record = Result(
            task_id=_SAVED + self.id,
            state="GROUP",
            document=encoded.body,
            content_type=encoded.content_type,
            content_encoding=encoded.content_encoding,
            expires=self.app.settings.results.expires,
        )
        self.app.gateway.put([record])

    def delete(self) -> None:
        """Forget what ``save`` has kept. The results stay."""
        self.app.gateway.forget([_SAVED + self.id])

    @classmethod
    def restore(cls, group_id: str, app: Umbel) -> GroupResult | None:
        """The group that was saved under that id; None where there is none."""
        record = app.gateway.get([_SAVED + group_id]).get(_SAVED + group_id)
        if record is None:
            return None
        document = decode(app, record)
        return cls(app, Shown.from_plain(document["result"]))


def send(app: Umbel, canvas: Canvas[Any], options: Mapping[str, Any]) -> Any:
    """Send a composed call; return its handle. Raises as ``Canvas.apply_async``."""
    given = dict(options)
    timeout = given.pop("timeout", None)
    plan = compiled(canvas, protocol.new_id(), given)
    begin(app, plan, timeout=timeout)
    return handle_of(plan.shown, app, plan.workflow if plan.stored else None)


def handle_of(shown: Shown, app: Umbel, workflow: str | None = None) -> Any:
    """The handle of a task or a group."""
    if shown.is_group:
        return GroupResult(app, shown, workflow)
    structure = app.tasks[shown.task].handle(shown.id)._structure if shown.task in app.tasks else None
    return NodeResult(shown.id, app, structure, before=shown.before, workflow=workflow)


def workflow_result(workflow: str, app: Umbel) -> Any:
    """The handle of what a stored workflow ends with. Raises ``LookupError`` where there is none of that id."""
    record = shown_of(app, workflow)
    if record is None:
        raise LookupError(
            f"there is no workflow {workflow!r}: it is unknown, or its time ([workflows] expires) is over"
        )
    return handle_of(read_shown(app, record)[0], app, workflow)


def _left(end: float | None) -> float | None:
    return None if end is None else max(0.0, end - time.monotonic())


def _pause(pause: float, end: float | None, group: str) -> float:
    if end is not None and time.monotonic() >= end:
        raise ResultTimeout(f"group {group} has members without a result after the time asked for")
    return pause if end is None else min(pause, max(0.001, end - time.monotonic()))
