"""The broker of a worker, as kombu connects to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import parse_qsl, urlsplit, urlunsplit

from attrs import frozen

from umbel.errors import SettingsError
from umbel_celery.options import CeleryOptions

_SCHEMES: Final[Mapping[str, str]] = {
    "redis": "redis",
    "rediss": "rediss",
    "unix": "redis+socket",
    "redis+socket": "redis+socket",
    "celery+redis": "redis",
    "celery+rediss": "rediss",
    "amqp": "amqp",
    "amqps": "amqps",
}


@frozen
class Address:
    """What ``kombu.Connection`` is made of."""

    url: str
    transport_options: Mapping[str, Any]
    ssl: Mapping[str, Any]

    @property
    def amqp(self) -> bool:
        """Whether the broker knows topics; on Redis publish-subscribe stands for them."""
        return urlsplit(self.url).scheme in ("amqp", "amqps", "pyamqp")


def address_of(url: str, driver_options: Mapping[str, Any], options: CeleryOptions) -> Address:
    """From ``[broker] url`` and ``[broker.options]``, unless the options of the listener name a broker.

    Raises ``SettingsError`` for a broker on which no tool of Celery could listen.
    """
    if options.broker is not None:
        return Address(options.broker, options.transport_options, options.ssl)
    parts = urlsplit(url)
    if parts.scheme not in _SCHEMES:
        raise SettingsError(
            [
                f"the listener 'celery' cannot use a broker of kind {parts.scheme or url!r}, on which Celery's tools do not "
                "listen: set broker in [plugins.options.celery], or take 'celery' out of [plugins] hooks"
            ]
        )
    scheme = _SCHEMES[parts.scheme]
    found = urlunsplit(parts._replace(scheme=scheme, query=""))
    chosen, tls = dict(options.transport_options), dict(options.ssl)
    if "redis" in scheme:
        given = {**dict(parse_qsl(parts.query)), **driver_options}
        if "global_keyprefix" in given:
            chosen.setdefault("global_keyprefix", given["global_keyprefix"])
        chosen = {"socket_timeout": 10, "socket_connect_timeout": 5, "socket_keepalive": True, **chosen}
        if scheme == "redis+socket":
            found = f"redis+socket://{parts.path}?virtual_host={given.get('db', given.get('virtual_host', 0))}"
        elif scheme == "rediss":
            tls = {"ssl_cert_reqs": "required", "ssl_ca_certs": given.get("ssl_ca_certs"), **tls}
    return Address(found, chosen, tls)
