"""The settings of the transport and of the listener."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attrs import Attribute, field, frozen

PRIORITIES = ("same", "inverted")


def _positive(instance: object, attribute: Attribute[Any], value: float) -> None:
    if not value > 0:
        raise ValueError(f"{attribute.name} must be greater than 0, not {value!r}")


def _priority(instance: object, attribute: Attribute[str], value: str) -> None:
    if value not in PRIORITIES:
        raise ValueError(f"{attribute.name} must be one of {', '.join(PRIORITIES)}, not {value!r}")


def _steps(instance: object, attribute: Attribute[Any], value: tuple[int, ...]) -> None:
    if not value or value[0] != 0 or list(value) != sorted(set(value)) or value[-1] > 9:
        raise ValueError(f"{attribute.name} must ascend from 0 to at most 9, as in 0, 3, 6, 9; {value!r} does not")


@frozen(kw_only=True)
class TransportOptions:
    """What a transport on Celery's Redis layout takes. What Celery names too must be the same on both sides."""

    priority: str = field(default="same", validator=_priority)
    """How ``Message.priority`` is written. ``same``: the number that Celery's own clients would write; workers of ours
    serve the highest first, Celery's the lowest. ``inverted``: nine minus the number, so that all workers agree; then a
    message without a priority lies in the list of step 9, which others than Celery and we do not read."""
    priority_steps: tuple[int, ...] = field(default=(0, 3, 6, 9), validator=_steps)
    """The priorities that have a list of their own (Celery: transport option ``priority_steps``)."""
    visibility_timeout: float = field(default=3600.0, validator=_positive)
    """Seconds after which any consumer restores a message that a Celery worker took and did not acknowledge (Celery:
    transport option ``visibility_timeout``). What our workers took is restored when its lease ends."""
    global_keyprefix: str = ""
    """Stands before every key and channel (Celery: transport option ``global_keyprefix``)."""
    eta_queues: tuple[str, ...] = ()
    """Queues that only Celery workers consume: delayed messages are sent to them at once, for the worker that takes them
    to hold, because nobody there would look into our set of delayed messages."""
    ssl_ca_certs: str | None = None
    """File of the authorities that are trusted with ``celery+rediss://``; not given: the system's."""
    socket_timeout: float = field(default=5.0, validator=_positive)
    """Seconds within which the server must answer, where the caller gives no deadline."""
    poll_interval: float = field(default=1.0, validator=_positive)
    """Seconds between two looks into the lists when the server gives no hint."""
    max_connections: int = field(default=8, validator=_positive)
    """Connections beside those of consumers and subscribers."""
    max_message_size: int = field(default=128 * 2**20, validator=_positive)
    """Largest body in bytes. Redis itself ends at 512 MB, of which the envelope takes a third."""


@frozen(kw_only=True)
class CeleryOptions:
    """What the listener ``celery`` takes: ``[plugins.options.celery]``."""

    broker: str | None = None
    """Where Celery's tools listen, as kombu writes it (``redis://…``, ``amqp://…``); not given: ``[broker] url``."""
    transport_options: Mapping[str, Any] = field(factory=dict)
    """Further options of that connection, as Celery's ``broker_transport_options``."""
    ssl: Mapping[str, Any] = field(factory=dict)
    """Options of TLS, as Celery's ``broker_use_ssl``; with ``rediss://`` certificates are always checked."""
    events: bool = False
    """Send task events from the start, as ``celery worker -E``; otherwise once a tool asks for them, as Flower does."""
    heartbeat: float = field(default=2.0, validator=_positive)
    """Seconds between two events that tell that the worker is alive."""
    gossip: bool = True
    """Learn revoked tasks from Celery's workers, and answer their elections."""
    chord_ordered: bool = True
    """Keep the parts of a chord by their place; false: in the order in which they end (Celery:
    ``result_backend_transport_options``, ``result_chord_ordered``). Must be the same on both sides."""
    control_exchange: str = "celery"
    """Celery's setting ``control_exchange``."""
    event_exchange: str = "celeryev"
    """Celery's setting ``event_exchange``."""
