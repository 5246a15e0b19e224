"""The result store in Redis, shared with Celery."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, ClassVar, Final, Literal

from attrs import field, frozen
from redis.crc import key_slot

from umbel.capabilities import ResultStoreCapabilities
from umbel.errors import DecodeError, ResultRefused, ResultStoreUnavailable
from umbel.model import FINAL_STATES, Lease, Result
from umbel.ports.clock import Clock
from umbel.ports.result_store import ClaimStore, JoinState, JoinStore, ResultStore
from umbel_redis import claims, documents, joins
from umbel_redis.advice import look
from umbel_redis.claims import Claims
from umbel_redis.joins import Joins, milliseconds
from umbel_redis.keys import with_prefix
from umbel_redis.options import RedisOptions, positive
from umbel_redis.session import Command, Script, Session
from umbel_redis.waiters import Waiters

_PUT: Final = Script(documents.PUT)
_AT_ONCE: Final = 500
_BYTES_AT_ONCE: Final = 16 * 2**20
"""Records, and about as many bytes of them, in one command: the server does nothing else meanwhile."""
_LARGEST: Final = 512 * 2**20
"""Bytes of a value that Redis takes, unless its ``proto-max-bulk-len`` is changed."""


@frozen(kw_only=True)
class ResultStoreOptions(RedisOptions):
    """What the result store takes."""

    poll_interval: float = field(default=2.0, validator=positive)
    """Seconds between two looks, give or take a quarter, at results that are waited for and were not published."""
    foreign_serializer: Literal["json", "msgpack", "pickle", "yaml"] = "json"
    """The form of records that another program wrote: Celery's ``result_serializer``."""


