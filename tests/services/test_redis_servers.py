from __future__ import annotations

import re
import ssl
from collections.abc import Callable
from pathlib import Path

import pytest
import redis
from cluster import until
from servers.process import Failed, refuses
from servers.redis import RedisCluster, RedisSentinel, RedisServer

Make = Callable[..., RedisServer]


def test_kill_and_restart_keep_what_was_answered(make_redis: Make) -> None:
    server = make_redis()
    port, pid = server.port, server.pid
    server.command("SET", "before", "kill")
    server.kill()
    assert not server.running
    with pytest.raises(redis.ConnectionError):
        server.command("PING")
    server.start()
    assert server.command("GET", "before") == b"kill"
    server.command("SET", "before", "stop")
    server.restart()
    assert server.command("GET", "before") == b"stop"
    assert server.port == port
    assert server.pid != pid


def test_config_lines_override(make_redis: Make) -> None:
    server = make_redis("appendonly no", "maxmemory 10mb")
    assert server.command("CONFIG", "GET", "maxmemory") == {b"maxmemory": b"10485760"}
    server.command("SET", "key", "gone")
    server.kill()
    server.start()
    assert server.command("GET", "key") is None


def test_a_paused_server_answers_nothing_and_then_everything(make_redis: Make) -> None:
    server = make_redis()
    with redis.Redis.from_url(server.url, socket_timeout=0.2, retry=None) as client:
        client.set("key", 1)
        server.pause()
        with pytest.raises(redis.TimeoutError):
            client.get("key")
        server.resume()
        server.wait_until_ready()
        assert client.get("key") == b"1"


def test_a_server_that_is_paused_can_be_killed(make_redis: Make) -> None:
    server = make_redis()
    server.pause()
    server.kill()
    assert not server.running


def test_password_unix_socket_and_tls(make_redis: Make) -> None:
    server = make_redis(password="secret", tls=True)
    with pytest.raises(redis.AuthenticationError):
        redis.Redis(port=server.port, retry=None).ping()
    with redis.Redis.from_url(server.unix_url) as client:
        assert client.ping()
    assert server.certificates is not None
    with redis.Redis.from_url(server.tls_url, ssl_ca_certs=str(server.certificates.ca)) as client:
        assert client.ping()
    with redis.Redis.from_url(server.tls_url, retry=None) as client, pytest.raises(redis.ConnectionError) as error:
        client.ping()  # an authority that nobody knows
    assert isinstance(error.value.__cause__ or error.value.__context__, ssl.SSLCertVerificationError)


@pytest.mark.parametrize("turn", [1, 2])
def test_each_test_has_a_database_of_its_own(redis_url: str, redis_server: RedisServer, turn: int) -> None:
    with redis.Redis.from_url(redis_url) as client:
        assert client.dbsize() == 0
        client.set("key", turn)
    assert redis_server.command("DBSIZE") == 0


def test_a_config_that_the_server_refuses_is_told(tmp_path: Path) -> None:
    server = RedisServer(tmp_path, "no-such-directive yes")
    with pytest.raises(Failed, match="no-such-directive"):
        server.start()


def test_one_server_is_not_started_twice(make_redis: Make) -> None:
    server = make_redis()
    with pytest.raises(Failed, match="runs already"):
        server.start()
    server.kill()
    with pytest.raises(Failed, match="does not run"):
        server.pause()


def test_another_program_can_be_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, make_redis: Make) -> None:
    monkeypatch.setenv("TEST_REDIS_SERVER", "no-such-server")
    monkeypatch.setenv("CI", "")
    with pytest.raises(pytest.skip.Exception, match=r"no no-such-server on this machine .*make services"):
        make_redis()


def test_a_cluster_serves_all_slots_and_comes_back(redis_cluster: RedisCluster) -> None:
    with redis.RedisCluster.from_url(redis_cluster.url) as client:
        for number in range(30):
            client.set(f"key{number}", number)
    assert all(master.command("DBSIZE") for master in redis_cluster.masters)
    for master in redis_cluster.masters:
        master.kill()
    redis_cluster.start()
    with redis.RedisCluster.from_url(redis_cluster.url) as client:
        assert [client.get(f"key{number}") for number in range(30)] == [b"%d" % number for number in range(30)]


@pytest.mark.slow
def test_a_replica_takes_the_place_of_a_dead_master(tmp_path: Path) -> None:
    with RedisCluster(tmp_path, replicas=1) as cluster:
        dead = cluster.masters[0]
        dead.kill()
        until(
            lambda: any(r.command("INFO", "replication")["role"] == "master" for r in cluster.replicas),
            "a replica becomes master",
        )
        cluster.wait_until_ok()


def test_sentinel_failover_in_order(redis_sentinel: RedisSentinel) -> None:
    first = redis_sentinel.master
    first.command("SET", "key", "kept")
    # A failover waits for no write: what the replica does not have by then is lost.
    until(lambda: all(server.command("GET", "key") for server in redis_sentinel.data), "the replica has the key")
    second = redis_sentinel.failover()
    assert second is not first
    assert second.command("GET", "key") == b"kept"
    assert re.fullmatch(r"sentinel://127\.0\.0\.1:\d+", redis_sentinel.url)


def test_sentinel_failover_after_a_death(tmp_path: Path) -> None:
    with RedisSentinel(tmp_path, sentinels=3) as sentinel:
        dead = sentinel.master
        dead.kill()
        assert sentinel.wait_until_master_is_not(dead) in sentinel.data
        assert refuses(dead.port)
        assert len(sentinel.hosts) == 3
