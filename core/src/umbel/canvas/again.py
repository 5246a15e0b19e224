"""Ending a workflow as a whole, and trying what has failed in it again."""

from __future__ import annotations

import secrets
from base64 import b64decode, b64encode
from typing import TYPE_CHECKING, Any

from umbel import protocol
from umbel.canvas import joining
from umbel.canvas.graph import NODE, ONCE, WORKFLOW, Join, Slot, join_key, plan_id
from umbel.canvas.joining import Marked
from umbel.canvas.marks import EARLY, ordered
from umbel.canvas.rules import UNSENT
from umbel.canvas.sending import (
    announce,
    fire,
    kept,
    passing,
    plan_record,
    read_plan,
    read_shown,
    shown_of,
    shown_record,
)
from umbel.errors import UmbelError
from umbel.model import Message, Result, evolve, without_route
from umbel.protocol import BROKER_HEADERS
from umbel.result import decode

if TYPE_CHECKING:
    from umbel.app import Umbel


def cancel(app: Umbel, workflow: str, *, terminate: bool = True) -> bool:
    """Let no task of a workflow start any more; with ``terminate``, end those that run.

    What waits becomes REVOKED as workers take it from its queue; so the workflow ends, with what follows told of the failure.
    True: kept for workers that do not run now. Blocks. Raises as ``Control.revoke``.
    """
    return app.control.revoke(headers={WORKFLOW: workflow}, terminate=terminate, expires=kept(app))


def failed_record(app: Umbel, slot_key: str, message: Message, queue: str) -> Result:
    """The message of a member that has failed, kept so that it can be tried again."""
    properties = without_route(message.properties)
    headers = {name: value for name, value in message.headers.items() if name not in BROKER_HEADERS}
    plain = list(evolve(message, headers=headers, properties=properties, queue=queue, due=None).to_plain())
    plain[2] = b64encode(plain[2]).decode()
    return passing(app, slot_key, plain)


def failed_id(workflow: str, slot: Slot) -> str:
    """Under which id ``failed_record`` is kept."""
    return f"{plan_id(workflow, slot.join)}/{slot.index}"


def retry(app: Umbel, workflow: str, node: str | None = None) -> tuple[str, int]:
    """Try what has failed in a workflow that has ended again, or just the task of id ``node``; what succeeded stays.

    It goes on as a workflow of a new id, with the same task ids; so who waits for one of them gets what it comes to now.
    Returns that id, and how many tasks were sent. Blocks. Raises ``UmbelError`` where there is nothing to try again.
    """
    record = shown_of(app, workflow)
    if record is None:
        raise UmbelError(f"there is no workflow {workflow}: it is unknown, or its time ([workflows] expires) is over")
    if not record.final:
        raise UmbelError(f"workflow {workflow} has not ended: `umbel workflow show {workflow}` says what it waits for")
    shown, names = read_shown(app, record)
    again = _Again(app, workflow, protocol.new_id(), names)
    messages = again.messages(node)
    if not messages:
        what = "of it" if node is None else f"with the id {node}"
        raise UmbelError(f"workflow {workflow} has no failed task {what} that could be sent again")
    app.gateway.put([shown_record(app, again.new, shown, names)])
    announce(app, again.new, shown)
    again.store()
    app.gateway.forget(again.forgotten)
    app.client.send(messages)
    again.go_on(messages[0].queue)
    return again.new, len(messages)


