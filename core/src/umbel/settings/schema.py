"""What can be set: attrs classes that are the schema, the checks and the reference documentation at once.

Every field carries one sentence of help in its metadata. ``None`` means "not set" (TOML has no null); where ``None``
is a choice of its own, the field names the words that say so in a file.
"""
# ruff: noqa: RUF009  # setting() makes an attrs field, not a default value

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Final, Literal, Union, get_args, get_origin

from attrs import NOTHING, Attribute, Factory, field, frozen, has

from umbel.settings.units import (
    DURATION_PATTERN,
    SIZE_PATTERN,
    Bytes,
    Seconds,
    format_seconds,
    parse_rate,
    parse_unique,
)

# --- types as people and JSON Schema read them ----------------------------------------------------


@frozen
class Kind:
    """A type as people and JSON Schema read it; ``form`` is the remedy for a value that is not of it."""

    name: str
    form: str
    schema: Mapping[str, Any]


def _with_units(number: str, pattern: str) -> Mapping[str, Any]:
    return {"anyOf": [{"type": number, "minimum": 0}, {"type": "string", "pattern": pattern}]}


KINDS: Final[Mapping[Any, Kind]] = {
    str: Kind("string", 'a string in quotes such as "name"', {"type": "string"}),
    bool: Kind("boolean", "true or false", {"type": "boolean"}),
    int: Kind("integer", "a whole number such as 4", {"type": "integer"}),
    float: Kind("number", "a number such as 0.5", {"type": "number"}),
    Seconds: Kind(
        "duration",
        'a duration such as 30 (seconds), "500ms", "30s", "5m", "1h" or "1d"',
        _with_units("number", DURATION_PATTERN),
    ),
    Bytes: Kind("size", 'a size such as 4096 (bytes), "10MB" or "64KiB"', _with_units("integer", SIZE_PATTERN)),
}


def bare_type(type_: Any) -> tuple[Any, bool]:
    """The type without ``| None``, and whether it had it."""
    others = [each for each in get_args(type_) if each is not NoneType]
    if get_origin(type_) in (Union, UnionType) and len(others) == 1:
        return others[0], True
    return type_, False


def is_list(type_: Any) -> bool:
    """Whether values of it are lists of one type in a file."""
    return get_origin(type_) in (list, set, frozenset, Sequence) or (
        get_origin(type_) is tuple and get_args(type_)[1:] == (...,)
    )


def is_table(type_: Any) -> bool:
    """Whether values of it are tables whose keys are free."""
    return get_origin(type_) in (dict, Mapping)


def is_literal(type_: Any) -> bool:
    """Whether values of it are one of a few."""
    return get_origin(type_) is Literal


def kind_of(type_: Any) -> Kind:
    """How to tell people of a type."""
    bare, _ = bare_type(type_)
    if bare in KINDS:
        return KINDS[bare]
    if is_literal(bare):
        words = " or ".join(json.dumps(word) for word in get_args(bare))
        return Kind(words, words, {"enum": list(get_args(bare))})
    if is_list(bare):
        item = kind_of(get_args(bare)[0])
        name = f"list of {item.name}s" if item.schema else "list"
        example = '["a", "b"]' if item.name == "string" else "[1, 2]"
        return Kind(name, f"a {name} such as {example}", {"type": "array", "items": item.schema})
    if is_table(bare) or has(bare):
        return Kind("table", "a table", {"type": "object"})
    name = getattr(bare, "__name__", str(bare))
    return Kind(name, f"of type {name}", {})


# --- fields ---------------------------------------------------------------------------------------


def _filled(text: str) -> None:
    if not text.strip():
        raise ValueError("must not be empty")


def _module(name: str) -> None:
    module, _, attribute = name.partition(":")
    parts = [*module.split("."), *(attribute.split(".") if ":" in name else ())]
    if not all(part.isidentifier() for part in parts):
        raise ValueError('must be a module or module:attribute such as "shop.tasks" or "shop.tasks:app"')


def _modules(names: tuple[str, ...]) -> None:
    for name in names:
        if ":" in name:
            raise ValueError('must be modules only, such as "shop.tasks"')
        _module(name)


def _timezone(name: str) -> None:
    if name == "UTC":
        return  # needs no time zone database
    from zoneinfo import ZoneInfo

    try:
        ZoneInfo(name)
    except (ValueError, OSError, KeyError):  # malformed; a folder of the database; unknown
        raise ValueError(
            'must be the name of a time zone such as "Asia/Seoul"; if none is found: pip install tzdata'
        ) from None


