"""Handles on what became of a task. Making one does no I/O."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from attrs import field, frozen

from umbel import protocol
from umbel.errors import DecodeError, DuplicateTask, TaskRevoked
from umbel.model import FINAL_STATES, Result, State
from umbel.revocation import GRACE

if TYPE_CHECKING:
    from umbel.app import Umbel

R = TypeVar("R")


@frozen(eq=False)
class AsyncResult(Generic[R]):
    """The result of one sent task: wait for it with ``get()``, or ``await`` it. Thread-safe, fork-safe."""

    id: str
    app: Umbel = field(repr=False)
    _structure: Callable[[Any], R] | None = field(default=None, repr=False, alias="structure")
    sent: bool = field(default=True, kw_only=True)
    """Whether the call that gave this handle was sent; False: another with the same unique key waits or runs."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AsyncResult) and other.id == self.id

    def __hash__(self) -> int:
        return hash(self.id)

    def __str__(self) -> str:
        return self.id

    # --- waiting ---

    def get(self, timeout: float | None = None, *, propagate: bool = True) -> R:
        """Wait up to ``timeout`` seconds (None: for ever) for the end, and return the task's value.

        Raises what the task raised (``propagate=False``: returns it), ``TaskRevoked``, ``ResultTimeout``,
        ``ResultStoreUnavailable``, ``NotSupported`` without a result store.
        """
        return self._conclude(self.app.gateway.wait(self.id, timeout), propagate)

    async def aget(self, timeout: float | None = None, *, propagate: bool = True) -> R:
        """``get`` for event loops."""
        return self._conclude(await self.app.gateway.await_(self.id, timeout), propagate)

    def __await__(self) -> Generator[Any, None, R]:
        return self.aget().__await__()

    def _conclude(self, record: Result, propagate: bool) -> R:
        document = self._decode(record)
        value: Any = document.get("result")
        if record.state == State.SUCCESS:
            return value if self._structure is None else self._structure(value)
        exc = protocol.exception_from_plain(value, document.get("traceback"))
        if record.state == State.REVOKED and not isinstance(exc, TaskRevoked):
            exc = TaskRevoked(str(value))
        if propagate:
            raise exc
        return exc  # type: ignore[return-value]  # asked for by propagate=False

    # --- looking ---

    def record(self) -> Mapping[str, Any] | None:
        """The result document as stored now; None where there is none."""
        found = self.app.gateway.get([self.id]).get(self.id)
        return None if found is None else self._decode(found)

    async def arecord(self) -> Mapping[str, Any] | None:
        """``record`` for event loops."""
        found = (await self.app.gateway.aget([self.id])).get(self.id)
        return None if found is None else self._decode(found)

    @property
    def state(self) -> str:
        """The state stored now. Blocks.

        Where there is no record: PENDING, be the task waiting or unknown; but UNKNOWN where every task has a record from its
        sending on (``[results] track = "submit"``).
        """
        document = self.record()
        if document:
            return str(document["status"])
        return (State.UNKNOWN if self.app.settings.results.track == "submit" else State.PENDING).value

    status = state

    def ready(self) -> bool:
        """Whether the task has ended. Blocks for one look-up."""
        return self.state in FINAL_STATES

    def successful(self) -> bool:
        """Whether the task has ended well. Blocks for one look-up."""
        return self.state == State.SUCCESS

    def failed(self) -> bool:
        """Whether the task has failed. Blocks for one look-up."""
        return self.state == State.FAILURE

    @property
    def result(self) -> Any:
        """The value, the exception, or the progress last told; None where there is no record. Blocks."""
        document = self.record()
        if document is None:
            return None
        if document["status"] in (State.FAILURE, State.REVOKED, State.RETRY):
            return protocol.exception_from_plain(document.get("result"), document.get("traceback"))
        return document.get("result")

    info = result

    @property
    def traceback(self) -> str | None:
        """The traceback of a failed task. Blocks."""
        document = self.record()
        text = document.get("traceback") if document else None
        return text if isinstance(text, str) else None

    # --- ending it ---

    def revoke(self, *, terminate: bool = False, grace: float = GRACE, expires: float | None = None) -> bool:
        """Let the task not run; with ``terminate``, end it if it runs. See ``Control.revoke``."""
        return self.app.control.revoke(self.id, terminate=terminate, grace=grace, expires=expires)

    def cancel(self, *, grace: float = GRACE) -> bool:
        """Let the task not run, or end it if it runs: ``revoke(terminate=True)``."""
        return self.revoke(terminate=True, grace=grace)

    async def acancel(self, *, grace: float = GRACE) -> bool:
        """``cancel`` for event loops."""
        return await self.app.control.arevoke(self.id, terminate=True, grace=grace)

    def forget(self) -> None:
        """Delete the stored record."""
        self.app.gateway.forget([self.id])

    def _decode(self, record: Result) -> Mapping[str, Any]:
        return decode(self.app, record)


@frozen(eq=False)
class NotSent(AsyncResult[R]):
    """What a call is given that was dropped because another with the same unique key waits or runs: revoked, and no I/O."""

    why: DuplicateTask = field(kw_only=True)

    @property
    def existing(self) -> AsyncResult[R]:
        """The handle of the other."""
        return AsyncResult(self.why.existing, self.app, sent=False)

    def get(self, timeout: float | None = None, *, propagate: bool = True) -> R:
        """Raises ``DuplicateTask`` (``propagate=False``: returns it)."""
        if propagate:
            raise self.why
        return self.why  # type: ignore[return-value]  # asked for by propagate=False

    async def aget(self, timeout: float | None = None, *, propagate: bool = True) -> R:
        """``get`` for event loops."""
        return self.get(timeout, propagate=propagate)

    def record(self) -> Mapping[str, Any] | None:
        """A document as of a revoked task."""
        return protocol.result_document(self.id, State.REVOKED, protocol.exception_to_plain(TaskRevoked(str(self.why))))

    async def arecord(self) -> Mapping[str, Any] | None:
        """``record`` for event loops."""
        return self.record()

    def forget(self) -> None:
        """There is nothing to delete."""


def decode(app: Umbel, record: Result) -> Mapping[str, Any]:
    """The result document of ``record``. Raises ``DecodeError``."""
    document = app.result_codec.decode(record.document, record.content_type, record.compression)
    if not isinstance(document, Mapping) or "status" not in document:
        raise DecodeError(f"the record of task {record.task_id} is not a result document")
    return document
