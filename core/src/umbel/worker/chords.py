"""Chords as the wire has them: the body rides in each member's message, and who ends last sends it.

Who keeps the account of a chord that a peer has sent is ``Umbel.chords``, which a plugin puts there: the kernel's own workflows
need none (``worker.workflows``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from umbel import protocol
from umbel.canvas.compose import Chain, Chord, Group
from umbel.canvas.graph import ONCE, WORKFLOW, derived
from umbel.canvas.marks import written
from umbel.canvas.signature import Canvas, Signature, plain_signatures
from umbel.errors import ChordError, DecodeError
from umbel.model import Message, State

if TYPE_CHECKING:
    from umbel.app import Umbel
    from umbel.task import Request

Follow = Any
"""``followups._messages``, which knows how each kind of signature is sent."""


def ended(app: Umbel, request: Request, state: State, value: Any, follow: Follow) -> list[Message]:
    """A member has ended with a value or an exception: what is sent because the whole chord has. Blocks for the account."""
    invocation = request.invocation
    chord, group, index, task_id = invocation.embed.chord, invocation.group, invocation.group_index, request.id
    if state is not State.SUCCESS:  # of a chain in a chord, the last has the body, and none after this one will run
        for plain in invocation.embed.chain:
            options = plain.get("options") or {}
            if isinstance(options.get("chord"), Mapping):
                chord, group = options["chord"], options.get("group_id")
                index, task_id = options.get("group_index"), str(options.get("task_id") or "")
    if chord is None or group is None or app.chords is None:
        return []
    plain_value = protocol.exception_to_plain(value) if isinstance(value, BaseException) else value
    part = app.result_codec.encode([1, task_id, str(state), plain_value]).body
    parts = app.chords.part(group, index, task_id, part)
    if parts is None:
        return []
    chord = started_once(chord, group)
    messages = body(app, request, chord, [app.result_codec.decode(each, _content_type(app)) for each in parts], follow)
    app.client.send(messages)
    app.chords.sent(group)
    return []


def _content_type(app: Umbel) -> str:
    return app.result_codec.encode(None).content_type


def started_once(chord: Mapping[str, Any], group: str) -> Mapping[str, Any]:
    """The body as it is sent by whoever ended last: sent twice, it starts once, where it is one task and runs here."""
    if chord.get("subtask_type"):
        return chord
    options = chord.get("options") or {}
    headers = {**(options.get("headers") or {}), WORKFLOW: group, ONCE: True}
    return {**chord, "options": {**options, "headers": headers}}


def body(app: Umbel, request: Request, chord: Mapping[str, Any], parts: Sequence[Any], follow: Follow) -> list[Message]:
    """What is sent because every member has ended: ``parts`` are ``[1, id, state, value]``, in order. Raises ``DecodeError``."""
    for part in parts:
        if not isinstance(part, Sequence) or len(part) != 4:
            raise DecodeError("the account of a chord has a part that is no [1, id, state, value]")
    failed = next((part for part in parts if part[2] != State.SUCCESS), None)
    if failed is None:
        messages: list[Message] = follow(app, chord, ([part[3] for part in parts],), request, "chord")
        return messages
    exc = protocol.exception_from_plain(failed[3])
    error = ChordError(f"Dependency {failed[1]} raised {protocol.short_repr(exc)}")
    heads = _heads(chord)
    app.gateway.put([written(app, task_id, State.FAILURE, error) for head in heads if (task_id := _id_of(head))])
    return [
        message
        for number, head in enumerate(heads)
        for errback in plain_signatures((head.get("options") or {}).get("link_error"))
        for message in follow(app, errback, (_id_of(head),), request, f"chord error {number}")
    ]


def _heads(chord: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The calls that a body begins with, and those after them in a chain, which will not run either."""
    if chord.get("subtask_type") in ("chain", "group"):
        return [head for member in Signature.from_plain(chord).kwargs.get("tasks") or () for head in _heads(member)]
    return [chord]


def _id_of(head: Mapping[str, Any]) -> str:
    return str((head.get("options") or {}).get("task_id") or "")


def wire_members(
    app: Umbel, canvas: Canvas[Any], later: Sequence[Mapping[str, Any]], name: str
) -> list[Canvas[Any]] | None:
    """A group that something follows, as members that carry the body; None where it is not to go in that form.

    It goes so where peers take part in the work (``Umbel.chords``): a worker of theirs knows no other. ``later``: what follows
    the group, or the chord, in execution order; ``name`` tells it from others. Opens its account. Blocks.
    """
    group, body = (canvas.header, canvas.body) if isinstance(canvas, Chord) else (canvas, None)
    if app.chords is None or not isinstance(group, Group) or group.need != "all" or group.cancel:
        return None
    members = [*_leaves(group)]
    rest = [dict(step) for step in later]
    plain = rest.pop(0) if body is None and rest else None if body is None else body.to_plain()
    simple = all(_is_line(member) for member in members)
    if plain is None or plain.get("subtask_type") or not members or not simple:
        return None
    if not app.chords.open(name, len(members)):
        return None
    options = dict(plain.get("options") or {})
    options.setdefault("task_id", derived(name, "body"))
    options |= {"group_id": name, "chain": [*(options.get("chain") or ()), *reversed(rest)]}
    carried = {"group_id": name, "chord": {**plain, "options": options}}
    return [_carrying(member, {**carried, "group_index": at}, derived(name, at)) for at, member in enumerate(members)]


def _leaves(group: Group) -> Iterator[Canvas[Any]]:
    for member in group.members:
        if isinstance(member, Group):
            yield from _leaves(member)
        else:
            yield member


def _is_line(member: Canvas[Any]) -> bool:
    return isinstance(member, Signature) or (
        isinstance(member, Chain) and bool(member.tasks) and all(isinstance(step, Signature) for step in member.tasks)
    )


def _carrying(member: Canvas[Any], carried: Mapping[str, Any], task_id: str) -> Canvas[Any]:
    """The member, or the last task of its chain, with its place in the chord."""
    if isinstance(member, Chain):
        *first, last = member.tasks
        return Chain(tasks=(*first, _carrying(last, carried, task_id)), options=member.options)
    return member.set(**{"task_id": task_id, **member.options, **carried})
