"""Generated canvases and the cases of the error rules: what they are, and what they must come to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache
from itertools import product
from typing import Any, Final

from canvas_work import STEP, Misbehaving, brief, perform
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from umbel import Umbel, chain, chord, group
from umbel.canvas.graph import NODE, ONCE
from umbel.canvas.signature import Canvas, Signature
from umbel.errors import ResultStoreUnavailable
from umbel.testing.harness import Harness, in_memory

KINDS: Final = (
    *("ok",) * 8, "fail", "retry", "replace", "replace_group", "replace_chord", "replace_fail", "expired",
)  # fmt: skip
FORMS: Final = ("chain", "group", "chord", "chain", "group", "chord", "task")
_PAST: Final = datetime(2001, 1, 1, tzinfo=UTC)

Tree = tuple[Any, ...]
"""``("task", kind, label)``, ``("chain", [trees])``, ``("group", [trees])``, ``("chord", [trees], tree)``."""


class Failed(Exception):
    """What is expected of a canvas that cannot succeed."""


@st.composite
def trees(draw: st.DrawFn, *, depth: int, width: int, largest: int) -> Tree:
    """Canvases up to ``depth`` levels, with up to ``width`` calls in each, and up to ``largest`` tasks in all."""

    def grown(depth: int, most: int) -> Tree:
        form = draw(st.sampled_from(FORMS)) if depth and most > 1 else "task"
        if form == "task":
            return ("task", draw(st.sampled_from(KINDS)), 0)
        body = [("task", draw(st.sampled_from(KINDS)), 0)] if form == "chord" else []
        most -= len(body)
        members: list[Tree] = []
        for still in range(draw(st.integers(1, min(width, most))), 0, -1):
            members.append(grown(depth - 1, draw(st.integers(1, max(1, min(2 * most // still, most - still + 1))))))
            most -= size(members[-1])
        return (form, members, *body)

    return numbered(grown(depth, largest))


@cache
def drawn(number: int, of: int, *, depth: int, width: int, largest: int) -> Sequence[Tree]:
    """``number`` canvases of up to ``largest`` tasks each, the same for the same seed ``of``."""
    found: list[Tree] = []

    @seed(of)
    @settings(
        max_examples=number,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(trees(depth=depth, width=width, largest=largest))
    def draw(tree: Tree) -> None:
        found.append(tree)

    draw()
    return found


def size(tree: Tree) -> int:
    """How many tasks are in it."""
    match tree:
        case ("task", *_):
            return 1
        case ("chord", members, body):
            return sum(map(size, members)) + size(body)
        case (_, members):
            return sum(map(size, members))
    raise AssertionError(tree)


def numbered(tree: Tree, labels: Iterator[int] | None = None) -> Tree:
    """The same, each task with a label of its own, and room behind it for what it is replaced by."""
    labels = labels or iter(range(0, 2**31, STEP))
    match tree:
        case ("task", kind, _):
            return ("task", kind, next(labels))
        case ("chord", members, body):
            return ("chord", [numbered(member, labels) for member in members], numbered(body, labels))
        case (kind, members):
            return (kind, [numbered(member, labels) for member in members])
    raise AssertionError(tree)


def canvas_of(tree: Tree, call: Callable[[str, int], Signature]) -> Canvas[Any]:
    """``call`` makes the call of a task of a kind and a label."""
    match tree:
        case ("task", "expired", label):
            return call("ok", label).set(expires=_PAST)
        case ("task", kind, label):
            return call(kind, label)
        case ("chain", members):
            return chain(*(canvas_of(member, call) for member in members))
        case ("group", members):
            return group([canvas_of(member, call) for member in members])
        case ("chord", members, body):
            return chord([canvas_of(member, call) for member in members], canvas_of(body, call))
    raise AssertionError(tree)


Calls = dict[int, Any]
"""What each task that starts is given, in order, by its label."""


def expected(tree: Tree, *given: Any, calls: Calls | None = None) -> Any:
    """The value that it comes to; ``calls`` gets what starts meanwhile. Raises ``Failed``."""
    calls = {} if calls is None else calls
    match tree:
        case ("task", kind, label):
            return _task(kind, label, given, calls)
        case ("chain", members):
            for member in members:
                given = (expected(member, *given, calls=calls),)
            return given[0]
        case ("group", members):
            return _side_by_side(members, given, calls)
        case ("chord", members, body):
            return expected(body, _side_by_side(members, given, calls), calls=calls)
    raise AssertionError(tree)


def _task(kind: str, label: int, given: Sequence[Any], calls: Calls) -> Any:
    def started(label: int, *given: Any) -> list[Any]:
        calls[label] = brief(list(given))
        return [label, calls[label]]

    if kind == "expired":
        raise Failed
    value = started(label, *given)
    match kind:
        case "fail":
            raise Failed
        case "replace":
            return started(label + 1, *given)
        case "replace_fail":
            started(label + 1, *given)
            raise Failed
        case "replace_group":
            return [started(label + more, *given) for more in (1, 2)]
        case "replace_chord":
            return started(label + 3, [started(label + more, *given) for more in (1, 2)])
    return value


def _side_by_side(members: Sequence[Tree], given: Sequence[Any], calls: Calls) -> list[Any]:
    """Groups directly within a group lie in one list with its other members."""
    values: list[Any] = []
    failed = False
    for member in members:
        try:
            value = expected(member, *given, calls=calls)
        except Failed:
            failed = True
            continue
        values += value if member[0] == "group" else [value]
    if failed:
        raise Failed
    return values


# --- the error rules ------------------------------------------------------------------------------

Case = tuple[int, str, int, Any]
"""Nesting, place of what fails in its chain, number of failures, ``join``."""

PLACES: Final = ("alone", "first", "middle", "last")
POLICIES: Final[tuple[Any, ...]] = ("all", "settled", 1, 2)
CASES: Final[Sequence[Case]] = tuple(product(range(4), PLACES, range(4), POLICIES))


def table_canvas(case: Case, tell: Callable[[str], Signature], tasks: Any) -> Canvas[Any]:
    """A case of the truth table; who is told of a failure is told by ``tell``. ``tasks`` has ``identity`` and ``boom``."""
    nesting, place, failures, policy = case
    members = [_table_member(place, number < failures, tell, tasks) for number in range(3)]
    canvas: Any = group(members, join=policy).on_error(tell("group"))
    canvas = canvas | tasks.identity.s().link_error(tell("body"))
    for level in range(nesting):
        outer = group([canvas, tasks.identity.s()]).on_error(tell(f"outer group {level}"))
        canvas = chord(outer, tasks.identity.s().link_error(tell(f"outer body {level}")))
    return canvas  # type: ignore[no-any-return]  # what the operator makes of them


def _table_member(place: str, fails: bool, tell: Callable[[str], Signature], tasks: Any) -> Any:
    ok = tasks.identity.s()
    call = tasks.boom.s().link_error(tell("member")) if fails else ok
    match place:
        case "first":
            return chain(call, ok)
        case "middle":
            return chain(ok, call, ok)
        case "last":
            return chain(ok, call)
    return call


def table_fails(case: Case) -> bool:
    _, _, failures, policy = case
    return failures > 0 if policy == "all" else False if policy == "settled" else 3 - failures < policy


def table_told(case: Case) -> dict[str, int]:
    """How often each is told, but for the members' own errbacks."""
    if not table_fails(case):
        return {}
    told = {"group": 1, "body": 1}
    for level in range(case[0]):
        told |= {f"outer group {level}": 1, f"outer body {level}": 1}
    return told


