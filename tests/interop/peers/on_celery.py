"""Celery: the app that its worker loads and, run as a script, the client."""

from __future__ import annotations

import json
import os
from ast import literal_eval
from base64 import b64decode
from collections.abc import Mapping, Sequence
from typing import Any

import interop_tasks
from amqp import basic_message
from celery import Celery, Signature, chain
from celery.exceptions import TimeoutError as ResultTimeout
from conversation import converse, raised
from kombu import Exchange, Queue

SERIALIZERS = ["json", "msgpack", "yaml", "pickle"]
QUEUES: Mapping[str, int | None] = json.loads(os.environ["INTEROP_QUEUES"])
"""Every queue, with its number of priorities."""

app = Celery("on_celery", broker=os.environ["INTEROP_BROKER"], backend=os.environ["INTEROP_RESULTS"])
app.conf.update(
    accept_content=SERIALIZERS,
    broker_connection_retry_on_startup=True,
    task_acks_late=True,
    task_default_queue="interop-celery",
    task_queues=[Queue(name, Exchange(name), name, max_priority=priorities) for name, priorities in QUEUES.items()],
    worker_prefetch_multiplier=1,
)
interop_tasks.define(app.task)

Step = Sequence[Any]
"""A task, its arguments, and maybe its options."""


def signature(task: str, args: Sequence[Any], options: Mapping[str, Any] | None = None) -> Signature:
    return app.signature(task, args).set(**options or {})


class Client:
    """What a test asks of a client, in Celery's words."""

    def send(
        self,
        task: str,
        args: Sequence[Any] = (),
        *,
        queue: str,
        literal: str | None = None,
        link: Step | None = None,
        link_error: Step | None = None,
        steps: Sequence[Step] = (),
        **options: Any,
    ) -> Mapping[str, Any]:
        if literal is not None:
            args = [literal_eval(literal)]
        for name, step in (("link", link), ("link_error", link_error)):
            if step:
                options[name] = signature(*step)
        first = signature(task, args)
        if not steps:
            sent = first.apply_async(queue=queue, **options)
            return {"id": sent.id, "first": sent.id}
        last = chain(first.set(queue=queue), *(signature(*step) for step in steps)).apply_async(**options)
        result = last
        while result.parent is not None:
            result = result.parent
        return {"id": last.id, "first": result.id}

    def get(self, id: str, timeout: float) -> Mapping[str, Any]:
        try:
            value = app.AsyncResult(id).get(timeout=timeout)
        except ResultTimeout:
            raise
        except Exception as exc:  # what the task raised
            return {"raised": raised(exc)}
        return {"value": value}

    def look(self, id: str) -> Mapping[str, Any]:
        result = app.AsyncResult(id)
        return {"state": result.state, "children": [child.id for child in result.children or ()]}

    def replay(self, queue: str, entry: Mapping[str, Any]) -> Mapping[str, Any]:
        """A captured message, to another queue: not read and written again, but as it was."""
        with app.connection() as connection:
            channel: Any = connection.default_channel
            if (envelope := entry.get("envelope")) is not None:
                channel.client.lpush(queue, json.dumps(envelope))
            else:
                properties = {name: value for name, value in entry["properties"].items() if value is not None}
                body = b64decode(entry["body_base64"])
                message = basic_message.Message(body, application_headers=entry["headers"] or {}, **properties)
                channel.basic_publish(message, exchange="", routing_key=queue)
        return {}


if __name__ == "__main__":
    converse(Client())
