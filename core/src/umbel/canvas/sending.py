"""Sending a composed call: what has to be stored is stored, then what begins is published, in that order."""

from __future__ import annotations

import logging
import secrets
from base64 import b64decode, b64encode
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

from umbel import protocol
from umbel.canvas import joining, keys
from umbel.canvas.graph import ONCE, PREFIX, Branch, Join, Plan, Shown, join_key, plan_id
from umbel.canvas.joining import Marked
from umbel.canvas.marks import EARLY, fire_message, written
from umbel.canvas.sender import Sender
from umbel.canvas.signature import Signature, call_options
from umbel.claiming import KEY, claim
from umbel.errors import NotSupported, UmbelError
from umbel.model import Message, Result, State, TaskOptions
from umbel.result import decode

if TYPE_CHECKING:
    from umbel.app import Umbel

logger = logging.getLogger("umbel.workflows")

_BATCH: Final = 1000
"""Messages in one publish."""
_PATIENCE: Final = 30.0
"""Seconds for which a task that has run waits for a store that is away, before it fails for that."""

CALL_OPTIONS: Final = frozenset(
    {
        "task_id", "countdown", "eta", "expires", "queue", "priority", "serializer", "compression", "headers", "link",
        "link_error", "time_limit", "soft_time_limit", "ignore_result", "shadow", "argsrepr", "kwargsrepr", "reply_to",
        "root_id", "parent_id", "group_id", "group_index", "chain", "chord", "retries", "replaced_task_nesting", "origin",
        "exchange", "routing_key", "key", "stamped_headers", "stamps",
    }
)  # fmt: skip
"""Options of a signature that a call has too. Others, which only peers know, are left out."""


def begin(app: Umbel, plan: Plan, *, timeout: float | None = None, parent_id: str | None = None) -> None:
    """Store what ``plan`` needs and publish what begins.

    What breaks off in the middle, by an exception or by the death of the process, is given up (``umbel.canvas.sender``).
    """
    with Sender(app, plan.workflow, kept(app)) as sender:
        store = Storing(app, plan, sender if plan.stored else None)
        try:
            _send(app, plan, store, sender, timeout, parent_id)
        except BaseException:
            if plan.stored and not sender.accepted:
                store.never_sent()
            raise


def _send(app: Umbel, plan: Plan, store: Storing, sender: Sender, timeout: float | None, parent_id: str | None) -> None:
    queue = None
    if plan.stored and plan.open is not None:
        sender.lasts()
    for branches in _batches(plan.heads):
        keys.check(app, (step for branch in branches for step in branch.steps[1:]))
        store.store()
        messages = [branch_message(app, branch, root_id=_root(plan), parent_id=parent_id) for branch in branches]
        queue = queue or messages[0].queue
        app.client.send(messages, timeout)
        sender.accepted = True
        if plan.stored and len(branches) == _BATCH:
            sender.lasts()
    store.close(queue or app.settings.default_queue)


def stored_messages(
    app: Umbel, plan: Plan, *, root_id: str | None = None, one_start: bool = False, **options: Any
) -> list[Message]:
    """Store what ``plan`` needs, and return what begins. For a task that has run: it waits out a store that is away.

    ``one_start``: what begins does so once, should the task run again and send the same.

    Blocks up to ``_PATIENCE`` seconds. Raises ``ResultStoreUnavailable`` then, ``NotSupported``.
    """
    heads = list(plan.heads)
    joining.insist(Storing(app, plan).store, _PATIENCE)
    if one_start:
        heads = [once(branch) for branch in heads]
    return [branch_message(app, branch, root_id=root_id or _root(plan), **options) for branch in heads]


def _root(plan: Plan) -> str | None:
    return plan.workflow if plan.stored else None


class Storing:
    """Puts what a plan has found so far into the result store, before what begins is sent."""

    def __init__(self, app: Umbel, plan: Plan, sender: Sender | None = None) -> None:
        self._app = app
        self._plan = plan
        self._sender = sender
        self._owner = secrets.token_hex(8)
        self._begun = False

    def store(self) -> None:
        """Store the joins found since the last call. Raises ``NotSupported``, ``ResultStoreUnavailable``, ``WorkflowBroken``."""
        plan = self._plan
        if not plan.stored:
            return
        fresh = list(plan.joins)
        keys.check(self._app, (step for one in fresh for branch in one.starts for step in branch.steps))
        if self._sender is not None:
            self._sender.tell([one.id for one in fresh])
        records = [plan_record(self._app, plan.workflow, one) for one in fresh]
        if not self._begun:
            _check(self._app)
            records.append(shown_record(self._app, plan.workflow, plan.shown, plan.names))
            announce(self._app, plan.workflow, plan.shown)
        if records:
            self._app.gateway.put(records)
            joining.join(self._app.gateway, [self._opened(one) for one in fresh])
        self._begun = True
        del plan.joins[: len(fresh)]

    def never_sent(self) -> None:
        """The broker has taken nothing, as far as can be known, and the caller is told: no more than a record says so."""
        try:
            conclude(self._app, self._plan.workflow, State.FAILURE)
        except UmbelError as exc:
            logger.warning("workflow %s was never sent, and that cannot be stored: %s", self._plan.workflow, exc)

    def _opened(self, one: Join) -> Marked:
        return Marked(join_key(self._plan.workflow, one.id), {}, one.size, self._owner, kept(self._app))

    def close(self, queue: str) -> None:
        """All that begins has been sent: say how many members there are, and fire if they have ended already."""
        plan = self._plan
        self.store()
        if not plan.stored or plan.open is None:
            return
        one = plan.open
        shown = shown_record(self._app, plan.workflow, plan.shown, plan.names)
        self._app.gateway.put([plan_record(self._app, plan.workflow, one), shown])
        (state,) = joining.join(self._app.gateway, [self._opened(one)])
        if state.fires:
            fire(self._app, plan.workflow, one.id, self._owner, queue)