class Lab:
    """An app with the task that generated canvases are made of, and what it has seen."""

    def __init__(self, *plugins: object, settings: Mapping[str, Any] | None = None) -> None:
        self.app = Umbel(
            "lab", plugins=plugins, settings={"worker.concurrency": 4, "broker.publish_timeout": 30, **(settings or {})}
        )
        self.once: Counter[tuple[str, int, int]] = Counter()
        """Starts of what joins have started, by id, number of retries, and of replacements."""
        self.calls: Counter[Any] = Counter()
        """Calls of ``note``, by what it is to note."""
        self.inputs: dict[int, set[str]] = {}
        """What each task of a workflow was given, as text, by its label."""

        @self.app.task(bind=True, max_retries=5)
        def work(self_: Any, *given: Any, kind: str, label: int) -> Any:
            request = self_.request
            if request.message.headers.get(ONCE):
                self.once[request.id, request.retries, request.invocation.replaced_task_nesting] += 1
            if NODE in request.message.headers:
                self.inputs.setdefault(label, set()).add(repr(brief(list(given))))
            return perform(self_, self.call, given, kind=kind, label=label)

        @self.app.task
        def note(*what: Any) -> Any:
            self.calls[what[-1]] += 1
            return what[-1]

        @self.app.task
        def identity(value: Any = None) -> Any:
            return value

        @self.app.task
        def boom(*_: Any) -> None:
            raise ValueError("bad")

        self.work, self.note, self.identity, self.boom = work, note, identity, boom

    def call(self, kind: str, label: int) -> Signature:
        """Of the task that generated canvases are made of."""
        call: Signature = self.work.s(kind=kind, label=label)
        return call

    @contextmanager
    def running(self, settings: Mapping[str, Any] | None = None) -> Iterator[Harness]:
        """In memory, with a worker; what is forgotten after a time is."""
        with in_memory(self.app, settings={"results.expires": 3600, **(settings or {})}) as harness, harness.worker():
            yield harness


def reconciled(lab: Lab, harness: Harness, worker: Any = None) -> None:
    """Let pass the time that a crash's leases take, and what there was to finish be finished."""
    from umbel.worker.workflows import Workflows

    workflows: Workflows = (worker or harness._worker).workflows
    for _ in range(6):
        harness.advance(31)
        while True:
            try:
                lab.app.runtime.call(workflows.reconcile(), timeout=10)
                break
            except ResultStoreUnavailable:
                continue
        harness.run_until_idle(30)


__all__ = [
    "CASES", "Failed", "Lab", "Misbehaving", "canvas_of", "drawn", "expected", "numbered", "reconciled", "size", "table_canvas",
    "table_fails", "table_told", "trees",
]  # fmt: skip
