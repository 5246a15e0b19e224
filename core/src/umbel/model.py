"""The values that travel between the layers: frozen, slotted, explaining themselves.

Times are seconds: points in time are Unix time as float, durations are float. Header and property values are
plain data only (None, bool, int, float, str, bytes, list, dict), so that they cross a pipe to a child cheaply.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar

from attrs import NOTHING, Factory, evolve, field, fields, frozen, make_class

T = TypeVar("T")

DEAD_SUFFIX: Final = ".dead"
"""The dead letters of queue ``q`` are the queue ``q.dead``."""

HEADER_DEAD_CAUSE: Final = "umbel-dead-cause"
HEADER_DEAD_QUEUE: Final = "umbel-dead-queue"
HEADER_DEAD_AT: Final = "umbel-dead-at"
HEADER_DEAD_COUNT: Final = "umbel-dead-count"
"""Headers that a transport adds to a message when it goes to the dead letters."""


def by_position(cls: type[T]) -> Callable[..., T]:
    """A maker of values of a frozen class, by position, for where a task makes many: a quarter of the time of the class's own.

    What it makes begins as an instance of a twin with the same slots that is not frozen, which is what costs. Neither
    converters nor validators run. The class is declared with ``weakref_slot=False``: otherwise no object can change over.
    """
    known = fields(cls)  # type: ignore[arg-type]  # attrs says at run time what is no class of its
    twin = make_class(cls.__name__, [one.name for one in known], slots=True, weakref_slot=False, init=False, eq=False)
    scope: dict[str, Any] = {f"default_{one.name}": one.default for one in known}
    scope |= {"new": object.__new__, "twin": twin, "cls": cls}
    taken, lines = [], []
    for one in known:
        value = one.name
        if isinstance(one.default, Factory):  # type: ignore[arg-type]  # a class, whatever its stub says
            scope[f"factory_{one.name}"] = one.default.factory
            value = f"factory_{one.name}() if {one.name} is default_{one.name} else {one.name}"
        taken.append(one.name if one.default is NOTHING else f"{one.name}=default_{one.name}")
        lines.append(f" value.{one.name} = {value}\n")
    body = "".join([" value = new(twin)\n", *lines, " value.__class__ = cls\n", " return value\n"])
    # As attrs makes its own: a loop over the fields would take three times as long.
    exec(f"def make({', '.join(taken)}):\n{body}", scope)
    make: Callable[..., T] = scope["make"]
    return make


def without_route(properties: Mapping[str, Any]) -> Mapping[str, Any]:
    """``properties`` for sending a delivered message again: to the queue it came from, not the way it came."""
    return {name: value for name, value in properties.items() if name not in ("exchange", "routing_key")}


def dead_letter_queue(queue: str) -> str:
    """Name of the queue that keeps the dead letters of ``queue``."""
    return queue + DEAD_SUFFIX


@frozen(kw_only=True, weakref_slot=False)
class Message:
    """One task message, encoded, as a transport carries it. The body is opaque to everything but the codec."""

    queue: str
    """The queue it is for."""
    headers: Mapping[str, Any] = field(factory=dict)
    """Protocol-2 headers, unknown ones included; empty for a protocol-1 message."""
    body: bytes = b""
    """Serialised, then compressed, arguments."""
    content_type: str = "application/json"
    content_encoding: str = "utf-8"
    priority: int = 0
    """0 to 9, higher is sooner, on every broker."""
    due: float | None = None
    """Unix time before which no consumer may see it; None: at once."""
    properties: Mapping[str, Any] = field(factory=dict)
    """``correlation_id``, ``reply_to``, ``delivery_mode``, ``expiration``, ``exchange``, ``routing_key`` where set.

    In what is published, an ``exchange`` that is not empty is where it goes, instead of to ``queue``: to every queue that is
    bound to it under ``routing_key`` (capability ``exchanges``). In what is delivered, the two say which way it came."""

    @property
    def id(self) -> str:
        """The task id; empty where only the body knows it (protocol 1)."""
        name = self.headers.get("id")
        return name if type(name) is str else str(name or "")

    @property
    def task(self) -> str:
        """The task's name; empty where only the body knows it (protocol 1)."""
        name = self.headers.get("task")
        return name if type(name) is str else str(name or "")

    def to_plain(self) -> tuple[Any, ...]:
        """The message as plain data, for a pipe between processes of one version."""
        return (
            self.queue,
            self.headers if type(self.headers) is dict else dict(self.headers),
            self.body,
            self.content_type,
            self.content_encoding,
            self.priority,
            self.due,
            self.properties if type(self.properties) is dict else dict(self.properties),
        )

    @classmethod
    def from_plain(cls, plain: tuple[Any, ...]) -> Message:
        """The inverse of ``to_plain``."""
        return make_message(*plain)


