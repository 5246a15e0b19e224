"""What URLs name, what clients reach, and what errors say."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from redis import exceptions
from servers.redis import RedisCluster, RedisSentinel, RedisServer

from umbel.errors import SettingsError
from umbel_redis import blocking
from umbel_redis.blocking import BlockingLine
from umbel_redis.connection import ERRORS, Fault, _ours, connect, connect_blocking, explain
from umbel_redis.options import RedisOptions, address_of

Make = Callable[..., RedisServer]


def ask(url: str, *command: Any, **options: Any) -> Any:
    """The answer of the asyncio client, or the fault."""
    settings = RedisOptions(**options)
    address = address_of(url, settings)

    async def main() -> Any:
        client = connect(address, settings)
        try:
            await client.redis.initialize()
            return await client.redis.execute_command(*command)
        except ERRORS as error:
            return explain(error, address)
        finally:
            await client.aclose()
            await client.aclose()

    return asyncio.run(main())


def ask_blocking(url: str, *command: Any, **options: Any) -> Any:
    """Likewise, of the synchronous one."""
    settings = RedisOptions(**options)
    address = address_of(url, settings)
    try:
        client = connect_blocking(address, settings)
    except ERRORS as error:
        return explain(error, address)
    try:
        return client.execute_command(*command)
    except ERRORS as error:
        return explain(error, address)
    finally:
        client.close()


both = pytest.mark.parametrize("ask", [ask, ask_blocking])


# --- addresses -----------------------------------------------------------------------------------


def test_a_url_names_host_database_and_credentials() -> None:
    address = address_of("redis://me:p%40ss@h:7000/3", RedisOptions())
    assert (address.kind, address.hosts, address.db) == ("single", (("h", 7000),), 3)
    assert (address.username, address.password, address.tls) == ("me", "p@ss", False)
    assert str(address) == "redis://me:***@h:7000/3"
    assert "p@ss" not in repr(address)


@pytest.mark.parametrize(
    ("url", "options", "expected"),
    [
        ("redis://", {}, ("single", (("localhost", 6379),), None, 0)),
        ("redis://[::1]:7000", {}, ("single", (("::1", 7000),), None, 0)),
        ("rediss://h/1", {}, ("single", (("h", 6379),), None, 1)),
        ("unix:///run/redis.sock", {"db": 2}, ("single", (), "/run/redis.sock", 2)),
        ("redis+socket:///run/redis.sock", {"virtual_host": 3}, ("single", (), "/run/redis.sock", 3)),
        ("redis+socket:///run/redis.sock", {"virtual_host": 3, "db": 3}, ("single", (), "/run/redis.sock", 3)),
        ("sentinel://a;sentinel://b:7", {"master": "m"}, ("sentinel", (("a", 26379), ("b", 7)), None, 0)),
        ("sentinel://a/4;sentinel://b:7/4", {"master": "m"}, ("sentinel", (("a", 26379), ("b", 7)), None, 4)),
        ("sentinel://a;sentinel://b:7/4", {"master": "m"}, ("sentinel", (("a", 26379), ("b", 7)), None, 4)),
        ("sentinel://a,b:7/4", {"master": "m"}, ("sentinel", (("a", 26379), ("b", 7)), None, 4)),
        ("redis://a:1,b:2", {"cluster": True}, ("cluster", (("a", 1), ("b", 2)), None, 0)),
    ],
)
def test_the_forms_of_urls(url: str, options: dict[str, Any], expected: tuple[Any, ...]) -> None:
    address = address_of(url, RedisOptions(**options))
    assert (address.kind, address.hosts, address.path, address.db) == expected
    assert address.tls == url.startswith("rediss")


@pytest.mark.parametrize(
    ("url", "options", "said"),
    [
        ("redis://h:port/0", {}, "not HOST or HOST:PORT"),
        ("redis://h:70000/0", {}, "not HOST or HOST:PORT"),
        ("redis://h/results", {}, "number of the database"),
        ("redis://h/1", {"db": 2}, "different databases"),
        ("redis://a,b/0", {}, "cluster=true"),
        ("redis://a/1", {"cluster": True}, "database 0 only"),
        ("redis://a/0", {"master": "m"}, "sentinel://"),
        ("sentinel://a/0", {}, "master=NAME"),
        ("sentinel://a/0", {"master": "m", "cluster": True}, "belongs to redis://"),
        ("unix://host/socket", {}, "three slashes"),
        ("redis+socket://host/socket", {}, "a redis.socket URL names a socket after three slashes"),
        ("sentinel://a;redis://b", {"master": "m"}, "each begins with sentinel://"),
        ("redis://a;redis://b", {}, "each begins with sentinel://"),
        ("redis://h/0?db=1", {}, "after ?"),
        ("memcached://h", {}, "none of redis"),
    ],
)
def test_a_url_that_is_wrong_is_refused_without_its_password(url: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=said.replace("?", r"\?")) as raised:
        address_of(url.replace("://", "://me:hidden@"), RedisOptions(**options))
    assert "hidden" not in str(raised.value)


def test_every_problem_is_told_at_once() -> None:
    with pytest.raises(SettingsError) as raised:
        address_of("redis://h:x/y", RedisOptions(master="m"))
    assert len(raised.value.problems) == 3


def test_the_password_of_several_urls_is_that_of_the_first() -> None:
    address = address_of("sentinel://me:pw@a;sentinel://me:pw@b:7", RedisOptions(master="m"))
    assert (address.username, address.password, address.hosts) == ("me", "pw", (("a", 26379), ("b", 7)))
    assert "pw" not in str(address)


@pytest.mark.parametrize("options", [{"db": -1}, {"virtual_host": -1}, {"timeout": 0}, {"connections": 0}])
def test_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        RedisOptions(**options)


# --- reaching ------------------------------------------------------------------------------------


@both
def test_a_server_is_reached_by_tcp_and_by_its_socket(ask: Callable[..., Any], make_redis: Make) -> None:
    server = make_redis(password="sésame")
    secret = "s%C3%A9same"
    assert ask(f"redis://:{secret}@127.0.0.1:{server.port}/5", "CLIENT", "GETNAME") == b"umbel"
    assert ask(f"redis://:{secret}@127.0.0.1:{server.port}/5", "SET", "k", "v") is True
    assert ask(f"unix://:{secret}@{server.socket}", "GET", "k", db=5) == b"v"
    assert ask(f"unix://:{secret}@{server.socket}", "GET", "k", db=4) is None


@both
def test_tls_trusts_whom_it_is_told_to(ask: Callable[..., Any], make_redis: Make) -> None:
    server = make_redis(tls=True)
    assert server.certificates is not None
    assert ask(server.tls_url, "PING", ssl_ca_certs=str(server.certificates.ca)) is True
    assert ask(server.tls_url, "PING", ssl_cert_reqs="none") is True
    fault = ask(server.tls_url, "PING")
    assert isinstance(fault, Fault)
    assert fault.permanent
    assert "ssl_ca_certs" in fault.sentence


@both
def test_the_nodes_of_a_cluster_are_found(ask: Callable[..., Any], redis_cluster: RedisCluster) -> None:
    first, second, _ = redis_cluster.hosts
    for url in (redis_cluster.url, f"redis://127.0.0.1:1,{first},{second}"):
        for key in ("a", "b", "c", "d"):
            assert ask(url, "SET", key, key, cluster=True) is True
    fault = [ask(redis_cluster.url, "GET", key) for key in "abcd"]
    faults = [found for found in fault if isinstance(found, Fault)]
    assert faults, "a client that knows no cluster is sent to another node"
    assert all(fault.permanent and "cluster=true" in fault.sentence for fault in faults)


@both
def test_the_master_is_found_through_sentinels(ask: Callable[..., Any], redis_sentinel: RedisSentinel) -> None:
    url = "sentinel://" + ",".join(redis_sentinel.hosts)
    assert ask(url, "SET", "k", "v", master=redis_sentinel.name) is True
    assert redis_sentinel.master.command("GET", "k") == b"v"
    fault = ask(url, "GET", "k", master="other")
    assert fault == Fault(f"no sentinel of {url} knows a master 'other' that is up", permanent=False)


# --- errors --------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize(
    ("credentials", "who"), [("", "its default user"), (":hidden", "its default user"), ("u:hidden", "user 'u'")]
)
def test_wrong_credentials_are_named_at_once(
    ask: Callable[..., Any], make_redis: Make, credentials: str, who: str
) -> None:
    server = make_redis(password="right")
    begun = time.monotonic()
    fault = ask(f"redis://{credentials and credentials + '@'}127.0.0.1:{server.port}/0", "PING")
    assert time.monotonic() - begun < 8
    assert isinstance(fault, Fault)
    assert fault.permanent
    assert f"refused {who}" in fault.sentence
    assert "hidden" not in fault.sentence
    if credentials.startswith("u"):
        server.command("ACL", "SETUSER", "u", "on", ">hidden", "+ping", "+client")
        fault = ask(f"redis://{credentials}@127.0.0.1:{server.port}/0", "SET", "k", "v")
        assert isinstance(fault, Fault)
        assert fault.permanent
        assert "does not allow it to user 'u'" in fault.sentence


@both
def test_wrong_credentials_are_named_in_a_cluster_too(ask: Callable[..., Any], make_redis: Make) -> None:
    server = make_redis("cluster-enabled yes", "databases 1", password="right")
    fault = ask(f"redis://u:hidden@127.0.0.1:{server.port}", "PING", cluster=True)
    assert isinstance(fault, Fault)
    assert fault.permanent
    assert "refused user 'u'" in fault.sentence


@both
def test_what_does_not_fit_the_server_says_what_to_change(ask: Callable[..., Any], make_redis: Make) -> None:
    server = make_redis("databases 4", "maxmemory 1mb", "maxmemory-policy noeviction")
    assert "cluster=true" in ask(server.url, "PING", cluster=True).sentence
    assert "has no database 9" in ask(server.url_of(9), "PING").sentence
    full = ask(server.url, "SET", "k", b"v" * 2_000_000)
    full = ask(server.url, "SET", "l", b"v") if full is True else full
    assert not full.permanent  # it can be mended, and then the same call succeeds
    assert "maxmemory" in full.sentence


@both
def test_a_server_that_is_not_there_may_come_back(ask: Callable[..., Any], make_redis: Make) -> None:
    server = make_redis()
    server.kill()
    for options in ({}, {"cluster": True}):
        fault = ask(server.url, "PING", **options)
        assert isinstance(fault, Fault)
        assert not fault.permanent
        assert f"redis://127.0.0.1:{server.port}/0 cannot be reached" in fault.sentence


@both
def test_a_server_that_is_silent_is_given_up_in_time(ask: Callable[..., Any], make_redis: Make) -> None:
    server = make_redis()
    server.pause()
    begun = time.monotonic()
    fault = ask(server.url, "PING", timeout=0.2, connect_timeout=0.2)
    assert time.monotonic() - begun < 8
    assert isinstance(fault, Fault)
    assert not fault.permanent
    assert "does not answer" in fault.sentence
    server.resume()


# --- lost connections ------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [AttributeError, TypeError])
def test_a_transport_that_is_gone_is_a_lost_connection(error: type[Exception]) -> None:
    """What asyncio's transports do from CPython 3.12 on, when they are written to after their end."""

    class Gone:
        async def send_packed_command(self, command: object, check_health: bool) -> None:
            raise error("'NoneType' object is not callable")

    connection = _ours(Gone)()
    with pytest.raises(exceptions.ConnectionError, match="lost"):
        asyncio.run(connection.send_packed_command([b"*1"]))


def test_threads_that_come_first_together_share_one_client(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each may make one; the one that is kept is whole before another sees it."""
    line = BlockingLine(address_of("redis://localhost:1/0", RedisOptions()), RedisOptions())
    together = threading.Barrier(4)

    def make(*given: Any) -> Any:
        together.wait(30)
        return connect_blocking(*given)

    monkeypatch.setattr(blocking, "connect_blocking", make)
    with ThreadPoolExecutor(4) as threads:
        clients = list(threads.map(lambda _: line._client(), range(4)))
    assert len({id(client) for client in clients}) == 1
    assert [cls.__name__ for cls in clients[0].connection_pool.connection_class.__mro__].count("_Bounded") == 1
    line.close()
