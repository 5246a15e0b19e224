from __future__ import annotations

import json
import socket
import urllib.request
from base64 import b64encode
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import amqp
import pytest
from amqp.exceptions import NotFound
from servers.process import Failed, refuses
from servers.rabbitmq import RabbitServer

Make = Callable[..., RabbitServer]


@contextmanager
def channel(url: str, **options: object) -> Iterator[amqp.Channel]:
    parts = urlsplit(url)
    vhost = parts.path.removeprefix("/")
    with amqp.Connection(f"{parts.hostname}:{parts.port}", virtual_host=vhost, confirm_publish=True, **options) as link:
        yield link.channel()


def test_vhosts_are_apart_and_go_when_deleted(rabbitmq: RabbitServer, rabbitmq_url: str) -> None:
    other = rabbitmq.vhost()
    with channel(rabbitmq_url) as here, channel(other) as there:
        here.queue_declare("mine", durable=True, auto_delete=False)
        with pytest.raises(NotFound, match="mine"):
            there.queue_declare("mine", passive=True)
    rabbitmq.delete_vhost(other)
    with pytest.raises(amqp.exceptions.NotAllowed, match="not found"), channel(other):
        pass


def test_the_quick_way_tells_what_went_wrong(rabbitmq: RabbitServer) -> None:
    with ThreadPoolExecutor(8) as threads:
        assert set(threads.map(rabbitmq.eval, ["1 + 1"] * 40)) == {"2"}
    with pytest.raises(Failed, match=r"1 = 2.*badmatch"):
        rabbitmq.eval("1 = 2")
    with pytest.raises(Failed, match=r"rabbitmqctl no_such_command"):
        rabbitmq.ctl("no_such_command")
    assert "/" in rabbitmq.ctl("list_vhosts").split()


@pytest.mark.slow
def test_a_node_of_its_own(make_rabbitmq: Make) -> None:
    """One node for all that needs a private one: each takes seconds to start."""
    server = make_rabbitmq(tls=True, management=True, consumer_timeout=61_000)
    port, url = server.port, server.vhost("kept")

    # settings
    assert server.eval("application:get_env(rabbit, consumer_timeout)") == "{ok, 61000}"

    # TLS, with the certificate verified
    assert server.certificates is not None
    with channel(server.tls_url, ssl={"ca_certs": str(server.certificates.ca), "server_hostname": "localhost"}):
        pass

    # the HTTP API
    request = urllib.request.Request(
        f"http://127.0.0.1:{server.management_port}/api/vhosts",
        headers={"Authorization": f"Basic {b64encode(b'guest:guest').decode()}"},
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        assert {vhost["name"] for vhost in json.load(answer)} == {"/", "kept"}

    # SIGSTOP: the connection stands, and nothing is said
    server.pause()
    with socket.create_connection(("127.0.0.1", port), timeout=0.3) as client:
        client.sendall(b"AMQP\0\0\x09\x01")
        with pytest.raises(TimeoutError):
            client.recv(1)
    server.resume()
    server.wait_until_ready()

    # what was confirmed outlives SIGKILL and an orderly restart
    quorum = {"x-queue-type": "quorum"}
    with channel(url) as link:
        link.queue_declare("classic", durable=True, auto_delete=False)
        link.queue_declare("quorum", durable=True, auto_delete=False, arguments=quorum)
        for queue in ("classic", "quorum"):
            link.basic_publish_confirm(amqp.Message("kept", delivery_mode=2), routing_key=queue)
    server.sync()
    server.kill()
    assert refuses(port)
    server.start()
    server.restart()
    assert server.port == port
    with channel(url) as link:
        for queue in ("classic", "quorum"):
            message = link.basic_get(queue)
            assert message is not None
            assert message.body == "kept"


def test_a_setting_that_the_node_refuses_is_told(tmp_path: Path) -> None:
    server = RabbitServer(tmp_path, no_such_setting=1)
    with pytest.raises(Failed, match="no_such_setting"):
        server.start()
