"""Unique calls in workflows: each is sent, and claims its key when a worker takes it on (``umbel.worker.uniques``)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from umbel import unique
from umbel.canvas.signature import Signature
from umbel.errors import NotSupported
from umbel.model import TaskOptions

if TYPE_CHECKING:
    from umbel.app import Umbel


def check(app: Umbel, calls: Iterable[Signature]) -> None:
    """Refuse what cannot be part of a workflow: a call that waits for others of its kind. Raises ``NotSupported``."""
    for call in calls:
        given = {name: call.options[name] for name in unique.OPTIONS & call.options.keys()}
        options = _options(app, call)
        if not unique.wanted(options, given):
            continue
        options = unique.called(options, given)
        if not options.unique and (options.debounce or (options.throttle and options.throttle_edge == "trailing")):
            raise NotSupported(
                f"task {call.task!r} is debounced or throttled, and cannot wait for other calls as a part of a workflow: say "
                ".set(debounce=None) or .set(throttle=None), or send it by itself"
            )


def in_workflow(app: Umbel, call: Signature) -> list[Any] | None:
    """The header of a call that is part of a workflow: sent in any case, it claims its key when a worker takes it on.

    None: it is not unique. Raises as ``check`` and ``unique.plan``.
    """
    given = {name: call.options[name] for name in unique.OPTIONS & call.options.keys()}
    options = _options(app, call)
    if not unique.wanted(options, given):
        return None
    check(app, [call])
    if call.task in app.tasks:
        made = app.tasks[call.task].unique_plan(call.args, call.kwargs, given)
    else:
        made = unique.plan(call.task, call.args, call.kwargs, options, given)
    return None if made is None else [made.name, made.until, made.on_conflict]


def _options(app: Umbel, call: Signature) -> TaskOptions:
    return app.tasks[call.task].options if call.task in app.tasks else app.options_of(call.task, TaskOptions())
