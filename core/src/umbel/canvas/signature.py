"""A task's call as a value, and what all composed calls have in common. The wire's six-key dictionary and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

from attrs import evolve, field, frozen

from umbel.errors import DecodeError

if TYPE_CHECKING:
    from umbel.app import Umbel
    from umbel.canvas.compose import Chain
    from umbel.canvas.stamping import StampingVisitor
    from umbel.result import AsyncResult

H = TypeVar("H")
"""The handle that sending gives."""


@frozen(kw_only=True)
class Canvas(ABC, Generic[H]):
    """A call, or several in some order, as a value: nothing is sent before ``delay``, ``apply_async`` and their kin.

    Every method that changes something returns another value and leaves this one as it was.
    """

    options: Mapping[str, Any] = field(factory=dict)
    """Options of ``apply_async``. Of a composed call: for each of its tasks that does not name its own."""
    immutable: bool = False
    """True: ignores the result of the task before it."""
    app: Umbel | None = field(default=None, eq=False, repr=False)

    # --- the wire ---

    @abstractmethod
    def to_plain(self) -> dict[str, Any]:
        """The wire's dictionary: six keys, always."""

    # --- composing ---

    def __or__(self, other: Canvas[Any]) -> Chain:
        """``self`` and then ``other``, which gets the result of ``self`` in front of its arguments unless it is immutable."""
        if not isinstance(other, Canvas):
            return NotImplemented
        from umbel.canvas.compose import chain  # composed calls are made of calls: they come after them

        return chain(self, other)

    @abstractmethod
    def after(self, *results: Any) -> Canvas[Any]:
        """The same call with the results of the tasks before it put in front of its arguments, unless immutable."""

    def stamp(self, visitor: StampingVisitor | None = None, *, append_stamps: bool = False, **headers: Any) -> Self:
        """The same call with headers that every task of it carries, callbacks included (``stamped_headers`` on the wire).

        ``visitor``: says for each part what more it is stamped with. Of two stamps of one name the later one stands, or with
        ``append_stamps`` both in a list.
        """
        from umbel.canvas.stamping import stamped  # it knows all composed calls, which are made of calls

        return stamped(self, visitor, append_stamps, headers)

    def set(self, **options: Any) -> Self:
        """The same call with further options of ``apply_async``."""
        return evolve(self, options={**self.options, **options})

    def clone(self, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, **options: Any) -> Canvas[Any]:
        """The same call with ``args`` in front, ``kwargs`` over its own, and further options."""
        return self.with_call(args, kwargs).set(**options)

    @abstractmethod
    def with_call(self, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> Canvas[Any]:
        """The same call with ``args`` in front and ``kwargs`` over its own, even if it is immutable where ``args`` are empty."""

    def link(self, *callbacks: Canvas[Any] | Mapping[str, Any]) -> Self:
        """The same call, that sends ``callbacks`` with its result when it succeeds."""
        return self._linked("link", callbacks)

    def link_error(self, *errbacks: Canvas[Any] | Mapping[str, Any]) -> Self:
        """The same call, that sends ``errbacks`` with the failed task's id when one of its tasks fails."""
        return self._linked("link_error", errbacks)

    def _linked(self, option: str, callbacks: Sequence[Canvas[Any] | Mapping[str, Any]]) -> Self:
        known = plain_signatures(self.options.get(option))
        return self.set(**{option: [*known, *(p for p in plain_signatures(callbacks) if p not in known)]})

    def on_error(self, *errbacks: Canvas[Any] | Mapping[str, Any]) -> Self:
        """The same call, that sends ``errbacks`` once if it fails, with the id of the task that failed, however many did."""
        return self._linked("on_error", errbacks)

    # --- sending ---

    def delay(self, *args: Any, **kwargs: Any) -> H:
        """Send it now, with ``args`` in front and ``kwargs`` over its own. Blocks until the broker has accepted it."""
        return self.apply_async(args, kwargs)

    async def adelay(self, *args: Any, **kwargs: Any) -> H:
        """``delay`` for event loops."""
        return await self.aapply_async(args, kwargs)

    @abstractmethod
    def apply_async(self, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, **options: Any) -> H:
        """Send it now, with further arguments and options. Blocks until the broker has accepted it.

        Raises ``NotSupported`` where it needs a result store that can join and there is none, ``EncodeError`` before anything
        is sent, ``PublishError``, ``ResultStoreUnavailable``.
        """

    async def aapply_async(
        self, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> H:
        """``apply_async`` for event loops: it waits in a thread."""
        import asyncio  # not at import: whoever only composes calls needs no event loop
        import contextvars

        context = contextvars.copy_context()
        loop = asyncio.get_running_loop()
        sent: H = await loop.run_in_executor(None, lambda: context.run(self.apply_async, args, kwargs, **options))
        return sent

    def home(self) -> Umbel:
        """The app that it is sent with. Raises ``ValueError`` where there is none."""
        if self.app is None:
            raise ValueError(f"{self} belongs to no app; make its calls with task.s(…) or app.signature(…)")
        return self.app


@frozen(kw_only=True)
class Signature(Canvas["AsyncResult[Any]"]):
    """A call that can be sent, stored, or attached to another call as its callback."""

    task: str
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(factory=dict)
    subtask_type: str | None = None

    def __str__(self) -> str:
        return f"the signature of {self.task!r}"

    def to_plain(self) -> dict[str, Any]:
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
        """Read the wire's dictionary, a composed one too, without what is in it. Raises ``DecodeError``."""
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
        return self if self.immutable else evolve(self, args=(*results, *self.args))

    def with_call(self, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> Signature:
        return evolve(self.after(*args), kwargs={**self.kwargs, **(kwargs or {})})

    def on_error(self, *errbacks: Canvas[Any] | Mapping[str, Any]) -> Self:
        """Of one task the same as ``link_error``: it fails once at most."""
        return self.link_error(*errbacks)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run it here and now, in this process."""
        call = self.with_call(args, kwargs)
        return self.home().tasks[call.task](*call.args, **call.kwargs)

    def apply_async(
        self, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> AsyncResult[Any]:
        call = self.with_call(args, kwargs)
        return self.home().send_task(call.task, call.args, call.kwargs, **call_options({**call.options, **options}))


def plain_signatures(value: object) -> list[Mapping[str, Any]]:
    """What a caller gave as ``link``: a signature, a dictionary, or several, as wire dictionaries."""
    if value is None:
        return []
    if isinstance(value, Canvas):
        return [value.to_plain()]
    if isinstance(value, Mapping):
        return [value]
    if isinstance(value, Sequence):
        return [plain for item in value for plain in plain_signatures(item)]
    raise TypeError(f"link and link_error take signatures, not {type(value).__name__}")


def call_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a signature as options of a call: the stamps, which lie flat among them, put together."""
    found = dict(options)
    if names := found.get("stamped_headers"):
        found["stamps"] = {name: found.pop(name) for name in names if name in found} | (found.get("stamps") or {})
    return found
