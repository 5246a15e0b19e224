"""The worker's log: where the application has none of its own, and how the end of a delivery is told in it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from umbel.model import Action, Outcome, Settlement, Verdict

if TYPE_CHECKING:
    from umbel.app import Umbel

logger = logging.getLogger("umbel.worker")


def start_log(app: Umbel) -> None:
    """Show the log, where plugins say or else on standard error, unless the application has arranged for its logging itself:
    then nothing of it is touched. Raises ``PluginError``."""
    if logging.root.handlers:
        return
    handlers: list[logging.Handler] = app.plugins.contributions("umbel_add_log_handlers", app=app)
    if not handlers:
        handlers = [logging.StreamHandler()]
        handlers[0].setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s"))
    for handler in handlers:
        logging.root.addHandler(handler)
    logging.root.setLevel(app.settings.worker.log_level)
    logging.getLogger("stevedore").setLevel(logging.WARNING)  # at DEBUG it lists every entry point of every scan


def log_end(name: str, outcome: Outcome, settlement: Settlement | None, *, lost: bool) -> None:
    """Tell what came of a delivery of task ``name``; ``lost``: its lease had passed to another."""
    task_id = outcome.task_id
    if lost:
        logger.warning("task %s[%s]: its lease had passed to another worker; this end does not count", name, task_id)
        return
    match outcome.verdict:
        case Verdict.SUCCESS:
            if logger.isEnabledFor(logging.DEBUG):
                logger.debug("task %s[%s] succeeded in %.3f s", name, task_id, outcome.runtime)
        case Verdict.FAILURE | Verdict.TIMED_OUT:
            text = f"\n{outcome.traceback}" if outcome.traceback else ""
            logger.error("task %s[%s] failed: %s%s", name, task_id, outcome.detail, text)
        case Verdict.RETRY | Verdict.EXPIRED | Verdict.REVOKED | Verdict.IGNORED:
            logger.info("task %s[%s] %s: %s", name, task_id, outcome.verdict.value, outcome.detail)
        case Verdict.FORWARDED:
            logger.debug("task %s[%s] forwarded: %s", name, task_id, outcome.detail)
        case Verdict.RETURNED | Verdict.CANCELLED:
            logger.debug("task %s[%s] given back: %s", name, task_id, outcome.verdict.value)
        case _:
            dead = settlement is not None and settlement.action is Action.DEAD
            where = "to the dead letters" if dead else "back to the queue"
            logger.error("task %s[%s] %s, %s: %s", name, task_id, outcome.verdict.value, where, outcome.detail)
