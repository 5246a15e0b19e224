"""The settings that every driver of this plugin shares, and what a URL names."""

from __future__ import annotations

import re
from typing import Any, Final, Literal
from urllib.parse import SplitResult, unquote, urlsplit, urlunsplit

from attrs import Attribute, field, frozen

from umbel.errors import SettingsError

_NEXT: Final = re.compile(r";(?=[a-z+]+://)")
_PORTS: Final = {"redis": 6379, "rediss": 6379, "sentinel": 26379}


def positive(instance: object, attribute: Attribute[Any], value: float | None) -> None:
    """Validator of a number that is greater than 0, or None."""
    if value is not None and not value > 0:
        raise ValueError(f"{attribute.name} must be greater than 0, not {value!r}")


@frozen(kw_only=True)
class RedisOptions:
    """How to reach the server, and how long to wait for it."""

    prefix: str = ""
    """Before the name of every key and channel, so that several fleets can share a server."""
    db: int | None = field(default=None)
    """Number of the database, where the URL's path does not say it (``unix://``)."""
    virtual_host: int | None = field(default=None)
    """The same, as Celery's ``redis+socket://`` URLs say it."""
    cluster: bool = False
    """The hosts are nodes of a Redis Cluster; one that answers is enough to find the others."""
    master: str | None = None
    """``sentinel://``: the name under which the sentinels know the master."""
    sentinel_username: str | None = None
    """``sentinel://``: user at the sentinels; the one in the URL is the servers'."""
    sentinel_password: str | None = field(default=None, repr=False)
    """``sentinel://``: password of that user; the one in the URL is the servers'."""
    connect_timeout: float = field(default=5.0, validator=positive)
    """Seconds that making a connection may take."""
    timeout: float = field(default=5.0, validator=positive)
    """Seconds after which an answer is given up, and its connection with it."""
    connections: int = field(default=8, validator=positive)
    """The most commands under way at once, each on a connection of its own; further callers wait."""
    ssl: bool = False
    """``sentinel://``: speak TLS with the sentinels and the servers (``rediss://`` always does)."""
    ssl_ca_certs: str | None = None
    """File with the certificates of the authorities to trust; None: the system's."""
    ssl_certfile: str | None = None
    """File with the certificate to show to the server; None: none is shown."""
    ssl_keyfile: str | None = None
    """File with the key of that certificate; None: it is in the same file."""
    ssl_cert_reqs: Literal["required", "none"] = "required"
    """``none``: believe any certificate."""
    ssl_check_hostname: bool = True
    """Whether the certificate must be for the host that the URL names."""

    @db.validator
    @virtual_host.validator
    def _not_negative(self, attribute: Attribute[int | None], value: int | None) -> None:
        if value is not None and value < 0:
            raise ValueError(f"{attribute.name} is 0 or greater, not {value}")


@frozen(kw_only=True)
class Address:
    """What a URL and the options name together."""

    kind: Literal["single", "sentinel", "cluster"]
    hosts: tuple[tuple[str, int], ...] = ()
    path: str | None = None
    """The socket file of a server on this host; ``hosts`` is empty then."""
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    db: int = 0
    tls: bool = False
    master: str = ""
    shown: str
    """The URL with the password masked: for messages."""

    def __str__(self) -> str:
        return self.shown


