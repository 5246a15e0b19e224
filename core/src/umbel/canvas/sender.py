"""A workflow that is being sent: whoever sends it holds the right to give it up, and renews it; who dies lets another take it.

The right is that of a join of its own, complete from the first mark on. Its marks are the names of the joins that are about to
be stored. While the sender lives it holds the right to fire that join; once all is sent it says that it has fired, and nobody
ever will. If it dies, the right ends by its lease, and the reconciler of some worker fires: the workflow is given up.
"""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Sequence
from concurrent.futures import CancelledError
from types import TracebackType
from typing import TYPE_CHECKING, Final

from umbel.canvas import joining
from umbel.canvas.graph import SENDING, WHY, join_key
from umbel.canvas.joining import LEASE, Marked
from umbel.errors import UmbelError, WorkflowBroken

if TYPE_CHECKING:
    from umbel.app import Umbel

logger = logging.getLogger("umbel.workflows")

_NOW: Final = 0.001
"""Seconds of a lease that ends at once."""
_ENDING: Final = (RuntimeError, CancelledError)
"""What a call may end with when its process, and the event loop with it, is ending."""


class Sender:
    """The sending of one workflow, from before anything of it is stored to its end: a context manager.

    What ends the block with an exception gives the workflow up, unless the broker had accepted nothing of it.
    """

    def __init__(self, app: Umbel, workflow: str, expires: float) -> None:
        self._app = app
        self._workflow = workflow
        self._key = join_key(workflow, SENDING)
        self._expires = expires
        self._lease = max(LEASE, 3 * app.settings.broker.publish_timeout)
        self._owner = secrets.token_hex(8)
        self._over = threading.Event()
        self._renewing: threading.Thread | None = None
        self._told = False
        self.accepted = False
        """The broker has something of it."""

    def tell(self, joins: Sequence[str]) -> None:
        """These joins are about to be stored. Blocks. Raises ``WorkflowBroken``, ``NotSupported``, ``ResultStoreUnavailable``."""
        self._told = True
        if not self._join(dict.fromkeys(joins, b""), self._lease):
            raise self._given_up()

    def lasts(self) -> None:
        """It may take longer than a lease: renew the right beside the sending from now on."""
        if self._renewing is None:
            self._renewing = threading.Thread(target=self._renew, name="umbel-workflow-sender", daemon=True)
            self._renewing.start()

    def _renew(self) -> None:
        while not self._over.wait(self._lease / 3):
            try:
                if not self._join({}, self._lease):
                    return  # given up; the sender hears of it when it tells of the next part
            except UmbelError as exc:
                logger.warning("workflow %s is being sent, and that cannot be told: %s", self._workflow, exc)
            except _ENDING as exc:
                logger.debug("workflow %s is not sent any more: %s", self._workflow, exc)
                return

    def _given_up(self) -> WorkflowBroken:
        heard = f"nothing was heard of its sender for {self._lease:g} s"
        return WorkflowBroken(f"workflow {self._workflow} was given up while it was being sent: {heard}")

    def _join(self, marks: dict[str, bytes], lease: float) -> bool:
        call = Marked(self._key, marks, 1, self._owner, self._expires, lease)
        return joining.join(self._app.gateway, [call])[0].fires

    def __enter__(self) -> Sender:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        """Raises ``WorkflowBroken`` where it had been given up meanwhile, ``ResultStoreUnavailable``."""
        self._over.set()
        if not self._told:
            return
        if exc is None:
            # The broker has all of it: a store that is away for a moment is no reason to give it up.
            done = joining.insist(lambda: joining.fired(self._app.gateway, self._key, self._owner), self._lease / 3)
            if not done:
                raise self._given_up()
            return
        try:
            if not self.accepted:  # the caller knows by the exception; nobody else waits for anything
                joining.fired(self._app.gateway, self._key, self._owner)
            elif not isinstance(exc, WorkflowBroken):
                why = f"{type(exc).__name__}: {exc}" if str(exc) else type(exc).__name__
                self._join({WHY: why[:1000].encode(errors="replace")}, _NOW)
        except (UmbelError, *_ENDING) as fault:  # the right ends by its lease
            logger.warning("workflow %s is given up in %g s: %s", self._workflow, self._lease, fault)
