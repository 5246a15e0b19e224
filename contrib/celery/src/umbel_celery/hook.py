"""The listener ``celery``: Umbel's workers among Celery's tools, Flower and ``celery inspect`` and ``control``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Final

from umbel.markers import hookimpl
from umbel.model import Delivery, Outcome, Settlement
from umbel.ports.step import Step
from umbel_celery import events
from umbel_celery.address import Address, address_of
from umbel_celery.chords import Accounts, AccountStep
from umbel_celery.monitor import Monitor
from umbel_celery.options import CeleryOptions
from umbel_celery.result_server import ResultServer

if TYPE_CHECKING:
    from umbel.app import Umbel
    from umbel.worker.worker import Worker

_LAST_WORDS: Final = 3.0
"""Seconds that a worker at its very end waits for the monitor to say farewell."""


class CeleryHook:
    """Makes a step that starts the monitor, and tells it of every task."""

    Options: ClassVar[type] = CeleryOptions

    def __init__(self, options: CeleryOptions | None = None) -> None:
        self._options = CeleryOptions() if options is None else options
        self._worker: Worker | None = None
        self._monitor: Monitor | None = None

    @hookimpl
    def umbel_add_steps(self, worker: Worker) -> Sequence[Step]:
        """Raises ``SettingsError`` for a broker on which no tool of Celery could listen."""
        broker = worker.settings.broker
        steps: list[Step] = [_MonitorStep(self, address_of(broker.url, broker.options, self._options))]
        if worker.app.chords is not None and (server := ResultServer.of(worker.settings.results)) is not None:
            steps.append(AccountStep(server, ordered=self._options.chord_ordered))
        return steps

    @hookimpl
    def umbel_configure(self, app: Umbel) -> None:
        """Chords that Celery has sent are accounted for as Celery does; not in a Redis Cluster, where Celery keeps no results."""
        server = ResultServer.of(app.settings.results)
        if server is None or not server.clustered:
            app.chords = Accounts(app)

    def start(self, worker: Worker, address: Address) -> None:
        """The worker consumes."""
        self._worker = worker
        self._monitor = Monitor(worker, address, self._options)
        self._monitor.start()

    def stopping(self) -> None:
        """The worker drains. The monitor goes on, to tell how its last tasks end; it is not to outlive the worker."""
        if self._monitor is not None and self._worker is not None:
            self._monitor.end_within(self._worker.settings.worker.grace + 10)
            if self._worker.failure is not None:
                self._end()

    @hookimpl
    def umbel_worker_stopped(self) -> None:
        """Everything else is over: there is nobody left whom a short wait on the loop could harm."""
        self._end()

    def _end(self) -> None:
        monitor, self._monitor = self._monitor, None
        if monitor is not None:
            monitor.end()
            monitor.join(_LAST_WORDS)

    # --- tasks ---

    @hookimpl
    def umbel_task_received(self, delivery: Delivery) -> None:
        message = delivery.message
        if self._hears and message.id and self._worker is not None and message.task in self._worker.app.tasks:
            self._say(events.received(message))

    @hookimpl
    def umbel_task_started(self, delivery: Delivery, started: float) -> None:
        if self._hears and delivery.message.id:
            self._say(events.started(delivery, started))

    @hookimpl
    def umbel_task_settled(self, settlement: Settlement, outcome: Outcome) -> None:
        if self._hears:
            for event in events.ended(settlement, outcome):
                self._say(event)

    @property
    def _hears(self) -> bool:
        return self._monitor is not None and self._monitor.events

    def _say(self, event: Any) -> None:
        if self._monitor is not None:
            self._monitor.say(event)


class _MonitorStep(Step):
    name: ClassVar[str] = "celery"
    requires: ClassVar[tuple[str, ...]] = ("intake",)

    def __init__(self, hook: CeleryHook, address: Address) -> None:
        self._hook, self._address = hook, address

    async def start(self, worker: Worker) -> None:
        self._hook.start(worker, self._address)

    async def stop(self, worker: Worker) -> None:
        self._hook.stopping()
