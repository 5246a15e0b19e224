"""Unique calls: of those with one key, at most one waits or runs.

A key is a claim of the result store whose owner is the task's id. Sending is three steps, and each may be the last one that a
process takes:

1. the key is claimed for as long as sending may take (``SENDING``): who dies here frees it in seconds;
2. the message is published; if that fails, the key is released;
3. the claim is extended to when the message must have been taken on (``WAITS``).

From there on the worker has it (``umbel.worker.uniques``). A message whose claim has ended while it waited still runs, unless
another call has claimed the key meanwhile: then it gives way to that one, and its record says so.

What is to be done is decided in generators that know nothing of threads or loops; ``send`` and ``asend`` carry it out.
"""

from __future__ import annotations

import inspect
import json
import logging
import math
from collections.abc import Awaitable, Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date, datetime, time
from decimal import Decimal
from functools import lru_cache
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

from attrs import evolve, frozen

from umbel import protocol
from umbel.claiming import KEY, SENDING, UNIQUE, WAITS, Key, waits
from umbel.errors import DuplicateTask, EncodeError, TaskRevoked, UmbelError
from umbel.model import Lease, Message, Result, State, TaskOptions
from umbel.result import AsyncResult, NotSent

if TYPE_CHECKING:
    from umbel.app import Umbel

logger = logging.getLogger("umbel.unique")

HEADER: Final = KEY
OPTIONS: Final = frozenset(
    {"unique", "unique_key", "on_conflict", "debounce", "debounce_max", "throttle", "throttle_edge"}
)
"""What a task and a call may say about it: names of ``TaskOptions``."""

_MODES: Final = frozenset({"unique", "debounce", "throttle"})
_MARGIN: Final = 5.0
"""Seconds that claiming and extending may take beside the publish."""
_TRIES: Final = 20
"""How often a call tries to take the place of one that has just taken another's."""
_LONGEST_KEY: Final = 100
WINDOW: Final = b"window"
"""Value of a key that is held for a time, whatever becomes of its task."""

Step = tuple[str, Any]
"""``ask`` (verb, payload), ``send`` messages, ``put`` results."""


@frozen(kw_only=True)
class Plan:
    """How one call is unique."""

    task: str
    name: str
    """Of the claim."""
    until: str | float
    """``until_start``, ``until_done``, or seconds."""
    on_conflict: str
    quiet: float | None = None
    """Seconds from the last call to the start; None: the call's own time."""
    longest: float = math.inf
    """Seconds from the first call to the start."""


@frozen(kw_only=True)
class Conflict:
    """The call was not sent, because of another."""

    plan: Plan
    task_id: str
    """Its own id."""
    existing: str
    """The id of the other."""


# --- what a call asks for -------------------------------------------------------------------------


def wanted(options: TaskOptions, call: Mapping[str, Any]) -> bool:
    """Whether a call is to be unique."""
    declared = options.unique or options.debounce or options.throttle
    return bool(declared) or bool(call and not OPTIONS.isdisjoint(call.keys()))


def plan(
    task: str,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    options: TaskOptions,
    call: dict[str, Any],
    function: Callable[..., Any] | None = None,
) -> Plan | None:
    """How a call is unique; takes what concerns it, and a debounced call's delay, out of ``call``.

    None: it is not, or not any more (``unique=None``). ``function`` without the task itself as its first parameter. Raises
    ``ValueError``, ``TypeError``, ``EncodeError`` for arguments that make no key.
    """
    given = {name: call.pop(name) for name in OPTIONS & call.keys()}
    literal = given.pop("unique_key", None)
    modes = _MODES & given.keys()
    if modes and not any(given[name] for name in modes):
        return None
    options = called(options, given)
    if not (options.unique or options.debounce or options.throttle):
        raise ValueError(
            f"task {task!r} is not unique: give unique, debounce or throttle beside {', '.join(sorted(given))}"
        )
    key = literal if literal is not None else _key(task, args, kwargs, options.unique_key, function)
    if len(key) > _LONGEST_KEY:
        key = sha256(key.encode(errors="surrogatepass")).hexdigest()
    made = Plan(task=task, name=f"{UNIQUE}{task}:{key}", until="until_start", on_conflict="replace")
    if options.unique is not None:
        return evolve(made, until=options.unique, on_conflict=options.on_conflict)
    if options.throttle is not None and options.throttle_edge == "leading":
        return evolve(made, until=options.throttle, on_conflict="drop")
    if "countdown" in call or "eta" in call:
        raise ValueError("a debounced or throttled call has its time from that: give no countdown or eta")
    if options.throttle is not None:
        return evolve(made, quiet=math.inf, longest=options.throttle)
    return evolve(made, quiet=options.debounce, longest=options.debounce_max or math.inf)


