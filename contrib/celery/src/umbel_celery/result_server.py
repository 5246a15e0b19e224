"""The Redis in which results lie, reached as the settings of the result store say."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qsl, unquote, urlsplit

from attrs import frozen
from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from redis.asyncio.retry import Retry as AsyncRetry
from redis.asyncio.sentinel import Sentinel as AsyncSentinel
from redis.backoff import NoBackoff
from redis.sentinel import Sentinel

from umbel_celery.losses import honest

if TYPE_CHECKING:
    from umbel.settings.schema import ResultSettings

_SCHEMES: Final = {"redis": "redis", "rediss": "rediss", "unix": "unix", "redis+socket": "unix", "sentinel": "sentinel"}
_TLS: Final = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_cert_reqs")
_KEPT: Final = 86_400
"""Seconds for which Celery keeps what it keeps of a chord, unless results are kept for another time."""


@frozen
class ResultServer:
    """One server, or the master that sentinels name."""

    _url: str
    """Without its query."""
    _options: Mapping[str, Any]
    kept: int
    """Seconds for which results are kept."""

    @classmethod
    def of(cls, results: ResultSettings) -> ResultServer | None:
        """None: results do not lie in Redis."""
        parts = urlsplit(results.url or "")
        if parts.scheme not in _SCHEMES:
            return None
        options = {**dict(parse_qsl(parts.query)), **results.options}
        return cls(str(results.url).partition("?")[0], options, int(results.expires or _KEPT))

    @property
    def clustered(self) -> bool:
        """Whether it is a Redis Cluster, in which Celery keeps no results."""
        return self._is("cluster")

    @property
    def prefix(self) -> str:
        """What stands before every key, as Celery writes it too."""
        prefix = str(self._options.get("prefix") or "")
        return prefix if not prefix or prefix[-1] in ":_-." else prefix + "_"

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[AsyncRedis]:
        """A client for an event loop, which tries nothing again by itself, and is closed at the end. No I/O before."""
        async with AsyncExitStack() as stack:
            clients = self._clients(AsyncRedis, AsyncSentinel, retry=AsyncRetry(NoBackoff(), 0))
            for client in clients:
                honest(client.connection_pool)
                stack.push_async_callback(client.aclose)
            yield clients[0]

    @contextmanager
    def connected_blocking(self) -> Iterator[Redis]:
        """A client that blocks; otherwise likewise."""
        with ExitStack() as stack:
            clients = self._clients(Redis, Sentinel)
            for client in clients:
                stack.callback(client.close)
            yield clients[0]

    def _clients(self, single: Any, sentinel: Any, **settings: Any) -> Sequence[Any]:
        """The server's, and those of the sentinels that it is asked of."""
        scheme = _SCHEMES[urlsplit(self._url).scheme]
        tls = scheme == "rediss" or (scheme == "sentinel" and self._is("ssl"))
        settings |= {
            "protocol": 2,
            "client_name": "umbel",
            "socket_timeout": float(self._options.get("timeout", 5)),
            "socket_connect_timeout": float(self._options.get("connect_timeout", 5)),
        }
        if tls:
            unchecked = self._options.get("ssl_cert_reqs") == "none"
            settings |= {name: self._options[name] for name in _TLS if name in self._options}
            settings["ssl_check_hostname"] = not unchecked and self._is("ssl_check_hostname", True)
        if scheme == "sentinel":
            return self._through(sentinel, {**settings, "ssl": tls})
        settings["db"] = int(self._options.get("db") or self._options.get("virtual_host") or 0)
        return [single.from_url(f"{scheme}://{self._url.partition('://')[2]}", **settings)]

    def _through(self, sentinel: Any, settings: Mapping[str, Any]) -> Sequence[Any]:
        """``sentinel://a:1,b:2/0``, or as Celery writes it ``sentinel://a:1;sentinel://b:2/0``."""
        urls = [urlsplit(url) for url in self._url.split(";")]
        user, _, password = map(unquote, urls[0].netloc.rpartition("@")[0].partition(":"))
        hosts = [urlsplit(f"//{host}") for url in urls for host in url.netloc.rpartition("@")[2].split(",")]
        of_sentinels = {name: self._options.get(f"sentinel_{name}") for name in ("username", "password")}
        manager = sentinel(
            [(host.hostname or "localhost", host.port or 26379) for host in hosts],
            sentinel_kwargs={**settings, **of_sentinels},
            db=int(next((url.path.strip("/") for url in urls if url.path.strip("/")), 0)),
            username=user or None,
            password=password or None,
            **settings,
        )
        return [manager.master_for(str(self._options.get("master"))), *manager.sentinels]

    def _is(self, option: str, default: bool = False) -> bool:
        """A switch; in a URL's query it is text."""
        return str(self._options.get(option, default)).lower() in ("true", "1", "yes", "on")