class RedisResultStore(ResultStore, JoinStore, ClaimStore):
    """Keeps results under Celery's keys: each side reads what the other wrote, and hears when it is written.

    Leases and lifetimes are by the server's clock.
    """

    api_version: ClassVar[tuple[int, int]] = (1, 0)
    Options = ResultStoreOptions
    capabilities = ResultStoreCapabilities(durable=True, push=True, expires=True, join=True, claim=True)

    def __init__(self, url: str, *, options: Any = None, clock: Clock | None = None) -> None:
        super().__init__(url, options=options, clock=clock)
        prefix = with_prefix(self.options.prefix)
        scripts = (_PUT, *joins.SCRIPTS, *claims.SCRIPTS)
        self._session = Session(url, self.options, ResultStoreUnavailable, scripts)
        self._prefix = f"{prefix}celery-task-meta-"
        self._form = documents.FORMS[self.options.foreign_serializer]
        self._joins = Joins(self._session, prefix)
        self._claims = Claims(self._session, prefix)
        self._looked = False
        """Whether the server has been asked how safe it is: before the first record is put."""
        self._waiters = Waiters(
            self._session, self._prefix, self._fetch, poll=self.options.poll_interval, patience=self.options.timeout
        )

    # --- results ---------------------------------------------------------------------------------

    async def put(self, results: Sequence[Result]) -> None:
        """One round trip for each node concerned, whatever the number."""
        if not self._looked:
            await look(self._session, "results, locks and groups")
            self._looked = True
        for result in results:
            _check(result)
        if results:
            await self._session.run([self._putting(part) for part in self._parted(results)])

    def _parted(self, results: Sequence[Result]) -> Iterable[Sequence[Result]]:
        """What goes into one command, in order: in a cluster, what lies in one slot."""
        slots: dict[int, list[Result]] = {}
        if self._session.clustered:
            for result in results:
                slots.setdefault(key_slot((self._prefix + result.task_id).encode()), []).append(result)
        for of_slot in slots.values() or (results,):
            part: list[Result] = []
            size = 0
            for result in of_slot:
                if part and (len(part) >= _AT_ONCE or size + len(result.document) > _BYTES_AT_ONCE):
                    yield part
                    part, size = [], 0
                part.append(result)
                size += len(result.document)
            yield part

    def _putting(self, results: Sequence[Result]) -> Command:
        prefix, expires = self._prefix, results[0].expires
        keys = [prefix + result.task_id for result in results]
        written = [documents.write(result) for result in results]
        if not any(
            side or result.expires != expires or result.state not in FINAL_STATES
            for result, (_, side) in zip(results, written, strict=True)
        ):  # almost always: then they are told apart by their documents alone
            return _PUT.on(keys, self._form.lua, _lifetime(expires), *[document for document, _ in written])
        arguments: list[bytes | str | int] = [self._form.lua]
        for result, (document, side) in zip(results, written, strict=True):
            arguments += (document, _lifetime(result.expires), side, "" if result.final else result.order)
        return _PUT.on(keys, *arguments)

    async def get(self, task_ids: Sequence[str]) -> Mapping[str, Result]:
        """Raises ``DecodeError`` too, for another program's record in a form that ``foreign_serializer`` does not name."""
        records: dict[str, Result] = {}
        for task_id, found in (await self._fetch(task_ids)).items():
            if isinstance(found, DecodeError):
                raise found
            records[task_id] = found
        return records

    async def _fetch(self, task_ids: Iterable[str]) -> Mapping[str, Result | DecodeError]:
        wanted = list(task_ids)
        size = 1 if self._session.clustered else _AT_ONCE
        parts = [wanted[at : at + size] for at in range(0, len(wanted), size)]
        if not parts:
            return {}
        answers = await self._session.run([("MGET", *self._keys(part)) for part in parts])
        found: dict[str, Result | DecodeError] = {}
        for task_id, (document, side) in zip(wanted, _pairs(chain.from_iterable(answers)), strict=True):
            if document is not None:
                try:
                    found[task_id] = documents.read(task_id, document, side, self._form)
                except DecodeError as error:
                    found[task_id] = error
        return found

    async def forget(self, task_ids: Sequence[str]) -> None:
        size = 1 if self._session.clustered else _AT_ONCE
        parts = [task_ids[at : at + size] for at in range(0, len(task_ids), size)]
        if parts:
            await self._session.run([("DEL", *self._keys(part)) for part in parts])

    def _keys(self, task_ids: Iterable[str]) -> Iterable[str]:
        """Each record's key, and the one beside it."""
        for task_id in task_ids:
            record = self._prefix + task_id
            yield record
            yield documents.side_of(record)

    async def wait(self, task_id: str) -> Result:
        """Raises ``ResultStoreUnavailable`` for what only a person can mend (a wrong password), ``DecodeError`` as ``get``."""
        self._session.client  # noqa: B018  # raises after close
        return await self._waiters.wait(task_id)

    # --- abilities -------------------------------------------------------------------------------

    async def join(
        self,
        key: str,
        marks: Mapping[str, bytes],
        *,
        size: int | None,
        owner: str,
        lease: float,
        expires: float | None = None,
    ) -> JoinState:
        return await self._joins.join(key, marks, size=size, owner=owner, lease=lease, expires=expires)

    async def members(self, key: str) -> Mapping[str, bytes]:
        return await self._joins.members(key)

    async def fired(self, key: str, owner: str) -> bool:
        return await self._joins.fired(key, owner)

    async def unfired(self, limit: int = 100) -> Sequence[str]:
        return await self._joins.unfired(limit)

    async def claim(self, name: str, owner: str, *, lease: float, value: bytes | None = None) -> Lease:
        return await self._claims.claim(name, owner, lease=lease, value=value)

    async def release(self, name: str, owner: str, *, value: bytes | None = None) -> bool:
        return await self._claims.release(name, owner, value)

    async def claims(self, prefix: str = "") -> Sequence[Lease]:
        return await self._claims.claims(prefix)

    # --- the end ---------------------------------------------------------------------------------

    async def close(self) -> None:
        await self._waiters.close()
        await self._session.close()


def _lifetime(expires: float | None) -> str | int:
    return "" if expires is None else milliseconds(expires)


def _check(result: Result) -> None:
    if len(result.document) > _LARGEST:
        raise ResultRefused(
            f"the record of task {result.task_id} is larger than a value in Redis may be: {_LARGEST} bytes"
        )
    if result.task_id.isascii():
        return
    try:
        result.task_id.encode()
    except UnicodeEncodeError:
        raise ResultRefused(f"the task id {result.task_id!r} is no text that could name a key") from None


def _pairs(values: Iterable[Any]) -> Iterable[tuple[bytes | None, bytes | None]]:
    flat = iter(values)
    return zip(flat, flat, strict=True)
