"""What ``umbel plugins why`` answers: from a setting to the components that came of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import click
from attrs import frozen

from umbel.cli.config import written
from umbel.cli.output import pairs
from umbel.plugins.kinds import Kind
from umbel.plugins.lineage import NAMING, Lineage, kind_named_by, trace
from umbel.settings.sources import join_key, leaves, mask_value, split_key

if TYPE_CHECKING:
    from umbel.app import Umbel


@frozen
class Answer:
    """One setting and what came of it."""

    setting: str
    value: Any
    """As it may be shown."""
    origin: str
    components: Sequence[Lineage]


def answer(app: Umbel, text: str) -> Answer:
    """Trace every plugin that the setting ``text`` names. Raises ``click.BadParameter`` if it is no such setting."""
    path = split_key(text) or (text,)
    key = join_key(path)
    kind = kind_named_by(key)
    if kind is None:
        near = get_close_matches(key, NAMING, n=1)
        meant = f"did you mean {near[0]}? " if near else ""
        raise click.BadParameter(f"{key} names no plugin; {meant}these do: {', '.join(NAMING)}", param_hint="KEY")
    value = next((below for at, below in leaves(app.settings) if join_key(at) == key), None)
    names = [value] if isinstance(value, str) else list(value or ())
    lineages = [trace(app.plugins, kind, name, _arguments(app, kind)) for name in names if name != "none"]
    origin = app.loaded.provenance.get(key, "default")
    return Answer(setting=key, value=mask_value(path, value), origin=origin, components=lineages)


def show(found: Answer) -> str:
    """The answer for people."""
    setting = pairs([("setting", f"{found.setting} = {written(found.value)}"), ("from", found.origin)])
    return "\n\n".join(
        [setting, *(pairs(_told(c)) for c in found.components)] if found.components else [setting, "no plugin is used"]
    )


def _arguments(app: Umbel, kind: Kind[Any]) -> dict[str, Any]:
    """What the kernel gives the factory of that kind beside the name."""
    settings = app.settings
    match kind.name:
        case "transport":
            return {"options": settings.broker.options, "clock": app.clock}
        case "result_store":
            return {"options": settings.results.options, "clock": app.clock}
        case "pool":
            return {"options": settings.worker.pool_options}
    return {}


def _told(lineage: Lineage) -> Iterator[tuple[str, object]]:
    yield "plugin", f"{lineage.kind.replace('_', ' ')} {lineage.name or ''}".rstrip()
    yield "hook", lineage.hook
    if lineage.answered_by:
        yield "answered by", lineage.answered_by
    if lineage.wrapped_by:
        yield "wrapped by", ", ".join(lineage.wrapped_by)
    if lineage.target:
        yield "distribution", f"{lineage.distribution} {lineage.version}" if lineage.distribution else "none"
        yield "target", lineage.target
    if lineage.component:
        yield "component", lineage.component
    if lineage.listens_to:
        yield "listens to", ", ".join(lineage.listens_to)
    if lineage.reason:
        yield "trouble", lineage.reason
