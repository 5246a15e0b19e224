"""What is asked of a whole fleet of workers, from anywhere that has the app: ``app.control``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from umbel.revocation import GRACE, Revocation, revocations

if TYPE_CHECKING:
    from umbel.app import Umbel


class Control:
    """Tells workers which tasks not to run. Thread-safe; works in scripts, in event loops (``a…``), and inside tasks."""

    def __init__(self, app: Umbel) -> None:
        self._app = app

    def revoke(
        self,
        *ids: str,
        task: str | None = None,
        headers: Mapping[str, Any] | None = None,
        terminate: bool = False,
        grace: float = GRACE,
        expires: float | None = None,
    ) -> bool:
        """Let tasks not run: those of ``ids``, or those named ``task`` and carrying ``headers`` (all that is given).

        What has not started is not started, and gets the state REVOKED when a worker takes it from its queue. What runs is
        left alone, unless ``terminate``: then ``TaskCancelled`` is raised in it, and after ``grace`` seconds the process
        that runs it is killed (0: at once); it is REVOKED if it does not run to its end, and what it returns otherwise.

        ``headers``: name and value of a header or stamp, or a list of values of which it is one; ``root_id`` and ``group``
        are headers as well. ``expires``: seconds for which the revocation holds, else 30 days by id and 1 day by name or
        header: it then holds for whatever is sent meanwhile too.

        True: it is kept in the result store, and holds for workers that are not running now. False: it was told to those
        that are, which hand it on to later ones as long as one of them lives. Blocks until it is kept and told. Raises
        ``ValueError``, ``NotSupported`` where it can be neither, ``ResultStoreUnavailable``, ``BrokerUnavailable``.
        """
        made = self._made(ids, task, headers, terminate, grace, expires)
        kept = [self._app.gateway.ask("revoke", (each.to_plain(), self._app.clock.time())) for each in made]
        return all(kept)

    async def arevoke(
        self,
        *ids: str,
        task: str | None = None,
        headers: Mapping[str, Any] | None = None,
        terminate: bool = False,
        grace: float = GRACE,
        expires: float | None = None,
    ) -> bool:
        """``revoke`` for event loops."""
        made = self._made(ids, task, headers, terminate, grace, expires)
        kept = [await self._app.gateway.aask("revoke", (each.to_plain(), self._app.clock.time())) for each in made]
        return all(kept)

    def restore(self, *ids: str, task: str | None = None, headers: Mapping[str, Any] | None = None) -> bool:
        """Take back what was revoked: these ids, or what was revoked under just this name and these headers.

        What has been refused or ended in the meantime stays so. False if nothing of it was kept. Raises as ``revoke``.
        """
        made = self._made(ids, task, headers)
        found = [self._app.gateway.ask("restore", (each.to_plain(), self._app.clock.time())) for each in made]
        return any(found)

    def revoked(self) -> Sequence[Revocation]:
        """The revocations that the result store keeps. Raises ``NotSupported`` where it keeps none."""
        return [Revocation.from_plain(plain) for plain in self._app.gateway.ask("revoked", None)]

    def _made(
        self,
        ids: Sequence[str],
        task: str | None,
        headers: Mapping[str, Any] | None,
        terminate: bool = False,
        grace: float = GRACE,
        expires: float | None = None,
    ) -> Sequence[Revocation]:
        now = self._app.clock.time()
        return revocations(ids, task=task, headers=headers, terminate=terminate, grace=grace, expires=expires, now=now)
