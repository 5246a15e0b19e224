"""What is sent because a task ended: its retry, its callbacks, the next of its chain, its errbacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from umbel import protocol
from umbel.canvas.compile import compiled, joins
from umbel.canvas.compose import ACCUMULATE, Chain, Group, members_of, read
from umbel.canvas.compose import chain as chain_of
from umbel.canvas.graph import NODE, TOGETHER, WORKFLOW, derived
from umbel.canvas.sending import call_message, stored_messages
from umbel.canvas.signature import Canvas, Signature, call_options, plain_signatures
from umbel.errors import DecodeError, TaskRevoked
from umbel.model import Message, State, evolve, without_route
from umbel.protocol import BROKER_HEADERS, Invocation
from umbel.worker import chords

if TYPE_CHECKING:
    from umbel.app import Umbel
    from umbel.task import Request


def check_supported(embed: protocol.Embed, *, chords_kept: bool) -> None:
    """Refuse, before anything runs, what could not be sent afterwards. Raises ``DecodeError``."""
    if embed is protocol.NO_EMBED:
        return
    if not chords_kept and (embed.chord is not None or any((p.get("options") or {}).get("chord") for p in embed.chain)):
        raise DecodeError(
            "the message is part of a chord that a peer has sent, and nobody here keeps the account of those: add "
            '"celery" to [plugins] hooks (pip install "umbel[celery]"), with results elsewhere than in a Redis Cluster'
        )
    for plain in (*embed.callbacks, *embed.errbacks, *embed.chain):
        _check(plain)


def _check(plain: Mapping[str, Any]) -> None:
    for member in members_of(plain) if plain.get("subtask_type") in ("chain", "group") else ():
        _check(member)
    if plain.get("subtask_type") in ("chord", "chunks"):
        read(plain)


def retry_message(message: Message, invocation: Invocation, queue: str, due: float | None, app: Umbel) -> Message:
    """The same call again: same id, one retry more, to the queue it came from. The body's bytes are reused."""
    if not message.headers.get("task"):  # protocol 1: the count of retries is in the body, so it is sent as protocol 2
        encoded = app.codec.encode(protocol.make_body(invocation.args, invocation.kwargs, invocation.embed))
        made = protocol.make_headers(
            invocation.task,
            invocation.id,
            args=invocation.args,
            kwargs=invocation.kwargs,
            expires=invocation.expires,
            time_limit=invocation.time_limit,
            soft_time_limit=invocation.soft_time_limit,
            group=invocation.group,
            group_index=invocation.group_index,
            ignore_result=invocation.ignore_result,
            headers=invocation.headers,
        )
        if encoded.compression:
            made["compression"] = encoded.compression
        message = evolve(
            message,
            headers=made,
            body=encoded.body,
            content_type=encoded.content_type,
            content_encoding=encoded.content_encoding,
        )
    headers = {k: v for k, v in message.headers.items() if k not in BROKER_HEADERS}
    headers |= {
        "retries": invocation.retries + 1,
        "eta": None if due is None else protocol.format_time(due),
        "parent_id": invocation.id,
    }
    return evolve(message, queue=queue, headers=headers, due=due, properties=without_route(message.properties))


def on_success(app: Umbel, request: Request, result: Any) -> list[Message]:
    """Callbacks with the result, and the next of the chain."""
    embed = request.invocation.embed
    if embed.chord is not None:
        chords.ended(app, request, State.SUCCESS, result, _messages)
    if not embed.callbacks and not embed.chain:
        return []
    followed = [
        message
        for number, plain in enumerate(embed.callbacks)
        for message in _messages(app, plain, (result,), request, f"link {number}")
    ]
    if embed.chain:
        *rest, following = embed.chain
        followed += _messages(app, following, (result,), request, "chain", chain=rest)
    return followed


def on_failure(app: Umbel, request: Request, exc: BaseException | None = None) -> list[Message]:
    """Errbacks, each with the failed task's id in front of its arguments. ``exc``: why it failed, where a chord is to hear."""
    if exc is not None and request.invocation.embed is not protocol.NO_EMBED:
        state = State.REVOKED if isinstance(exc, TaskRevoked) else State.FAILURE
        chords.ended(app, request, state, exc, _messages)
    return [
        message
        for number, plain in enumerate(request.invocation.embed.errbacks)
        for message in _messages(app, plain, (request.id,), request, f"link_error {number}")
    ]


