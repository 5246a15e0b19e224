"""The account that Celery keeps in Redis of a chord's members, shared with the Celery workers that run some of them.

Under the group's id lie the parts by their place, the parts that were counted, how many are awaited, and who sends the body.
One script does all at the end of a member, as Celery from 5.7 on does; older workers count the same parts.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any, ClassVar, Final, cast
from uuid import uuid4

from redis import exceptions
from redis.asyncio import Redis

from umbel.errors import NotSupported, ResultStoreUnavailable
from umbel.model import Message, TaskOptions
from umbel.ports.step import Step
from umbel_celery.result_server import ResultServer

if TYPE_CHECKING:
    from umbel.app import Umbel
    from umbel.canvas.compose import Chord
    from umbel.result import AsyncResult
    from umbel.worker.worker import Worker

log = logging.getLogger("umbel.celery")

_VERB: Final = "celery-chord"
_CLAIMED: Final = 60
"""Seconds that the winner has to send the body; asked again, the same member wins again."""
_PAUSE: Final = (0.1, 5.0)
"""First and longest pause in seconds before a server that cannot keep the account now is asked again."""
_PASSING: Final = (
    *(exceptions.ConnectionError, exceptions.TimeoutError, exceptions.ReadOnlyError, exceptions.TryAgainError),
    OSError,
)

_PART: Final = """
-- KEYS: parts, extra, size, counted, claim.
-- ARGV: part, place, task and place, task, lifetime, lifetime of the claim, how parts are kept unless there are some already
if redis.call('GET', KEYS[5]) == 'done' then return false end
local kind = redis.call('TYPE', KEYS[1]).ok
local list = (kind == 'none' and ARGV[7] or kind) == 'list'
if redis.call('SADD', KEYS[4], ARGV[3]) == 1 then
  if list then redis.call('RPUSH', KEYS[1], ARGV[1]) else redis.call('ZADD', KEYS[1], ARGV[2], ARGV[1]) end
end
for at = 1, 4 do redis.call('EXPIRE', KEYS[at], ARGV[5]) end
local size = redis.call('GET', KEYS[3])
if not size then return false end
local wanted = tonumber(size) + tonumber(redis.call('GET', KEYS[2]) or 0)
if redis.call(list and 'LLEN' or 'ZCARD', KEYS[1]) < wanted then return false end
local winner = redis.call('GET', KEYS[5])
if winner and winner ~= ARGV[4] then return false end
redis.call('SET', KEYS[5], ARGV[4], 'EX', ARGV[6])
return redis.call(list and 'LRANGE' or 'ZRANGE', KEYS[1], 0, -1)
"""

_SENT: Final = """
-- KEYS as above
redis.call('DEL', KEYS[1], KEYS[2], KEYS[3], KEYS[4])
redis.call('SET', KEYS[5], 'done', 'EX', 300)
return 1
"""


class Accounts:
    """``Umbel.chords``: asks the worker, which has the connection."""

    def __init__(self, app: Umbel) -> None:
        self._app = app
        self._shared = ResultServer.of(app.settings.results) is not None
        """Whether results lie where Celery counts the members of its chords; elsewhere it sends a task that looks for them."""

    def part(self, group: str, index: int | None, task_id: str, part: bytes) -> Sequence[bytes] | None:
        """See the kernel's ``Chords``. Raises ``ResultStoreUnavailable``."""
        if not self._shared:
            return None
        return cast("Sequence[bytes] | None", self._app.gateway.ask(_VERB, ("part", group, index, task_id, part)))

    def open(self, group: str, size: int) -> bool:
        """See the kernel's ``Chords``. Raises ``ResultStoreUnavailable``."""
        if self._shared:
            self._app.gateway.ask(_VERB, ("open", group, size))
        return self._shared

    def sent(self, group: str) -> None:
        """See the kernel's ``Chords``. Raises ``ResultStoreUnavailable``."""
        self._app.gateway.ask(_VERB, ("sent", group))