def _moment(text: str) -> None:
    from datetime import datetime

    try:
        datetime.fromisoformat(text)
    except ValueError:
        raise ValueError('must be a moment such as "2026-03-01T08:00" or "2026-03-01T08:00+09:00"') from None


def setting(
    default: Any,
    help: str,
    *,
    gt: float | None = None,
    ge: float | None = None,
    le: float | None = None,
    check: Callable[[Any], object] | None = None,
    none: tuple[str, ...] = (),
    each: str = "NAME",
) -> Any:
    """A field of a settings class. A callable ``default`` is a factory.

    ``gt``, ``ge`` and ``le`` bound its value; ``check`` raises ``ValueError`` saying what it must be; the words in
    ``none`` mean None; ``each`` stands for the name in the documentation of a table of tables.
    """
    bounds = {"exclusiveMinimum": gt, "minimum": ge, "maximum": le}

    def validate(_: Any, attribute: Attribute[Any], value: Any) -> None:
        if value is None:
            return
        if gt is not None and not value > gt:
            raise ValueError(f"{attribute.name} must be more than {gt}")
        if (ge is not None and not value >= ge) or (le is not None and not value <= le):
            raise ValueError(f"{attribute.name} must be " + (f"at least {ge}" if le is None else f"from {ge} to {le}"))
        if check is not None:
            try:
                check(value)
            except ValueError as error:
                raise ValueError(f"{attribute.name} {error}") from None

    return field(
        default=Factory(default) if callable(default) else default,
        converter=(lambda value: None if isinstance(value, str) and value in none else value) if none else None,
        validator=validate,
        metadata={
            "help": help,
            "none": none,
            "each": each,
            "bounds": {name: bound for name, bound in bounds.items() if bound is not None},
        },
    )


# --- the schema -----------------------------------------------------------------------------------


@frozen(kw_only=True)
class BrokerSettings:
    """Where messages travel."""

    url: str = setting("sqlite:///umbel.sqlite3", "Address; its scheme names the transport plugin.", check=_filled)
    lease: Seconds = setting(15.0, "How long a delivery stays with a worker that no longer renews its lease.", gt=0)
    publish_timeout: Seconds = setting(5.0, "Time in which the broker must have accepted what is sent to it.", gt=0)
    options: Mapping[str, Any] = setting(dict, "Options of the transport plugin, named in its own reference.")


@frozen(kw_only=True)
class ResultSettings:
    """Where results are kept."""

    url: str | None = setting(
        "sqlite:///umbel.sqlite3",
        'Address of the result store; its scheme names the plugin, and "disabled" keeps no results.',
        none=("disabled", ""),
    )
    expires: Seconds | None = setting(
        86400.0, 'Age at which a stored result may be forgotten; "never" keeps it.', gt=0, none=("never",)
    )
    serializer: str = setting("json", "Serializer plugin for stored results.")
    extended: bool = setting(False, "Store the task's name, arguments, worker, retries and queue with its result.")
    track: Literal["end", "start", "submit"] = setting(
        "end",
        "From where on a task has a record: from its end or first retry, its start (STARTED), or from sending on (PENDING too); "
        'with "submit", a task without one is UNKNOWN.',
    )
    accept_compression: tuple[str, ...] = setting(
        (), "Compressor plugins for results that another program has compressed (Celery's result_compression)."
    )
    options: Mapping[str, Any] = setting(dict, "Options of the result store plugin, named in its own reference.")


@frozen(kw_only=True)
class UniqueSettings:
    """Unique tasks and locks, which live in the result store."""

    lease: Seconds = setting(15.0, "How long a key stays taken by a running task whose worker is gone.", gt=0)
    bound: Seconds = setting(
        86400.0, "How long a key stays taken by a message that waits; longer where the message expires later.", gt=0
    )
    lock_lease: Seconds = setting(30.0, "How long a lock stays with a holder that is gone.", gt=0)


@frozen(kw_only=True)
class CodecSettings:
    """How message bodies are written, and what is read."""

    serializer: str = setting("json", "Serializer plugin for the messages that are sent.")
    accept: tuple[str, ...] = setting(("json",), "Serializers whose messages are read; all others are refused.")
    compression: str | None = setting(None, "Compressor plugin for the messages that are sent.")
    accept_compression: tuple[str, ...] = setting((), "Compressors, besides the one used, whose messages are read.")
    max_body_size: Bytes = setting(64_000_000, "Largest message body that is read, after decompression.", ge=1)


