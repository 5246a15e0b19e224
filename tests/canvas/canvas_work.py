"""What the tasks of generated canvases do, in the harness and on real workers, and what misbehaves around them."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from umbel import chord, group, hookimpl
from umbel.canvas.graph import FIRE
from umbel.canvas.signature import Signature
from umbel.errors import ResultStoreUnavailable
from umbel.model import Message, evolve

STEP: Final = 4
"""Labels of two tasks lie so far apart at least: between them are those of what a task is replaced by."""
_LONGEST: Final = 120

Again = Callable[[str, int], Signature]
"""The call of a task of another kind and label, with nothing given to it."""


def brief(value: Any) -> Any:
    """``value``, or what tells it from others where it is long: bodies of bodies would get more and more."""
    text = json.dumps(value, sort_keys=True)
    return value if len(text) <= _LONGEST else hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def perform(task: Any, again: Again, given: Sequence[Any], *, kind: str, label: int) -> Any:
    """Return, raise, retry, or go on as something else: see ``canvas_model.expected``."""
    match kind:
        case "fail":
            raise ValueError(label)
        case "retry" if task.request.retries < 1:
            raise task.retry(countdown=0.3)
        case "replace":
            raise task.replace(again("ok", label + 1).after(*given))
        case "replace_fail":
            raise task.replace(again("fail", label + 1).after(*given))
        case "replace_group":
            raise task.replace(group([again("ok", label + more).after(*given) for more in (1, 2)]))
        case "replace_chord":
            members = [again("ok", label + more).after(*given) for more in (1, 2)]
            raise task.replace(chord(members, again("ok", label + 3)))
    return [label, brief(list(given))]


class Misbehaving:
    """A plugin: every message arrives three times, and one answer of the store in ``rate`` is lost, done or not done.

    What one process sends again, as copies of one task do, it sends no more than ``copies`` times: each of three copies of
    each of three copies would be more than a chain of twenty bears. With ``late``, seconds, copies come late.
    """

    def __init__(self, *, copies: int = 3, faults: float = 0.0, seed: int = 0, late: float = 0.0) -> None:
        self._copies = copies
        self._faults = faults
        self._late = late
        self._random = random.Random(seed)
        self._sent: Counter[tuple[str, int, int]] = Counter()

    @hookimpl(wrapper=True)
    def umbel_make_transport(self) -> Iterator[None]:
        transport = yield
        assert transport is not None
        if self._copies > 1:
            for name in ("publish", "publish_blocking"):
                if hasattr(transport, name):
                    self._repeat(transport, name)
        return transport  # type: ignore[return-value]  # what a wrapper of pluggy's gives back

    def _repeat(self, transport: Any, name: str) -> None:
        call = getattr(transport, name)

        def publish(messages: Sequence[Message], **how: Any) -> None:
            call(self._copied(messages), **how)
            self._sent.update({_identity(message): self._copies for message in messages})

        async def publish_async(messages: Sequence[Message], **how: Any) -> None:
            await call(self._copied(messages), **how)
            self._sent.update({_identity(message): self._copies for message in messages})

        setattr(transport, name, publish_async if inspect.iscoroutinefunction(call) else publish)

    def _copied(self, messages: Sequence[Message]) -> list[Message]:
        fresh = {_identity(message): message for message in messages if self._sent[_identity(message)] == 0}
        copied: list[Message] = [*fresh.values()]
        for message in fresh.values():
            for _ in range(self._copies - 1):
                late = self._random.uniform(0, self._late)
                copied.append(evolve(message, due=(message.due or time.time()) + late) if late else message)
        return copied

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


def _identity(message: Message) -> tuple[str, int, int]:
    headers = message.headers
    return message.id, headers.get("retries") or 0, headers.get("replaced_task_nesting") or 0


CRASHES: Final[Mapping[str, Callable[[Sequence[Any], Mapping[str, Any]], bool]]] = {
    "put": lambda args, kwargs: any(result.final for result in args[0]),
    "join": lambda args, kwargs: bool(args[1]),
    "publish": lambda args, kwargs: any(message.task == FIRE for message in args[0]),
    "fired": lambda args, kwargs: True,
    "claim": lambda args, kwargs: kwargs.get("value") is not None,
    "settle": lambda args, kwargs: True,
}
"""Calls of a worker that its workflows make, and what is to be in them: where a worker may be killed."""
_SIDES: Final = ("before", "after")
POINTS: Final = tuple(f"{name}:{side}" for name in CRASHES for side in _SIDES)


class Crashing:
    """A plugin: the worker is killed at one of ``POINTS``, the first time that it comes there; ``flag`` says when.

    A settlement counts once something has been marked: a kill there is one between mark and settle.
    """

    def __init__(self, point: str, flag: Path) -> None:
        self._name, _, self._side = point.partition(":")
        self._flag = flag
        self._marked = False

    @hookimpl(wrapper=True)
    def umbel_make_transport(self) -> Iterator[None]:
        transport = yield
        return self._guarded(transport, ("publish", "settle"))  # type: ignore[return-value]  # what a wrapper gives back

    @hookimpl(wrapper=True)
    def umbel_make_result_store(self) -> Iterator[None]:
        store = yield
        return self._guarded(store, ("put", "join", "fired", "claim"))  # type: ignore[return-value]  # as above

    def _guarded(self, driver: Any, names: Sequence[str]) -> Any:
        for name in names:
            setattr(driver, name, self._guard(name, getattr(driver, name)))
        return driver

    def _guard(self, name: str, call: Any) -> Any:
        async def guarded(*args: Any, **kwargs: Any) -> Any:
            here = name == self._name and CRASHES[name](args, kwargs) and (name != "settle" or self._marked)
            if here and self._side == "before":
                self._die()
            answer = await call(*args, **kwargs)
            self._marked = self._marked or (name == "join" and bool(args[1]))
            if here:
                self._die()
            return answer

        return guarded

    def _die(self) -> None:
        self._flag.write_text(repr(time.time()))
        os.kill(os.getpid(), signal.SIGKILL)
