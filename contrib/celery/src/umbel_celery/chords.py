"""The account that Celery keeps in Redis of a chord's members, shared with the Celery workers that run some of them.

Under the group's id lie the parts by their place, the parts that were counted, how many are awaited, and who sends the body.
One script does all at the end of a member, as Celery from 5.7 on does; older workers count the same parts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Final, cast
from urllib.parse import urlsplit, urlunsplit
from uuid import uuid4

from redis import Redis as SyncRedis
from redis import exceptions
from redis.asyncio import Redis

from umbel.errors import NotSupported, ResultStoreUnavailable
from umbel.model import Message, TaskOptions
from umbel.ports.step import Step

if TYPE_CHECKING:
    from umbel.app import Umbel
    from umbel.canvas.compose import Chord
    from umbel.result import AsyncResult
    from umbel.worker.worker import Worker

_VERB: Final = "celery-chord"
_SCHEMES: Final = ("redis", "rediss")
_KEPT: Final = 86_400
"""Seconds for which Celery keeps the account, unless results are kept for another time."""
_CLAIMED: Final = 60
"""Seconds that the winner has to send the body; asked again, the same member wins again."""

_PART: Final = """
-- KEYS: parts, extra, size, counted, claim. ARGV: part, place, task and place, task, lifetime, lifetime of the claim
if redis.call('GET', KEYS[5]) == 'done' then return false end
if redis.call('SADD', KEYS[4], ARGV[3]) == 1 then redis.call('ZADD', KEYS[1], ARGV[2], ARGV[1]) end
for at = 1, 4 do redis.call('EXPIRE', KEYS[at], ARGV[5]) end
local size = redis.call('GET', KEYS[3])
if not size then return false end
local wanted = tonumber(size) + tonumber(redis.call('GET', KEYS[2]) or 0)
if redis.call('ZCARD', KEYS[1]) < wanted then return false end
local winner = redis.call('GET', KEYS[5])
if winner and winner ~= ARGV[4] then return false end
redis.call('SET', KEYS[5], ARGV[4], 'EX', ARGV[6])
return redis.call('ZRANGE', KEYS[1], 0, -1)
"""

_SENT: Final = """
-- KEYS as above
redis.call('DEL', KEYS[1], KEYS[2], KEYS[3], KEYS[4])
redis.call('SET', KEYS[5], 'done', 'EX', 300)
return 1
"""


def shares_results(url: str | None) -> bool:
    """Whether results lie where Celery counts the members of its chords; elsewhere it sends a task that looks for them."""
    return bool(url) and urlsplit(str(url)).scheme in _SCHEMES


class Accounts:
    """``Umbel.chords``: asks the worker, which has the connection."""

    def __init__(self, app: Umbel) -> None:
        self._app = app

    def part(self, group: str, index: int | None, task_id: str, part: bytes) -> Sequence[bytes] | None:
        """See the kernel's ``Chords``. Raises ``ResultStoreUnavailable``."""
        if not shares_results(self._app.settings.results.url):
            return None
        return cast("Sequence[bytes] | None", self._app.gateway.ask(_VERB, ("part", group, index, task_id, part)))

    def open(self, group: str, size: int) -> bool:
        """See the kernel's ``Chords``. Raises ``ResultStoreUnavailable``."""
        if not shares_results(self._app.settings.results.url):
            return False
        self._app.gateway.ask(_VERB, ("open", group, size))
        return True

    def sent(self, group: str) -> None:
        """See the kernel's ``Chords``. Raises ``ResultStoreUnavailable``."""
        self._app.gateway.ask(_VERB, ("sent", group))


class AccountStep(Step):
    """Answers for the tasks of one worker, over a connection of its own to the Redis of the results."""

    name: ClassVar[str] = "celery-chords"
    requires: ClassVar[tuple[str, ...]] = ("settlement",)

    def __init__(self) -> None:
        self._client: Redis | None = None
        self._prefix = ""
        self._kept = _KEPT

    async def start(self, worker: Worker) -> None:
        results = worker.settings.results
        self._client = Redis.from_url(_address(results.url or ""), protocol=2, client_name="umbel")
        self._prefix, self._kept = _prefix(results), _lifetime(results)
        worker.gateway.added[_VERB] = self.answer

    async def stop(self, worker: Worker) -> None:
        worker.gateway.added.pop(_VERB, None)
        if self._client is not None:
            await self._client.aclose()

    async def answer(self, payload: Any) -> Any:
        """One verb of ``Accounts``. Raises ``ResultStoreUnavailable``."""
        assert self._client is not None  # entered as a verb by `start` alone
        do, group, *rest = payload
        keys = [f"{self._prefix}celery-taskset-meta-{group}.{end}" for end in "jtsdc"]
        try:
            if do == "open":
                return await self._client.set(keys[2], rest[0], ex=self._kept)
            if do == "sent":
                return await cast("Any", self._client.eval(_SENT, 5, *keys))
            index, task_id, part = rest
            place = "+inf" if index is None else str(index)
            arguments = (part, place, f"{task_id}:{place}", task_id, self._kept, _CLAIMED)
            return await cast("Any", self._client.eval(_PART, 5, *keys, *arguments)) or None
        except (exceptions.RedisError, OSError) as exc:
            raise ResultStoreUnavailable(f"the account of chord {group} cannot be kept: {exc}") from exc


def send(app: Umbel, chord: Chord, *, timeout: float | None = None) -> AsyncResult[Any]:
    """Send a chord in Celery's form, so that workers of Celery can run members of it, and its body. Blocks.

    Its members are tasks, or chains of tasks; its body is a task. Results must lie in Redis. Umbel's workers take part if they
    list ``celery`` in ``[plugins] hooks``. Returns the handle of the body. Raises ``NotSupported`` for any other chord,
    ``PublishError``, ``ResultStoreUnavailable``.
    """
    results = app.settings.results
    if not shares_results(results.url):
        raise NotSupported("a chord in Celery's form needs [results] url = redis://, where Celery counts its members")
    plain = chord.to_plain()["kwargs"]
    group, body = str(uuid4()), plain["body"]
    if body["subtask_type"]:
        raise NotSupported(f"the body of a chord in Celery's form is one task, not a {body['subtask_type']}")
    body_id = body["options"].get("task_id") or str(uuid4())
    body = {**body, "options": {**body["options"], "task_id": body_id, "group_id": group}}
    messages = [_member(app, member, at, group, body) for at, member in enumerate(plain["header"]["kwargs"]["tasks"])]
    if not messages:
        raise NotSupported("a chord in Celery's form has one member at least")
    _open(results, group, len(messages))
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


def _open(results: Any, group: str, size: int) -> None:
    with SyncRedis.from_url(_address(results.url), protocol=2, client_name="umbel") as client:
        try:
            client.set(f"{_prefix(results)}celery-taskset-meta-{group}.s", size, ex=_lifetime(results))
        except exceptions.RedisError as exc:
            raise ResultStoreUnavailable(f"the account of chord {group} cannot be opened: {exc}") from exc


def _address(url: str) -> str:
    return urlunsplit(urlsplit(url)._replace(query=""))


def _prefix(results: Any) -> str:
    prefix = str(results.options.get("prefix") or "")
    return prefix if not prefix or prefix[-1] in ":_-." else prefix + "_"


def _lifetime(results: Any) -> int:
    return int(results.expires or _KEPT)
