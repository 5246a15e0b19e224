"""Umbel: the app that its worker loads and, run as a script, the client."""

from __future__ import annotations

from ast import literal_eval
from collections.abc import Mapping, Sequence
from typing import Any
from uuid import uuid4

import interop_tasks
from conversation import converse, raised

from umbel import Umbel
from umbel.canvas.signature import Signature
from umbel.errors import ResultTimeout

app = Umbel("on_umbel")
interop_tasks.define(app.task)

Step = Sequence[Any]
"""A task, its arguments, and maybe its options."""


def signature(task: str, args: Sequence[Any], options: Mapping[str, Any] | None = None) -> Signature:
    return app.signature(task, args).set(**options or {})


class Client:
    """What a test asks of a client, in Umbel's words."""

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
        following = [signature(*step).set(task_id=str(uuid4())) for step in steps]
        if following:
            options["chain"] = [step.to_plain() for step in reversed(following)]
        sent = app.send_task(task, args, queue=queue, **options)
        return {"id": str(following[-1].options["task_id"]) if following else sent.id, "first": sent.id}

    def get(self, id: str, timeout: float) -> Mapping[str, Any]:
        try:
            value = app.result(id).get(timeout=timeout)
        except ResultTimeout:
            raise
        except Exception as exc:  # what the task raised
            return {"raised": raised(exc)}
        return {"value": value}

    def look(self, id: str) -> Mapping[str, Any]:
        record = app.result(id).record() or {"status": "PENDING"}
        return {"state": record["status"], "children": [child[0][0] for child in record.get("children") or ()]}

    def waiting(self, queue: str) -> Mapping[str, Any]:
        """How many messages are in the queue, and nobody has them."""
        gateway: Any = app.gateway  # its runtime is no part of the interface that children have too
        return {"ready": gateway.runtime.call(gateway.transport.depth([queue]))[queue].ready}


if __name__ == "__main__":
    converse(Client())