def fire(app: Umbel, workflow: str, join: str, owner: str, queue: str) -> None:
    """Use the right to fire a join. A crash after publishing leaves the right to be taken anew: then it is sent twice."""
    app.client.send([fire_message(app, workflow, join, queue)])
    for key in (join_key(workflow, join), join_key(workflow, join) + EARLY):  # whichever has given the right
        joining.fired(app.gateway, key, owner)


def conclude(app: Umbel, workflow: str, state: State) -> None:
    """The workflow has ended: say so, once."""
    record = shown_of(app, workflow)
    if record is None or record.final:
        return
    shown, names = read_shown(app, record)
    value = {"shown": shown.to_plain(), "joins": names}
    app.gateway.put([written(app, record.task_id, state, value, expires=kept(app))])


def kept(app: Umbel) -> float:
    """Seconds without news after which a workflow is forgotten."""
    return app.settings.workflows.expires


def plan_record(app: Umbel, workflow: str, join: Join) -> Result:
    """What a join starts, as a record that never ends. Raises ``EncodeError``."""
    encoded = app.codec.encode(join.to_plain())
    text = {"type": encoded.content_type, "compression": encoded.compression, "plan": b64encode(encoded.body).decode()}
    return passing(app, plan_id(workflow, join.id), text)


def read_plan(app: Umbel, record: Result) -> Join:
    """The inverse of ``plan_record``. Raises ``DecodeError``."""
    text = decode(app, record)["result"]
    return Join.from_plain(app.codec.decode(b64decode(text["plan"]), text["type"], text["compression"]))


def shown_record(app: Umbel, workflow: str, shown: Shown, joins: Sequence[str]) -> Result:
    """What is shown of a workflow, as a record."""
    return passing(app, plan_id(workflow), {"shown": shown.to_plain(), "joins": list(joins)})


def read_shown(app: Umbel, record: Result) -> tuple[Shown, list[str]]:
    """The inverse of ``shown_record``: what is shown, and the names of the joins."""
    text = decode(app, record)["result"]
    return Shown.from_plain(text["shown"]), list(text["joins"])


def shown_of(app: Umbel, workflow: str) -> Result | None:
    """The record that shows a workflow; None where there is none."""
    name = plan_id(workflow)
    return app.gateway.get([name]).get(name)


def passing(app: Umbel, task_id: str, value: Any) -> Result:
    """A record of a workflow's own, which never ends."""
    encoded = app.result_codec.encode(protocol.result_document(task_id, "WORKFLOW", value))
    return Result(
        task_id=task_id,
        state="WORKFLOW",
        document=encoded.body,
        content_type=encoded.content_type,
        content_encoding=encoded.content_encoding,
        expires=kept(app),
    )


def announce(app: Umbel, workflow: str, shown: Shown) -> None:
    """Put the workflow on the list of those that there are, where the store can keep one."""
    text = f"{app.clock.time():.3f} {_name(shown)}"
    try:
        claim(app.gateway, PREFIX + workflow, workflow, lease=kept(app), value=text.encode())
    except NotSupported:
        return  # it runs all the same; `umbel workflow list` says what it needs


def _name(shown: Shown) -> str:
    names = [one.task for one in shown.every() if one.task]
    return " → ".join(dict.fromkeys(names)) or "-"


def _check(app: Umbel) -> None:
    """Refuse at the call what the store cannot do. Raises ``NotSupported``."""
    joining.join(app.gateway, [])


def branch_message(
    app: Umbel,
    branch: Branch,
    values: Sequence[Any] = (),
    *,
    root_id: str | None = None,
    parent_id: str | None = None,
    **more: Any,
) -> Message:
    """The message that starts a branch, with ``values`` in front of its first task's arguments unless it is immutable."""
    first, *rest = branch.steps
    call = first.after(*values)
    chain = [*(call.options.get("chain") or ()), *reversed([step.to_plain() for step in rest])]
    options = call_options(call.options)
    if chain:
        options["chain"] = chain
    for name, value in (("root_id", root_id), ("parent_id", parent_id), *more.items()):
        if value:
            options.setdefault(name, value)
    return call_message(app, call, options)


def once(branch: Branch) -> Branch:
    """The branch, of whose first task only one copy starts."""
    first, *rest = branch.steps
    headers = {**(first.options.get("headers") or {}), ONCE: True}
    return Branch((first.set(headers=headers), *rest), branch.end)


def call_message(app: Umbel, call: Signature, options: Mapping[str, Any]) -> Message:
    """The message of one call, with those of ``options`` that a call knows."""
    known: dict[str, Any] = {k: v for k, v in options.items() if k in CALL_OPTIONS and v not in (None, "")}
    for name in ("eta", "expires"):  # JSON has no times
        if isinstance(moment := known.get(name), str):
            known[name] = datetime.fromtimestamp(protocol.parse_time(moment, app.timezone) or 0, UTC)
    if "exchange" not in known:  # a queue is named by itself
        known.pop("routing_key", None)
    effective = app.options_of(call.task, app.tasks[call.task].declared if call.task in app.tasks else TaskOptions())
    if (key := keys.in_workflow(app, call)) is not None:
        known["headers"] = {**(known.get("headers") or {}), KEY: key}
    if effective.typed and call.task in app.tasks:
        return app.tasks[call.task].message(call.args, call.kwargs, **known)
    return app.client.message(call.task, call.args, call.kwargs, effective, **known)


def _batches(branches: Iterator[Branch]) -> Iterator[list[Branch]]:
    while batch := list(islice(branches, _BATCH)):
        yield batch