make_message: Final = by_position(Message)
"""``Message`` by position, all or the first of its fields."""


@frozen(kw_only=True, weakref_slot=False)
class Delivery:
    """One handing-out of a message to one consumer, under a lease. It ends in exactly one settlement."""

    message: Message
    queue: str
    """The queue it was taken from."""
    token: Any = field(eq=False)
    """The driver's handle, with the fencing number of this handing-out. Opaque to the kernel."""
    count: int = 1
    """How often the message was handed out and not given back uncounted, this time included: 1, 2, …"""
    starts: int = 0
    """How often the start of its work was recorded (``TransportCapabilities.start_marks``)."""
    leased_until: float | None = None
    """Unix time at which the lease ends unless renewed; None: held as long as the session lives."""


make_delivery: Final = by_position(Delivery)
"""``Delivery`` by position."""


@frozen(kw_only=True)
class HeldTask:
    """A delivery that a worker has claimed and not settled, at one moment."""

    delivery: Delivery
    acknowledged: bool
    """Settled before its start (``ack="early"``)."""
    started: float | None = None
    """Unix time at which its work began; None: it waits for a slot."""
    pid: int | None = None
    """The process that runs it."""


class Action(enum.Enum):
    """How a delivery can end."""

    ACK = "ack"
    """Done: the broker forgets it."""
    REQUEUE = "requeue"
    """Back to its queue, at the front among equals, after ``Settlement.delay``."""
    DEAD = "dead"
    """To the dead letters, with ``Settlement.cause``."""


@frozen(kw_only=True, weakref_slot=False)
class Settlement:
    """The end of one delivery."""

    delivery: Delivery
    action: Action
    delay: float = 0.0
    """REQUEUE: seconds until it may be handed out again."""
    counted: bool = True
    """REQUEUE: whether this handing-out, and its start if one was marked, stay in the counts; False for work that was
    given back unstarted, or that has run to its end."""
    cause: str = ""
    """DEAD: why, in one line; kept in the header ``umbel-dead-cause``."""


make_settlement: Final = by_position(Settlement)
"""``Settlement`` by position."""


class State(enum.StrEnum):
    """Task states as stored. Custom states are plain strings beside these."""

    UNKNOWN = "UNKNOWN"
    """Never stored: there is no record, though one is kept from sending on (``[results] track = "submit"``)."""
    PENDING = "PENDING"
    RECEIVED = "RECEIVED"
    """Never stored by Umbel: a worker tells of it by an event. Records of other programs may say it; before STARTED."""
    STARTED = "STARTED"
    SUCCESS = "SUCCESS"
    FAILURE = "FAILURE"
    RETRY = "RETRY"
    REVOKED = "REVOKED"
    REJECTED = "REJECTED"
    """Never stored by Umbel, which stores FAILURE."""
    IGNORED = "IGNORED"
    """Never stored by Umbel, which stores nothing; of a member of a workflow, REVOKED."""


FINAL_STATES: Final = frozenset({"SUCCESS", "FAILURE", "REVOKED"})
"""A record in one of these never changes again."""


@frozen(kw_only=True, weakref_slot=False)
class Result:
    """One state of one task, as a result store keeps it."""

    task_id: str
    state: str
    document: bytes
    """The whole result document (status, result, traceback, children, date_done, task_id, …), serialised."""
    content_type: str = "application/json"
    content_encoding: str = "utf-8"
    expires: float | None = None
    """Seconds from now after which the store may forget it; None: never."""
    reply_to: str | None = field(default=None, eq=False)
    """Of the task's message, for stores that send results to who asked (``ResultStore.reply_to``); others do not keep it."""
    correlation_id: str | None = field(default=None, eq=False)
    """Of the task's message, likewise; None: the task id."""
    order: int = field(default=0, eq=False)
    """Of a passing state: where it stands in the life of its task (``protocol.order_of``); it replaces none that is later."""
    compression: str | None = None
    """How another program has compressed ``document``, as the header of that name on messages says it. Never put."""

    @property
    def final(self) -> bool:
        """Whether the task has ended."""
        return self.state in FINAL_STATES

    def to_plain(self) -> tuple[Any, ...]:
        """The result as plain data, for a pipe between processes of one version."""
        return (
            self.task_id,
            self.state,
            self.document,
            self.content_type,
            self.content_encoding,
            self.expires,
            self.reply_to,
            self.correlation_id,
            self.order,
            self.compression,
        )

    @classmethod
    def from_plain(cls, plain: tuple[Any, ...]) -> Result:
        """The inverse of ``to_plain``."""
        return make_result(*plain)


