"""What is typed, as values."""

from __future__ import annotations

import json
import math
from typing import Any

import click

from umbel.settings.schema import parse_seconds


def value_of(text: str) -> Any:
    """``text`` as JSON, else as text: ``2``, ``true``, ``[1, 2]``, ``Ada``. Words that only look like JSON are text."""
    try:
        return json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return text


def _no_constant(word: str) -> Any:
    raise ValueError(f"{word} is not JSON")


class Duration(click.ParamType[float]):
    """Seconds, or "500ms", "30s", "5m", "1h", "1d"."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, int | float):
            return float(value)
        try:
            seconds = float(value)
        except ValueError:
            try:
                return parse_seconds(value)
            except ValueError as error:
                self.fail(f"{value!r} {error}, or a number of seconds", param, ctx)
        if not 0 <= seconds < math.inf:
            self.fail(f"{value!r} must not be negative or endless", param, ctx)
        return seconds


DURATION = Duration()
