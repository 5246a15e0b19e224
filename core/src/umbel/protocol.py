"""The wire format: task protocol 2 (and 1 on input), result documents, exceptions as data.

The format is the one Celery speaks; the facts come from captured traffic (see ``docs/reference/wire.md``). Functions here
are pure: plain data in, values out; the only error that reading raises is ``DecodeError``.
"""

from __future__ import annotations

import json
import math
import os
import reprlib
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, tzinfo
from functools import lru_cache
from itertools import product
from operator import itemgetter
from typing import Any, Final

from attrs import field, frozen

from umbel import errors
from umbel.errors import DecodeError, TaskFailed
from umbel.model import by_position

EARLY: Final = 0.05
"""Seconds by which a task may start before its ETA: clocks differ, and a way back to the queue costs more."""

REPR_LIMIT: Final = 1024
"""Characters kept of ``argsrepr`` and ``kwargsrepr``."""

STANDARD_HEADERS: Final = frozenset(
    {
        "lang", "task", "id", "shadow", "eta", "expires", "group", "group_index", "retries", "timelimit", "root_id",
        "parent_id", "argsrepr", "kwargsrepr", "origin", "ignore_result", "replaced_task_nesting", "stamped_headers",
        "stamps", "compression",
    }
)  # fmt: skip
"""Everything else in the headers is the user's, exposed as ``request.headers`` and copied to retries."""

BROKER_HEADERS: Final = frozenset(
    {
        "redelivered", "x-death", "x-first-death-exchange", "x-first-death-queue", "x-first-death-reason",
        "x-last-death-exchange", "x-last-death-queue", "x-last-death-reason", "x-delivery-count",
        "umbel-dead-cause", "umbel-dead-queue", "umbel-dead-at", "umbel-dead-count", "umbel-amqp",
    }
)  # fmt: skip
"""Added by brokers on the way; never copied to a message that is sent again."""


# --- small values -------------------------------------------------------------------------------


def new_id() -> str:
    """A random UUIDv4 as text. 0.9 µs here against 2.1 µs for ``str(uuid.uuid4())``; safe across forks."""
    h = os.urandom(16).hex()
    return f"{h[:8]}-{h[8:12]}-4{h[13:16]}-{'89ab'[int(h[16], 16) & 3]}{h[17:20]}-{h[20:]}"


def origin() -> str:
    """Who sends: ``gen<pid>@<host>``."""
    return f"gen{os.getpid()}@{socket.gethostname()}"


_bounded = reprlib.Repr()
_bounded.maxlevel = 3
_bounded.maxstring = _bounded.maxother = 128
_bounded.maxlist = _bounded.maxtuple = _bounded.maxdict = _bounded.maxset = 32


def short_repr(value: object, *, small: bool = False) -> str:
    """``repr`` for logs, at most ``REPR_LIMIT`` characters. ``small``: known to be little data, so plain repr will do."""
    try:
        text = repr(value) if small else _bounded.repr(value)
    except Exception as exc:  # a user's __repr__ may raise anything; a log line must not fail for it
        text = f"<unprintable {type(value).__name__}: {type(exc).__name__}>"
    return text if len(text) <= REPR_LIMIT else text[: REPR_LIMIT - 3] + "..."


def format_time(timestamp: float) -> str:
    """Unix time as ISO 8601 with microseconds and offset, as the protocol writes it."""
    second = math.floor(timestamp)
    micros = round((timestamp - second) * 1e6)
    if 0 < micros < 1_000_000:
        return f"{_format_second(second)}.{micros:06d}+00:00"
    return f"{_format_second(second + (micros > 0))}+00:00"


@lru_cache(maxsize=16)
def _format_second(second: int) -> str:
    """Kept, because thousands of tasks end within one second: a time costs 0.8 µs so, and 3.1 otherwise."""
    return datetime.fromtimestamp(second, UTC).isoformat().removesuffix("+00:00")


def parse_time(text: object, timezone: tzinfo = UTC) -> float | None:
    """ISO 8601 to Unix time; a naive time is in ``timezone``. None for None. Raises ``DecodeError``."""
    if text is None or text == "":
        return None
    try:
        moment = text if isinstance(text, datetime) else datetime.fromisoformat(str(text))
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=timezone)
        return moment.timestamp()
    except (ValueError, OverflowError, OSError) as exc:
        raise DecodeError(f"{str(text)[:64]!r} is not an ISO 8601 time") from exc


# --- task messages ------------------------------------------------------------------------------