make_result: Final = by_position(Result)
"""``Result`` by position."""


@frozen(kw_only=True, weakref_slot=False)
class Job:
    """One piece of work for a pool. The pool moves the payload and reads only the fields below."""

    id: int
    """Ascending within one worker's life, never used twice in it."""
    task: str
    """The task's name, for logs and for learning how long such work takes."""
    payload: tuple[Any, ...]
    """Plain data for the executor."""
    time_limit: float | None = None
    """Seconds after which the pool kills the work (capability ``hard_limit``)."""
    soft_time_limit: float | None = None
    """Seconds after which the pool raises ``SoftTimeLimitExceeded`` in it (capability ``soft_limit``)."""
    alone: bool = False
    """It is its message's last start. A pool that runs many jobs in a child gives it one of its own, so that nobody is blamed
    for another."""


make_job: Final = by_position(Job)
"""``Job`` by position."""


class Ending(enum.Enum):
    """How a job left the pool."""

    DONE = "done"
    """The executor returned; ``Completion.payload`` is what it returned."""
    RETURNED = "returned"
    """It was not started: given back by ``recall`` or ``stop``, or reserved on a child that died."""
    LOST = "lost"
    """The child died while running it; ``Completion.detail`` says how (``signal 9 (SIGKILL)``, ``exit code 1``)."""
    TIMED_OUT = "timed out"
    """Its hard limit passed, and it was killed."""
    CANCELLED = "cancelled"
    """``cancel`` or ``stop`` ended it while it ran."""
    COLLATERAL = "collateral"
    """It ran beside a job that ended their child, and ended with it: nothing of that is its own doing."""


@frozen(kw_only=True, weakref_slot=False)
class Completion:
    """One job's end. Every submitted job has exactly one."""

    job_id: int
    ending: Ending
    payload: tuple[Any, ...] | None = None
    """DONE: the executor's plain data, opaque to the pool."""
    detail: str = ""
    runtime: float = 0.0
    """Seconds between the start in the child and its end, where known."""


make_completion: Final = by_position(Completion)
"""``Completion`` by position."""


class Verdict(enum.Enum):
    """What came of one delivery, before policy decides how to settle it."""

    SUCCESS = "success"
    FAILURE = "failure"
    RETRY = "retry"
    IGNORED = "ignored"
    REJECTED = "rejected"
    REQUEUED = "requeued"
    """``raise Reject(requeue=True)``."""
    EXPIRED = "expired"
    REVOKED = "revoked"
    UNKNOWN_TASK = "unknown task"
    UNREADABLE = "unreadable"
    """Undecodable, refused content type, oversize, or a form that is not understood."""
    LOST = "lost"
    TIMED_OUT = "timed out"
    CANCELLED = "cancelled"
    """Stopped while running, because the worker is shutting down."""
    RETURNED = "returned"
    """Not started."""
    FORWARDED = "forwarded"
    """Not run: sent again as it was, with a header that only the body could give."""


# A call of the class costs 0.5 µs.
_VERDICTS: Final[Mapping[str, Verdict]] = {verdict.value: verdict for verdict in Verdict}


@frozen(kw_only=True, weakref_slot=False)
class Outcome:
    """What came of one delivery, and what has to be sent and stored because of it."""

    verdict: Verdict
    task_id: str = ""
    task: str = ""
    results: tuple[Result, ...] = ()
    """To be stored before the delivery is settled."""
    follow_ups: tuple[Message, ...] = ()
    """To be published before the results are stored: retries, callbacks, the next of a chain."""
    detail: str = ""
    """One line for logs, events and dead letters: the exception, or the reason."""
    traceback: str | None = None
    runtime: float = 0.0
    delay: float = 0.0
    """RETURNED: seconds until it may be handed out again."""

    def to_plain(self) -> tuple[Any, ...]:
        """The outcome as plain data, for a pipe between processes of one version."""
        return (
            self.verdict.value,
            self.task_id,
            self.task,
            [r.to_plain() for r in self.results] if self.results else (),
            [m.to_plain() for m in self.follow_ups] if self.follow_ups else (),
            self.detail,
            self.traceback,
            self.runtime,
            self.delay,
        )

    @classmethod
    def from_plain(cls, plain: tuple[Any, ...]) -> Outcome:
        """The inverse of ``to_plain``."""
        verdict, task_id, task, results, follow_ups, detail, traceback, runtime, delay = plain
        return make_outcome(
            _VERDICTS[verdict],
            task_id,
            task,
            tuple([make_result(*r) for r in results]) if results else (),
            tuple([make_message(*m) for m in follow_ups]) if follow_ups else (),
            detail,
            traceback,
            runtime,
            delay,
        )


