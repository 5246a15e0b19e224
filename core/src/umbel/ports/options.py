"""The options of a driver that has none. A module of its own, because the fork server of a pool is to import little."""

from __future__ import annotations

from attrs import frozen


@frozen
class NoOptions:
    """Options of a driver that has none."""
