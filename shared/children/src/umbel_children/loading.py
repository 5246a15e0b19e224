"""How a pool that has no children loads the application: on a thread of its own, with a bound."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

from umbel.errors import UmbelError
from umbel.ports.pool import Executor, PoolContext, Upcall


async def load(pool: str, context: PoolContext, upcall: Upcall, on_loop: Callable[..., None]) -> Executor:
    """The executor, made on a thread; ``on_loop(function, …)`` calls on the running loop, from any thread.

    Raises ``UmbelError`` when the application cannot be imported or is not within ``start_timeout``.
    """
    made: asyncio.Future[Executor] = asyncio.get_running_loop().create_future()

    def settle(executor: Executor | None, error: BaseException | None) -> None:
        if made.done():
            return
        if executor is not None:
            made.set_result(executor)
            return
        told = "it made no executor" if error is None else f"{type(error).__name__}: {error}"
        problem = UmbelError(f"pool {pool}: the application did not load: {told}")
        problem.__cause__ = error
        made.set_exception(problem)

    def make() -> None:
        try:
            executor = context.factory.make(upcall)
        except BaseException as error:  # user code: it may even call sys.exit
            on_loop(settle, None, error)
        else:
            on_loop(settle, executor, None)

    threading.Thread(target=make, name=f"umbel-{pool}-load", daemon=True).start()
    try:
        async with asyncio.timeout(context.start_timeout):
            return await made
    except TimeoutError:
        raise UmbelError(f"pool {pool}: the application did not load within {context.start_timeout:g} s") from None