@frozen(kw_only=True)
class Embed:
    """What rides in the body beside the arguments: signature dictionaries, as the wire has them."""

    callbacks: Sequence[Mapping[str, Any]] = ()
    errbacks: Sequence[Mapping[str, Any]] = ()
    chain: Sequence[Mapping[str, Any]] = ()
    """In reverse: the next task is the last element."""
    chord: Mapping[str, Any] | None = None

    def to_plain(self) -> dict[str, Any]:
        return {
            "callbacks": list(self.callbacks) or None,
            "errbacks": list(self.errbacks) or None,
            "chain": list(self.chain) or None,
            "chord": self.chord,
        }


NO_EMBED: Final = Embed()
NO_EMBED_PLAIN: Final = NO_EMBED.to_plain()
_NOTHING_ELSE: Final = f", {{}}, {json.dumps(NO_EMBED_PLAIN)}]".encode()
"""How the JSON of a body ends that has neither keyword arguments nor anything embedded, as Celery and we write it."""


@frozen(kw_only=True, weakref_slot=False)
class Invocation:
    """A decoded task message: what is to be called, with what, and as part of what."""

    id: str
    task: str
    args: Sequence[Any] = ()
    kwargs: Mapping[str, Any] = field(factory=dict)
    embed: Embed = NO_EMBED
    eta: float | None = None
    expires: float | None = None
    retries: int = 0
    time_limit: float | None = None
    soft_time_limit: float | None = None
    root_id: str | None = None
    parent_id: str | None = None
    group: str | None = None
    group_index: int | None = None
    shadow: str | None = None
    origin: str | None = None
    ignore_result: bool | None = None
    replaced_task_nesting: int = 0
    stamped_headers: Sequence[str] | None = None
    stamps: Mapping[str, Any] = field(factory=dict)
    headers: Mapping[str, Any] = field(factory=dict)
    """The user's own headers, unknown ones included."""


make_invocation: Final = by_position(Invocation)
"""``Invocation`` by position."""


