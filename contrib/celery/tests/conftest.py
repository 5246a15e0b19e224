"""A worker of Umbel on Celery's layout, with the listener on, and Celery's own app before it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from cluster import Cluster

sys.path.insert(0, str(Path(__file__).parent))

from celery_receiver import Monitor, let_go  # found by the line above

WORKER = "umbel@kit"


@pytest.fixture(params=["redis", "amqp"])
def tools_url(request: pytest.FixtureRequest) -> str:
    """Where Celery's tools are: on the worker's own broker, and on another one."""
    return str(request.getfixturevalue("redis_url" if request.param == "redis" else "rabbitmq_url"))


@pytest.fixture
def fleet(tmp_path: Path, redis_url: str) -> Iterator[Callable[..., Cluster]]:
    """``fleet(tools_url, worker__pool="prefork")``: no worker runs yet."""
    made: list[Cluster] = []

    def make(tools_url: str | None = None, **settings: Any) -> Cluster:
        cluster = Cluster(tmp_path)
        made.append(cluster)
        chosen: dict[str, Any] = {
            "broker__url": f"celery+{redis_url}",
            "plugins__hooks": ["celery"],
            "worker__name": WORKER,
            "worker__pool": "threads",
            "default_queue": "celery",
        }
        if tools_url is not None and tools_url != redis_url:
            chosen["plugins__options__celery__broker"] = tools_url
        return cluster.configure(**{**chosen, **settings})

    yield make
    for cluster in made:
        cluster.close()


@pytest.fixture
def app(tools_url: str) -> Iterator[Celery]:
    """Celery, unmodified, on the broker of its tools."""
    with Celery("peer", broker=tools_url, backend="disabled", set_as_current=False) as app:
        app.conf.broker_connection_retry_on_startup = True
        yield app


@pytest.fixture
def client(redis_url: str) -> Iterator[Celery]:
    """Celery, unmodified, with broker and results in Redis."""
    with Celery("client", broker=redis_url, backend=redis_url, set_as_current=False) as client:
        yield client
        let_go(client)


@pytest.fixture
def monitor(app: Celery) -> Monitor:
    """Listens within ``with monitor:``."""
    return Monitor(app)
