"""What is marked of a member's end: its state and its result document, as bytes that whoever marks need not read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from attrs import frozen

from umbel import protocol
from umbel.canvas.graph import FIRE, FIRES, NODE, PREFIX, WORKFLOW, Slot, derived, enough_of, join_key
from umbel.canvas.joining import Marked
from umbel.errors import DecodeError, TaskRevoked
from umbel.model import Message, Result, State, TaskOptions

if TYPE_CHECKING:
    from umbel.app import Umbel

SPREAD: Final = "SPREAD"
"""State of a member that has succeeded with a list of results, each of which counts as a member's."""


@frozen
class Mark:
    """One member's end."""

    state: str
    content_type: str
    """Behind a space, how the document is compressed, where a peer has done so."""
    document: bytes
    """A result document; without one, the end itself is all that is known."""

    @property
    def succeeded(self) -> bool:
        return self.state in (State.SUCCESS, SPREAD)

    def to_bytes(self) -> bytes:
        return b"\0".join((self.state.encode(), self.content_type.encode(), self.document))

    @classmethod
    def from_bytes(cls, data: bytes) -> Mark:
        """Raises ``DecodeError``."""
        parts = data.split(b"\0", 2)
        if len(parts) != 3:
            raise DecodeError("the mark of a workflow's member cannot be read")
        return cls(parts[0].decode(), parts[1].decode(), parts[2])

    @classmethod
    def of(cls, result: Result) -> Mark:
        """The end that a final record tells of."""
        compressed = f" {result.compression}" if result.compression else ""
        return cls(result.state, result.content_type + compressed, result.document)

    def read(self, app: Umbel) -> Mapping[str, Any]:
        """The result document. Raises ``DecodeError``."""
        content_type, _, compression = self.content_type.partition(" ")
        document = app.result_codec.decode(self.document, content_type, compression or None)
        if not isinstance(document, Mapping):
            raise DecodeError("the mark of a workflow's member is no result document")
        return document

    def error(self, app: Umbel) -> BaseException:
        """Why the member has failed. Raises ``DecodeError``."""
        document = self.read(app)
        exc = protocol.exception_from_plain(document.get("result"), document.get("traceback"))
        is_revoked = self.state == State.REVOKED and not isinstance(exc, TaskRevoked)
        return TaskRevoked(str(document.get("result"))) if is_revoked else exc


def written(app: Umbel, task_id: str, state: str, value: Any, *, expires: float | None = None) -> Result:
    """A record made by a workflow rather than by a task's run. ``value``: plain, or an exception. Raises ``EncodeError``."""
    plain = protocol.exception_to_plain(value) if isinstance(value, BaseException) else value
    document = protocol.result_document(task_id, state, plain, done=app.clock.time())
    try:
        encoded = app.result_codec.encode(document)
    except Exception:
        if not isinstance(value, BaseException):
            raise
        plain["exc_message"] = [protocol.short_repr(plain["exc_message"])]
        encoded = app.result_codec.encode(document)
    return Result(
        task_id=task_id,
        state=State(state).value,  # what a child gives its worker is plain
        document=encoded.body,
        content_type=encoded.content_type,
        content_encoding=encoded.content_encoding,
        expires=app.settings.results.expires if expires is None else expires,
    )


def fire_message(app: Umbel, workflow: str, join: str, queue: str, broken: str | None = None) -> Message:
    """The message of the task that starts what follows ``join``. The same id each time.

    ``broken``: that message was lost, for that reason; this one lets what follows fail, whatever has become of the members.
    """
    place = Slot(join, 0 if broken is None else 1)
    task_id = derived(workflow, join, "fire", *([] if broken is None else ["broken"]))
    return app.client.message(
        FIRE,
        (workflow, join) if broken is None else (workflow, join, broken),
        {},
        TaskOptions(ignore_result=True),
        queue=queue,
        task_id=task_id,
        root_id=task_id,  # its own: who revokes all of a root must not keep the workflow from ending
        parent_id=workflow,
        priority=9,
        headers={WORKFLOW: FIRES + workflow, NODE: str(place)},
    )


EARLY: Final = "~"
"""Last character of the key under which successes alone are marked, of a join that some of them complete."""


def marking(workflow: str, slot: Slot, mark: Mark, owner: str, expires: float, size: int | None = None) -> list[Marked]:
    """What is to be joined because of a member's end, in this order: what completes a join early comes last.

    ``size``: of the join, where the member's end says it.
    """
    key = join_key(workflow, slot.join)
    marks = {str(slot.index): mark.to_bytes()}
    calls = [Marked(key, marks, size, owner, expires)]
    if (enough := enough_of(slot.join)) is not None and mark.succeeded:
        calls.append(Marked(key + EARLY, {str(slot.index): b""}, enough, owner, expires))
    return calls


def place_of(key: str) -> tuple[str, str] | None:
    """Workflow and join of a key of ours; None of another's."""
    workflow, slash, join = key.removeprefix(PREFIX).removesuffix(EARLY).rpartition("/")
    return (workflow, join) if slash and key.startswith(PREFIX) else None


def ordered(marks: Mapping[str, bytes]) -> Sequence[tuple[int, Mark]]:
    """Marks by slot, in order. Raises ``DecodeError``."""
    return sorted(((int(slot), Mark.from_bytes(data)) for slot, data in marks.items()), key=lambda pair: pair[0])
