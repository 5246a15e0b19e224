"""Messages that come without the key of their concurrency limit, from programs that do not know of it: their body is read
where bodies are read, and they are sent again, with the key in a header, instead of being run."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from umbel import limit_keys
from umbel.model import Message, Outcome, Verdict, evolve
from umbel.worker import followups

if TYPE_CHECKING:
    from umbel.app import Umbel
    from umbel.protocol import Invocation

logger = logging.getLogger("umbel.task")


def forwarded(app: Umbel, message: Message, invocation: Invocation, queue: str) -> Outcome:
    """The outcome that sends ``message`` again, in protocol 2, to the queue it came from. Its id and retries stay the same.

    Arguments that the key cannot be worked out from give an empty one: the call fails by itself, under a limit.
    """
    key, name = "", invocation.task
    if name in app.tasks and (options := app.tasks[name].options).concurrency_key:
        try:
            key = limit_keys.of_call(app, name, invocation.args, invocation.kwargs, options, None)
        except ValueError as exc:
            logger.warning("task %s[%s] runs under an empty key: %s", name, invocation.id, exc)
    again = followups.retry_message(message, invocation, queue, invocation.eta, app)
    headers = {
        **again.headers,
        "retries": invocation.retries,
        "parent_id": invocation.parent_id,
        limit_keys.HEADER: key,
    }
    return Outcome(
        verdict=Verdict.FORWARDED,
        task_id=invocation.id,
        task=invocation.task,
        follow_ups=(evolve(again, headers=headers),),
        detail=f"its key is {key!r}",
    )
