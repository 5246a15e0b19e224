"""A task's call as a value: name, arguments, options. The wire's six-key dictionary and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from attrs import evolve, field, frozen

from umbel.errors import DecodeError

if TYPE_CHECKING:
    from umbel.app import Umbel
    from umbel.result import AsyncResult


@frozen(kw_only=True)
class Signature:
    """A call that can be sent, stored, or attached to another call as its callback."""

    task: str
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(factory=dict)
    options: Mapping[str, Any] = field(factory=dict)
    immutable: bool = False
    """True: ignores the result of the task before it."""
    subtask_type: str | None = None
    app: Umbel | None = field(default=None, eq=False, repr=False)

    def to_plain(self) -> dict[str, Any]:
        """The wire's dictionary: six keys, always."""
        return {
            "task": self.task,
            "args": list(self.args),
            "kwargs": dict(self.kwargs),
            "options": dict(self.options),
            "subtask_type": self.subtask_type,
            "immutable": self.immutable,
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any], app: Umbel | None = None) -> Signature:
        """Read the wire's dictionary. Raises ``DecodeError``."""
        task, args = plain.get("task"), plain.get("args") or ()
        kwargs, options = plain.get("kwargs") or {}, plain.get("options") or {}
        if not isinstance(task, str) or not isinstance(args, Sequence) or isinstance(args, (str, bytes)):
            raise DecodeError("a signature needs a task name and a list of args")
        if not isinstance(kwargs, Mapping) or not isinstance(options, Mapping):
            raise DecodeError(f"kwargs and options of the signature of {task!r} must be objects")
        return cls(
            task=task,
            args=tuple(args),
            kwargs=kwargs,
            options=options,
            immutable=bool(plain.get("immutable")),
            subtask_type=plain.get("subtask_type"),
            app=app,
        )

    def after(self, *results: Any) -> Signature:
        """The same call with the results of the tasks before it put in front of its arguments, unless immutable."""
        return self if self.immutable else evolve(self, args=(*results, *self.args))

    def set(self, **options: Any) -> Signature:
        """The same call with further options of ``apply_async``."""
        return evolve(self, options={**self.options, **options})

    def delay(self, *args: Any, **kwargs: Any) -> AsyncResult[Any]:
        """Send it now, with ``args`` in front and ``kwargs`` over its own."""
        return self.apply_async(args, kwargs)

    def apply_async(
        self, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> AsyncResult[Any]:
        """Send it now, with further arguments and options."""
        if self.app is None:
            raise ValueError(f"the signature of {self.task!r} belongs to no app; use app.signature(…)")
        call = self.after(*args)
        return self.app.send_task(
            call.task, call.args, {**call.kwargs, **(kwargs or {})}, **{**call.options, **options}
        )


def plain_signatures(value: object) -> list[Mapping[str, Any]]:
    """What a caller gave as ``link``: a signature, a dictionary, or several, as wire dictionaries."""
    if value is None:
        return []
    if isinstance(value, Signature):
        return [value.to_plain()]
    if isinstance(value, Mapping):
        return [value]
    if isinstance(value, Sequence):
        return [plain for item in value for plain in plain_signatures(item)]
    raise TypeError(f"link and link_error take signatures, not {type(value).__name__}")
