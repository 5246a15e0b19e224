"""What is sent because a task ended: its retry, its callbacks, the next of its chain, its errbacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from umbel import protocol
from umbel.canvas.signature import Signature
from umbel.errors import DecodeError
from umbel.model import Message, TaskOptions, evolve, without_route
from umbel.protocol import BROKER_HEADERS, Invocation

if TYPE_CHECKING:
    from umbel.app import Umbel
    from umbel.task import Request

_CALL_OPTIONS = frozenset(
    {
        "task_id", "countdown", "eta", "expires", "queue", "priority", "serializer", "compression", "headers", "link",
        "link_error", "time_limit", "soft_time_limit", "ignore_result", "shadow", "argsrepr", "kwargsrepr", "reply_to",
        "root_id", "parent_id", "group_id", "group_index", "chain", "chord", "retries", "replaced_task_nesting", "origin",
        "exchange", "routing_key",
    }
)  # fmt: skip


def check_supported(embed: protocol.Embed) -> None:
    """Refuse what this kernel cannot carry through. Raises ``DecodeError``."""
    if embed is protocol.NO_EMBED:
        return
    if embed.chord is not None:
        raise DecodeError("the message is part of a chord, and no workflow engine is installed to complete it")
    for plain in (*embed.callbacks, *embed.errbacks):
        _check(plain, last=True)
    for position, plain in enumerate(embed.chain):
        _check(plain, last=position == 0)


def _check(plain: Mapping[str, Any], *, last: bool) -> None:
    """``last``: nothing of a chain comes after it."""
    kind = plain.get("subtask_type")
    if kind in ("chord", "xmap", "xstarmap", "chunks"):
        raise DecodeError(f"a callback of the message is a {kind}, and no workflow engine is installed to run it")
    if kind == "group" and not last:
        raise DecodeError(
            "the message has a group before the end of a chain, and no workflow engine is installed to join it"
        )
    members = _members(plain) if kind in ("chain", "group") else ()
    for position, member in enumerate(members, 1):
        _check(member, last=last and (kind == "group" or position == len(members)))


def _members(plain: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    members = Signature.from_plain(plain).kwargs.get("tasks") or ()
    if not isinstance(members, Sequence) or not all(isinstance(m, Mapping) and m.get("task") for m in members):
        raise DecodeError(f"the tasks of a {plain.get('subtask_type')} must be a list of signatures")
    return members


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
    if not embed.callbacks and not embed.chain:
        return []
    messages = [m for plain in embed.callbacks for m in _messages(app, plain, (result,), request)]
    if embed.chain:
        *rest, following = embed.chain
        messages += _messages(app, following, (result,), request, chain=rest)
    return messages


def on_failure(app: Umbel, request: Request) -> list[Message]:
    """Errbacks, each with the failed task's id in front of its arguments."""
    return [m for plain in request.invocation.embed.errbacks for m in _messages(app, plain, (request.id,), request)]


def _messages(
    app: Umbel,
    plain: Mapping[str, Any],
    results: Sequence[Any],
    request: Request,
    chain: Sequence[Mapping[str, Any]] | None = None,
) -> list[Message]:
    """The messages that start one signature: one for a task or a chain, several for a group."""
    signature = Signature.from_plain(plain).after(*results)
    match signature.subtask_type:
        case "chain":
            members = _members(plain)
            rest = [*(chain or ()), *reversed([dict(m) for m in members[1:]])]
            return _messages(app, members[0], results, request, chain=rest) if members else []
        case "group":
            return [m for member in _members(plain) for m in _messages(app, member, results, request, chain=chain)]
    options: dict[str, Any] = {k: v for k, v in signature.options.items() if k in _CALL_OPTIONS and v not in (None, "")}
    for name in ("eta", "expires"):  # JSON has no times
        if isinstance(moment := options.get(name), str):
            options[name] = datetime.fromtimestamp(protocol.parse_time(moment, app.timezone) or 0, UTC)
    if "exchange" not in options:  # a queue is named by itself
        options.pop("routing_key", None)
    if chain is not None:
        options["chain"] = [*chain]
    if reply_to := request.message.properties.get("reply_to"):  # who sent the first of them waits for the others too
        options.setdefault("reply_to", reply_to)
    options.setdefault("root_id", request.root_id)
    options.setdefault("parent_id", request.id)
    declared = app.tasks[signature.task].declared if signature.task in app.tasks else TaskOptions()
    effective = app.options_of(signature.task, declared)
    return [app.client.message(signature.task, signature.args, signature.kwargs, effective, **options)]