@frozen(kw_only=True)
class QueueSettings:
    """One queue."""

    type: str | None = setting(None, "Kind of queue, where the broker has several.")
    max_priority: int | None = setting(None, "Number of priorities, where the broker must know it beforehand.", ge=1)
    arguments: Mapping[str, Any] = setting(dict, "Further arguments with which the broker declares the queue.")
    exchange: str | None = setting(
        None, "Exchange that the queue is bound to, where the broker has such.", check=_filled
    )
    exchange_type: Literal["direct", "topic", "fanout"] = setting("direct", "Kind of that exchange.")
    routing_key: str | None = setting(None, "Key of that binding; not set: the queue's name.")

    def __attrs_post_init__(self) -> None:
        """Refuse what would bind to nothing."""
        for option, default in (("exchange_type", "direct"), ("routing_key", None)):
            if self.exchange is None and getattr(self, option) != default:
                raise ValueError(f"{option} says nothing without an exchange; give exchange, or take {option} away")


@frozen(kw_only=True)
class TaskSettings:
    """Options of the tasks of one name, or of all whose names match a glob."""

    queue: str | None = setting(None, "Queue that the task is sent to.")
    serializer: str | None = setting(None, "Serializer plugin for the task's messages.")
    compression: str | None = setting(None, "Compressor plugin for the task's messages.")
    max_retries: int | None = setting(None, "How often the task may be retried before it counts as failed.", ge=0)
    retry_delay: Seconds | None = setting(None, "Delay before the first retry, and before each without a backoff.")
    retry_backoff: Seconds | None = setting(None, "Delay that doubles with each retry; 0 turns the backoff off.")
    retry_backoff_max: Seconds | None = setting(None, "Longest delay that the backoff reaches.", gt=0)
    retry_jitter: bool | None = setting(None, "Spread the delays of the backoff at random.")
    ack: Literal["late", "early"] | None = setting(
        None, 'Acknowledge when the task has ended ("late": at least once) or before it starts ("early": at most once).'
    )
    ignore_result: bool | None = setting(None, "Store no result for the task.")
    time_limit: Seconds | None = setting(None, "Time after which the running task is killed.", gt=0)
    soft_time_limit: Seconds | None = setting(None, "Time after which SoftTimeLimitExceeded is raised in it.", gt=0)
    rate_limit: str | None = setting(None, 'Most starts in a time for each worker, such as "100/m".', check=parse_rate)
    rate_limit_scope: Literal["worker", "fleet"] | None = setting(
        None, 'Whose starts rate_limit counts: those of each "worker", or of the whole "fleet".'
    )
    concurrency_limit: int | None = setting(None, "Most calls that run at once in the whole fleet, for each key.", ge=1)
    concurrency_key: str | None = setting(None, 'Key of concurrency_limit from the arguments, such as "{tenant}".')
    expires: Seconds | None = setting(None, "Age at which a message of the task is no longer worth running.", gt=0)
    priority: int | None = setting(None, "Priority of the task's messages: 0 to 9, higher is sooner.", ge=0, le=9)
    max_deliveries: int | None = setting(
        None, "Starts, each ended by the loss of its process, after which a message goes to the dead letters.", ge=1
    )
    dead_letter: bool | None = setting(
        None, "Send final failures to the dead letters too, from where they can be replayed."
    )
    track_started: bool | None = setting(None, "Store the state STARTED when the task starts.")
    unique: str | None = setting(
        None,
        'Of calls with one key, let one at most wait ("until_start"), wait or run ("until_done"), or be sent in a time ("10m").',
        check=parse_unique,
    )
    unique_key: str | None = setting(None, 'The key, made of the arguments, such as "{user_id}"; not set: all of them.')
    on_conflict: Literal["drop", "return", "replace", "raise"] | None = setting(
        None, "What becomes of a call whose key is taken: it, or the other one if that has not been taken on."
    )
    debounce: Seconds | None = setting(
        None, "Time without a further call of the same key after which the last one runs, in place of all.", gt=0
    )
    debounce_max: Seconds | None = setting(
        None, "Time after the first call by which a debounced one runs all the same.", gt=0
    )
    throttle: Seconds | None = setting(None, "Time in which one call of a key runs at most.", gt=0)
    throttle_edge: Literal["leading", "trailing"] | None = setting(
        None, 'Which one: the first at once ("leading"), or the last at the end of that time ("trailing").'
    )
    cancel: Literal["raise", "flag"] | None = setting(
        None, 'Cancelled while it runs: "raise" TaskCancelled in it, or only "flag" it for request.cancelled().'
    )

    def __attrs_post_init__(self) -> None:
        """Refuse combinations that cannot work."""
        if len(ways := [name for name in ("unique", "debounce", "throttle") if getattr(self, name) is not None]) > 1:
            raise ValueError(f"{' and '.join(ways)} are different ways to be unique; give one of them")
        for shorter, longer in (("soft_time_limit", "time_limit"), ("retry_backoff", "retry_backoff_max")):
            low, high = getattr(self, shorter), getattr(self, longer)
            if low is not None and high is not None and low > high:
                raise ValueError(
                    f"{shorter} ({format_seconds(low)}) is longer than {longer} ({format_seconds(high)});"
                    " lower the one or raise the other"
                )


