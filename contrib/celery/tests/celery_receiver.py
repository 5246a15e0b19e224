"""Celery's own tools: its receiver of events, listening in a thread, its ping, its end."""

from __future__ import annotations

import gc
import threading
import warnings
from typing import Any

from celery import Celery
from celery.events.state import State
from cluster import until


def until_it_answers(app: Celery) -> None:
    """Until a worker answers to ``ping``. What is asked before it listens is heard by nobody: so soon again, then less often."""
    pauses = [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8]
    assert any(app.control.ping(timeout=pause, limit=1) for pause in pauses)


def let_go(app: Celery) -> None:
    """Close what an app holds in Redis. It leaves that to collection, by when the server may be gone."""
    app.backend._pending_results.concrete.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()  # results unsubscribe
    app.backend.result_consumer.stop()
    app.backend.client.connection_pool.disconnect()


class Monitor:
    """What Celery's receiver has heard so far. It listens all the while: each ``capture`` is a subscription of its own, and
    what is said between two of them is told to nobody."""

    def __init__(self, app: Celery) -> None:
        self.state, self.heard = State(), list[dict[str, Any]]()
        self._app = app
        self._receiver: Any = None
        self._thread = threading.Thread(target=self._listen, daemon=True)

    def __enter__(self) -> Monitor:
        self._thread.start()
        try:
            until(self._hears, "a first event", every=0.1)
        except BaseException:
            self.__exit__()
            raise
        return self

    def _hears(self) -> bool:
        """Nobody says when a subscription holds: workers are asked to say that they live until that is heard."""
        if not (heard := self.of("worker-heartbeat")):
            self._app.control.broadcast("heartbeat")
        return bool(heard)

    def __exit__(self, *_: object) -> None:
        self._receiver.should_stop = True
        self._thread.join(10)
        assert not self._thread.is_alive()

    def _listen(self) -> None:
        with self._app.connection() as connection:
            self._receiver = self._app.events.Receiver(connection, handlers={"*": self._note})
            for _ in self._receiver.consume(limit=None, safety_interval=0.05, wakeup=False):
                pass

    def _note(self, event: dict[str, Any]) -> None:
        self.heard.append(event)
        if not event["type"].startswith("worker-elect"):  # as Celery's gossip does: they are for nobody's state
            self.state.event(dict(event))

    def of(self, kind: str, uuid: str | None = None) -> list[dict[str, Any]]:
        return [event for event in self.heard if event["type"] == kind and uuid in (None, event.get("uuid"))]

    def story(self, uuid: str) -> list[str]:
        return [event["type"] for event in self.heard if event.get("uuid") == uuid]

    def wait(self, kind: str, uuid: str | None = None) -> dict[str, Any]:
        return until(lambda: self.of(kind, uuid), f"{kind} of {uuid}; heard {self.story(uuid or '')}")[-1]