def make_headers(
    task: str,
    id: str,
    *,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    small: bool = False,
    eta: float | None = None,
    expires: float | None = None,
    retries: int = 0,
    time_limit: float | None = None,
    soft_time_limit: float | None = None,
    root_id: str | None = None,
    parent_id: str | None = None,
    group: str | None = None,
    group_index: int | None = None,
    shadow: str | None = None,
    origin: str = "",
    ignore_result: bool | None = False,
    replaced_task_nesting: int = 0,
    stamped_headers: Sequence[str] | None = None,
    stamps: Mapping[str, Any] | None = None,
    argsrepr: str | None = None,
    kwargsrepr: str | None = None,
    headers: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The nineteen standard headers, and the user's merged flat beside them."""
    made: dict[str, Any] = {
        "lang": "py",
        "task": task,
        "id": id,
        "shadow": shadow,
        "eta": None if eta is None else format_time(eta),
        "expires": None if expires is None else format_time(expires),
        "group": group,
        "group_index": group_index,
        "retries": retries,
        "timelimit": [time_limit, soft_time_limit],
        "root_id": root_id or id,
        "parent_id": parent_id,
        "argsrepr": short_repr(tuple(args), small=small) if argsrepr is None else argsrepr,
        "kwargsrepr": short_repr(kwargs or {}, small=small) if kwargsrepr is None else kwargsrepr,
        "origin": origin,
        "ignore_result": ignore_result,
        "replaced_task_nesting": replaced_task_nesting,
        "stamped_headers": None if stamped_headers is None else list(stamped_headers),
        "stamps": dict(stamps or {}),
    }
    if headers:
        made = {**headers, **made}
    return made


def make_body(args: Sequence[Any], kwargs: Mapping[str, Any], embed: Embed = NO_EMBED) -> list[Any]:
    """The protocol-2 body ``[args, kwargs, embed]``, still to be serialised."""
    return [list(args), dict(kwargs), NO_EMBED_PLAIN if embed is NO_EMBED else embed.to_plain()]


def args_alone(body: bytes, content_type: str) -> bytes | None:
    """The JSON of the positional arguments, of a body that has nothing else; None: it is not known to be so.

    Where it is a document by itself, the body is ``[args, {}, NO_EMBED_PLAIN]``; where it is none, it may be a list of more.
    """
    only = content_type == "application/json" and body.endswith(_NOTHING_ELSE) and body.startswith(b"[")
    return body[1 : -len(_NOTHING_ELSE)] if only else None


def read_invocation(headers: Mapping[str, Any], payload: Any, timezone: tzinfo = UTC) -> Invocation:
    """Read a task message: ``payload`` is the deserialised body. Protocol 2, 1, and the mixed form.

    Raises ``DecodeError`` saying what is missing or of the wrong type.
    """
    if headers.get("task"):
        is_list = type(payload) is list
        if not is_list and isinstance(payload, Mapping):  # headers of protocol 2, body of protocol 1: headers win
            return _read({**payload, **headers}, payload, _embed_of(payload), timezone)
        if (
            not (is_list or (isinstance(payload, Sequence) and not isinstance(payload, (str, bytes))))
            or len(payload) != 3
        ):
            raise DecodeError(f"the body must be [args, kwargs, embed], not {_kind(payload)}")
        args, kwargs, embed = payload
        embed = NO_EMBED if embed is NO_EMBED_PLAIN or embed == NO_EMBED_PLAIN else _embed_of(embed)
        usual = _read_usual(headers, args, kwargs, embed, timezone)
        return _read(headers, {"args": args, "kwargs": kwargs}, embed, timezone) if usual is None else usual
    if isinstance(payload, Mapping) and payload.get("task"):
        fields = {**payload, "group": payload.get("group") or payload.get("taskset")}
        return _read(fields, payload, _embed_of(payload), timezone, user_headers=headers)
    raise DecodeError("neither the headers nor the body name a task: this is not a task message")


_NO_LIMITS: Final[list[Any]] = [None, None]
_VALUES_OF: Final = itemgetter(
    "task", "id", "eta", "expires", "group", "group_index", "retries", "timelimit", "root_id", "parent_id", "origin",
    "ignore_result", "replaced_task_nesting", "stamped_headers", "stamps", "shadow",
)  # fmt: skip
_NONE: Final = type(None)
_USUAL: Final = frozenset(
    (str, str, eta, expires, *group, int, list, str, parent, str, ignored, int, _NONE, dict, _NONE)
    for eta, expires, group, parent, ignored in product(
        (_NONE, str), (_NONE, str), ((_NONE, _NONE), (str, int)), (_NONE, str), (_NONE, bool)
    )
)
"""The types that those headers have in all but a few messages: one look-up in place of a look at each."""


def _read_usual(
    headers: Mapping[str, Any], args: Any, kwargs: Any, embed: Embed, timezone: tzinfo
) -> Invocation | None:
    """The usual message, read in a third of the time that ``_read`` takes, which gives the same; None: it is another."""
    try:
        values = _VALUES_OF(headers)
    except KeyError:
        return None
    if tuple(map(type, values)) not in _USUAL or type(args) is not list or type(kwargs) is not dict:
        return None
    task, id, eta, expires, group, index, retries, limits, root, parent, origin, ignored, nesting, _, stamps, _ = values
    if not id or "args" in headers or (kwargs and not all(isinstance(key, str) for key in kwargs)):
        return None
    hard, soft = (None, None) if limits == _NO_LIMITS else read_limits(limits)
    return make_invocation(
        id,
        task,
        args,
        kwargs,
        embed,
        None if eta is None else parse_time(eta, timezone),
        None if expires is None else parse_time(expires, timezone),
        retries,
        hard,
        soft,
        root or id,
        parent or None,
        group or None,
        index,
        None,
        origin or None,
        ignored,
        nesting,
        None,
        stamps,
        {} if headers.keys() <= STANDARD_HEADERS else {k: v for k, v in headers.items() if k not in STANDARD_HEADERS},
    )


def _read(
    fields: Mapping[str, Any],
    call: Mapping[str, Any],
    embed: Embed,
    timezone: tzinfo,
    user_headers: Mapping[str, Any] | None = None,
) -> Invocation:
    args, kwargs = call.get("args"), call.get("kwargs")
    args = [] if args is None else args
    kwargs = {} if kwargs is None or kwargs == [] else kwargs  # an empty PHP array arrives as a list
    # Exact types first, and only the fields that are given: asking abstract classes took a third of the time in here.
    if type(args) is not list and (not isinstance(args, Sequence) or isinstance(args, (str, bytes))):
        raise DecodeError(f"args must be a list, not {_kind(args)}")
    if kwargs != {} and not (isinstance(kwargs, Mapping) and all(isinstance(key, str) for key in kwargs)):
        raise DecodeError(f"kwargs must be an object with string keys, not {_kind(kwargs)}")
    id = fields.get("id")
    if not id or not isinstance(id, str):
        raise DecodeError("the message has no task id")
    hard, soft = read_limits(fields.get("timelimit"))
    eta, expires, ignored = fields.get("eta"), fields.get("expires"), fields.get("ignore_result")
    stamps = fields.get("stamps")
    user = fields if user_headers is None else user_headers
    protocol_1 = user_headers is not None or "args" in fields
    given: dict[str, Any] = {"root_id": id, "task": ""}
    for name, kind, read in _FIELDS:
        value = fields.get(name)
        if value is not None:
            # The exact type first: nearly always it is, and a call for each costs twice as much.
            value = value if type(value) is kind else read(fields, name)
            if value is not None and value != "":
                given[name] = value
    return Invocation(
        id=id,
        args=args,
        kwargs=kwargs,
        embed=embed,
        eta=None if eta is None else parse_time(eta, timezone),
        expires=None if expires is None else parse_time(expires, timezone),
        time_limit=hard,
        soft_time_limit=soft,
        ignore_result=None if ignored is None else bool(ignored),
        stamped_headers=_names(fields.get("stamped_headers")),
        stamps=stamps if stamps and isinstance(stamps, Mapping) else {},
        headers={}
        if user.keys() <= STANDARD_HEADERS  # almost always, and ten times cheaper than looking at each
        else {k: v for k, v in user.items() if k not in STANDARD_HEADERS and not (protocol_1 and k in _PROTOCOL_1)},
        **given,
    )


_PROTOCOL_1 = frozenset({"args", "kwargs", "utc", "callbacks", "errbacks", "taskset", "chord", "chain"})


def _embed_of(value: Any) -> Embed:
    if not value or (type(value) is dict and not any(value.values())):
        return NO_EMBED
    if not isinstance(value, Mapping):
        raise DecodeError(f"the embed must be an object, not {_kind(value)}")
    chord = value.get("chord")
    if chord is not None and not isinstance(chord, Mapping):
        raise DecodeError(f"embed.chord must be a signature, not {_kind(chord)}")
    callbacks, errbacks, chain = (_signatures(value, name) for name in ("callbacks", "errbacks", "chain"))
    if not (callbacks or errbacks or chain or chord):
        return NO_EMBED
    return Embed(callbacks=callbacks, errbacks=errbacks, chain=chain, chord=chord)


def _signatures(embed: Mapping[str, Any], name: str) -> Sequence[Mapping[str, Any]]:
    value = embed.get(name)
    if value is None:
        return ()
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, Sequence) or not all(isinstance(item, Mapping) and item.get("task") for item in value):
        raise DecodeError(f"embed.{name} must be a list of signatures")
    return list(value)


