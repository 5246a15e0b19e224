"""What the stores of this plugin speak through: scripts and pipelines over one client, replaced whole when it fails."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from hashlib import sha1
from typing import Any, TypeAlias, cast

from attrs import field, frozen
from redis import exceptions

from umbel.errors import UmbelError
from umbel_redis.connection import ERRORS, Client, connect, explain
from umbel_redis.options import RedisOptions, address_of

Value: TypeAlias = bytes | str | int | float
Command: TypeAlias = tuple[Value, ...]


@frozen
class Script:
    """A script of Redis's. It must be harmless when it runs twice: an answer may be lost."""

    text: str
    digest: str = field(init=False)

    @digest.default
    def _sha1(self) -> str:
        return sha1(self.text.encode(), usedforsecurity=False).hexdigest()

    def on(self, keys: Sequence[Value], *arguments: Value) -> Command:
        """The call with these keys, which in a cluster lie in one slot, and arguments."""
        return ("EVALSHA", self.digest, len(keys), *keys, *arguments)


class Session:
    """For one event loop. Its errors are of the class ``unavailable``, caused by redis-py's."""

    def __init__(
        self, url: str, options: RedisOptions, unavailable: type[UmbelError], scripts: Sequence[Script] = ()
    ) -> None:
        """No I/O. ``scripts``: all that will be called."""
        self.address = address_of(url, options)
        self.clustered = self.address.kind == "cluster"
        self._options = options
        self._unavailable = unavailable
        self._scripts = {script.digest: script.text for script in scripts}
        self._slots = asyncio.Semaphore(options.connections)
        self._client: Client | None = None
        self._calls: dict[asyncio.Timeout, Client] = {}
        """What is under way; a call ends when its time is set to now."""
        self._ended = asyncio.Event()
        self._last_fault = ""
        self._closings: set[asyncio.Task[None]] = set()
        self._closed = False

    @property
    def client(self) -> Client:
        """The present client. Raises ``unavailable`` after ``close``."""
        if self._closed:
            raise self._unavailable(f"this connection to {self.address} is closed")
        if self._client is None:
            # A call has one deadline of its own; redis-py's would cost a task for each command.
            self._client = connect(self.address, self._options, socket_timeout=None)
        return self._client

    async def call(self, command: Command) -> Any:
        """The answer to one command."""
        (answer,) = await self.run([command])
        return answer

    async def run(self, commands: Sequence[Command]) -> list[Any]:
        """The answers to ``commands``, in one round trip for each node that they concern.

        They are carried out in order as far as they concern one key. Raises ``unavailable`` if one of them failed, or they
        took longer than the option ``timeout`` allows; then nothing is known of the others.
        """
        client = None
        try:
            async with asyncio.timeout(self._options.timeout) as call, self._slots:
                client = self._calls[call] = self.client  # those that waited for their turn take the one that is whole
                try:
                    return await self._send(client, commands)
                finally:
                    del self._calls[call]
                    self._ended.set()
        except ERRORS as error:
            if client is None:
                busy = f"all {self._options.connections} connections to {self.address} were busy for {self._options.timeout:g} s"
                raise self._unavailable(f"{busy}: see the options connections and timeout") from error
            raise self.failed(client, error) from error

    async def each(self, script: Script, keys: Sequence[Value], *arguments: Value) -> list[Any]:
        """The answers of a script that looks at each of ``keys`` for itself: one for all, or in a cluster one for each."""
        together = [[key] for key in keys] if self.clustered else [keys]
        return await self.run([script.on(some, *arguments) for some in together])

    async def _send(self, client: Client, commands: Sequence[Command]) -> list[Any]:
        answers = await _exchange(client, commands)
        unknown = [number for number, answer in enumerate(answers) if isinstance(answer, exceptions.NoScriptError)]
        if unknown:  # the server was restarted, or has never seen them: it keeps what it is sent whole
            again = [("EVAL", self._scripts[str(commands[n][1])], *commands[n][2:]) for n in unknown]
            for number, answer in zip(unknown, await _exchange(client, again), strict=True):
                answers[number] = answer
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return answers

    def failed(self, client: Client, error: BaseException) -> UmbelError:
        """The error to raise for one of ``ERRORS``; a client that failed for a while is thrown away, with all its calls."""
        if self._closed:
            return self._unavailable(f"this connection to {self.address} is closed")
        fault = explain(error, self.address)
        if self._client is not client and isinstance(error, TimeoutError):  # ended by the fault of another call
            return self._unavailable(self._last_fault)
        if self._client is client and not fault.permanent:
            self._client, self._last_fault = None, fault.sentence
            closing = asyncio.create_task(self._end(client), name="umbel-redis-close")
            self._closings.add(closing)  # the loop keeps only weak references
            closing.add_done_callback(self._closings.discard)
        return self._unavailable(fault.sentence)

    def permanent(self, error: BaseException) -> bool:
        """Whether what failed would fail again until somebody mends something."""
        return explain(error.__cause__ or error, self.address).permanent

    async def close(self) -> None:
        """End what is under way (it raises ``unavailable``) and free every connection. Harmless when called twice."""
        self._closed = True
        client, self._client = self._client, None
        if client is not None:
            await self._end(client)
        if self._closings:
            await asyncio.wait(self._closings)

    async def _end(self, client: Client) -> None:
        """End the calls of ``client``, then close it: a call that went on could make one more connection."""
        now = asyncio.get_running_loop().time()
        for call, user in self._calls.items():
            if user is client and not call.expired():
                call.reschedule(now)
        while client in self._calls.values():
            self._ended.clear()
            await self._ended.wait()
        try:
            await client.aclose()
        except ERRORS:  # it failed, and there is nothing of it to save
            return


async def _exchange(client: Client, commands: Sequence[Command]) -> list[Any]:
    """The answers, errors of single commands among them."""
    if client.address.kind != "cluster":
        return await client.exchange(commands)
    if len(commands) == 1:
        try:
            await client.redis.initialize()
            return [await client.redis.execute_command(*commands[0])]
        except exceptions.NoScriptError as error:
            return [error]
    pipeline = client.redis.pipeline(transaction=False)
    for command in commands:
        pipeline.execute_command(*command)
    return await cast("Awaitable[list[Any]]", pipeline.execute(raise_on_error=False))