class _Again:
    """A workflow's joins under a new id: marks of what has succeeded are taken over, all others are awaited anew."""

    def __init__(self, app: Umbel, workflow: str, new: str, names: list[str]) -> None:
        self._app = app
        self._old = workflow
        self.new = new
        found = app.gateway.get([plan_id(workflow, name) for name in names])
        self._plans: dict[str, Join] = {}
        for name in names:
            if (record := found.get(plan_id(workflow, name))) is None:
                raise UmbelError(f"a part of workflow {workflow} is gone: its time ([workflows] expires) is over")
            self._plans[name] = read_plan(app, record)
        self._marks = {name: dict(ordered(joining.members(app.gateway, join_key(workflow, name)))) for name in names}
        if any(UNSENT in marks for marks in self._marks.values()):
            raise UmbelError(f"workflow {workflow} was not sent whole: only the program that sent it can send it again")
        self.forgotten: list[str] = []
        """Ids of tasks whose records say that they have failed, and whose next ones are to be taken."""
        self._still_failed: list[Result] = []
        """What has failed and is not tried again now, to be tried another time."""

    def messages(self, node: str | None) -> list[Message]:
        """What has failed by itself, to be sent again. Its marks, and those of all that failed because of it, are taken away."""
        failed = {
            failed_id(self._old, Slot(name, slot)): Slot(name, slot)
            for name, marks in self._marks.items()
            for slot, mark in marks.items()
            if not mark.succeeded
        }
        found: list[Message] = []
        anew: list[str] = []
        for key, record in self._app.gateway.get(list(failed)).items():
            message = self._read(record)
            if node is None or message.id == node:
                found.append(self._moved(message))
                self.forgotten += [message.id, *self._behind(message)]
                anew += self._unmark(failed[key])
            else:
                self._still_failed.append(
                    failed_record(self._app, failed_id(self.new, failed[key]), message, message.queue)
                )
        for name in anew:  # it grows: what follows a join that is awaited anew is so too
            plan = self._plans[name]
            self.forgotten += [str(step.options["task_id"]) for branch in plan.starts for step in branch.steps]
            for slot in (plan.to, *(branch.end for branch in plan.starts)):
                if slot is not None:
                    anew += self._unmark(slot)
        return found

    def _unmark(self, slot: Slot) -> list[str]:
        """Take a failure's mark away; the join that waits for it now."""
        marks = self._marks[slot.join]
        if (mark := marks.get(slot.index)) is None or mark.succeeded:
            return []
        del marks[slot.index]
        return [slot.join]

    def _waits(self, name: str) -> bool:
        plan = self._plans[name]
        return plan.size is None or len(self._marks[name]) < plan.size

    def _read(self, record: Result) -> Message:
        plain = decode(self._app, record)["result"]
        plain[2] = b64decode(plain[2])
        return Message.from_plain(tuple(plain))

    def _behind(self, message: Message) -> list[str]:
        """Ids of the tasks that ride behind the first in a message."""
        body = self._app.codec.decode(message.body, message.content_type, message.headers.get("compression"))
        chain = protocol.read_invocation(message.headers, body, self._app.timezone).embed.chain
        return [str(task_id) for plain in chain if (task_id := (plain.get("options") or {}).get("task_id"))]

    def _moved(self, message: Message) -> Message:
        headers = {name: value for name, value in message.headers.items() if name != ONCE}
        headers |= {WORKFLOW: self.new, "root_id": self.new, "retries": 0}
        return evolve(message, headers=headers)

    def store(self) -> None:
        """Store every join under the new id, with the marks that stay."""
        app, owner = self._app, secrets.token_hex(8)
        for plan in self._plans.values():
            for branch in plan.starts:
                for step in branch.steps:
                    headers: dict[str, Any] = step.options.get("headers") or {}
                    if WORKFLOW in headers and NODE in headers:
                        headers[WORKFLOW] = self.new
        app.gateway.put([*(plan_record(app, self.new, plan) for plan in self._plans.values()), *self._still_failed])
        calls = []
        for name, plan in self._plans.items():
            marks = {str(slot): mark.to_bytes() for slot, mark in self._marks[name].items()}
            # Complete joins have fired in the old workflow: theirs is no more than a record.
            size = plan.size if self._waits(name) else None
            calls.append(Marked(join_key(self.new, name), marks, size, owner, kept(app)))
        joining.join(app.gateway, calls)

    def go_on(self, queue: str) -> None:
        """Nothing fires by itself here: what is complete has fired before. Early joins count their successes anew."""
        app, owner = self._app, secrets.token_hex(8)
        for name, plan in self._plans.items():
            if isinstance(plan.need, int) and self._waits(name):
                marks = {str(slot): b"" for slot, mark in self._marks[name].items() if mark.succeeded}
                call = Marked(join_key(self.new, name) + EARLY, marks, plan.need, owner, kept(app))
                if joining.join(app.gateway, [call])[0].fires:
                    fire(app, self.new, name, owner, queue)