def address_of(url: str, options: RedisOptions) -> Address:
    """The server that ``url`` and ``options`` name. Raises ``SettingsError`` with every problem; shows no password.

    ``redis://user:password@host:6379/0``, ``rediss://…``, ``unix:///run/redis.sock`` (``db`` is an option),
    ``sentinel://host:26379,host:26379/0`` with the option ``master``; several hosts with the option ``cluster``. As Celery's
    users write them: ``redis+socket:///run/redis.sock``, ``sentinel://host:26379;sentinel://host:26379``.
    """
    problems: list[str] = []
    parts = urlsplit(_joined(url))
    credentials, _, netloc = parts.netloc.rpartition("@")
    username, has_password, password = credentials.partition(":")
    shown = f"{parts.scheme}://{username + (':***' if has_password else '') + '@' if credentials else ''}{netloc}{parts.path}"
    if parts.query:
        problems.append(f"{shown}: what stands after ? is read into options before a driver is made")
    path = hosts = None
    db = options.virtual_host if options.db is None else options.db
    if parts.scheme in ("unix", "redis+socket"):
        path = unquote(parts.path)
        if netloc or not path:
            problems.append(
                f"a {parts.scheme} URL names a socket after three slashes: {parts.scheme}:///run/redis/redis.sock?db=0"
            )
    elif parts.scheme in _PORTS:
        hosts = _hosts(netloc, _PORTS[parts.scheme], shown, problems)
        db = _db(parts, options, shown, problems)
    else:
        problems.append(f"{parts.scheme!r} is none of redis, rediss, unix, redis+socket, sentinel")
    sentinel = parts.scheme == "sentinel"
    if sentinel and not options.master:
        problems.append(f"{shown} does not say which master the sentinels are to name: add ?master=NAME")
    if not sentinel and options.master:
        problems.append(f"the option master belongs to sentinel:// URLs, and {shown} is none")
    if options.cluster and (sentinel or path is not None):
        problems.append(f"the option cluster belongs to redis:// and rediss:// URLs, and {shown} is none")
    if options.cluster and db:
        problems.append(f"a Redis Cluster has database 0 only, and {shown} asks for {db}")
    if not options.cluster and not sentinel and hosts is not None and len(hosts) > 1:
        problems.append(f"{shown} names several hosts: add ?cluster=true if they are a cluster, or use sentinel://")
    if problems:
        raise SettingsError(problems)
    return Address(
        kind="sentinel" if sentinel else "cluster" if options.cluster else "single",
        hosts=tuple(hosts or ()),
        path=path,
        username=unquote(username) or None,
        password=unquote(password) if has_password else None,
        db=db or 0,
        tls=parts.scheme == "rediss" or (sentinel and options.ssl),
        master=options.master or "",
        shown=shown,
    )


def _joined(url: str) -> str:
    """Several URLs of sentinels with semicolons between as one with commas, user and path of the first that has one."""
    first, *others = _NEXT.split(url)
    if not others:
        return url
    if not all(each.startswith("sentinel://") for each in (first, *others)):
        raise SettingsError(
            ["several URLs with semicolons between name sentinels of one master: each begins with sentinel://"]
        )
    whole = urlsplit(first)
    hosts = [whole.netloc, *(urlsplit(other).netloc.rpartition("@")[2] for other in others)]
    path = next((path for path in (whole.path, *(urlsplit(other).path for other in others)) if path), "")
    return urlunsplit(whole._replace(netloc=",".join(hosts), path=path))


def _hosts(netloc: str, default: int, shown: str, problems: list[str]) -> list[tuple[str, int]]:
    hosts = []
    for part in netloc.split(",") if netloc else ["localhost"]:
        host, bracket, rest = part.partition("]") if part.startswith("[") else (part, "", "")
        name, _, port = (host[1:], "", rest.removeprefix(":")) if bracket else part.partition(":")
        if not name or (port and not (port.isascii() and port.isdigit() and int(port) < 65536)):
            problems.append(f"{shown}: {part!r} is not HOST or HOST:PORT")
        else:
            hosts.append((unquote(name), int(port or default)))
    return hosts


def _db(parts: SplitResult, options: RedisOptions, shown: str, problems: list[str]) -> int | None:
    number = parts.path.strip("/")
    if number and not (number.isascii() and number.isdigit()):
        problems.append(f"{shown}: after the slash stands the number of the database, not {number!r}")
        return None
    chosen = options.virtual_host if options.db is None else options.db
    if number and chosen is not None and int(number) != chosen:
        problems.append(f"{shown} and the option db name different databases")
    return int(number) if number else chosen
