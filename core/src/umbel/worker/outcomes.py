"""Outcomes as values: which result is stored and what is sent, for each way that a task can end."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from umbel import protocol
from umbel.canvas.graph import REST
from umbel.errors import EncodeError
from umbel.model import Message, Outcome, Result, State, Verdict, make_outcome, make_result

if TYPE_CHECKING:
    from umbel.app import Umbel
    from umbel.codec import Encoded
    from umbel.ports.serializer import Serializer
    from umbel.protocol import Invocation

_UNESCAPED: Final = re.compile(r"[0-9A-Za-z_.:-]+")
"""Ids that stand in JSON as they are."""


class Plain(tuple[Result, ...]):
    """The one result of a plain success. All but its document can be told from the message and the settings."""

    __slots__ = ()


class Records:
    """Makes the result records of one app; every record is empty-handed where results are not kept."""

    def __init__(self, app: Umbel, hostname: str) -> None:
        self._app = app
        self._hostname = hostname
        self._results = app.settings.results
        self.kept = bool(self._results.url)
        """Whether there is a result store."""
        self._write_success: Callable[[str, Any, float], bytes | None] | None = None

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
        attempts: Sequence[Mapping[str, Any]] = (),
    ) -> tuple[Result, ...]:
        """The record of a task's end, or of its retry; ``headers`` and ``properties`` of its message.

        ``value``: plain, or an exception. Raises ``EncodeError``.
        """
        if not self.kept or not task_id or not _is_text(task_id):
            return ()
        plain = state is State.SUCCESS and not children and not attempts
        if plain and (written := self._plain_success(task_id, value, headers)):
            return Plain((self._plain_result(task_id, written, properties),))
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
        if attempts:
            extra["attempts"] = list(attempts)

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
                order=protocol.order_of(state, _number(headers.get("retries"))) if state is State.RETRY else 0,
            ),
        )

    def _plain_result(self, task_id: str, document: bytes, properties: Mapping[str, Any]) -> Result:
        reply_to, correlation_id = _text(properties.get("reply_to")), _text(properties.get("correlation_id"))
        return make_result(task_id, "SUCCESS", document, *_JSON, self._results.expires, reply_to, correlation_id)

    def to_plain(self, outcome: Outcome, message: Message) -> tuple[Any, ...]:
        """``outcome`` of ``message`` for the worker. Of a plain success, only what does not stand in the message."""
        if outcome.verdict is Verdict.SUCCESS and not outcome.follow_ups and outcome.task_id == message.id:
            if type(outcome.results) is Plain:
                return outcome.results[0].document, outcome.runtime
            if not outcome.results:
                return None, outcome.runtime
        return outcome.to_plain()

    def from_plain(self, plain: tuple[Any, ...], message: Message) -> Outcome:
        """The inverse of ``to_plain``."""
        if len(plain) != 2:
            return Outcome.from_plain(plain)
        (document, runtime), id = plain, message.id
        results = () if document is None else (self._plain_result(id, document, message.properties),)
        return make_outcome(Verdict.SUCCESS, id, message.task, results, (), "", None, runtime)

    def _plain_success(self, task_id: str, value: Any, headers: Mapping[str, Any]) -> bytes | None:
        """The document of a success with nothing but its value; None: it has more, or is to be written as any other."""
        if headers.get("group") or headers.get("parent_id") or self._results.extended:
            return None
        if (write := self._write_success) is None:
            codec, name = self._app.result_codec, self._results.serializer
            write = self._write_success = _success_writer(
                codec.serializer(name), self._app.settings.codec.max_body_size
            )
        return write(task_id, value, self._app.clock.time())

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
        results = () if ignored else self.final(id, state, exc, headers=headers, properties=properties)
        later = headers.get(REST)
        for each in later if isinstance(later, list) else ():  # those of its chain that ride behind it end with it
            results += self.final(
                str(each), state, exc, headers={}, properties={"reply_to": properties.get("reply_to")}
            )
        return Outcome(
            verdict=verdict,
            task_id=id,
            task=task or (invocation.task if invocation else ""),
            results=results,
            detail=detail or str(exc),
        )


def _success_writer(serializer: Serializer, most: int) -> Callable[[str, Any, float], bytes | None]:
    """Writes the document of a plain success round its value: a third of the time of making and encoding it.

    The serializer itself has written what stands round it, once. What it gives is None where JSON is not what it writes, or
    a document is not composed of what it gives for its parts; or where the id has to be escaped, or the value is large.
    """
    dumps = serializer.dumps
    marks = {"result": "result mark", "date_done": "date mark", "task_id": "id mark"}
    document = protocol.result_document(marks["task_id"], State.SUCCESS, marks["result"]) | marks
    probe: list[Any] = ["é", 1.5, {"a": None}]
    parts = (
        re.split(rb'"result mark"|date mark|id mark', dumps(document))
        if (serializer.content_type, serializer.content_encoding) == _JSON
        else []
    )
    if len(parts) != 4 or parts[0] + dumps(probe) + parts[1] + b"date mark" + parts[2] + b"id mark" + parts[3] != dumps(
        document | {"result": probe}
    ):
        return lambda task_id, value, done: None
    before, then, last, end = parts
    most -= sum(map(len, parts)) + 1024

    def write(task_id: str, value: Any, done: float) -> bytes | None:
        if _UNESCAPED.fullmatch(task_id) is None:
            return None
        plain = b"null" if value is None else dumps(value)
        if len(plain) > most or len(task_id) > 512:
            return None
        return b"".join((before, plain, then, protocol.format_time(done).encode(), last, task_id.encode(), end))

    return write


_JSON: Final = ("application/json", "utf-8")


def _number(header: Any) -> int:
    return header if isinstance(header, int) and header >= 0 else 0


def _text(header: Any) -> str | None:
    return header if isinstance(header, str) else None


def _is_text(task_id: str) -> bool:
    """Whether a store can keep it. An id with half a surrogate pair, which JSON lets pass, would block all others for ever."""
    try:
        task_id.encode()
    except UnicodeEncodeError:
        return False
    return True
