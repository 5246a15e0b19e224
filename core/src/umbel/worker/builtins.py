"""Tasks that every worker has: those that the wire has for canvases, and the one that goes on where a join is complete."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from umbel.canvas import joining
from umbel.canvas.compose import ACCUMULATE, MAP, STARMAP
from umbel.canvas.graph import (
    CANCELS,
    FIRE,
    ONCE,
    SENDING,
    TOGETHER,
    WHY,
    WORKFLOW,
    Join,
    Slot,
    derived,
    join_key,
    plan_id,
)
from umbel.canvas.joining import Marked
from umbel.canvas.marks import SPREAD, Mark, marking, ordered, written
from umbel.canvas.rules import UNSENT, Verdict, decide
from umbel.canvas.sending import (
    branch_message,
    call_message,
    conclude,
    fire,
    kept,
    once,
    read_plan,
)
from umbel.canvas.signature import Signature, call_options, plain_signatures
from umbel.errors import (
    BrokerUnavailable,
    ChordError,
    ResultStoreUnavailable,
    Retry,
    UmbelError,
    WorkflowBroken,
)
from umbel.model import Message, State, TaskOptions
from umbel.protocol import exception_to_plain
from umbel.result import decode
from umbel.task import Task
from umbel.worker import chords, followups

if TYPE_CHECKING:
    from umbel.app import Umbel

logger = logging.getLogger("umbel.worker")

CHORD_UNLOCK: Final = "celery.chord_unlock"
_BATCH: Final = 1000
"""Messages in one publish."""
_LOOKED_AT: Final = 500
"""Records asked for at once."""
_PASSING: Final = (BrokerUnavailable, ResultStoreUnavailable)
_PERSISTENT: Final = TaskOptions(
    ignore_result=True,
    max_retries=None,
    autoretry_for=_PASSING,
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
    parts = [[1, each, records[each].state, decode(app, records[each]).get("result")] for each in ids]
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


def _fire(self: Task[..., Any], workflow: str, join: str, broken: str | None = None) -> None:
    """Start what follows a complete join. Run again, it sends and marks the same again, which changes nothing.

    ``broken``: the message that was to do so was lost; what follows fails, saying so.
    """
    app = self.app
    if join == SENDING:
        give_up(app, workflow, self.request.message.queue)
        return
    record = app.gateway.get([plan_id(workflow, join)]).get(plan_id(workflow, join))
    if record is None:
        logger.warning("workflow %s: its time ([workflows] expires) was over before %s was complete", workflow, join)
        return
    firing = _Firing(app, workflow, read_plan(app, record), self.request.message.queue)
    if broken is None:
        firing.go()
    else:
        firing.fail(broken)


class _Firing:
    """One complete join."""

    def __init__(self, app: Umbel, workflow: str, plan: Join, queue: str) -> None:
        self._app = app
        self._workflow = workflow
        self._plan = plan
        self._queue = queue
        self._marks: Mapping[int, Mark] = {}

    def go(self) -> None:
        """Decide, and go on. Whatever is wrong with the values, the workflow goes on: it fails then."""
        try:
            self._marks = dict(ordered(joining.members(self._app.gateway, join_key(self._workflow, self._plan.id))))
            self._decided()
        except _PASSING:
            raise
        except Exception as exc:
            logger.warning(
                "workflow %s fails, for what follows %s cannot start", self._workflow, self._plan.id, exc_info=exc
            )
            self._fail(exc, State.FAILURE, self._following)

    def fail(self, why: str) -> None:
        """Go on as if the members had failed; they are not looked at."""
        self._fail(WorkflowBroken(f"workflow {self._workflow} cannot go on: {why}"), State.FAILURE, self._following)

    @property
    def _following(self) -> str:
        """Id of what does not start; of the workflow, where nothing would."""
        starts = self._plan.starts
        return str(starts[0].steps[0].options["task_id"]) if starts else self._workflow

    def _decided(self) -> None:
        states = {slot: State.SUCCESS.value if mark.succeeded else mark.state for slot, mark in self._marks.items()}
        decision = decide(self._plan.need, self._plan.size, states)
        if decision.verdict is Verdict.SUCCEED:
            self._succeed(decision.members)
        elif decision.verdict is Verdict.FAIL:
            first = decision.members[0]
            mark = self._marks[first]
            error, state = mark.error(self._app), mark.state
            failed = self._following if first == UNSENT else self._id_of(first)
            if self._plan.listed and first != UNSENT:
                error, state = ChordError(f"Dependency {failed} raised {_told(error)}"), State.FAILURE.value
            self._fail(error, state, failed)

    def _id_of(self, slot: int) -> str:
        return str(self._marks[slot].read(self._app).get("task_id") or "")

    # --- it has succeeded ---

    def _succeed(self, members: Sequence[int]) -> None:
        plan, app = self._plan, self._app
        value = self._value(members)
        parent = self._id_of(members[-1])
        messages = (
            branch_message(app, once(branch), (value,), root_id=self._workflow, parent_id=parent)
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
            conclude(app, self._workflow, State.SUCCESS)

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
            conclude(app, self._workflow, final)

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


def give_up(app: Umbel, workflow: str, queue: str) -> None:
    """Let a workflow whose sending broke off fail: every join that is not complete fails now, by the usual rules.

    What has been sent of it runs on, but where a group cancels its others: there a member has failed.
    """
    told = dict(joining.members(app.gateway, join_key(workflow, SENDING)))
    why = told.pop(WHY, b"").decode(errors="replace") or "its sender was lost"
    names = list(told)
    error = WorkflowBroken(f"workflow {workflow} was not sent whole: {why}")
    mark = {str(UNSENT): Mark.of(written(app, workflow, State.FAILURE, error)).to_bytes()}
    owner, reached_end = secrets.token_hex(8), False
    for at in range(0, len(names), _LOOKED_AT):
        part = names[at : at + _LOOKED_AT]
        plans = app.gateway.get([plan_id(workflow, name) for name in part])
        for name in part:
            if plan_id(workflow, name) not in plans:
                continue  # it was about to be stored
            key = join_key(workflow, name)
            (state,) = joining.join(app.gateway, [Marked(key, {}, None, owner, kept(app))])
            if state.size is None or state.count < state.size:
                if name.endswith(CANCELS):
                    _cancel_members(app, workflow, name)
                (state,) = joining.join(app.gateway, [Marked(key, mark, 1, owner, kept(app))])
            if state.fires:
                fire(app, workflow, name, owner, queue)
            reached_end = reached_end or read_plan(app, plans[plan_id(workflow, name)]).last
    if not reached_end:
        conclude(app, workflow, State.FAILURE)


def _cancel_members(app: Umbel, workflow: str, join: str) -> None:
    try:
        app.control.revoke(headers={TOGETHER: f"{workflow}/{join}"}, terminate=True, expires=kept(app))
    except UmbelError as exc:  # cancelling is a saving: they end by themselves
        logger.warning("the members of a group in workflow %s run on: %s", workflow, exc)


def _told(exc: BaseException) -> str:
    try:
        return repr(exc)[:1000]
    except Exception:  # a user's __repr__ may raise anything
        return type(exc).__name__


_BUILTINS: Final[Mapping[str, tuple[Callable[..., Any], TaskOptions]]] = {
    MAP: (_map, TaskOptions()),
    STARMAP: (_starmap, TaskOptions()),
    ACCUMULATE: (_accumulate, TaskOptions()),
    CHORD_UNLOCK: (_chord_unlock, _PERSISTENT),
    FIRE: (_fire, _PERSISTENT),
}