def called(options: TaskOptions, given: Mapping[str, Any]) -> TaskOptions:
    """The options of a call that is given some of its own; one way to be unique stands for all of the task's."""
    if _MODES & given.keys():
        options = evolve(options, unique=None, debounce=None, debounce_max=None, throttle=None)
    return evolve(options, **{name: value for name, value in given.items() if name != "unique_key"})


def _key(
    task: str,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    how: str | Callable[..., object] | None,
    function: Callable[..., Any] | None,
) -> str:
    if callable(how):
        made = how(*args, **kwargs)
        return made if isinstance(made, str) else _canonical(task, made)
    args, kwargs = _bound(function, args, kwargs)
    if how is None:
        return sha256(_canonical(task, [args, kwargs]).encode(errors="surrogatepass")).hexdigest()
    try:
        return how.format(*args, **kwargs)
    except (KeyError, IndexError, AttributeError, ValueError) as exc:
        raise ValueError(
            f"unique_key {how!r} of task {task!r} cannot be made of these arguments: {type(exc).__name__} {exc}"
        ) from None


def _bound(
    function: Callable[..., Any] | None, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """The arguments by the names of the parameters, defaults filled in; as they are where the function is not here."""
    if function is None:
        return args, kwargs
    try:
        bound = _signature(function).bind(*args, **kwargs)
    except TypeError:  # the call is wrong: the task says so where it runs
        return args, kwargs
    bound.apply_defaults()
    named = dict(bound.arguments)
    for parameter in bound.signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            named |= named.pop(parameter.name)
    return (), named


@lru_cache(maxsize=1024)
def _signature(function: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(function)


def _canonical(task: str, value: object) -> str:
    def plain(value: object) -> object:
        if isinstance(value, datetime | date | time):
            return value.isoformat()
        if isinstance(value, UUID | Decimal):
            return str(value)
        raise TypeError(f"a {type(value).__name__}")

    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), default=plain)
    except (TypeError, ValueError, RecursionError) as exc:
        raise EncodeError(
            f"task {task!r}: no unique key can be made of its arguments ({exc}): give the task a unique_key, a format string "
            "or a function of its arguments"
        ) from None


# --- sending --------------------------------------------------------------------------------------


def held_for(message: Message, now: float, bound: float) -> float:
    """Seconds for which the key of a message that waits is held: until it expires, or ``bound`` after its due time."""
    expires = protocol.parse_time(message.headers.get("expires"))
    return max((max(message.due or now, now) + bound if expires is None else expires) - now, 1.0)


def _steps(app: Umbel, plan: Plan, message: Message, timeout: float) -> Generator[Step, Any, str | Conflict]:
    name, task_id, sending = plan.name, message.id, timeout + _MARGIN
    replaced: Lease | None = None
    began = app.clock.time()
    for _ in range(_TRIES):
        lease: Lease = yield _claim(name, task_id, sending, SENDING)
        if lease.owner == task_id:
            break
        if plan.on_conflict != "replace" or not waits(lease):
            return Conflict(plan=plan, task_id=task_id, existing=lease.owner)
        if (
            yield "ask", ("release", (name, lease.owner, lease.value))
        ):  # atomic: it has not been taken on, and never will be
            replaced = lease
    else:
        return Conflict(plan=plan, task_id=task_id, existing=lease.owner)
    now = app.clock.time()
    since = now if replaced is None else _since(replaced.value, now)
    message = _prepared(plan, message, now, since, lease.fence)
    try:
        yield "send", [message]
    except Exception:
        yield from _if_possible("ask", ("release", (name, task_id, None)), f"{name} stays claimed for {sending:g} s")
        raise
    word = not isinstance(plan.until, str)
    value = WINDOW if word else WAITS if plan.quiet is None else WAITS + b" %.6f" % since
    lasts = plan.until if isinstance(plan.until, float | int) else held_for(message, now, app.settings.unique.bound)
    extend = _claim(name, task_id, float(lasts), value)
    held = yield from _if_possible(*extend, f"task {task_id} is sent, and {name} is claimed for {sending:g} s only")
    if not word and held is not None and held.fence != lease.fence and app.clock.time() - began < sending:
        # Its task has ended meanwhile and freed the key, which was taken anew just now.
        yield from _if_possible("ask", ("release", (name, task_id, value)), f"{name} stays claimed for {lasts:g} s")
    if replaced is not None:
        record = replaced_by(app, replaced.owner, task_id)
        yield from _if_possible(
            "put", [record], f"the record of task {replaced.owner} is written when its message comes"
        )
    return task_id


def _claim(name: str, owner: str, lease: float, value: bytes) -> Step:
    return "ask", ("claim", (name, owner, lease, value))


def _if_possible(kind: str, payload: Any, otherwise: str) -> Generator[Step, Any, Any]:
    """A step after which the call is what it is, whether the step is taken or not; its answer, None where there is none."""
    try:
        return (yield kind, payload)
    except UmbelError as exc:
        logger.warning("%s: %s", otherwise, exc)
        return None


