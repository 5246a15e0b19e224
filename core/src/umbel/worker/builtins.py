"""Tasks that every worker has: those that the wire has for canvases, and the one that goes on where a join is complete."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from umbel.canvas import joining
from umbel.canvas.compose import ACCUMULATE, MAP, STARMAP
from umbel.canvas.graph import FIRE, ONCE, RIDES, WORKFLOW, Branch, Join, Slot, derived, join_key, plan_id
from umbel.canvas.marks import SPREAD, Mark, marking, ordered, written
from umbel.canvas.rules import Verdict, decide
from umbel.canvas.sending import branch_message, call_message, fire, kept, read_plan, read_shown, shown_of
from umbel.canvas.signature import Signature, call_options, plain_signatures
from umbel.errors import BrokerUnavailable, ChordError, EncodeError, PublishRefused, ResultStoreUnavailable, Retry
from umbel.model import Message, State, TaskOptions
from umbel.protocol import exception_to_plain
from umbel.task import Task, current_request
from umbel.worker import chords, followups

if TYPE_CHECKING:
    from umbel.app import Umbel

logger = logging.getLogger("umbel.worker")

CHORD_UNLOCK: Final = "celery.chord_unlock"
_BATCH: Final = 1000
"""Messages in one publish."""
_PERSISTENT: Final = TaskOptions(
    ignore_result=True,
    max_retries=None,
    autoretry_for=(BrokerUnavailable, ResultStoreUnavailable),
    retry_backoff=1.0,
    retry_backoff_max=60.0,
)


def builtin(app: Umbel, name: str) -> Task[..., Any] | None:
    """The task of that name that every worker has; None: there is none."""
    found = _BUILTINS.get(name)
    if found is None:
        return None
    function, options = found
    return Task(app, function, name=name, bind=True, options=options)


def _map(self: Task[..., Any], *, task: Mapping[str, Any], it: Iterable[Any]) -> list[Any]:
    call = Signature.from_plain(task, self.app)
    return [call(item) for item in it]


def _starmap(self: Task[..., Any], *, task: Mapping[str, Any], it: Iterable[Sequence[Any]]) -> list[Any]:
    call = Signature.from_plain(task, self.app)
    return [call(*item) for item in it]


def _accumulate(self: Task[..., Any], *values: Any, index: int | None = None) -> Any:
    return list(values) if index is None else values[index]


def _chord_unlock(
    self: Task[..., Any],
    group: str,
    body: Mapping[str, Any],
    *,
    result: Sequence[Any] = (),
    interval: float | None = None,
    max_retries: int | None = None,
    **_: Any,
) -> None:
    """Send the body of a peer's chord when all its members have records. Else look again in ``interval`` seconds."""
    app, request = self.app, self.request
    ids = list(_ids_in(result))
    records = app.gateway.get(ids)
    if not all(task_id in records and records[task_id].final for task_id in ids):
        if max_retries is not None and request.retries >= max_retries:
            return
        raise Retry(interval or 1.0)
    parts = []
    for task_id in ids:
        document = app.result_codec.decode(records[task_id].document, records[task_id].content_type)
        parts.append([1, task_id, records[task_id].state, document.get("result")])
    body = chords.started_once(body, group)
    app.client.send(chords.body(app, request, body, parts, followups.after))


def _ids_in(result: Sequence[Any]) -> Iterator[str]:
    """Ids in what peers write of results: ``[[id, parent], children]`` each."""
    for each in result:
        (task_id, _), children = each
        if children:
            yield from _ids_in(children)
        else:
            yield str(task_id)


# --- going on -------------------------------------------------------------------------------------


def _fire(self: Task[..., Any], workflow: str, join: str) -> None:
    """Start what follows a complete join. Run again, it sends and marks the same again, which changes nothing."""
    app = self.app
    record = app.gateway.get([plan_id(workflow, join)]).get(plan_id(workflow, join))
    if record is None:
        logger.warning("workflow %s: its time ([workflows] expires) was over before %s was complete", workflow, join)
        return
    _Firing(app, workflow, read_plan(app, record)).go()


