"""Outcomes as values: which result is stored and what is sent, for each way that a task can end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from umbel import protocol
from umbel.errors import EncodeError
from umbel.model import Message, Outcome, Result, State, Verdict

if TYPE_CHECKING:
    from umbel.app import Umbel
    from umbel.codec import Encoded
    from umbel.protocol import Invocation


class Records:
    """Makes the result records of one app; every record is empty-handed where results are not kept."""

    def __init__(self, app: Umbel, hostname: str) -> None:
        self._app = app
        self._hostname = hostname
        self._results = app.settings.results

    @property
    def kept(self) -> bool:
        """Whether there is a result store."""
        return bool(self._results.url)

    def final(
        self,
        task_id: str,
        state: State,
        value: Any,
        *,
        headers: Mapping[str, Any],
        properties: Mapping[str, Any],
        traceback: str | None = None,
        children: Sequence[str] = (),
        queue: str = "",
        call: tuple[Sequence[Any], Mapping[str, Any]] | None = None,
    ) -> tuple[Result, ...]:
        """The record of a task's end, or of its retry; ``headers`` and ``properties`` of its message.

        ``value``: plain, or an exception. Raises ``EncodeError``.
        """
        if not self.kept or not task_id or not _is_text(task_id):
            return ()
        extra: dict[str, Any] = {}
        if self._results.extended:
            args, kwargs = call or ([], {})
            wanted = {
                "name": headers.get("task"),
                "args": list(args),
                "kwargs": dict(kwargs),
                "worker": self._hostname,
                "retries": headers.get("retries") or 0,
                "queue": queue,
            }
            extra = {name: self._plain_or_repr(item) for name, item in wanted.items()}

        failed = isinstance(value, BaseException)
        document = protocol.result_document(
            task_id,
            state,
            None if failed else value,
            children=[[[child, None], None] for child in children],
            done=None if state is State.RETRY else self._app.clock.time(),
            group_id=_text(headers.get("group")),
            parent_id=_text(headers.get("parent_id")),
            extra=extra,
        )
        encoded = (
            self._encode_exception(document, value, traceback) if failed else self._app.result_codec.encode(document)
        )
        return (
            Result(
                task_id=task_id,
                state=state.value,
                document=encoded.body,
                content_type=encoded.content_type,
                content_encoding=encoded.content_encoding,
                expires=self._results.expires,
                reply_to=_text(properties.get("reply_to")),
                correlation_id=_text(properties.get("correlation_id")),
            ),
        )

    def _encode_exception(self, document: dict[str, Any], exc: BaseException, traceback: str | None) -> Encoded:
        """As it is where that can be stored; else with the repr of its arguments; where that is too large, cut short."""
        encode = self._app.result_codec.encode
        document["result"] = plain = protocol.exception_to_plain(exc)
        document["traceback"] = traceback
        try:
            return encode(document)
        except EncodeError:
            plain["exc_message"] = [self._plain_or_repr(arg) for arg in plain["exc_message"]]
        try:
            return encode(document)
        except EncodeError:
            plain["exc_message"] = [protocol.short_repr(plain["exc_message"])]
            document["traceback"] = traceback and traceback[-protocol.REPR_LIMIT :]
            return encode(document)

    def _plain_or_repr(self, value: Any) -> Any:
        try:
            self._app.result_codec.encode(value)
        except EncodeError:
            return protocol.short_repr(value)
        return value

    def refused(self, result: Result, message: Message, exc: BaseException) -> tuple[Result, ...]:
        """The record of a failure in place of ``result``, which the result store does not take."""
        headers = message.headers if result.task_id == message.id else {}
        properties = {"reply_to": result.reply_to, "correlation_id": result.correlation_id}
        return self.final(result.task_id, State.FAILURE, exc, headers=headers, properties=properties)

    def ended(
        self,
        verdict: Verdict,
        message: Message,
        exc: BaseException,
        *,
        state: State = State.FAILURE,
        detail: str = "",
        invocation: Invocation | None = None,
    ) -> Outcome:
        """An end without a call: expired, revoked, unknown, unreadable. The result is stored if the id is known.

        ``invocation``: the body, where it was read; of protocol 1 it alone knows the id.
        """
        headers, properties = message.headers, message.properties
        ignored = bool(headers.get("ignore_result"))
        id, task = message.id or (invocation.id if invocation else ""), message.task
        return Outcome(
            verdict=verdict,
            task_id=id,
            task=task or (invocation.task if invocation else ""),
            results=() if ignored else self.final(id, state, exc, headers=headers, properties=properties),
            detail=detail or str(exc),
        )


def _text(header: Any) -> str | None:
    return header if isinstance(header, str) else None


def _is_text(task_id: str) -> bool:
    """Whether a store can keep it. An id with half a surrogate pair, which JSON lets pass, would block all others for ever."""
    try:
        task_id.encode()
    except UnicodeEncodeError:
        return False
    return True
