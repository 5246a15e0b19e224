"""Calls composed of calls: ``chain``, ``group``, ``chord``, with the field's names and operators."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain as chain_of
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, Literal, Self, TypeVar

from attrs import evolve, frozen

from umbel.canvas.rules import Need
from umbel.canvas.signature import Canvas, Signature
from umbel.errors import DecodeError

if TYPE_CHECKING:
    from umbel.app import Umbel
    from umbel.canvas.results import GroupResult
    from umbel.result import AsyncResult

C = TypeVar("C", bound=Canvas[Any])

MAP: Final = "celery.map"
STARMAP: Final = "celery.starmap"
CHUNKS: Final = "celery.chunks"
ACCUMULATE: Final = "celery.accumulate"
"""Tasks that every worker has, by the names that the wire has for them."""


class Stream(Iterable[Canvas[Any]]):
    """Members that come from a generator, each made when it is sent. They can be read once."""

    def __init__(self, members: Iterable[Canvas[Any]]) -> None:
        self._members: Iterator[Canvas[Any]] | None = iter(members)

    def __iter__(self) -> Iterator[Canvas[Any]]:
        members, self._members = self._members, None
        if members is None:
            raise ValueError(
                "the members of this group came from a generator, which has been read; give it a list instead"
            )
        return members


def _streamed(members: Iterable[Any]) -> tuple[Stream | tuple[()], Umbel | None]:
    """A stream, and the app of its first member, which has to be looked at for that."""
    rest = iter(members)
    first = next(rest, None)
    if first is None:
        return (), None
    return Stream(_given([chain_of((first,), rest)])), _app_of(_given([(first,)]))


def _app_of(members: Iterable[Canvas[Any]]) -> Umbel | None:
    return next((member.app for member in members if member.app is not None), None)


@frozen(kw_only=True)
class Chain(Canvas["AsyncResult[Any]"]):
    """Calls one after the other, each with the result of the one before it in front of its arguments."""

    tasks: tuple[Canvas[Any], ...]

    def __str__(self) -> str:
        return f"the chain of {len(self.tasks)} calls"

    def to_plain(self) -> dict[str, Any]:
        return _plain("chain", {"tasks": [task.to_plain() for task in self.tasks]}, self)

    def after(self, *results: Any) -> Chain:
        if self.immutable or not self.tasks or not results:
            return self
        first, *rest = self.tasks
        return evolve(self, tasks=(first.after(*results), *rest))

    def with_call(self, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> Chain:
        if not self.tasks:
            return self
        first, *rest = self.tasks
        return evolve(self, tasks=(first.with_call(args, kwargs), *rest))

    def __call__(self, *args: Any, **kwargs: Any) -> AsyncResult[Any]:
        """Send it."""
        return self.apply_async(args, kwargs)

    def apply_async(
        self, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> AsyncResult[Any]:
        """Send it; the handle is that of its last call, ``parent`` that of the one before it."""
        handle: AsyncResult[Any] = self.home().send_canvas(self.with_call(args, kwargs), options)
        return handle


@frozen(kw_only=True)
class Group(Canvas["GroupResult"]):
    """Calls side by side. Their results are a list, in the order in which the calls were given."""

    members: Iterable[Canvas[Any]]
    need: Need = "all"
    cancel: bool = False
    """When a member fails, the others are cancelled: those that wait are not started, those that run are told to end."""

    def __str__(self) -> str:
        return "the group"

    @property
    def streamed(self) -> bool:
        """Whether its members are made one by one as they are sent."""
        return isinstance(self.members, Stream)

    def to_plain(self) -> dict[str, Any]:
        """The wire's dictionary. Of a group that came from a generator: reads it to its end."""
        policy = {name: value for name, value, usual in _policy(self) if value != usual}
        return _plain("group", {"tasks": [member.to_plain() for member in self.members]} | policy, self)

    def after(self, *results: Any) -> Group:
        return self if self.immutable or not results else self.with_call(results)

    def with_call(self, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> Group:
        if not args and not kwargs:
            return self
        return self._each(lambda member: member.with_call(args, kwargs))

    def skew(self, start: float = 1.0, stop: float | None = None, step: float = 1.0) -> Self:
        """The same group, its members' countdowns spread from ``start`` seconds by ``step``, over again from ``stop``."""

        def countdowns() -> Iterator[float]:
            at = start
            while True:
                yield at
                at += step
                if stop is not None and at >= stop:
                    at = start

        spread = countdowns()
        return self._each(lambda member: member.set(countdown=next(spread)))

    def _each(self, change: Any) -> Self:
        if isinstance(self.members, Stream):
            return evolve(self, members=Stream(map(change, self.members)))
        return evolve(self, members=tuple(change(member) for member in self.members))

    def group(self) -> Self:
        """Itself, for those who write ``task.chunks(…).group()``."""
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> GroupResult:
        """Send it."""
        return self.apply_async(args, kwargs)

    def apply_async(
        self, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> GroupResult:
        """Send it, ``options`` for each member that does not name its own. Members from a generator are sent as they come."""
        handle: GroupResult = self.home().send_canvas(self.with_call(args, kwargs), options)
        return handle


@frozen(kw_only=True)
class Chord(Canvas["AsyncResult[Any]"]):
    """A group, and a call that gets the list of its results once all of them are there."""

    header: Group
    body: Canvas[Any] | None = None

    def __str__(self) -> str:
        return "the chord"

    def _body(self) -> Canvas[Any]:
        if self.body is None:
            raise ValueError("a chord needs a body: chord(header, body), or chord(header)(body)")
        return self.body

    def to_plain(self) -> dict[str, Any]:
        kwargs = {"header": self.header.to_plain(), "body": self._body().to_plain(), "kwargs": {}}
        return _plain("chord", kwargs, self)

    def after(self, *results: Any) -> Chord:
        return self if self.immutable else evolve(self, header=self.header.after(*results))

    def with_call(self, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> Chord:
        return evolve(self, header=self.header.with_call(args, kwargs))

    def __call__(self, body: Canvas[Any] | None = None, **options: Any) -> AsyncResult[Any]:
        """Send it, with ``body`` if it has none yet."""
        return (self if body is None else evolve(self, body=body)).apply_async(**options)

    def apply_async(
        self, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> AsyncResult[Any]:
        """Send it; the handle is that of its body, ``parent`` that of its header."""
        self._body()
        handle: AsyncResult[Any] = self.home().send_canvas(self.with_call(args, kwargs), options)
        return handle


def chain(*tasks: Canvas[Any] | Iterable[Canvas[Any]], **options: Any) -> Chain:
    """Calls one after the other: ``chain(a.s(1), b.s())``, the same as ``a.s(1) | b.s()``. A chain within is taken apart."""
    steps: list[Canvas[Any]] = []
    for task in _given(tasks):
        plain = isinstance(task, Chain) and not task.options and not task.immutable
        steps += task.tasks if plain else [task]  # type: ignore[attr-defined]  # a chain: that is what `plain` says
    return Chain(tasks=tuple(steps), options=options, app=_app_of(steps))


def group(
    *members: Canvas[Any] | Iterable[Canvas[Any]],
    join: Need = "all",
    on_failure: Literal["wait", "cancel"] = "wait",
    **options: Any,
) -> Group:
    """Calls side by side: ``group(add.s(n, n) for n in range(10))``. What comes from a generator is made as it is sent.

    ``join``: the group succeeds when ``"all"`` its members have; when all are ``"settled"``, and then its result is a list of
    ``{"state": …, "result": …}`` or ``{"state": …, "error": …}``; or as soon as so many have succeeded, with their results in
    order. ``on_failure="cancel"``: the first failure cancels the other members.
    """
    if join not in ("all", "settled") and (isinstance(join, (str, bool)) or join < 1):
        raise ValueError(f'join is "all", "settled", or a number of members from 1, not {join!r}')
    single = members[0] if len(members) == 1 else None
    if single is not None and not isinstance(single, (Canvas, Sequence)):
        members_, app = _streamed(single)
        return Group(members=members_, need=join, cancel=on_failure == "cancel", options=options, app=app)
    given = tuple(_given(members))
    return Group(members=given, need=join, cancel=on_failure == "cancel", options=options, app=_app_of(given))


def chord(header: Group | Iterable[Canvas[Any]], body: Canvas[Any] | None = None, **options: Any) -> Chord:
    """``chord(header, body)``: a group and a call with the list of its results; ``chord(header)(body)`` sends it at once."""
    members = header if isinstance(header, Group) else group(header)
    app = members.app or (None if body is None else body.app)
    return Chord(header=members, body=body, options=options, app=app)


def mapped(call: Signature, items: Iterable[Any], *, star: bool) -> Signature:
    """One task that calls ``call`` for each of ``items``, one after the other, and returns the list of what they return."""
    kind, task = ("xstarmap", STARMAP) if star else ("xmap", MAP)
    kwargs = {"task": call.to_plain(), "it": [list(item) if star else item for item in items]}
    return Signature(task=task, kwargs=kwargs, immutable=True, subtask_type=kind, app=call.app)


def chunks(call: Signature, items: Iterable[Sequence[Any]], size: int) -> Group:
    """A group of tasks, each of which calls ``call`` for ``size`` of ``items``. ``items`` are read as it is sent."""
    if size < 1:
        raise ValueError(f"a chunk holds 1 item at least, not {size}")

    def parts() -> Iterator[Signature]:
        rest = iter(items)
        while part := list(islice(rest, size)):
            yield mapped(call, part, star=True)

    return Group(members=Stream(parts()), app=call.app)


def read(plain: Mapping[str, Any], app: Umbel | None = None) -> Canvas[Any]:
    """What a dictionary of the wire stands for, with everything in it. Raises ``DecodeError``."""
    found = Signature.from_plain(plain, app)
    common: dict[str, Any] = {"options": found.options, "immutable": found.immutable, "app": app}
    match found.subtask_type:
        case "chain":
            return Chain(tasks=tuple(read(task, app) for task in members_of(plain)), **common)
        case "group":
            need, cancel = found.kwargs.get("join", "all"), found.kwargs.get("on_failure") == "cancel"
            members = tuple(read(task, app) for task in members_of(plain))
            return Group(members=members, need=need, cancel=cancel, **common)
        case "chord":
            header, body = found.kwargs.get("header") or [], found.kwargs.get("body")
            if not isinstance(header, Mapping):
                header = {"task": "celery.group", "kwargs": {"tasks": header}, "subtask_type": "group"}
            read_header = read(header, app)
            if not isinstance(read_header, Group):  # a header that is one chain or task
                read_header = Group(members=(read_header,), app=app)
            if not isinstance(body, Mapping):
                raise DecodeError("a chord needs a body that is a signature")
            return Chord(header=read_header, body=read(body, app), **common)
        case "chunks":
            task, items, size = (found.kwargs.get(name) for name in ("task", "it", "n"))
            if not isinstance(task, Mapping) or not isinstance(items, Sequence) or not isinstance(size, int):
                raise DecodeError("chunks need a task, a list of items and a number")
            return evolve(chunks(Signature.from_plain(task, app), items, size), options=found.options)
    return found


def members_of(plain: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """The signatures of a chain or a group, as dictionaries. Raises ``DecodeError``."""
    members = Signature.from_plain(plain).kwargs.get("tasks") or ()
    if not isinstance(members, Sequence) or not all(isinstance(m, Mapping) and m.get("task") for m in members):
        raise DecodeError(f"the tasks of a {plain.get('subtask_type')} must be a list of signatures")
    return members


def _given(items: Sequence[Canvas[Any] | Iterable[Canvas[Any]]]) -> Iterator[Canvas[Any]]:
    for item in items:
        for call in item if isinstance(item, Iterable) else (item,):
            if not isinstance(call, Canvas):
                raise TypeError(
                    f"a workflow is composed of signatures, such as task.s(1), not of {type(call).__name__}"
                )
            yield call


def _plain(kind: str, kwargs: Mapping[str, Any], canvas: Canvas[Any]) -> dict[str, Any]:
    return {
        "task": f"celery.{kind}",
        "args": [],
        "kwargs": dict(kwargs),
        "options": dict(canvas.options),
        "subtask_type": kind,
        "immutable": canvas.immutable,
    }


def _policy(group: Group) -> Sequence[tuple[str, Any, Any]]:
    return ("join", group.need, "all"), ("on_failure", "cancel" if group.cancel else "wait", "wait")