class _Firing:
    """One complete join."""

    def __init__(self, app: Umbel, workflow: str, plan: Join) -> None:
        self._app = app
        self._workflow = workflow
        self._plan = plan
        self._marks = dict(ordered(joining.members(app.gateway, join_key(workflow, plan.id))))
        request = current_request()
        self._queue = request.message.queue if request is not None else app.settings.default_queue

    def go(self) -> None:
        states = {slot: State.SUCCESS.value if mark.succeeded else mark.state for slot, mark in self._marks.items()}
        decision = decide(self._plan.need, self._plan.size, states)
        if decision.verdict is Verdict.SUCCEED:
            try:
                self._succeed(decision.members)
            except (EncodeError, PublishRefused) as exc:
                self._fail(exc, State.FAILURE, self._id_of(decision.members[-1]) if decision.members else "")
        elif decision.verdict is Verdict.FAIL:
            first = decision.members[0]
            mark = self._marks[first]
            error, state = mark.error(self._app), mark.state
            if self._plan.listed:
                error, state = ChordError(f"Dependency {self._id_of(first)} raised {_told(error)}"), State.FAILURE.value
            self._fail(error, state, self._id_of(first))

    def _id_of(self, slot: int) -> str:
        return str(self._marks[slot].read(self._app).get("task_id") or "")

    # --- it has succeeded ---

    def _succeed(self, members: Sequence[int]) -> None:
        plan, app = self._plan, self._app
        value = self._value(members)
        parent = self._id_of(members[-1])
        messages = (
            branch_message(app, _once(branch), (value,), root_id=self._workflow, parent_id=parent)
            for branch in plan.starts
        )
        self._send(messages)
        if plan.to is not None:
            mark = self._marks[members[0]]
            if plan.listed:
                made = written(app, plan_id(self._workflow, plan.id), State.SUCCESS, value)
                mark = Mark(SPREAD if plan.spread else made.state, made.content_type, made.document)
            self._mark({plan.to: mark})
        if plan.last:
            self._conclude(State.SUCCESS)

    def _value(self, members: Sequence[int]) -> Any:
        if self._plan.need == "settled":
            return [self._settled(self._marks[slot]) for slot in members]
        values: list[Any] = []
        for slot in members:
            mark = self._marks[slot]
            value: Any = mark.read(self._app).get("result")
            values += value if mark.state == SPREAD else [value]
        return values if self._plan.listed else values[0]

    def _settled(self, mark: Mark) -> dict[str, Any]:
        if mark.succeeded:
            return {"state": State.SUCCESS.value, "result": mark.read(self._app).get("result")}
        return {"state": mark.state, "error": exception_to_plain(mark.error(self._app))}

    # --- it has failed ---

    def _fail(self, exc: BaseException, state: str, failed: str) -> None:
        """What does not start has a record that says why; who is told, and what is marked further on, stands in ``rules``."""
        plan, app = self._plan, self._app
        final = State.REVOKED if state == State.REVOKED else State.FAILURE
        records = [
            written(app, str(step.options["task_id"]), final, exc) for branch in plan.starts for step in branch.steps
        ]
        app.gateway.put(records)
        told: list[tuple[str, Mapping[str, Any]]] = [(failed, plain) for plain in plan.errbacks]
        if plan.listed:
            for branch in plan.starts:
                body = branch.steps[0]
                task_id = str(body.options["task_id"])
                told += [(task_id, plain) for plain in plain_signatures(body.options.get("link_error"))]
        self._send(self._errback(number, failed, plain) for number, (failed, plain) in enumerate(told))
        by_id = {record.task_id: record for record in records}
        marks = {
            branch.end: Mark.of(by_id[str(branch.steps[-1].options["task_id"])])
            for branch in plan.starts
            if branch.end is not None
        }
        if plan.to is not None:
            marks[plan.to] = Mark.of(written(app, failed, final, exc))
        self._mark(marks)
        if plan.last:
            self._conclude(final)

    def _errback(self, number: int, failed: str, plain: Mapping[str, Any]) -> Message:
        call = Signature.from_plain(plain).after(failed)
        options = call_options(call.options)
        options["headers"] = {**(options.get("headers") or {}), WORKFLOW: self._workflow, ONCE: True}
        options.setdefault("task_id", derived(self._workflow, self._plan.id, "error", number))
        options |= {"root_id": self._workflow, "parent_id": failed}
        return call_message(self._app, call, options)

    # --- telling ---

    def _send(self, messages: Iterable[Message]) -> None:
        batch: list[Message] = []
        for message in messages:
            batch.append(message)
            if len(batch) >= _BATCH:
                self._app.client.send(batch)
                batch = []
        self._app.client.send(batch)

    def _mark(self, marks: Mapping[Slot, Mark]) -> None:
        app, owner = self._app, secrets.token_hex(8)
        for slot, mark in marks.items():
            # In order: what completes a join early is to find the mark of the same end in the join itself.
            for state in joining.join(app.gateway, marking(self._workflow, slot, mark, owner, kept(app))):
                if state.fires:
                    fire(app, self._workflow, slot.join, owner, self._queue)

    def _conclude(self, state: State) -> None:
        """The workflow has ended: say so, and let the store forget its joins when results are forgotten."""
        app = self._app
        record = shown_of(app, self._workflow)
        if record is None or record.final:
            return
        shown, names = read_shown(app, record)
        ended = written(app, record.task_id, state, {"shown": shown.to_plain(), "joins": names}, expires=kept(app))
        app.gateway.put([ended])


def _told(exc: BaseException) -> str:
    try:
        return repr(exc)[:1000]
    except Exception:  # a user's __repr__ may raise anything
        return type(exc).__name__


def _once(branch: Branch) -> Branch:
    """The branch, of whose first task only one copy starts."""
    first, *rest = branch.steps
    headers = {**(first.options.get("headers") or {}), ONCE: RIDES if rest else True}
    return Branch((first.set(headers=headers), *rest), branch.end)


_BUILTINS: Final[Mapping[str, tuple[Callable[..., Any], TaskOptions]]] = {
    MAP: (_map, TaskOptions()),
    STARMAP: (_starmap, TaskOptions()),
    ACCUMULATE: (_accumulate, TaskOptions()),
    CHORD_UNLOCK: (_chord_unlock, _PERSISTENT),
    FIRE: (_fire, _PERSISTENT),
}
