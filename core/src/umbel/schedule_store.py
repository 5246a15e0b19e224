"""What a gateway can be asked about schedules: plain data in, plain data out, so that tasks in a worker's child can ask too."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import attrs

from umbel.model import ScheduleEntry

if TYPE_CHECKING:
    from umbel.gateway import LocalGateway


def to_plain(entry: ScheduleEntry) -> dict[str, Any]:
    """The entry as a pipe between processes of one version carries it."""
    return {field.name: getattr(entry, field.name) for field in attrs.fields(ScheduleEntry)}


async def _load(gateway: LocalGateway, payload: tuple[Sequence[str] | None, bool]) -> list[dict[str, Any]]:
    names, declared = payload
    return [to_plain(entry) for entry in await gateway.scheduler.load(names, declared=declared)]


async def _upsert(gateway: LocalGateway, entries: Sequence[Mapping[str, Any]]) -> None:
    await gateway.scheduler.upsert([ScheduleEntry(**{**entry, "args": tuple(entry["args"])}) for entry in entries])


async def _remove(gateway: LocalGateway, names: Sequence[str]) -> int:
    return await gateway.scheduler.remove(names)


async def _leader(gateway: LocalGateway, _: None) -> dict[str, Any] | None:
    leader = await gateway.scheduler.leader()
    return None if leader is None else {"owner": leader.owner, "fence": leader.fence, "until": leader.until}


VERBS: Final[Mapping[str, Callable[[LocalGateway, Any], Coroutine[Any, Any, Any]]]] = {
    "schedules.load": _load,
    "schedules.upsert": _upsert,
    "schedules.remove": _remove,
    "schedules.leader": _leader,
}
