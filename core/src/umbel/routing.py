"""Which options and which queue a task gets, and what the queues are to be. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import attrs

from umbel.model import QueueSpec, TaskOptions
from umbel.settings.units import parse_unique

if TYPE_CHECKING:
    from umbel.settings.schema import QueueSettings, TaskSettings


def effective_options(name: str, declared: TaskOptions, settings: Mapping[str, TaskSettings]) -> TaskOptions:
    """``declared`` by the decorator, overridden by the operator's ``[tasks."…"]``.

    Every pattern that matches ``name`` applies, general ones first: globs from the shortest to the longest, then the
    exact name. A setting that is not given (None) overrides nothing.
    """
    matching = sorted(
        (pattern for pattern in settings if pattern == name or fnmatchcase(name, pattern)),
        key=lambda pattern: (pattern == name, len(pattern)),
    )
    changes = {
        field: value
        for pattern in matching
        for field, value in attrs.asdict(settings[pattern], recurse=False).items()
        if value is not None
    }
    if "unique" in changes:
        changes["unique"] = parse_unique(changes["unique"])
    return attrs.evolve(declared, **changes) if changes else declared


def queue_specs(settings: Mapping[str, QueueSettings]) -> Mapping[str, QueueSpec]:
    """The queues that ``[queues.…]`` describes, by name."""
    return {name: QueueSpec(name=name, **attrs.asdict(queue, recurse=False)) for name, queue in settings.items()}
