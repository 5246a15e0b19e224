"""Where the broker is, and the settings of both drivers."""

from __future__ import annotations

import ssl
from typing import Any, Final
from urllib.parse import unquote

from attrs import Attribute, field, frozen

from umbel.errors import PublishRefused, SettingsError

_PORTS: Final = {"amqp": 5672, "amqps": 5671}
UNCOUNTED: Final = 2**31 - 1
"""A delivery limit that is never reached: how often a message may come again is the kernel's to decide."""
QUEUE_TYPES: Final = ("quorum", "classic")


def _one_of(*words: str) -> Any:
    def check(instance: object, attribute: Attribute[str], value: str) -> None:
        if value not in words:
            raise ValueError(f"{attribute.name} must be {' or '.join(words)}, not {value!r}")

    return check


def _positive(instance: object, attribute: Attribute[Any], value: float | None) -> None:
    if value is not None and not value > 0:
        raise ValueError(f"{attribute.name} must be greater than 0, not {value!r}")


def _natural(instance: object, attribute: Attribute[Any], value: int) -> None:
    if value < 0:
        raise ValueError(f"{attribute.name} must not be negative, and {value!r} is")


def _priorities(instance: object, attribute: Attribute[Any], value: int | None) -> None:
    if value is not None and not 1 <= value <= 255:
        raise ValueError(f"{attribute.name} must be 1 to 255, not {value!r}")


@frozen(kw_only=True)
class ConnectionOptions:
    """What every connection takes."""

    hosts: tuple[str, ...] = ()
    """Further nodes, ``host`` or ``host:port``, tried in this order when those of the URL do not answer."""
    heartbeat: float = field(default=10.0, validator=_positive)
    """Seconds of silence after which a connection is taken for dead, by either side (by the server after up to twice that)."""
    connect_timeout: float = field(default=5.0, validator=_positive)
    """Seconds that connecting to one node may take."""
    timeout: float = field(default=10.0, validator=_positive)
    """Seconds that the broker may take to answer, where the caller gives no deadline."""
    frame_max: int = field(default=131_072, validator=_positive)
    """Largest frame in bytes; the broker may ask for less."""
    ssl_ca_certs: str | None = None
    """File of the authorities to trust; None: the system's."""
    ssl_certfile: str | None = None
    """File of the certificate to show, for brokers that ask for one."""
    ssl_keyfile: str | None = None
    """File with the key of that certificate; None: it is in the same file."""
    ssl_cert_reqs: str = field(default="required", validator=_one_of("required", "none"))
    """``none`` trusts any certificate."""
    ssl_check_hostname: bool = True
    """Whether the certificate must be for the host that the URL names."""


@frozen(kw_only=True)
class TransportOptions(ConnectionOptions):
    """What the transport takes."""

    queue_type: str = field(default="quorum", validator=_one_of(*QUEUE_TYPES))
    """Kind of queues that the settings give no ``type``."""
    max_priority: int | None = field(default=None, validator=_priorities)
    """``x-max-priority`` of classic queues that the settings give no ``max_priority``; 9 keeps all ten priorities apart."""
    delivery_limit: int = field(default=UNCOUNTED, validator=_natural)
    """``x-delivery-limit`` of quorum queues; 0: none. Without one, RabbitMQ 3.10 to 3.13 puts what is given back at the end of
    its queue, and RabbitMQ 4 throws away what was given back twenty times. Celery declares none."""
    consumer_timeout: float | None = field(default=1800.0, validator=_positive)
    """The broker's ``consumer_timeout`` in seconds (its own setting is in milliseconds), or less; None: it has none.
    What runs for longer than half of it is kept from it."""
    max_message_size: int = field(default=16 * 2**20, validator=_positive)
    """Largest body in bytes; the broker's own setting of that name must allow as much."""


@frozen
class Address:
    """Nodes of one broker, and how to sign in."""

    hosts: tuple[tuple[str, int], ...]
    user: str
    password: str = field(repr=False)
    vhost: str
    tls: bool

    def __str__(self) -> str:
        return ", ".join(f"{host}:{port}" for host, port in self.hosts)


def address_of(url: str, options: ConnectionOptions) -> Address:
    """Read ``amqp[s]://user:password@host:port,host:port/vhost``; ``rpc://`` means ``amqp://``.

    Without user and password they are ``guest``, without a host it is ``localhost``, without a vhost ``/``. Raises
    ``SettingsError`` with every problem.
    """
    scheme, _, rest = url.partition("://")
    tls = scheme == "amqps"
    rest, _, path = rest.partition("?")[0].partition("/")
    credentials, at, netloc = rest.rpartition("@")
    user, _, password = credentials.partition(":") if at else ("guest", "", "guest")
    problems: list[str] = []
    hosts = [
        _host(part.strip(), _PORTS["amqps" if tls else "amqp"], problems)
        for part in [*(netloc or "localhost").split(","), *options.hosts]
    ]
    if problems:
        raise SettingsError(problems)
    return Address(
        hosts=tuple(hosts),
        user=unquote(user),
        password=unquote(password),
        vhost=unquote(path) or "/",
        tls=tls,
    )


def _host(text: str, default: int, problems: list[str]) -> tuple[str, int]:
    host, colon, port = text.rpartition(":") if not text.endswith("]") else (text, "", "")
    if not colon:
        host, port = text, str(default)
    if not port.isdigit() or not 0 < int(port) < 65536:
        problems.append(f"{text!r} in the broker's URL or hosts is no host:port")
        return host, default
    return host.strip("[]") or "localhost", int(port)


def ssl_context(address: Address, options: ConnectionOptions) -> ssl.SSLContext | None:
    """None without TLS. Raises ``PublishRefused`` naming the option whose file cannot be used."""
    if not address.tls:
        return None
    try:
        context = ssl.create_default_context(cafile=options.ssl_ca_certs)
    except OSError as error:
        raise PublishRefused(f"ssl_ca_certs = {options.ssl_ca_certs!r} cannot be used: {error}") from error
    if options.ssl_certfile:
        try:
            context.load_cert_chain(options.ssl_certfile, options.ssl_keyfile)
        except OSError as error:
            raise PublishRefused(
                f"ssl_certfile = {options.ssl_certfile!r} with ssl_keyfile = {options.ssl_keyfile!r} cannot be used: {error}"
            ) from error
    if options.ssl_cert_reqs == "none" or not options.ssl_check_hostname:
        context.check_hostname = False
    if options.ssl_cert_reqs == "none":
        context.verify_mode = ssl.CERT_NONE
    return context
