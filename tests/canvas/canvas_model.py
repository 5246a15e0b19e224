"""Generated canvases, what they must come to, and a broker and a store that misbehave."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from hypothesis import strategies as st

from umbel import Umbel, chain, chord, group, hookimpl
from umbel.canvas.graph import NODE, ONCE
from umbel.canvas.signature import Canvas
from umbel.errors import ResultStoreUnavailable
from umbel.testing.harness import Harness, in_memory

KINDS = ("ok", "ok", "ok", "ok", "ok", "fail", "retry", "replace", "replace_group")

Tree = tuple[Any, ...]
"""``("task", kind, label)``, ``("chain", [trees])``, ``("group", [trees])``, ``("chord", [trees], tree)``."""


class Failed(Exception):
    """What is expected of a canvas that cannot succeed."""


def trees(*, depth: int, width: int, kinds: Sequence[str] = KINDS) -> st.SearchStrategy[Tree]:
    """Canvases up to ``depth`` levels, with up to ``width`` calls in each."""
    leaf: st.SearchStrategy[Tree] = st.tuples(st.just("task"), st.sampled_from(kinds), st.integers(0, 99))
    found = leaf
    for _ in range(depth):
        several = st.lists(found, min_size=1, max_size=width)
        found = st.one_of(
            leaf,
            st.tuples(st.just("chain"), several),
            st.tuples(st.just("group"), several),
            st.tuples(st.just("chord"), several, leaf),
        )
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


def canvas_of(tree: Tree, work: Any) -> Canvas[Any]:
    match tree:
        case ("task", kind, label):
            call: Canvas[Any] = work.s(kind=kind, label=label)
            return call
        case ("chain", members):
            return chain(*(canvas_of(member, work) for member in members))
        case ("group", members):
            return group([canvas_of(member, work) for member in members])
        case ("chord", members, body):
            return chord([canvas_of(member, work) for member in members], canvas_of(body, work))
    raise AssertionError(tree)


def expected(tree: Tree, *given: Any) -> Any:
    """The value that it comes to. Raises ``Failed``."""
    match tree:
        case ("task", "fail", _):
            raise Failed
        case ("task", "replace_group", label):
            return [[label, *given], [label + 1, *given]]
        case ("task", _, label):
            return [label, *given]
        case ("chain", members):
            for member in members:
                given = (expected(member, *given),)
            return given[0]
        case ("group", members):
            return _side_by_side(members, given)
        case ("chord", members, body):
            return expected(body, _side_by_side(members, given))
    raise AssertionError(tree)


def _side_by_side(members: Sequence[Tree], given: Sequence[Any]) -> list[Any]:
    """Groups directly within a group lie in one list with its other members."""
    values: list[Any] = []
    failed = False
    for member in members:
        try:
            value = expected(member, *given)
        except Failed:
            failed = True
            continue
        values += value if member[0] == "group" else [value]
    if failed:
        raise Failed
    return values


class Misbehaving:
    """A plugin: every message arrives three times, and one answer of the store in ``rate`` is lost, done or not done."""

    def __init__(self, *, copies: int = 3, faults: float = 0.0, seed: int = 0) -> None:
        self._copies = copies
        self._faults = faults
        self._random = random.Random(seed)

    @hookimpl(wrapper=True)
    def umbel_make_transport(self) -> Iterator[None]:
        transport = yield
        assert transport is not None
        for name in ("publish", "publish_blocking"):
            self._repeat(transport, name)
        return transport  # type: ignore[return-value]  # what a wrapper of pluggy's gives back

    def _repeat(self, transport: Any, name: str) -> None:
        publish = getattr(transport, name)
        setattr(transport, name, lambda messages, **how: publish(list(messages) * self._copies, **how))

    @hookimpl(wrapper=True)
    def umbel_make_result_store(self) -> Iterator[None]:
        store = yield
        assert store is not None
        for name in ("put", "get", "join", "members", "fired", "unfired", "claim", "release"):
            self._disturb(store, name)
        return store  # type: ignore[return-value]  # what a wrapper of pluggy's gives back

    def _disturb(self, store: Any, name: str) -> None:
        call = getattr(store, name)

        async def disturbed(*args: Any, **kwargs: Any) -> Any:
            drawn = self._random.random()
            if drawn < self._faults / 2:
                raise ResultStoreUnavailable("it was away")
            answer = await call(*args, **kwargs)
            if drawn < self._faults:
                raise ResultStoreUnavailable("its answer was lost")
            return answer

        setattr(store, name, disturbed)


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
        self.inputs: dict[str, set[str]] = {}
        """What each task was given, as text, by its id."""

        @self.app.task(bind=True, max_retries=5)
        def work(self_: Any, *given: Any, kind: str, label: int) -> Any:
            request = self_.request
            if request.message.headers.get(ONCE):
                self.once[request.id, request.retries, request.invocation.replaced_task_nesting] += 1
            if NODE in request.message.headers:
                self.inputs.setdefault(request.id, set()).add(repr(given))
            match kind:
                case "fail":
                    raise ValueError(label)
                case "retry" if request.retries < 1:
                    raise self_.retry(countdown=0.5)
                case "replace":
                    raise self_.replace(work.s(*given, kind="ok", label=label))
                case "replace_group":
                    members = [work.s(*given, kind="ok", label=label + more) for more in (0, 1)]
                    raise self_.replace(group(members))
            return [label, *given]

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


__all__ = ["Failed", "Lab", "Misbehaving", "canvas_of", "expected", "reconciled", "size", "trees"]
