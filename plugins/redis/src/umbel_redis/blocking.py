"""Scripts run on the calling thread: for synchronous publishers."""

from __future__ import annotations

import contextlib
import os
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

from redis import RedisCluster, exceptions

from umbel.errors import BrokerUnavailable, PublishRefused
from umbel_redis.connection import ERRORS, BlockingRedis, connect_blocking, explain
from umbel_redis.options import Address, RedisOptions
from umbel_redis.scripts import ALL
from umbel_redis.session import Command

_TEXTS = {script.digest: script.text for script in ALL}
_call = threading.local()
"""``deadline``: the ``time.monotonic()`` by which this thread's call is over."""


class BlockingLine:
    """A thread-safe pool of connections; a child made by ``fork()`` gets its own."""

    def __init__(self, address: Address, options: RedisOptions) -> None:
        self._address = address
        self._options = options
        self._clients: dict[str, BlockingRedis] = {}
        self._slots = threading.Semaphore(options.connections)
        self._closed = False
        _lines.add(self)

    @contextlib.contextmanager
    def within(self, timeout: float) -> Iterator[None]:
        """Bound all that happens inside. Raises ``BrokerUnavailable``, or ``PublishRefused`` for what would fail again."""
        _call.deadline = time.monotonic() + timeout
        slots = self._slots
        if not slots.acquire(timeout=max(0.0, timeout)):
            raise BrokerUnavailable(f"all connections to {self._address} were busy for {timeout:g} s")
        try:
            yield
        except ERRORS as error:
            self._check_open()
            fault = explain(error, self._address)
            raise (PublishRefused if fault.permanent else BrokerUnavailable)(fault.sentence) from error
        finally:
            slots.release()

    def run(self, commands: Sequence[Command]) -> list[Any]:
        """The answers to ``commands``, in one round trip for each node that they concern."""
        answers = self._exchange(commands)
        if unknown := [n for n, answer in enumerate(answers) if isinstance(answer, exceptions.NoScriptError)]:
            again = [("EVAL", _TEXTS[str(commands[n][1])], *commands[n][2:]) for n in unknown]
            for number, answer in zip(unknown, self._exchange(again), strict=True):
                answers[number] = answer
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return answers

    def _exchange(self, commands: Sequence[Command]) -> list[Any]:
        client = self._client()
        if len(commands) == 1:
            try:
                return [client.execute_command(*commands[0])]  # type: ignore[no-untyped-call]  # redis-py's gap
            except exceptions.NoScriptError as error:
                return [error]
        pipeline = client.pipeline(transaction=False)
        for command in commands:
            pipeline.execute_command(*command)
        return pipeline.execute(raise_on_error=False)

    def _client(self) -> BlockingRedis:
        self._check_open()
        if not self._clients:
            made = connect_blocking(self._address, self._options)
            if not isinstance(made, RedisCluster):
                pool = made.connection_pool
                pool.connection_class = type("Bounded", (_Bounded, pool.connection_class), {})
            self._clients.setdefault("", made)  # of several threads that come here at once, the first one's is kept
        return self._clients[""]

    def _check_open(self) -> None:
        if self._closed:
            raise BrokerUnavailable(f"this connection to {self._address} is closed")

    def close(self) -> None:
        """Free every connection; calls under way on other threads end in an error. Harmless when called twice."""
        self._closed = True
        for client in self._clients.values():
            client.close()

    def _forked(self) -> None:
        self._slots = threading.Semaphore(self._options.connections)


class _Bounded:
    """Makes each step of a connection of redis-py's, the making included, end by the deadline of the thread's call."""

    _sock: Any
    socket_timeout: float
    socket_connect_timeout: float

    def _connect(self) -> Any:
        self._bound()
        return super()._connect()  # type: ignore[misc]  # mixed into a connection class

    def send_packed_command(self, *args: Any, **kwargs: Any) -> Any:
        self._bound()
        return super().send_packed_command(*args, **kwargs)  # type: ignore[misc]  # likewise

    def read_response(self, *args: Any, **kwargs: Any) -> Any:
        self._bound()
        return super().read_response(*args, **kwargs)  # type: ignore[misc]  # likewise

    def _bound(self) -> None:
        left = _call.deadline - time.monotonic()
        if left <= 0:
            raise exceptions.TimeoutError("the deadline of the call has passed")
        self.socket_timeout = self.socket_connect_timeout = left
        if self._sock is not None:
            self._sock.settimeout(left)


_lines: weakref.WeakSet[BlockingLine] = weakref.WeakSet()


def _after_in_child() -> None:
    for line in list(_lines):
        line._forked()


os.register_at_fork(after_in_child=_after_in_child)