def read_limits(value: Any) -> tuple[float | None, float | None]:
    """The header ``timelimit``, which is [hard, soft]. Raises ``DecodeError``."""
    if value is None or value == [None, None]:
        return None, None
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise DecodeError(f"timelimit must be [hard, soft], not {_kind(value)}")
    hard, soft = (*value, None, None)[:2]
    for limit in (hard, soft):
        if limit is not None and (
            isinstance(limit, bool) or not isinstance(limit, (int, float)) or not 0 <= limit < math.inf
        ):
            raise DecodeError("timelimit must hold seconds")
    return hard or None, soft or None


def _text(fields: Mapping[str, Any], name: str) -> str | None:
    value = fields.get(name)
    if value is None or isinstance(value, str):
        return value or None
    raise DecodeError(f"{name} must be text, not {_kind(value)}")


def _integer(fields: Mapping[str, Any], name: str) -> int | None:
    value = fields.get(name)
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    raise DecodeError(f"{name} must be a whole number, not {_kind(value)}")


_FIELDS: Final[Sequence[tuple[str, type, Callable[[Mapping[str, Any], str], Any]]]] = (
    *((name, str, _text) for name in ("task", "root_id", "parent_id", "group", "shadow", "origin")),
    *((name, int, _integer) for name in ("retries", "group_index", "replaced_task_nesting")),
)


def _names(value: Any) -> Sequence[str] | None:
    return [str(item) for item in value] if isinstance(value, (list, tuple)) else None


def _kind(value: Any) -> str:
    return type(value).__name__


# --- results ------------------------------------------------------------------------------------


_RANKS: Final[Mapping[str, int]] = {"PENDING": 0, "RECEIVED": 1, "STARTED": 2, "RETRY": 7}
_MOST_DELIVERIES: Final = 511


