"""One start for each run: of several messages of one scheduled run, the first that reaches a worker runs, the others do not.

Two schedulers send one run when the first was held up beyond its lease between publishing and marking, or when it could not
know whether the broker had taken a message. The messages have one task id, and a number each. The first to come claims the
id with its number, for ``[scheduler] remember``; one that finds another's number is a copy, and is acknowledged unrun.
The same message comes again after a crash or as a retry: it finds its own number, and runs. Nothing is renewed and nothing
freed, so there is nothing that a crash could leave half done.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, cast

from umbel.errors import ResultStoreUnavailable
from umbel.model import Outcome, Verdict
from umbel.ports.result_store import ClaimStore
from umbel.scheduling.runs import HEADER_COPY, START
from umbel.worker.admission import returned

if TYPE_CHECKING:
    from umbel.worker.held import Held
    from umbel.worker.worker import Worker

logger = logging.getLogger("umbel.worker")

_PATIENCE: Final = 5.0
COPY: Final = "a copy of another"
"""What is said of a message that does not start because another of its run does."""


class OneStart:
    """A gate of the worker (``Worker.gates``). Messages that no scheduler has sent pass at the cost of one look-up."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._remember = worker.settings.scheduler.remember

    async def admit(self, batch: Sequence[Held]) -> Sequence[Held]:
        """See ``Gate``. Where the store keeps no claims, all pass: the scheduler says so at its start."""
        runs = [held for held in batch if HEADER_COPY in held.delivery.message.headers]
        if not runs or not self._worker.gateway.has_store:
            return batch
        store = self._worker.gateway.store
        if not store.capabilities.claim:
            return batch
        verdicts = await asyncio.gather(*(self._may_start(cast("ClaimStore", store), held) for held in runs))
        out = {held.job_id for held, may in zip(runs, verdicts, strict=True) if not may}
        return [held for held in batch if held.job_id not in out]

    async def _may_start(self, store: ClaimStore, held: Held) -> bool:
        message = held.delivery.message
        number = str(message.headers[HEADER_COPY])
        try:
            async with asyncio.timeout(_PATIENCE):
                claim = await store.claim(f"{START}{message.id}", number, lease=self._remember)
        except (ResultStoreUnavailable, TimeoutError) as error:
            logger.warning(
                "run %s waits: the result store cannot say whether it is the only one: %s", message.id, error
            )
            held.delay = 1.0
            self._worker.settlement.end(held, returned(held))
            return False
        if claim.owner == number:
            return True
        logger.info("run %s of task %s was sent twice; this copy is not run", message.id, message.task)
        self._worker.settlement.end(
            held, Outcome(verdict=Verdict.IGNORED, task_id=message.id, task=message.task, detail=COPY)
        )
        return False