def _since(value: bytes, now: float) -> float:
    """When the first call was made that a replaced one stood for."""
    _, _, moment = value.partition(b" ")
    return float(moment) if moment else now


def _prepared(plan: Plan, message: Message, now: float, since: float, fence: int) -> Message:
    headers = dict(message.headers)
    due = message.due
    if plan.quiet is not None:
        due = min(now + plan.quiet, since + plan.longest)
        headers["eta"] = protocol.format_time(due)
    if isinstance(plan.until, str):
        headers[HEADER] = [plan.name, plan.until, fence]
    return evolve(message, headers=headers, due=due)


def replaced_by(app: Umbel, task_id: str, by: str) -> Result:
    """The record of a call whose place another of the same key has taken."""
    exc = protocol.exception_to_plain(TaskRevoked(f"replaced by task {by} of the same unique key"))
    document = protocol.result_document(task_id, State.REVOKED, exc, done=app.clock.time())
    encoded = app.result_codec.encode(document)
    return Result(
        task_id=task_id,
        state=State.REVOKED.value,
        document=encoded.body,
        content_type=encoded.content_type,
        content_encoding=encoded.content_encoding,
        expires=app.settings.results.expires,
    )


class _Course:
    """The steps of one call, as they are carried out: each with the answer of the one before, or with what it raised."""

    def __init__(self, app: Umbel, plan: Plan, message: Message, timeout: float | None) -> None:
        self._steps = _steps(app, plan, message, app.settings.broker.publish_timeout if timeout is None else timeout)
        self._failed: Exception | None = None
        self.answer: Any = None
        self.sent: str | Conflict = ""
        """What came of the call, at the end."""

    def __iter__(self) -> Iterator[Step]:
        while True:
            try:
                step = self._steps.send(self.answer) if self._failed is None else self._steps.throw(self._failed)
            except StopIteration as end:
                self.sent = _checked(end.value)
                return
            self.answer = self._failed = None
            yield step

    @contextmanager
    def step(self) -> Iterator[None]:
        try:
            yield
        except Exception as exc:
            self._failed = exc


def send(app: Umbel, plan: Plan, message: Message, timeout: float | None) -> str | Conflict:
    """Send ``message`` if its key is free, or may be taken; its id, or what is in its way. Blocks.

    Raises as ``Client.send``; ``NotSupported`` where the store keeps no claims, ``ResultStoreUnavailable``: then nothing is sent.
    """
    course = _Course(app, plan, message, timeout)
    for kind, payload in course:
        with course.step():
            if kind == "ask":
                course.answer = _read(payload, app.gateway.ask(*payload))
            elif kind == "send":
                app.client.send(payload, timeout)
            else:
                app.gateway.put(payload)
    return course.sent


async def asend(
    app: Umbel,
    plan: Plan,
    message: Message,
    timeout: float | None,
    publish: Callable[[Sequence[Message]], Awaitable[None]] | None = None,
) -> str | Conflict:
    """``send`` for event loops; ``publish`` instead of ``Client.asend``."""
    course = _Course(app, plan, message, timeout)
    for kind, payload in course:
        with course.step():
            if kind == "ask":
                course.answer = _read(payload, await app.gateway.aask(*payload))
            elif kind == "send":
                await (app.client.asend(payload, timeout) if publish is None else publish(payload))
            else:
                await app.gateway.aput(payload)
    return course.sent


def _read(asked: tuple[str, Any], answer: Any) -> Any:
    return Lease(**answer) if asked[0] == "claim" else answer


def _checked(sent: str | Conflict) -> str | Conflict:
    if isinstance(sent, Conflict) and sent.plan.on_conflict == "raise":
        raise duplicate(sent)
    return sent


def duplicate(conflict: Conflict) -> DuplicateTask:
    """What is in the way of a call, as an error."""
    return DuplicateTask(conflict.task_id, conflict.plan.task, conflict.existing)


def handle(app: Umbel, sent: str | Conflict, structure: Callable[[Any], Any] | None = None) -> AsyncResult[Any]:
    """What the sender of a unique call is given."""
    if isinstance(sent, str):
        return AsyncResult(sent, app, structure)
    existing = AsyncResult(sent.existing, app, structure, sent=False)
    return (
        existing if sent.plan.on_conflict == "return" else NotSent(sent.task_id, app, sent=False, why=duplicate(sent))
    )


def started(app: Umbel, message: Message) -> None:
    """A task begins: free the key of one that is unique until then. Blocks; a fault of the store is logged."""
    key = Key.of(message)
    if key is not None and key.until == "until_start":
        try:
            app.gateway.ask("release", (key.name, message.id, None))
        except UmbelError as exc:  # the worker tries again at its end
            logger.warning("task %s[%s]: its unique key is not free yet: %s", message.task, message.id, exc)
