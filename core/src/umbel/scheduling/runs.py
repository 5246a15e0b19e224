"""The message of one run.

Its id is made of the entry and the due time, so that whoever sends it sends the same run. Beside the id it carries a number
of its own: a worker can tell two messages of one run apart, whatever made them two.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, cast

from umbel import unique
from umbel.claiming import claims_of
from umbel.errors import NotSupported, UmbelError
from umbel.gateway import LocalGateway
from umbel.model import Message, ScheduleEntry, TaskOptions
from umbel.protocol import format_time, new_id
from umbel.scheduling.terms import run_id

if TYPE_CHECKING:
    from umbel.app import Umbel

HEADER_COPY: Final = "umbel-run"
"""A number for each message that is published, kept by its retries and redeliveries."""
HEADER_SCHEDULE: Final = "umbel-schedule"
"""The entry's name."""
HEADER_DUE: Final = "umbel-due"
"""The due time, ISO 8601."""

START: Final = "umbel-run:"
"""Before a run's id: the name of the claim by which one message of the run may start."""

_NOT_TO_BE_GIVEN: Final = ("task_id", "timeout", "eta")


def run_message(app: Umbel, entry: ScheduleEntry, slot: float) -> Message:
    """The message of the run that is due at ``slot``. Raises ``EncodeError``, ``TypeError``, ``ValueError``, ``UmbelError``."""
    headers = {HEADER_COPY: new_id(), HEADER_SCHEDULE: entry.name, HEADER_DUE: format_time(slot)}
    return call_message(app, entry, task_id=run_id(entry.name, slot), headers=headers)


def call_message(app: Umbel, entry: ScheduleEntry, *, task_id: str, headers: Mapping[str, Any]) -> Message:
    """The message of a call of the entry's task, with the entry's options. Raises as ``run_message``."""
    options: dict[str, Any] = {name: value for name, value in entry.options.items() if name not in unique.OPTIONS}
    for name in _NOT_TO_BE_GIVEN:
        if name in options:
            raise ValueError(f"options may not have {name}: a schedule sets the ids and times of its runs itself")
    options |= {"task_id": task_id, "headers": {**options.get("headers", {}), **headers}}
    kwargs = dict(entry.kwargs)
    if entry.task in app.tasks:
        return app.tasks[entry.task].message(entry.args, kwargs, **options)
    effective = _options_of(app, entry.task)
    options.setdefault("ignore_result", True if effective.ignore_result else None)
    return app.client.message(entry.task, entry.args, kwargs, effective, **cast("Any", options))


def plan_of(app: Umbel, entry: ScheduleEntry) -> unique.Plan | None:
    """How calls of the entry's task are unique; None: they are not. Raises as ``run_message``, ``NotSupported`` where the
    result store keeps no claims."""
    options, call = _options_of(app, entry.task), dict(entry.options)
    if not unique.wanted(options, call):
        return None
    if isinstance(app.gateway, LocalGateway):
        claims_of(app.gateway.store, "unique tasks")
    if entry.task in app.tasks:
        return app.tasks[entry.task].unique_plan(entry.args, entry.kwargs, call)
    return unique.plan(entry.task, entry.args, entry.kwargs, options, call)


def _options_of(app: Umbel, task: str) -> TaskOptions:
    return app.tasks[task].options if task in app.tasks else app.options_of(task, TaskOptions())


def check_overlap(app: Umbel, entry: ScheduleEntry, overlap: str) -> None:
    """Refuse an overlap policy that could not be kept: nothing would tell when the earlier run has ended.

    Raises ``NotSupported``.
    """
    if overlap == "allow":
        return
    reason = ""
    if not app.settings.results.url:
        reason = 'there is no result store: set [results] url, which is "disabled"'
    elif app.gateway.reply_to is not None:
        reason = (
            "the store of [results] url gives results to their caller only: take one that keeps them (redis, sqlite)"
        )
    elif entry.options.get("ignore_result", _options_of(app, entry.task).ignore_result):
        reason = f"task {entry.task!r} stores no result: take its ignore_result away"
    if reason:
        raise NotSupported(
            f"schedule {entry.name!r} has overlap = {overlap!r}, and nobody could tell when a run has ended: {reason}, or "
            'set overlap = "allow"'
        )


def sentence(error: BaseException) -> str:
    """What is wrong, in one line."""
    text = str(error) or type(error).__name__
    return text if isinstance(error, UmbelError | ValueError) else f"{type(error).__name__}: {text}"