def replacement(app: Umbel, request: Request, canvas: Canvas[Any]) -> list[Message]:
    """What goes on in the place of a task: its last call has the task's id, its callbacks, and its place in workflows."""
    invocation, message = request.invocation, request.message
    place = {name: message.headers[name] for name in (WORKFLOW, NODE, TOGETHER) if name in message.headers}
    carried = {
        "task_id": request.id,
        "link": list(invocation.embed.callbacks),
        "link_error": list(invocation.embed.errbacks),
        "chain": list(invocation.embed.chain),
        "chord": invocation.embed.chord,
        "group_id": invocation.group,
        "group_index": invocation.group_index,
        "headers": {**invocation.headers, **place},
        "replaced_task_nesting": invocation.replaced_task_nesting + 1,
    }
    if place:
        carried["ignore_result"] = False
    if reply_to := message.properties.get("reply_to"):
        carried["reply_to"] = reply_to
    if stamps := {n: v for n, v in invocation.stamps.items() if n in (invocation.stamped_headers or ())}:
        canvas = canvas.stamp(**stamps)
    plain = canvas.to_plain()
    steps = chain_of(read(plain, app)).tasks  # read anew: members that a generator makes are made just once
    if not isinstance(steps[-1], Signature):  # a group, whose results are the value
        steps = (*steps, Signature(task=ACCUMULATE, kwargs={"index": 0}))
    last = steps[-1]
    own = last.options.get("headers") or {}
    links = {name: [*carried.pop(name), *plain_signatures(last.options.get(name))] for name in ("link", "link_error")}  # type: ignore[misc]  # both are lists
    last = last.set(**carried, **links).set(headers={**own, **carried["headers"]})  # type: ignore[dict-item]  # a mapping
    # Should this execution be repeated, and find something else to go on with, that is another workflow.
    workflow = derived(request.id, "replace", invocation.replaced_task_nesting, repr(plain))
    plan = compiled(Chain(tasks=(*steps[:-1], last)), workflow, ends=False)
    return stored_messages(app, plan, one_start=bool(place), root_id=request.root_id, parent_id=request.id)


def after(
    app: Umbel, plain: Mapping[str, Any], results: Sequence[Any], request: Request, position: str
) -> list[Message]:
    """The messages that start a signature with ``results``, sent by the task of ``request``."""
    return _messages(app, plain, results, request, position)


def _messages(
    app: Umbel,
    plain: Mapping[str, Any],
    results: Sequence[Any],
    request: Request,
    position: str,
    chain: Sequence[Mapping[str, Any]] | None = None,
) -> list[Message]:
    """The messages that start one signature: one for a task or a chain, several for a group.

    ``position`` tells it from the others that the task sends: ids of what has to be joined derive from it.
    """
    reply_to = request.message.properties.get("reply_to")  # who sent the first of them waits for the others too
    kind = plain.get("subtask_type")
    if kind in ("chain", "group", "chord", "chunks"):
        canvas = read(plain).after(*results)
        steps = (canvas, *(read(step) for step in reversed(chain or ())))
        whole = Chain(tasks=steps) if len(steps) > 1 else canvas
        wired = None
        if joins(whole) and not isinstance(canvas, Chain):
            wired = chords.wire_members(app, canvas, [*reversed(chain or ())], derived(request.id, position))
        if wired is not None:
            return [
                message
                for number, member in enumerate(wired)
                for message in _messages(app, member.to_plain(), (), request, f"{position}.{number}")
            ]
        if joins(whole) and not (isinstance(canvas, Chain) and app.chords is not None):
            plan = compiled(whole, derived(request.id, position))
            return stored_messages(app, plan, parent_id=request.id, reply_to=reply_to)
        if isinstance(canvas, Chain):
            if not canvas.tasks:
                return []
            first, *later = canvas.tasks
            rest = [*(chain or ()), *reversed([step.to_plain() for step in later])]
            return _messages(app, first.to_plain(), (), request, position, chain=rest)
        assert isinstance(canvas, Group)  # a chord joins, and chunks are read as a group
        return [
            message
            for number, member in enumerate(canvas.members)
            for message in _messages(app, member.to_plain(), (), request, f"{position}.{number}", chain=chain)
        ]
    signature = Signature.from_plain(plain).after(*results)
    options = call_options(signature.options)
    if chain is not None:  # what follows a replaced task rides in the last of what replaced it
        options["chain"] = [*chain, *(options.get("chain") or ())]
    if reply_to:
        options.setdefault("reply_to", reply_to)
    options.setdefault("root_id", request.root_id)
    options.setdefault("parent_id", request.id)
    return [call_message(app, signature, options)]
