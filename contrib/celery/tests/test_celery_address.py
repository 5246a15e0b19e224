"""How a broker of Umbel's is written for kombu."""

from __future__ import annotations

from typing import Any

import pytest

from umbel.errors import SettingsError
from umbel_celery.address import address_of
from umbel_celery.options import CeleryOptions
from umbel_celery.views import address


@pytest.mark.parametrize(
    ("url", "options", "expected", "amqp"),
    [
        ("celery+redis://:pw@h:1/5?visibility_timeout=9", {}, "redis://:pw@h:1/5", False),
        ("redis://h/0?prefix=x", {}, "redis://h/0", False),
        ("unix:///run/redis.sock", {"db": 3}, "redis+socket:///run/redis.sock?virtual_host=3", False),
        ("celery+rediss://h:1/5", {}, "rediss://h:1/5", False),
        ("amqp://u:p@h:1/v", {}, "amqp://u:p@h:1/v", True),
        ("amqps://h/v", {}, "amqps://h/v", True),
    ],
)
def test_schemes(url: str, options: dict[str, Any], expected: str, amqp: bool) -> None:
    made = address_of(url, options, CeleryOptions())
    assert (made.url, made.amqp) == (expected, amqp)


def test_options_of_the_driver_and_of_the_listener() -> None:
    made = address_of("celery+rediss://h/0?global_keyprefix=a:", {"ssl_ca_certs": "ca.pem"}, CeleryOptions())
    assert made.transport_options["global_keyprefix"] == "a:"
    assert made.ssl == {"ssl_cert_reqs": "required", "ssl_ca_certs": "ca.pem"}
    named = CeleryOptions(broker="sentinel://s:1", transport_options={"master_name": "m"}, ssl={"x": 1})
    made = address_of("sentinel://s:1/0", {}, named)
    assert (made.url, made.transport_options, made.ssl) == ("sentinel://s:1", {"master_name": "m"}, {"x": 1})


@pytest.mark.parametrize("url", ["memory", "sqlite:///x", "sentinel://h/0"])
def test_a_broker_on_which_nobody_listens(url: str) -> None:
    with pytest.raises(SettingsError, match=r"\[plugins\.options\.celery\]"):
        address_of(url, {}, CeleryOptions())


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://:pw@h:1/0?password=x", "redis://:********@h:1/0"),
        ("amqp://u@h/v", "amqp://u@h/v"),
        ("memory", "memory"),
    ],
)
def test_what_is_shown_of_an_address(url: str, shown: str) -> None:
    assert address(url) == shown
