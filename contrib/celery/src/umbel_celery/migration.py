"""From Celery's settings to Umbel's: a table of what becomes what, and a reason for all that becomes nothing. No I/O."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, Final
from urllib.parse import urlsplit, urlunsplit

from attrs import define, field

_BROKERS: Final = {"redis": "celery+redis", "amqp": "amqp", "amqps": "amqps", "pyamqp": "amqp", "librabbitmq": "amqp"}
_RESULTS: Final = {"redis": "redis", "rediss": "rediss", "rpc": "rpc", "sentinel": "sentinel"}
_CONTENT: Final = {
    "application/json": "json",
    "application/x-python-serialize": "pickle",
    "application/x-yaml": "yaml",
    "application/x-msgpack": "msgpack",
    "application/data": "auth",
}
_COMPRESSION: Final = {"gzip": "zlib", "bzip": "bzip2", "xz": "lzma", "zstandard": "zstd"}
_TASK_OPTIONS: Final = {
    "time_limit",
    "soft_time_limit",
    "rate_limit",
    "ignore_result",
    "max_retries",
    "track_started",
    "priority",
}


class NotCarried(ValueError):
    """A setting, or a part of one, has no counterpart; the text says why."""


@define
class Migration:
    """What has become of a Celery configuration."""

    settings: dict[str, Any] = field(factory=dict)
    """Tables and values of ``umbel.toml``."""
    left: list[tuple[str, str]] = field(factory=list)
    """Settings that could not be carried over, each with its reason."""
    carried: int = 0

    def set(self, path: tuple[str, ...], value: Any) -> None:
        """Put one value into its table."""
        table = self.settings
        for part in path[:-1]:
            table = table.setdefault(part, {})
        table[path[-1]] = value

    def leave(self, name: str, reason: str) -> None:
        """Say why a setting is not carried over."""
        self.left.append((name, reason))


def migrate(given: Mapping[str, Any]) -> Migration:
    """Carry over what was set. ``given``: Celery's settings under their present names, without those left at their default."""
    made = Migration()
    made.set(("default_queue",), "celery")  # Celery's default is not ours
    made.set(("results", "url"), "disabled")  # likewise
    made.set(("plugins", "hooks"), ["celery"])
    for name in sorted(given):
        if given[name] is None:
            continue
        carry = _TABLE.get(name)
        if carry is None:
            made.leave(name, _REASONS.get(name, "it has no counterpart"))
            continue
        try:
            carry(made, given[name])
            made.carried += 1
        except NotCarried as exc:
            made.leave(name, str(exc))
        except (TypeError, ValueError, AttributeError) as exc:  # Celery checks no types
            made.leave(name, f"its value is of no form that is known: {exc}")
    if "broker_url" not in given:
        made.leave("broker_url", "it is not set: Celery takes amqp://guest@localhost//, Umbel a file; set [broker] url")
    if not given.get("task_acks_late"):
        made.leave(
            "task_acks_late",
            'it is off: Celery acknowledges before a task starts, Umbel after its result is stored. Give ack = "early" to '
            "the tasks that must not run a second time after a crash",
        )
    return made


# --- values ---------------------------------------------------------------------------------------


def seconds(value: Any) -> float | int:
    """A duration as a number of seconds."""
    if isinstance(value, timedelta):
        value = value.total_seconds()
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise NotCarried(f"{value!r} is no number of seconds")
    return int(value) if value == int(value) else value


def rate(value: Any) -> str:
    """``10/m``; a bare number means starts a second."""
    text = str(value)
    return text if "/" in text else f"{text}/s"


