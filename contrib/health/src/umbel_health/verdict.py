"""How a worker is: what is known of it at one moment, and what that means. No I/O."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any

from attrs import Attribute, field, frozen

CHILDLESS: float = 10.0
"""Seconds for which a pool may be without any process: those that end are replaced within a moment."""


def _positive(instance: object, attribute: Attribute[Any], value: float | None) -> None:
    if value is not None and not value > 0:
        raise ValueError(f"{attribute.name} must be more than 0, not {value!r}")


def _port(instance: object, attribute: Attribute[int], value: int) -> None:
    if not 0 <= value <= 65535:
        raise ValueError(f"port must be from 0 to 65535, not {value!r}")


@frozen(kw_only=True)
class HealthOptions:
    """What the listener ``health`` takes: ``[plugins.options.health]``."""

    host: str = "127.0.0.1"
    """Address to listen at; ``0.0.0.0`` for probes that come from outside the container."""
    port: int = field(default=8640, validator=_port)
    """Port to listen at; 0: a free one, which is logged."""
    max_poll_age: float = field(default=60.0, validator=_positive)
    """Seconds since the last answer of the broker after which the worker is not ready."""
    restart_after: float | None = field(default=None, validator=_positive)
    """Seconds since the last answer of the broker after which the worker is not live; not set: it is live without a
    broker, since to restart it would not bring the broker back."""


class Phase(enum.StrEnum):
    """Where a worker stands in its life."""

    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"


@frozen(kw_only=True)
class View:
    """What is known of a worker at one moment."""

    phase: Phase
    running_for: float = 0.0
    """Seconds since it became ready."""
    consumes: bool = True
    """Whether it consumes a queue: remote control may have taken the last one away."""
    last_poll_age: float | None = None
    """Seconds since the broker answered; None: it has not yet."""
    childless: float = 0.0
    """Seconds for which the pool has had no process."""

    @property
    def silence(self) -> float:
        """Seconds for which a broker that is being asked has not answered."""
        if self.phase is not Phase.RUNNING or not self.consumes:
            return 0.0
        return self.running_for if self.last_poll_age is None else self.last_poll_age


def why_not_live(view: View, options: HealthOptions) -> Sequence[str]:
    """Reasons to restart the worker; none: it is live."""
    if options.restart_after is not None and view.silence > options.restart_after:
        return [_silent(view, "restart_after", options.restart_after)]
    return []


def why_not_ready(view: View, options: HealthOptions) -> Sequence[str]:
    """Reasons why no work is to be expected of the worker; none: it is ready."""
    if view.phase is not Phase.RUNNING:
        return [f"the worker is {view.phase}"]
    reasons = []
    if view.silence > options.max_poll_age:
        reasons.append(_silent(view, "max_poll_age", options.max_poll_age))
    if view.childless > CHILDLESS:
        reasons.append(f"the pool has had no process for {view.childless:.0f} s: its log says why none starts")
    return reasons


def _silent(view: View, option: str, bound: float) -> str:
    return f"the broker has not answered for {view.silence:.0f} s, longer than {option} = {bound:g} s"
