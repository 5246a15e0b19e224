"""What is sent because a task ended: its retry, its callbacks, the next of its chain, its errbacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from umbel import protocol
from umbel.canvas.signature import Signature
from umbel.errors import DecodeError
from umbel.model import Message, TaskOptions, evolve
from umbel.protocol import BROKER_HEADERS, Invocation

if TYPE_CHECKING:
    from umbel.app import Umbel
    from umbel.task import Request

_CALL_OPTIONS = frozenset(
    {
        "task_id", "countdown", "queue", "priority", "serializer", "compression", "headers", "link", "link_error",
        "time_limit", "soft_time_limit", "ignore_result", "shadow", "argsrepr", "kwargsrepr", "reply_to", "root_id",
        "parent_id", "group_id", "group_index", "chain", "chord", "retries", "replaced_task_nesting", "origin",
    }
)  # fmt: skip


def check_supported(embed: protocol.Embed) -> None:
    """Refuse what this kernel cannot carry through. Raises ``DecodeError``."""
    if embed.chord is not None:
        raise DecodeError("the message is part of a chord, and no workflow engine is installed to complete it")
    for plain in (*embed.callbacks, *embed.errbacks, *embed.chain):
        if plain.get("subtask_type") in ("chord", "xmap", "xstarmap", "chunks"):
            raise DecodeError(
                f"a callback of the message is a {plain['subtask_type']}, and no workflow engine is installed to run it"
            )


def retry_message(message: Message, invocation: Invocation, queue: str, due: float | None, app: Umbel) -> Message:
    """The same call again: same id, one retry more, to the queue it came from. The body's bytes are reused."""
    if not message.headers.get("task"):  # protocol 1: the count of retries is in the body, so it is sent as protocol 2
        message = app.client.message(
            invocation.task,
            invocation.args,
            invocation.kwargs,
            TaskOptions(),
            task_id=invocation.id,
            link=list(invocation.embed.callbacks),
            link_error=list(invocation.embed.errbacks),
            headers=invocation.headers,
            ignore_result=bool(invocation.ignore_result),
        )
    headers = {k: v for k, v in message.headers.items() if k not in BROKER_HEADERS}
    headers |= {
        "retries": invocation.retries + 1,
        "eta": None if due is None else protocol.format_time(due),
        "parent_id": invocation.id,
    }
    return evolve(message, queue=queue, headers=headers, due=due)


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
    members: Sequence[Any] = signature.kwargs.get("tasks") or ()
    match signature.subtask_type:
        case "chain":
            rest = [*(chain or ()), *reversed([dict(m) for m in members[1:]])]
            return _messages(app, members[0], results, request, chain=rest) if members else []
        case "group":
            return [m for member in members for m in _messages(app, member, results, request, chain=chain)]
    options: dict[str, Any] = {k: v for k, v in signature.options.items() if k in _CALL_OPTIONS and v is not None}
    if chain is not None:
        options["chain"] = [*chain]
    options.setdefault("root_id", request.root_id)
    options.setdefault("parent_id", request.id)
    declared = app.tasks[signature.task].declared if signature.task in app.tasks else TaskOptions()
    effective = app.options_of(signature.task, declared)
    return [app.client.message(signature.task, signature.args, signature.kwargs, effective, **options)]