def _plain(value: Any) -> Any:
    """A value that a file can hold. Raises ``NotCarried``."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, timedelta):
        return seconds(value)
    if isinstance(value, str | bool | int | float):
        return value
    raise NotCarried(f"a value of type {type(value).__name__} cannot be written into a file")


def _to(*path: str, by: Callable[[Any], Any] = _plain) -> Callable[[Migration, Any], None]:
    def carry(made: Migration, value: Any) -> None:
        made.set(path, by(value))

    return carry


def _same(value: Any) -> Callable[[Migration, Any], None]:
    """A setting that says what Umbel does anyway."""

    def carry(made: Migration, given: Any) -> None:
        if given != value:
            raise NotCarried(f"Umbel always behaves as if it were {value!r}")

    return carry


# --- brokers and results --------------------------------------------------------------------------


def _first(value: Any) -> str:
    urls = value if isinstance(value, list | tuple) else str(value).split(";")
    if len(urls) > 1:
        raise NotCarried(
            "it names several servers: set [broker] url by hand, as the plugin of that broker describes it"
        )
    return str(urls[0])


def _broker(made: Migration, value: Any) -> None:
    parts = urlsplit(_first(value))
    if parts.scheme not in _BROKERS:
        raise NotCarried(f"there is no transport for {parts.scheme}:// that shares Celery's queues")
    made.set(("broker", "url"), urlunsplit(parts._replace(scheme=_BROKERS[parts.scheme])))


def _options(table: Mapping[str, tuple[str, ...]]) -> Callable[[Migration, Any], None]:
    """The options that the table knows, each to its place."""

    def carry(made: Migration, value: Mapping[str, Any]) -> None:
        for name, path in table.items():
            if name in value:
                made.set(path, _plain(value[name]))
        if others := sorted(value.keys() - set(table)):
            raise NotCarried(f"of its options Umbel has not: {', '.join(others)}")

    return carry


def _backend(made: Migration, value: Any) -> None:
    parts = urlsplit(str(value))
    scheme = parts.scheme or str(value)
    if scheme == "disabled":
        return
    if scheme not in _RESULTS:
        raise NotCarried(f"there is no result store for {scheme!r}: set [results] url")
    made.set(
        ("results", "url"), urlunsplit(parts._replace(scheme=_RESULTS[scheme])) if parts.scheme else f"{scheme}://"
    )


def _expires(made: Migration, value: Any) -> None:
    made.set(("results", "expires"), seconds(value) or "never")


# --- tasks and queues -----------------------------------------------------------------------------


def _routes(made: Migration, value: Any) -> None:
    tables = value if isinstance(value, list | tuple) else [value]
    for table in tables:
        if not isinstance(table, Mapping):
            raise NotCarried("routers are functions: give each task its queue in [tasks.NAME], or at the call")
        for name, route in table.items():
            queue = route if isinstance(route, str) else route.get("queue") if isinstance(route, Mapping) else None
            if not isinstance(queue, str):
                made.leave(f"task_routes[{name!r}]", "it is no queue's name: Umbel routes by queue")
                continue
            made.set(("tasks", str(name), "queue"), queue)


def _annotations(made: Migration, value: Any) -> None:
    if not isinstance(value, Mapping):
        raise NotCarried("annotations that are functions have no counterpart: set [tasks.NAME]")
    for name, options in value.items():
        for option, chosen in options.items():
            if option not in _TASK_OPTIONS:
                made.leave(
                    f"task_annotations[{name!r}][{option!r}]", "it is no option of a task: use a hook or middleware"
                )
            elif chosen is not None:
                made.set(("tasks", str(name), option), rate(chosen) if option == "rate_limit" else _plain(chosen))


def _queues(made: Migration, value: Any) -> None:
    queues = list(value.values()) if isinstance(value, Mapping) else list(value)
    names = []
    for queue in queues:
        if not hasattr(queue, "name") or not queue.name:
            raise NotCarried("it holds something that is no kombu Queue: set [queues.NAME] and [worker] queues")
        names.append(queue.name)
        if queue.max_priority:
            made.set(("queues", queue.name, "max_priority"), queue.max_priority)
        arguments = dict(queue.queue_arguments or {})
        if kind := arguments.pop("x-queue-type", None):
            made.set(("queues", queue.name, "type"), kind)
        if arguments:
            made.set(("queues", queue.name, "arguments"), _plain(arguments))
        if queue.exchange and queue.exchange.name not in ("", queue.name):
            made.set(("queues", queue.name, "exchange"), queue.exchange.name)
            made.set(("queues", queue.name, "exchange_type"), queue.exchange.type)
            made.set(("queues", queue.name, "routing_key"), queue.routing_key or "")
    made.set(("worker", "queues"), names)


def _schedule(made: Migration, value: Mapping[str, Any]) -> None:
    for name, entry in value.items():
        when, table = entry.get("schedule"), {"task": entry.get("task")}
        cron = [getattr(when, f"_orig_{part}", None) for part in _CRONTAB]
        try:
            if None not in cron:
                table["crontab"] = " ".join(_cron_field(part) for part in cron)
            elif hasattr(when, "event") and hasattr(when, "lat"):
                table["when"] = {"solar": when.event, "latitude": when.lat, "longitude": when.lon}
                if "solar" not in (hooks := made.settings["plugins"]["hooks"]):
                    hooks.append("solar")
            else:
                table["every"] = seconds(getattr(when, "run_every", when))
                if entry.get("relative"):
                    made.leave(
                        f"beat_schedule[{name!r}]['relative']", "an interval counts from the epoch: give it a start"
                    )
            for part in ("args", "kwargs", "options"):
                if entry.get(part):
                    table[part] = _plain(entry[part])
        except NotCarried as exc:
            made.leave(f"beat_schedule[{name!r}]", str(exc))
            continue
        made.set(("schedules", str(name)), table)


_CRONTAB: Final = ("minute", "hour", "day_of_month", "month_of_year", "day_of_week")


def _cron_field(value: Any) -> str:
    if isinstance(value, list | tuple | set | frozenset):
        return ",".join(str(item) for item in sorted(value))
    return str(value).replace(" ", "")


def _pool(made: Migration, value: Any) -> None:
    if value not in ("prefork", "threads", "solo"):
        raise NotCarried(f"there is no pool {value!r}: see `umbel plugins`, and set [worker] pool")
    made.set(("worker", "pool"), value)


def _security(name: str) -> Callable[[Migration, Any], None]:
    return _to("plugins", "options", "auth", name)


_TABLE: Final[Mapping[str, Callable[[Migration, Any], None]]] = {
    "accept_content": _to("codec", "accept", by=lambda value: [_CONTENT.get(each, each) for each in value]),
    "beat_schedule": _schedule,
    "broker_transport_options": _options(
        {name: ("broker", "options", name) for name in ("visibility_timeout", "global_keyprefix", "priority_steps")}
    ),
    "broker_url": _broker,
    "control_exchange": _to("plugins", "options", "celery", "control_exchange"),
    "event_exchange": _to("plugins", "options", "celery", "event_exchange"),
    "imports": _to("imports"),
    "include": _to("imports"),
    "result_backend": _backend,
    "result_backend_transport_options": _options(
        {
            "global_keyprefix": ("results", "options", "prefix"),
            "master_name": ("results", "options", "master"),
            "result_chord_ordered": ("plugins", "options", "celery", "chord_ordered"),
        }
    ),
    "result_expires": _expires,
    "result_extended": _to("results", "extended"),
    "result_serializer": _to("results", "serializer"),
    "security_cert_store": _security("store"),
    "security_certificate": _security("certificate"),
    "security_digest": _security("digest"),
    "security_key": _security("key"),
    "security_key_password": _security("key_password"),
    "task_acks_late": _same(True),
    "task_acks_on_failure_or_timeout": _same(True),
    "task_annotations": _annotations,
    "task_compression": _to("codec", "compression", by=lambda value: _COMPRESSION.get(value, value)),
    "task_default_priority": _to("tasks", "*", "priority"),
    "task_default_queue": _to("default_queue"),
    "task_default_rate_limit": _to("tasks", "*", "rate_limit", by=rate),
    "task_ignore_result": _to("tasks", "*", "ignore_result"),
    "task_protocol": _same(2),
    "task_queues": _queues,
    "task_reject_on_worker_lost": _same(True),
    "task_routes": _routes,
    "task_serializer": _to("codec", "serializer"),
    "task_soft_time_limit": _to("tasks", "*", "soft_time_limit", by=seconds),
    "task_time_limit": _to("tasks", "*", "time_limit", by=seconds),
    "task_track_started": _to("tasks", "*", "track_started"),
    "timezone": _to("timezone", by=str),
    "worker_concurrency": _to("worker", "concurrency"),
    "worker_max_memory_per_child": _to("worker", "max_memory_per_child", by=lambda value: int(value) * 1024),
    "worker_max_tasks_per_child": _to("worker", "max_tasks_per_child"),
    "worker_pool": _pool,
    "worker_send_task_events": _to("plugins", "options", "celery", "events"),
    "worker_soft_shutdown_timeout": _to("worker", "grace", by=seconds),
}

_REASONS: Final[Mapping[str, str]] = {
    "broker_connection_retry_on_startup": "Umbel tells a wrong address at the start, and reconnects for ever afterwards",
    "broker_connection_retry": "Umbel always reconnects",
    "broker_connection_max_retries": "Umbel always reconnects",
    "broker_pool_limit": "Umbel has one session a process",
    "broker_use_ssl": "TLS belongs to the URL and the options of the broker's plugin: set [broker] url and options",
    "beat_cron_starting_deadline": "each entry says that for itself: set catch_up_within in [schedules.NAME]",
    "beat_max_loop_interval": "a scheduler sleeps until the next entry is due; [scheduler] poll bounds it",
    "beat_scheduler": "Umbel has its own scheduler stores",
    "beat_schedule_filename": "Umbel has its own scheduler stores",
    "beat_sync_every": "each run is recorded as it is sent",
    "enable_utc": "Umbel keeps time in UTC always; timezone is for schedules and for what is shown",
    "redis_backend_use_ssl": "TLS belongs to the URL and the options of the result store's plugin: set [results] url and options",
    "task_always_eager": "a setting that is only for tests: umbel.testing runs tasks in the test's process",
    "task_eager_propagates": "a setting that is only for tests: umbel.testing runs tasks in the test's process",
    "task_create_missing_queues": "a queue that is sent to is always created",
    "task_default_exchange": "Umbel sends to queues by name; [queues.NAME] exchange binds a queue to an exchange",
    "task_default_exchange_type": "Umbel sends to queues by name; [queues.NAME] exchange binds a queue to an exchange",
    "task_default_routing_key": "Umbel sends to queues by name; [queues.NAME] exchange binds a queue to an exchange",
    "task_send_sent_event": "clients of Umbel send no events; workers do",
    "task_queue_max_priority": "the priorities are a queue's own: set max_priority in [queues.NAME]",
    "worker_prefetch_multiplier": "Umbel measures how much to prefetch; [worker] prefetch bounds it",
    "worker_hijack_root_logger": "Umbel leaves the root logger alone",
    "worker_redirect_stdouts": "Umbel leaves standard output alone",
    "worker_log_format": "logging is the application's own",
    "worker_task_log_format": "logging is the application's own",
    "worker_autoscaler": "Umbel scales by the work that waits, between [worker] autoscale_min and autoscale_max",
}
