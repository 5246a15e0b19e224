"""The settings that both drivers share, and the file that a URL names."""

from __future__ import annotations

import os
from typing import Any
from urllib.parse import unquote, urlsplit

from attrs import Attribute, field, frozen

from umbel.errors import SettingsError

SYNCHRONOUS = ("normal", "full", "off")


def _one_of(instance: object, attribute: Attribute[str], value: str) -> None:
    if value not in SYNCHRONOUS:
        raise ValueError(f"{attribute.name} must be one of {', '.join(SYNCHRONOUS)}, not {value!r}")


def _positive(instance: object, attribute: Attribute[Any], value: float | None) -> None:
    if value is not None and not value > 0:
        raise ValueError(f"{attribute.name} must be greater than 0, not {value!r}")


@frozen(kw_only=True)
class Options:
    """What the result store takes, and the transport too."""

    synchronous: str = field(default="normal", validator=_one_of)
    """What a confirmed write survives. ``normal`` and ``off``: the death of every process. ``full``: a power cut too, for
    one ``fsync`` a transaction. After a power cut ``normal`` may lack the last transactions; ``off`` may leave the file
    damaged."""
    busy_timeout: float = field(default=5.0, validator=_positive)
    """Seconds to wait for a lock that another process holds, where the caller gives no shorter deadline."""
    poll_interval: float = field(default=0.5, validator=_positive)
    """Seconds between two looks at the file when no hint arrives, give or take a quarter."""
    max_file_size: int | None = field(default=None, validator=_positive)
    """Bytes beyond which the file may not grow; None: as far as the disk allows."""


@frozen(kw_only=True)
class TransportOptions(Options):
    """What the transport takes."""

    max_message_size: int = field(default=64 * 2**20, validator=_positive)
    """Largest body in bytes, of a message or of a broadcast."""


def file_of(url: str) -> str:
    """The absolute path of the file that ``url`` names: ``sqlite:///relative.sqlite3``, ``sqlite:////absolute.sqlite3``.

    Relative to the directory in which the process is now. Raises ``SettingsError``.
    """
    parts = urlsplit(url)
    path = unquote(parts.path.removeprefix("/"))
    if parts.netloc or not path or path.endswith("/") or path == ":memory:":
        raise SettingsError(
            [
                "a sqlite URL names a file after three slashes: sqlite:///umbel.sqlite3, or sqlite:////var/lib/umbel.sqlite3"
            ]
        )
    return os.path.abspath(path)
