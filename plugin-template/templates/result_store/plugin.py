"""``{{ cookiecutter.name }}:///folder``: a result store that is a folder, for any number of processes that see it.

A task has at most two files: its latest state that is not final, and its final one. The final file is *linked* into its
place, which fails if one is there: the first final record stays, and needs no lock. Of the others the later in the task's
life stays (``Result.order``), whoever comes last: they are compared and replaced under a lock on the folder.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Final, TypeVar
from urllib.parse import quote, unquote, urlsplit
from uuid import uuid4

from attrs import frozen

from umbel.capabilities import ResultStoreCapabilities
from umbel.errors import ResultStoreUnavailable, SettingsError
from umbel.model import Result
from umbel.ports.clock import Clock
from umbel.ports.result_store import ResultStore, replaces, surviving

T = TypeVar("T")

SCHEME: Final = "{{ cookiecutter.name }}"


FIELDS: Final = ("task_id", "state", "content_type", "content_encoding", "expires", "order")
"""What is kept of a record beside its document."""


@frozen
class Options:
    """Options of the result store."""

    poll: float = 0.05
    """Seconds between two looks for the results that somebody waits for."""


class {{ cookiecutter.__class }}(ResultStore):
    """Keeps records in the folder that the URL names: three slashes before a relative path, four before an absolute one.

    File operations run in threads. However many wait, one task looks for all of them.
    """

    api_version: ClassVar[tuple[int, int]] = (1, 0)
    Options: ClassVar[type] = Options
    capabilities: ResultStoreCapabilities = ResultStoreCapabilities(durable=True, expires=True)

    def __init__(self, url: str, *, options: Any = None, clock: Clock | None = None) -> None:
        super().__init__(url, options=options, clock=clock)
        parts = urlsplit(url)
        if parts.netloc or len(parts.path) < 2:
            raise SettingsError([f"[results] url must be {SCHEME}:///folder, or {SCHEME}:////absolute/folder"])
        self._folder = Path(unquote(parts.path[1:])).absolute()
        self._waiting: dict[str, set[asyncio.Future[Result]]] = {}
        self._looking: asyncio.Task[None] | None = None
        self._closed = False

    # --- the port, on the event loop ------------------------------------------------------------

    async def put(self, results: Sequence[Result]) -> None:
        await self._do(self._put, surviving(results))

    async def get(self, task_ids: Sequence[str]) -> Mapping[str, Result]:
        return await self._do(self._get, task_ids)

    async def wait(self, task_id: str) -> Result:
        self._enter()
        found: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(task_id, set()).add(found)
        if self._looking is None:
            self._looking = asyncio.create_task(self._look())
        try:
            return await found
        finally:
            self._waiting[task_id].discard(found)
            if not self._waiting[task_id]:
                del self._waiting[task_id]
            if not self._waiting and self._looking is not None:
                self._looking.cancel()
                self._looking = None

    async def forget(self, task_ids: Sequence[str]) -> None:
        await self._do(self._forget, task_ids)

    async def close(self) -> None:
        self._closed = True
        for found in [found for waiting in self._waiting.values() for found in waiting]:
            found.cancel()
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.wait([self._looking])

    def _enter(self) -> None:
        if self._closed:
            raise ResultStoreUnavailable(f"this connection to {self._folder} is closed; make a new instance")

    async def _do(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run ``function`` in a thread. Raises ``ResultStoreUnavailable`` for what the file system refuses."""
        self._enter()
        try:
            return await asyncio.to_thread(function, *arguments)
        except OSError as error:
            raise ResultStoreUnavailable(f"{self._folder}: {error}") from error

    async def _look(self) -> None:
        """Answer those who wait, until nobody does."""
        while True:
            try:
                records = await self._do(self._get, list(self._waiting))
            except ResultStoreUnavailable:
                records = {}  # the port: a store that is away is waited for
            for task_id, record in records.items():
                for found in self._waiting.get(task_id, ()) if record.final else ():
                    if not found.done():
                        found.set_result(record)
            await asyncio.sleep(self.options.poll)

    # --- in a thread: files ---------------------------------------------------------------------

    def _paths(self, task_id: str) -> tuple[Path, Path]:
        """Where the final record of a task is, and where its latest other one."""
        name = quote(task_id, safe="")
        return self._folder / f"{name}.final", self._folder / f"{name}.state"

    def _put(self, results: Iterable[Result]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        for result in results:
            self._put_one(result)

    def _put_one(self, result: Result) -> None:
        final, state = self._paths(result.task_id)
        if self._read(final) is not None:
            return
        end = None if result.expires is None else self.clock.time() + result.expires
        head = {"end": end} | {name: getattr(result, name) for name in FIELDS}
        draft = self._folder / f"{uuid4().hex}.draft"
        try:
            draft.write_bytes(json.dumps(head).encode() + b"\n" + result.document)
            if result.final:
                os.link(draft, final)
            else:
                with self._alone():
                    known = self._read(state)
                    if known is None or replaces(result, known):
                        os.replace(draft, state)
        except FileExistsError:
            pass  # another was quicker, and what is final stays
        finally:
            draft.unlink(missing_ok=True)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the folder against every other process and thread; the system frees it if this one dies."""
        with (self._folder / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _forget(self, task_ids: Iterable[str]) -> None:
        for task_id in task_ids:
            for path in self._paths(task_id):
                path.unlink(missing_ok=True)

    def _get(self, task_ids: Iterable[str]) -> dict[str, Result]:
        found = {}
        for task_id in task_ids:
            final, state = self._paths(task_id)
            if (record := self._read(final) or self._read(state)) is not None:
                found[task_id] = record
        return found

    def _read(self, path: Path) -> Result | None:
        """The record in a file, if there is one; one that has expired is removed."""
        try:
            head, _, document = path.read_bytes().partition(b"\n")
        except FileNotFoundError:
            return None
        fields = json.loads(head)
        end = fields.pop("end")
        if end is not None and self.clock.time() >= end:
            path.unlink(missing_ok=True)
            return None
        return Result(document=document, **fields)