@frozen(kw_only=True)
class ScheduleSettings:
    """One periodic task."""

    task: str = setting(NOTHING, "Name of the task to send.", check=_filled)
    crontab: str | None = setting(None, 'When to send it: minute, hour, day, month, weekday, such as "0 3 * * *".')
    every: Seconds | None = setting(
        None, "Time from one sending to the next; counted from start, else from 1970.", gt=0
    )
    at: tuple[str, ...] = setting((), 'Moments at which to send it, such as "2026-03-01T08:00".')
    when: Mapping[str, Any] = setting(dict, 'What a hook makes a timetable of, such as {solar = "sunset", …}.')
    timezone: str | None = setting(
        None, "Time zone of crontab and of moments without an offset, if not the application's own.", check=_timezone
    )
    jitter: Seconds = setting(0.0, "Most that a sending is put off; by how much is drawn from its name and time.")
    overlap: Literal["allow", "skip", "queue", "cancel_old"] = setting(
        "allow", "What to do with a run while the earlier one has not ended."
    )
    catch_up: Literal["none", "one", "all"] = setting(
        "one", "Which of the due times to send that passed while no scheduler ran: none, the last one, or all."
    )
    catch_up_within: Seconds | None = setting(None, "Age from which a due time is passed over; not set: see catch_up.")
    start: str | None = setting(None, 'Moment before which it is not sent, such as "2026-03-01".', check=_moment)
    end: str | None = setting(None, "Moment after which it is not sent.", check=_moment)
    max_runs: int | None = setting(None, "Runs after which it is not sent any more.", ge=1)
    args: tuple[Any, ...] = setting((), "Positional arguments of the task.")
    kwargs: Mapping[str, Any] = setting(dict, "Keyword arguments of the task.")
    options: Mapping[str, Any] = setting(dict, "Options of the sending, as for apply_async: queue, priority, expires.")
    enabled: bool = setting(True, "Whether it is sent at all.")

    def __attrs_post_init__(self) -> None:
        """Refuse an entry that nothing or two things would trigger."""
        said = [name for name in ("crontab", "every", "at", "when") if getattr(self, name)]
        if len(said) != 1:
            raise ValueError(f"needs one of crontab, every, at or when, and has {' and '.join(said) or 'none'}")


@frozen(kw_only=True)
class SchedulerSettings:
    """Where periodic tasks are kept, and who sends them."""

    url: str | None = setting(
        None,
        "Address of the scheduler store; not set: that of the results if a plugin keeps schedules there, else the broker's.",
        check=_filled,
    )
    lease: Seconds = setting(6.0, "How long the leading scheduler stays so without being heard of.", ge=0.5)
    poll: Seconds = setting(0.5, "Time within which a change of an entry is noticed.", gt=0)
    remember: Seconds = setting(3600.0, "Time for which a worker knows a run from a second message of it.", gt=0)
    options: Mapping[str, Any] = setting(dict, "Options of the scheduler store's plugin, named in its own reference.")


