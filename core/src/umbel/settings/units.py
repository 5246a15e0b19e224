"""Durations, sizes and rates as people write them."""

from __future__ import annotations

import math
import re
from typing import Annotated, Final

Seconds = Annotated[float, "duration"]
"""A duration: a number of seconds, or a string such as "500ms", "30s", "5m", "1h", "1d"."""
Bytes = Annotated[int, "size"]
"""A size: a number of bytes, or a string such as "10MB" (powers of 1000) or "64KiB" (powers of 1024)."""

_SECONDS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_BYTES: Final = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_RATES: Final = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
DURATION_PATTERN: Final = r"^[0-9]+(\.[0-9]+)?(ms|s|m|h|d)$"
SIZE_PATTERN: Final = r"^[0-9]+(\.[0-9]+)?(B|KB|MB|GB|KiB|MiB|GiB)$"
_RATE_PATTERN: Final = r"^([0-9]+(?:\.[0-9]+)?)/(s|m|h|d)$"


def parse_seconds(text: str) -> float:
    """Seconds of "500ms", "30s", "5m", "1h", "1d". Raises ``ValueError`` for any other form."""
    if not re.fullmatch(DURATION_PATTERN, text):
        raise ValueError('must be a duration such as "500ms", "30s", "5m", "1h" or "1d"')
    number = text.rstrip("dhms")
    if not math.isfinite(seconds := float(number) * _SECONDS[text[len(number) :]]):
        raise ValueError("must be a duration that ends")
    return seconds


def parse_bytes(text: str) -> int:
    """Bytes of "10MB", "64KiB". Raises ``ValueError`` for any other form and for parts of a byte."""
    if not re.fullmatch(SIZE_PATTERN, text):
        raise ValueError('must be a size such as "10MB" or "64KiB"')
    number = text.rstrip("BKMGi")
    whole, _, part = number.partition(".")
    scale: int = 10 ** len(part)
    size, rest = divmod(int(whole + part) * _BYTES[text[len(number) :]], scale)
    if rest:
        raise ValueError("must be a whole number of bytes")
    return size


def parse_rate(text: str) -> float:
    """Starts in a second of "10/s", "100/m", "3/h", "5/d". Raises ``ValueError`` for any other form."""
    match = re.fullmatch(_RATE_PATTERN, text)
    if match is None or not 0 < float(match[1]) < math.inf:
        raise ValueError('must be a rate such as "10/s", "100/m", "1000/h" or "5/d"')
    return float(match[1]) / _RATES[match[2]]


def parse_unique(text: str) -> str | float:
    """``until_start``, ``until_done``, or the seconds of a duration. Raises ``ValueError`` for any other form."""
    if text in ("until_start", "until_done"):
        return text
    try:
        return parse_seconds(text)
    except ValueError:
        raise ValueError('must be "until_start", "until_done" or a duration such as "10m"') from None


def format_seconds(seconds: float) -> str:
    """The shortest way to write a duration: 86400 is "1d"."""
    for unit in ("d", "h", "m"):
        if seconds and seconds % _SECONDS[unit] == 0:
            return f"{seconds / _SECONDS[unit]:.0f}{unit}"
    return f"{seconds * 1000:g}ms" if 0 < seconds < 1 else f"{seconds:.15g}s"


def format_bytes(size: int) -> str:
    """The shortest way to write a size: 64000000 is "64MB"."""
    units = sorted(_BYTES, key=_BYTES.__getitem__, reverse=True)
    unit = next(unit for unit in units if unit == "B" or (size and size % _BYTES[unit] == 0))
    return f"{size // _BYTES[unit]}{unit}"
