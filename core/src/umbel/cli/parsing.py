"""What is typed, as values."""

from __future__ import annotations

import json
import math
from typing import Any

import click

from umbel.settings.units import parse_seconds


def value_of(text: str) -> Any:
    """``text`` as JSON, else as text: ``2``, ``true``, ``[1, 2]``, ``Ada``. Words that only look like JSON are text."""
    try:
        return json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return text


def _no_constant(word: str) -> Any:
    raise ValueError(f"{word} is not JSON")


def duration(text: str) -> float:
    """Seconds of "30", "500ms", "30s", "5m", "1h", "1d". Raises ``click.BadParameter``."""
    try:
        seconds = float(text)
    except ValueError:
        try:
            return parse_seconds(text)
        except ValueError as error:
            raise click.BadParameter(f"{text!r} {error}, or a number of seconds") from None
    if not 0 <= seconds < math.inf:
        raise click.BadParameter(f"{text!r} must not be negative or endless")
    return seconds
