"""Looking for what holds or waits costs little, however much else there is, and leaves nothing behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from servers.redis import RedisServer

from umbel_redis.result_store import RedisResultStore, ResultStoreOptions


@asynccontextmanager
async def opened(server: RedisServer) -> AsyncIterator[RedisResultStore]:
    store = RedisResultStore(server.url, options=ResultStoreOptions())
    try:
        yield store
    finally:
        await store.close()


def calls(server: RedisServer) -> int:
    """Commands so far, those of scripts among them, but for what a connection says of itself."""
    stats = server.command("INFO", "commandstats")
    greetings = ("info", "hello", "client", "select", "ping")
    return sum(
        int(one["calls"]) for name, one in stats.items() if not name.removeprefix("cmdstat_").startswith(greetings)
    )


def test_an_idle_worker_looks_with_one_command_and_finds_what_there_is(make_redis: Callable[..., RedisServer]) -> None:
    server = make_redis()

    async def main() -> None:
        async with opened(server) as store:
            for _ in range(2):  # the second time the server knows the scripts
                before = calls(server)
                assert await store.unfired() == []
                assert await store.claims("umbel-revoked:") == []
            assert calls(server) - before == 2 * 2, "a script that asks once whether there is anything"
            for n in range(500):
                await store.claim(f"unique/{n}", "me", lease=60)
            await store.claim("umbel-revoked:1", "umbel", lease=60)
            before = calls(server)
            assert [lease.name for lease in await store.claims("umbel-revoked:")] == ["umbel-revoked:1"]
            assert calls(server) - before < 30, "the others are not read"
            assert len(await store.claims("unique/")) == 500
            assert len(await store.claims()) == 501

    asyncio.run(main())


def test_what_was_claimed_leaves_only_its_fence_behind(make_redis: Callable[..., RedisServer]) -> None:
    server = make_redis()

    async def main() -> None:
        async with opened(server) as store:
            for n in range(20):
                await store.claim(f"short/{n}", "me", lease=0.05)
            await store.claim("released", "me", lease=60)
            assert await store.release("released", "me")
            async with asyncio.timeout(10):
                while [key for key in server.command("KEYS", "*") if not key.endswith(b":fence")]:  # noqa: ASYNC110  # a server's clock rings no bell
                    await asyncio.sleep(0.02)

    asyncio.run(main())


def test_the_lists_of_names_forget_what_is_over_though_they_are_never_empty(
    make_redis: Callable[..., RedisServer],
) -> None:
    server = make_redis()

    async def main() -> None:
        async with opened(server) as store:
            await store.claim("long", "me", lease=600)
            for n in range(300):
                await store.claim(f"short/{n}", "me", lease=0.001)
            await asyncio.sleep(0.05)
            for n in range(64):  # one in each shard, more or less
                await store.claim(f"again/{n}", "me", lease=600)
            for kind in ("index", "names"):
                kept = sum(server.command("ZCARD", key) for key in server.command("KEYS", f"*:{kind}"))
                assert kept < 65 + 100, kind

    asyncio.run(main())