def order_of(state: str, retries: int = 0, deliveries: int = _MOST_DELIVERIES) -> int:
    """``Result.order`` of a passing state: later attempts after earlier ones, and within one, PENDING to RETRY.

    ``deliveries``: how often the message of that attempt had been handed out. States of a user's own are between STARTED and
    RETRY, in the order in which they are put.
    """
    return (retries << 9 | min(deliveries, _MOST_DELIVERIES)) << 3 | _RANKS.get(state, 4)


def result_document(
    task_id: str,
    state: str,
    result: Any,
    *,
    traceback: str | None = None,
    children: Sequence[Any] = (),
    done: float | None = None,
    group_id: str | None = None,
    parent_id: str | None = None,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The result document of one task, still to be serialised. ``result`` is plain data already."""
    document: dict[str, Any] = {
        "status": str(state),
        "result": result,
        "traceback": traceback,
        "children": list(children),
        "date_done": None if done is None else format_time(done),
    }
    if group_id:
        document["group_id"] = group_id
    if parent_id:
        document["parent_id"] = parent_id
    if extra:
        document.update(extra)
    document["task_id"] = task_id
    return document


# Errors of ours travel under the names that readers of the protocol raise; the table is read both ways.
_ALIASES: Final[Mapping[type[BaseException], tuple[str, str]]] = {
    errors.TaskRevoked: ("celery.exceptions", "TaskRevokedError"),
    errors.UnknownTask: ("celery.exceptions", "NotRegistered"),
    errors.ChordError: ("celery.exceptions", "ChordError"),
    errors.MaxRetriesExceeded: ("celery.exceptions", "MaxRetriesExceededError"),
    errors.Reject: ("celery.exceptions", "Reject"),
    errors.Ignore: ("celery.exceptions", "Ignore"),
    errors.WorkerLost: ("billiard.exceptions", "WorkerLostError"),
    errors.TimeLimitExceeded: ("billiard.exceptions", "TimeLimitExceeded"),
    errors.SoftTimeLimitExceeded: ("billiard.exceptions", "SoftTimeLimitExceeded"),
    errors.EncodeError: ("kombu.exceptions", "EncodeError"),
    errors.DecodeError: ("kombu.exceptions", "DecodeError"),
    errors.ContentRefused: ("kombu.exceptions", "ContentDisallowed"),
}
_ALIASES_BACK: Final = {name: cls for cls, name in _ALIASES.items()}


def exception_to_plain(exc: BaseException) -> dict[str, Any]:
    """An exception as data: ``exc_type``, ``exc_message`` (its arguments), ``exc_module``."""
    if isinstance(exc, TaskFailed):
        module, _, name = exc.type_name.rpartition(".")
        return {"exc_type": name, "exc_message": [exc.message], "exc_module": module}
    cls = type(exc)
    module, name = _ALIASES.get(cls, (cls.__module__, cls.__qualname__))
    args = exc.args if isinstance(exc.args, tuple) else ()  # a class may redefine it
    return {"exc_type": name, "exc_message": list(args), "exc_module": module}


def exception_from_plain(data: Any, traceback: object = None) -> BaseException:
    """Rebuild an exception; never imports anything and never calls what is not an exception class.

    A class that this process has not imported, or that cannot be built from its arguments, becomes ``TaskFailed`` with
    its name and message. The remote traceback, where it is text, is added as a note.
    """
    if isinstance(data, BaseException):  # pickle carries the object itself
        return data
    if not isinstance(data, Mapping):
        return TaskFailed("Exception", "" if data is None else str(data))
    name, module = str(data.get("exc_type") or "Exception"), str(data.get("exc_module") or "")
    message = data.get("exc_message")
    args = message if isinstance(message, (list, tuple)) else () if message is None else (message,)
    exc = _build(_find_exception(module, name), args)
    if exc is None:
        exc = TaskFailed(f"{module}.{name}" if module else name, ", ".join(str(a) for a in args))
    if isinstance(traceback, str) and traceback:
        exc.add_note(f"\nIn the worker:\n{traceback}")
    return exc


def _find_exception(module: str, name: str) -> type[BaseException] | None:
    if (alias := _ALIASES_BACK.get((module, name))) is not None:
        return alias
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    is_exception = isinstance(found, type) and issubclass(found, BaseException)
    return found if is_exception and not issubclass(found, (SystemExit, KeyboardInterrupt, GeneratorExit)) else None


def _build(cls: type[BaseException] | None, args: Sequence[Any]) -> BaseException | None:
    if cls is None:
        return None
    try:
        exc = cls(*args)
    except Exception:  # a constructor of the user's own may raise anything; the caller has a faithful substitute
        return None
    return exc if isinstance(exc, BaseException) else None
