"""What a worker shows of itself, with every key that Celery's tools look for. Pure functions of plain values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

from umbel.model import HeldTask, QueueSpec

if TYPE_CHECKING:
    from umbel.worker.worker import Worker


def task_info(task: HeldTask, hostname: str) -> dict[str, Any]:
    """A task that is held. Arguments are the text that its sender wrote: a worker does not decode bodies to show them."""
    message = task.delivery.message
    return {
        "id": message.id,
        "name": message.task,
        "args": str(message.headers.get("argsrepr") or "()"),
        "kwargs": str(message.headers.get("kwargsrepr") or "{}"),
        "type": message.task,
        "hostname": hostname,
        "time_start": task.started,
        "acknowledged": task.acknowledged,
        "delivery_info": {
            "exchange": message.properties.get("exchange", ""),
            "routing_key": message.properties.get("routing_key") or task.delivery.queue,
            "priority": message.priority,
            "redelivered": task.delivery.count > 1,
        },
        "worker_pid": task.pid,
    }


def queue_info(spec: QueueSpec) -> dict[str, Any]:
    """A queue that is consumed."""
    arguments = {**spec.arguments, **({"x-queue-type": spec.type} if spec.type else {})}
    return {
        "name": spec.name,
        "exchange": {
            "name": spec.exchange or spec.name,
            "type": spec.exchange_type,
            "arguments": None,
            "durable": True,
            "passive": False,
            "auto_delete": False,
            "delivery_mode": None,
            "no_declare": False,
        },
        "routing_key": spec.name if spec.routing_key is None else spec.routing_key,
        "queue_arguments": arguments or None,
        "binding_arguments": None,
        "consumer_arguments": None,
        "durable": True,
        "exclusive": False,
        "auto_delete": False,
        "no_ack": False,
        "alias": None,
        "bindings": [],
        "no_declare": None,
        "expires": None,
        "message_ttl": None,
        "max_length": None,
        "max_length_bytes": None,
        "max_priority": spec.max_priority,
    }


def stats(worker: Worker, *, clock: int, broker: Mapping[str, Any]) -> dict[str, Any]:
    """Figures of the worker."""
    found = dict(worker.operations.stats())
    found["pool"] = {
        "max-concurrency": worker.concurrency,
        "processes": [],
        "max-tasks-per-child": worker.settings.worker.max_tasks_per_child or "N/A",
        "put-guarded-by-semaphore": False,
        "timeouts": [0, 0],
        "writes": {},
        **found.get("pool", {}),
    }
    return {**found, "clock": str(clock), "broker": dict(broker)}


def address(url: str) -> str:
    """A URL without what may be secret in it: password, query."""
    parts = urlsplit(url)
    user, at, host = parts.netloc.rpartition("@")
    return urlunsplit(
        parts._replace(netloc=f"{user.partition(':')[0]}{':********' if ':' in user else ''}{at}{host}", query="")
    )


def configuration(worker: Worker) -> dict[str, Any]:
    """The settings that have a name in Celery, under it. Passwords are hidden."""
    settings = worker.settings
    return {
        "broker_url": address(settings.broker.url),
        "result_backend": address(settings.results.url or "disabled"),
        "result_expires": settings.results.expires,
        "result_serializer": settings.results.serializer,
        "result_extended": settings.results.extended,
        "task_serializer": settings.codec.serializer,
        "task_compression": settings.codec.compression,
        "accept_content": list(settings.codec.accept),
        "task_default_queue": settings.default_queue,
        "timezone": settings.timezone,
        "worker_pool": settings.worker.pool,
        "worker_concurrency": worker.concurrency,
        "worker_max_tasks_per_child": settings.worker.max_tasks_per_child,
        "imports": list(settings.imports),
    }


def registered(worker: Worker, wanted: tuple[str, ...]) -> list[str]:
    """Names of tasks, with what is wanted of their options and is set. The protocol's own tasks are left out."""
    names = []
    for name, task in sorted(worker.app.tasks.items()):
        options = [f"{item}={value}" for item in wanted if (value := getattr(task.options, item, None)) is not None]
        if not name.startswith("celery."):
            names.append(f"{name} [{' '.join(options)}]" if options else name)
    return names
