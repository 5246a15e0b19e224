"""What goes out because deliveries have ended, before they are settled: follow-ups to the broker, results to their store.

A passing fault is waited out; what is refused for good concerns its own task and no other's.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any

from umbel.errors import (
    BrokerUnavailable,
    NotSupported,
    PublishError,
    ResultRefused,
    ResultStoreUnavailable,
    UmbelError,
)
from umbel.model import Message, Result, Verdict, evolve

if TYPE_CHECKING:
    from umbel.worker.held import End
    from umbel.worker.worker import Worker

logger = logging.getLogger("umbel.worker")


class Outbox:
    """Publishes and stores for one worker, on its I/O loop."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._before_publish = worker.app.plugins.observer("umbel_before_publish")
        self._after_publish = worker.app.plugins.observer("umbel_after_publish")

    async def publish(self, ends: Sequence[End]) -> None:
        """Publish follow-ups; a message that the broker refuses makes its own task a dead letter, no other's."""
        messages = [message for end in ends for message in end.outcome.follow_ups]
        if not messages:
            return
        try:
            await self.insist(lambda: self._send(messages), BrokerUnavailable, "broker")
        except (PublishError, NotSupported):
            for end in ends:
                follow_ups = list(end.outcome.follow_ups)
                try:
                    if follow_ups:
                        await self.insist(lambda m=follow_ups: self._send(m), BrokerUnavailable, "broker")  # type: ignore[misc]  # the default binds the loop's variable
                except (PublishError, NotSupported) as exc:
                    detail = f"a follow-up was refused by the broker: {exc}"
                    message = end.held.delivery.message
                    end.outcome = self._worker.records.ended(Verdict.REJECTED, message, exc, detail=detail)

    async def store(self, ends: Sequence[End]) -> None:
        """Store the results of ``ends``; one that the store refuses for good fails its own task, no other's."""
        results = [result for end in ends for result in end.outcome.results]
        if self._worker.app.client.tracks:
            sent = [m for end in ends for m in end.outcome.follow_ups if m.id != end.outcome.task_id]
            results += self._worker.app.client.pending(sent)
        try:
            await self._put(results)
        except ResultRefused:
            for end in ends:
                for result in end.outcome.results:
                    await self._put_alone(end, result)

    async def _put(self, results: Sequence[Result]) -> None:
        if results:
            await self.insist(lambda: self._worker.gateway.store.put(results), ResultStoreUnavailable, "result store")

    async def _put_alone(self, end: End, result: Result) -> None:
        try:
            await self._put([result])
            return
        except ResultRefused as exc:
            detail, refused = f"the result store refused the record {result.state}: {exc}", exc
        logger.error("task %s[%s]: %s", end.outcome.task, result.task_id, detail)
        if not result.final:
            return
        if result.task_id == end.outcome.task_id and end.outcome.verdict is Verdict.SUCCESS:
            end.outcome = evolve(end.outcome, verdict=Verdict.FAILURE, detail=detail)
            if not end.held.settled:
                end.settlement = None  # it was for a success
        try:
            await self._put(self._worker.records.refused(result, end.held.delivery.message, refused))
        except ResultRefused as exc:
            logger.error(
                "task %s[%s] has no record, for that was refused too: %s", end.outcome.task, result.task_id, exc
            )

    async def _send(self, messages: Sequence[Message]) -> None:
        if self._before_publish:
            self._before_publish(messages=messages)
        await self._worker.gateway.do_publish(messages, self._worker.settings.broker.publish_timeout)
        if self._after_publish:
            self._after_publish(messages=messages)

    async def insist(self, call: Callable[[], Awaitable[Any]], passing: type[UmbelError], what: str) -> Any:
        """Repeat a call through passing faults, until the worker's last words are over."""
        pause = 0.05
        while True:
            transport = self._worker.gateway.transport
            try:
                return await call()
            except passing as exc:
                logger.warning("%s unavailable; finished work is kept and tried again in %.1f s: %s", what, pause, exc)
                if passing is BrokerUnavailable:
                    await self._worker.gateway.replace_transport(transport)
            await asyncio.sleep(pause * random.uniform(0.5, 1))  # jitter, not a secret
            pause = min(pause * 2, 5.0)