@frozen(kw_only=True)
class WorkerSettings:
    """A worker process."""

    pool: str = setting("prefork", "Pool plugin that runs the tasks.")
    concurrency: int | None = setting(
        None, "Tasks that run at once; not set: as many for each CPU as the pool declares.", ge=1
    )
    autoscale_min: int | None = setting(None, "Fewest tasks that run at once, with autoscale_max; not set: 1.", ge=1)
    autoscale_max: int | None = setting(
        None, "Most tasks that run at once where the worker chooses by what waits; not set: concurrency, always.", ge=1
    )
    autoscale_idle: Seconds = setting(30.0, "Time of too many slots after which the worker takes some away.", gt=0)
    queues: tuple[str, ...] = setting((), "Queues to consume; none: the default queue.")
    name: str | None = setting(None, "Name of the worker among all; not set: made of the host and the process.")
    prefetch: int | None = setting(None, "Most deliveries held at once; not set: measured.", ge=1)
    grace: Seconds = setting(25.0, "Time that running tasks have to end when the worker is stopped.")
    with_scheduler: bool = setting(False, "Run a scheduler too; of any number that run, one leads.")
    control: bool = setting(True, "Listen to remote control (umbel status, revoke), where the broker has a broadcast.")
    max_tasks_per_child: int | None = setting(None, "Tasks after which a child is replaced.", ge=1)
    max_memory_per_child: Bytes | None = setting(None, "Resident memory at which a child is replaced.", ge=1)
    start_timeout: Seconds = setting(60.0, "Time in which a child must have imported the application.", gt=0)
    max_deliveries: int = setting(
        3, "Starts, each ended by the loss of its process, after which a message goes to the dead letters.", ge=1
    )
    watchdog: Seconds = setting(30.0, "Longest silence of the broker before the session is rebuilt.", gt=0)
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"] = setting("INFO", "Least level that is logged.")
    pool_options: Mapping[str, Any] = setting(dict, "Options of the pool plugin, named in its own reference.")

    def __attrs_post_init__(self) -> None:
        """Refuse bounds of autoscaling that leave no room."""
        least, most, first = self.autoscale_min, self.autoscale_max, self.concurrency
        if most is None:
            if least is not None:
                raise ValueError("autoscale_min says nothing without autoscale_max; give that too, or take it away")
        elif (least or 1) > most:
            raise ValueError(f"autoscale_min ({least}) is more than autoscale_max ({most}); change one of them")
        elif first is not None and not (least or 1) <= first <= most:
            raise ValueError(
                f"concurrency ({first}), with which the worker starts, is not from {least or 1} to {most}, the bounds of its "
                "autoscaling; take it away, or change autoscale_min or autoscale_max"
            )


@frozen(kw_only=True)
class WorkflowSettings:
    """Groups, chords, and whatever else is joined."""

    expires: Seconds = setting(
        604800.0,
        "Time from its sending after which a workflow is forgotten, be it over or not; give more than any takes.",
        gt=0,
    )


@frozen(kw_only=True)
class PluginSettings:
    """Which plugins take part."""

    hooks: tuple[str, ...] = setting((), "Listeners to load, by the names under which they are installed.")
    disable: tuple[str, ...] = setting((), "Plugins that must not be loaded, whoever asks for them.")
    options: Mapping[str, Mapping[str, Any]] = setting(
        dict, "Options of listeners, serializers and compressors: a table for each, by name."
    )


@frozen(kw_only=True)
class Settings:
    """Everything that can be set."""

    app: str | None = setting(None, "The application: a module, or module:attribute.", check=_module)
    imports: tuple[str, ...] = setting((), "Modules with tasks, imported when a worker starts.", check=_modules)
    default_queue: str = setting("default", "Queue of the tasks that name none.", check=_filled)
    timezone: str = setting("UTC", "Time zone of schedules and of shown times.", check=_timezone)
    broker: BrokerSettings = setting(BrokerSettings, "Where messages travel.")
    results: ResultSettings = setting(ResultSettings, "Where results are kept.")
    unique: UniqueSettings = setting(UniqueSettings, "Unique tasks and locks, which live in the result store.")
    codec: CodecSettings = setting(CodecSettings, "How message bodies are written, and what is read.")
    queues: Mapping[str, QueueSettings] = setting(dict, "Queues that need more than a name.")
    tasks: Mapping[str, TaskSettings] = setting(dict, "Options of tasks, by name or by glob.", each="NAME OR GLOB")
    schedules: Mapping[str, ScheduleSettings] = setting(dict, "Periodic tasks, by a name of your choice.")
    scheduler: SchedulerSettings = setting(SchedulerSettings, "Where periodic tasks are kept, and who sends them.")
    worker: WorkerSettings = setting(WorkerSettings, "A worker process.")
    workflows: WorkflowSettings = setting(WorkflowSettings, "Groups, chords, and whatever else is joined.")
    plugins: PluginSettings = setting(PluginSettings, "Which plugins take part.")

    def __attrs_post_init__(self) -> None:
        """Refuse options that nobody would read."""
        codec, tasks = self.codec, self.tasks.values()
        named = {
            *self.plugins.hooks,
            *self.plugins.disable,
            self.results.serializer,
            codec.serializer,
            codec.compression,
        }
        named |= {*codec.accept, *codec.accept_compression, *self.results.accept_compression}
        named |= {name for task in tasks for name in (task.serializer, task.compression)}
        if unread := [name for name in self.plugins.options if name not in named]:
            raise ValueError(
                f"plugins.options has {unread[0]!r}, which names no listener, serializer or compressor of these settings; add "
                "it to [plugins] hooks or [codec] accept, or take the table away"
            )