class AccountStep(Step):
    """Answers for the tasks of one worker, over a connection of its own to the Redis of the results, until the last has ended."""

    name: ClassVar[str] = "celery-chords"
    before: ClassVar[tuple[str, ...]] = ("pool",)

    def __init__(self, server: ResultServer, *, ordered: bool) -> None:
        self._server = server
        self._kind = "zset" if ordered else "list"
        self._client: Redis | None = None
        self._connection = AsyncExitStack()
        self._ending = False

    async def start(self, worker: Worker) -> None:
        self._client = await self._connection.enter_async_context(self._server.connected())
        worker.gateway.added[_VERB] = self.answer

    async def stop(self, worker: Worker) -> None:
        self._ending = True
        worker.gateway.added.pop(_VERB, None)
        await self._connection.aclose()

    async def answer(self, payload: Any) -> Any:
        """One verb of ``Accounts``. A server that is away is waited for: the member has ended, and is not to run again for it.

        Raises ``ResultStoreUnavailable`` for what the server refuses, and when the worker ends.
        """
        pause = _PAUSE[0]
        while True:
            try:
                return await self._carry_out(*payload)
            except _PASSING as exc:
                if self._ending:
                    raise _unkept(payload[1], exc) from exc
                log.warning("the account of chord %s is tried again in %.1f s: %s", payload[1], pause, exc)
            except exceptions.RedisError as exc:
                raise _unkept(payload[1], exc) from exc
            await asyncio.sleep(pause * random.uniform(0.5, 1))  # jitter, not a secret
            pause = min(pause * 2, _PAUSE[1])

    async def _carry_out(self, do: str, group: str, *rest: Any) -> Any:
        assert self._client is not None  # entered as a verb by `start` alone
        keys = [f"{self._server.prefix}celery-taskset-meta-{group}.{end}" for end in "jtsdc"]
        if do == "open":
            return await self._client.set(keys[2], rest[0], ex=self._server.kept)
        if do == "sent":
            return await cast("Any", self._client.eval(_SENT, 5, *keys))
        index, task_id, part = rest
        place = "+inf" if index is None else str(index)
        arguments = (part, place, f"{task_id}:{place}", task_id, self._server.kept, _CLAIMED, self._kind)
        return await cast("Any", self._client.eval(_PART, 5, *keys, *arguments)) or None


def _unkept(group: str, exc: Exception) -> ResultStoreUnavailable:
    return ResultStoreUnavailable(f"the account of chord {group} cannot be kept: {exc}")


def send(app: Umbel, chord: Chord, *, timeout: float | None = None) -> AsyncResult[Any]:
    """Send a chord in Celery's form, so that workers of Celery can run members of it, and its body. Blocks.

    Its members are tasks, or chains of tasks; its body is a task. Results must lie in Redis. Umbel's workers take part if they
    list ``celery`` in ``[plugins] hooks``. Returns the handle of the body. Raises ``NotSupported`` for any other chord,
    ``PublishError``, ``ResultStoreUnavailable``.
    """
    server = ResultServer.of(app.settings.results)
    if server is None or server.clustered:
        raise NotSupported(
            "a chord in Celery's form needs [results] url = redis://, of one server: there Celery counts members"
        )
    plain = chord.to_plain()["kwargs"]
    group, body = str(uuid4()), plain["body"]
    if body["subtask_type"]:
        raise NotSupported(f"the body of a chord in Celery's form is one task, not a {body['subtask_type']}")
    body_id = body["options"].get("task_id") or str(uuid4())
    body = {**body, "options": {**body["options"], "task_id": body_id, "group_id": group}}
    messages = [_member(app, member, at, group, body) for at, member in enumerate(plain["header"]["kwargs"]["tasks"])]
    if not messages:
        raise NotSupported("a chord in Celery's form has one member at least")
    key = f"{server.prefix}celery-taskset-meta-{group}.s"
    with server.connected_blocking() as client:
        try:
            client.set(key, len(messages), ex=server.kept)
        except exceptions.RedisError as exc:
            raise _unkept(group, exc) from exc
    app.client.send(messages, timeout)
    return app.result(body_id)


def _member(app: Umbel, plain: Mapping[str, Any], index: int, group: str, body: Mapping[str, Any]) -> Message:
    """The message of a member: of a chain, the first, with the rest behind it; its last belongs to the group."""
    kind = plain["subtask_type"]
    if kind not in (None, "chain"):
        raise NotSupported(f"a member of a chord in Celery's form is a task or a chain of tasks, not a {kind}")
    steps = [dict(step) for step in (plain["kwargs"]["tasks"] if kind else [plain])]
    if any(step["subtask_type"] for step in steps):
        raise NotSupported("a chain in a chord in Celery's form consists of tasks")
    steps = [{**step, "options": {"task_id": str(uuid4()), **step["options"]}} for step in steps]
    steps[-1]["options"] |= {"group_id": group, "group_index": index, "chord": body}
    first, *rest = steps
    options = {**first["options"], **({"chain": rest[::-1]} if rest else {})}
    effective = app.options_of(first["task"], TaskOptions())
    return app.client.message(first["task"], first["args"], first["kwargs"], effective, **options)