make_outcome: Final = by_position(Outcome)
"""``Outcome`` by position."""


@frozen(kw_only=True)
class TaskOptions:
    """How one task behaves. The decorator gives them, ``[tasks."…"]`` in the settings overrides them, a call overrides both."""

    queue: str | None = None
    """None: the default queue."""
    serializer: str | None = None
    """Plugin that writes the messages; None: ``[codec] serializer``."""
    compression: str | None = None
    """Plugin that compresses them; None: ``[codec] compression``."""
    max_retries: int | None = 3
    """None: for ever."""
    retry_delay: float = 180.0
    """Seconds before a retry that names no delay of its own."""
    autoretry_for: tuple[type[BaseException], ...] = ()
    """Exceptions that retry the task by themselves."""
    dont_autoretry_for: tuple[type[BaseException], ...] = ()
    """Exceptions among those that fail it at once all the same."""
    retry_backoff: float = 0.0
    """First delay of an exponential back-off for ``autoretry_for``; 0: ``retry_delay`` each time."""
    retry_backoff_max: float = 600.0
    """Longest delay of that back-off."""
    retry_jitter: bool = True
    """Draw each back-off between zero and its full length, so that retries do not come in step."""
    ack: str = "late"
    """``late``: acknowledge after the result is stored (at least once); ``early``: before the start (at most once)."""
    ignore_result: bool = False
    """Store no result."""
    time_limit: float | None = None
    """Seconds after which the task is killed."""
    soft_time_limit: float | None = None
    """Seconds after which ``SoftTimeLimitExceeded`` is raised in the task."""
    rate_limit: str | None = None
    """Starts a worker allows: ``10/s``, ``100/m``, ``5/h``."""
    rate_limit_scope: str = "worker"
    """Whose starts ``rate_limit`` counts: those of each ``worker``, or of the whole ``fleet`` (a result store with claims)."""
    concurrency_limit: int | None = None
    """Calls that run at once in the whole fleet, for each ``concurrency_key`` (a result store with claims)."""
    concurrency_key: str | None = None
    """What the limit is for, filled in from the arguments: ``{tenant}``; None: the task as a whole."""
    expires: float | None = None
    """Seconds after sending from which the task is not run any more."""
    priority: int | None = None
    """0 to 9, higher is sooner; None: 0."""
    max_deliveries: int | None = None
    """Starts that may end in the loss of the process before the message goes to the dead letters; None: the worker's."""
    dead_letter: bool = False
    """A final failure goes to the dead letters too, from where it can be replayed once its cause is mended."""
    track_started: bool = False
    """Store STARTED when the task begins."""
    cancel: str = "raise"
    """When it is cancelled while it runs: ``raise`` ``TaskCancelled`` in it; or only ``flag`` it, for ``request.cancelled()``."""
    unique: str | float | None = None
    """Of calls with one key, let one wait (``until_start``), wait or run (``until_done``), or be sent in so many seconds."""
    unique_key: str | Callable[..., object] | None = None
    """The key: a format string or a function of the arguments; None: all of them."""
    on_conflict: str = "drop"
    """What becomes of a call whose key is taken: ``drop`` it, ``return`` the other's handle, ``replace`` the other if it has not
    been taken on, ``raise`` ``DuplicateTask``."""
    debounce: float | None = None
    """Seconds without a further call of the same key after which the last one runs, in place of all."""
    debounce_max: float | None = None
    """Seconds after the first call of the key by which a debounced one runs all the same."""
    throttle: float | None = None
    """Seconds in which one call of a key runs at most."""
    throttle_edge: str = "leading"
    """``leading``: the first call of those seconds, at once; ``trailing``: the last, at their end."""
    typed: bool = False
    """Turn arguments and result into what the annotations say, by cattrs, on the worker and in ``get()``."""
    throws: tuple[type[BaseException], ...] = ()
    """Expected exceptions: logged in one line, without a traceback."""

    def __attrs_post_init__(self) -> None:
        if self.ack not in ("late", "early"):
            raise ValueError(f'ack is "late" or "early", not {self.ack!r}')
        if self.rate_limit_scope not in ("worker", "fleet"):
            raise ValueError(f'rate_limit_scope is "worker" or "fleet", not {self.rate_limit_scope!r}')
        if self.concurrency_limit is not None and self.concurrency_limit < 1:
            raise ValueError(f"concurrency_limit is at least 1, not {self.concurrency_limit!r}; None: no limit")
        if self.cancel not in ("raise", "flag"):
            raise ValueError(f'cancel is "raise" or "flag", not {self.cancel!r}')
        if self.unique is not None or self.debounce is not None or self.throttle is not None:
            self._check_unique()
        if self.on_conflict not in ("drop", "return", "replace", "raise"):
            raise ValueError(f'on_conflict is "drop", "return", "replace" or "raise", not {self.on_conflict!r}')
        if self.priority is not None and not 0 <= self.priority <= 9:
            raise ValueError(f"priority is 0 to 9, higher is sooner; {self.priority!r} is not")
        if self.time_limit and self.soft_time_limit and self.soft_time_limit > self.time_limit:
            raise ValueError("soft_time_limit is longer than time_limit, so it would never be reached")

    def _check_unique(self) -> None:
        given = [name for name in ("unique", "debounce", "throttle") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are different ways to be unique: give one of them")
        value = getattr(self, given[0])
        if not (given[0] == "unique" and value in ("until_start", "until_done")) and (
            isinstance(value, bool | str) or not value > 0
        ):
            words = '"until_start", "until_done" or ' if given[0] == "unique" else ""
            raise ValueError(f"{given[0]} is {words}a number of seconds greater than 0, not {value!r}")
        if self.on_conflict == "replace" and isinstance(self.unique, float | int):
            raise ValueError(
                'on_conflict = "replace" needs unique = "until_start" or "until_done": a window may have run'
            )
        if self.throttle_edge not in ("leading", "trailing"):
            raise ValueError(f'throttle_edge is "leading" or "trailing", not {self.throttle_edge!r}')


@frozen(kw_only=True)
class QueueSpec:
    """A queue as the settings want it."""

    name: str
    type: str | None = None
    """A kind that only the driver knows (RabbitMQ: ``quorum``, ``classic``); None: its default."""
    max_priority: int | None = None
    arguments: Mapping[str, Any] = field(factory=dict)
    """Further arguments of the driver's own."""
    exchange: str | None = None
    """The named exchange that it is bound to (capability ``exchanges``), beside being reached by its name; None: none."""
    exchange_type: str = "direct"
    """``direct``, ``topic`` or ``fanout``."""
    routing_key: str | None = None
    """The binding key; None: the queue's name."""


@frozen(kw_only=True)
class ScheduleEntry:
    """A periodic entry as a scheduler store keeps it. The schedule is plain data that the clockwork reads."""

    name: str
    task: str
    schedule: Mapping[str, Any]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(factory=dict)
    options: Mapping[str, Any] = field(factory=dict)
    enabled: bool = True
    declared: bool = False
    """By the settings or in code: a scheduler removes it when it is declared no more."""
    next_due: float | None = None
    """Unix time at which the clockwork is to look at it; None: never again."""
    last_due: float | None = None
    """The due time that was last dealt with: sent, or passed over by a policy of the entry. Unix time."""
    last_sent: float | None = None
    """The due time of the run that was last sent."""
    total_runs: int = 0
    """Runs that were sent."""
    problem: str = ""
    """Why nothing could be sent when it was last due; empty: something could."""
    revision: int = field(default=0, eq=False)
    """Given by the store, another one with each ``upsert``: so a mark can tell that the entry was changed meanwhile."""


@frozen(kw_only=True)
class Lease:
    """A named right, held by one owner until a time, numbered so that a late holder can be told apart."""

    name: str
    owner: str
    fence: int
    """Grows each time the right is taken anew; the same as long as its owner renews it in time."""
    until: float
    """Unix time."""
    value: bytes = b""


__all__ = [
    "DEAD_SUFFIX",
    "FINAL_STATES",
    "HEADER_DEAD_AT",
    "HEADER_DEAD_CAUSE",
    "HEADER_DEAD_COUNT",
    "HEADER_DEAD_QUEUE",
    "Action",
    "Completion",
    "Delivery",
    "Ending",
    "HeldTask",
    "Job",
    "Lease",
    "Message",
    "Outcome",
    "QueueSpec",
    "Result",
    "ScheduleEntry",
    "Settlement",
    "State",
    "TaskOptions",
    "Verdict",
    "by_position",
    "dead_letter_queue",
    "evolve",
    "make_completion",
    "make_delivery",
    "make_job",
    "make_message",
    "make_outcome",
    "make_result",
    "make_settlement",
    "without_route",
]
