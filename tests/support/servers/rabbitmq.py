"""RabbitMQ: a node with its own epmd, that shares nothing with the machine's nodes nor with other tests'."""

from __future__ import annotations

import itertools
import os
import secrets
import socket
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from servers.certificates import Certificates, make_certificates
from servers.process import HOST, Failed, Missing, Server, free_port, program, spawn
from umbel.model import DEAD_SUFFIX

USER = PASSWORD = "guest"
"""RabbitMQ makes it when it starts for the first time."""

_SCRIPTS = Path("/usr/lib/rabbitmq/bin")
"""Where Debian keeps what it wraps for PATH: the wrappers change to the system's user, and to its files."""

_ERL_ARGS = "+P 100000 +t 5000000 +stbt db +zdbbl 128000"
"""RabbitMQ's own, but a smaller table of processes, and no ``+sbwt none``: both halve what a start costs."""


class RabbitServer(Server):
    """One node. ``config`` are settings of ``rabbitmq.conf``, those with dots in their names by ``**{…}``::

        RabbitServer(folder, consumer_timeout=60_000, **{"vm_memory_high_watermark.relative": 0.4})

    Durable queues survive `kill`; see `sync` for quorum queues. With ``tls`` there is, beside ``url``, ``tls_url`` on a port of
    its own, and ``certificates`` says what a client needs. With ``management`` the HTTP API listens on ``management_port``,
    and starting takes longer. ``erl_args=""`` runs the VM with RabbitMQ's own flags, as benchmarks should. A node ``beside``
    another uses that one's epmd, which ends with it, and can `join` it.
    """

    def __init__(
        self,
        folder: Path,
        *,
        tls: bool = False,
        management: bool = False,
        erl_args: str = _ERL_ARGS,
        beside: RabbitServer | None = None,
        **config: Any,
    ) -> None:
        super().__init__(folder)
        self._beside = beside
        self.dist_port, self._epmd_port = free_port(), beside._epmd_port if beside else free_port()
        self.management_port = free_port() if management else 0
        self.tls_port = 0
        self.certificates: Certificates | None = None
        self.node = f"umbel{self.port}@localhost"
        self._erl_args = erl_args
        self._cookie = beside._cookie if beside else secrets.token_hex(16)
        self._epmd: subprocess.Popen[bytes] | None = None
        self._numbers = itertools.count(1)
        settings: dict[str, Any] = {
            "listeners.tcp.1": f"{HOST}:{self.port}",
            "loopback_users": "none",
            "log.console.level": "info",
            "disk_free_limit.absolute": "1MB",  # what runs beside the tests must not raise alarms in them
        }
        if management:
            settings |= {"management.tcp.ip": HOST, "management.tcp.port": self.management_port}
        if tls:
            self.tls_port, self.certificates = free_port(), make_certificates(self.folder)
            settings |= {
                "listeners.ssl.1": f"{HOST}:{self.tls_port}",
                "ssl_options.cacertfile": self.certificates.ca,
                "ssl_options.certfile": self.certificates.cert,
                "ssl_options.keyfile": self.certificates.key,
                "ssl_options.verify": "verify_peer",
                "ssl_options.fail_if_no_peer_cert": "false",
            }
        settings |= config
        (self.folder / "rabbitmq.conf").write_text(
            "".join(f"{key} = {_value(value)}\n" for key, value in settings.items())
        )
        (self.folder / "enabled_plugins").write_text("[rabbitmq_management]." if management else "[].")
        cookie = self.folder / ".erlang.cookie"
        cookie.write_text(self._cookie)
        cookie.chmod(0o400)

    @property
    def url(self) -> str:
        return self.url_of("/")

    @property
    def tls_url(self) -> str:
        return f"amqps://{USER}:{PASSWORD}@{HOST}:{self.tls_port}//"

    def url_of(self, vhost: str) -> str:
        return f"amqp://{USER}:{PASSWORD}@{HOST}:{self.port}/{'/' if vhost == '/' else quote(vhost, safe='')}"

    def vhost(self, name: str | None = None) -> str:
        """Make a vhost, and return its address. Takes some hundredths of a second; it lives as long as the data."""
        name = name or f"test{next(self._numbers)}"
        self.eval(
            f'ok = rabbit_vhost:add(<<"{name}">>, <<"tests">>), '
            f'ok = rabbit_auth_backend_internal:set_permissions(<<"{USER}">>, <<"{name}">>,'
            ' <<".*">>, <<".*">>, <<".*">>, <<"tests">>)'
        )
        return self.url_of(name)

    def delete_vhost(self, url: str) -> None:
        """Delete a vhost and all that is in it; the server closes its connections."""
        self.eval(f'ok = rabbit_vhost:delete(<<"{_vhost_of(url)}">>, <<"tests">>)')

    def eval(self, expression: str) -> str:
        """Evaluate Erlang in the node, quickly (`ctl` starts an Erlang of its own). Returns the value, printed."""
        # The node turns away a second caller of one name, and erl_call has few of its own.
        name, address = f"call{secrets.token_hex(8)}", f"{HOST}:{self.dist_port}"
        call = [program("erl_call"), "-h", name, "-address", address, "-c", self._cookie, "-e"]
        done = subprocess.run(
            call, input=f"{expression}.\n", env=self._env(), capture_output=True, text=True, timeout=60
        )
        if done.returncode or not done.stdout.startswith("{ok, "):
            raise Failed(f"{self} refuses {expression}: {done.stdout}{done.stderr}")
        return done.stdout.strip().removeprefix("{ok, ").removesuffix("}")

    def messages(self, url: str) -> int:
        """How many messages are in the quorum queues of a vhost, but for dead letters: ready, held, or delayed.

        From the queues themselves: what the node shows is seconds old, and AMQP tells nobody of what others hold. A queue that
        cannot tell yet counts as one.
        """
        count = (
            "lists:sum([case ra:local_query(amqqueue:get_pid(Q), fun rabbit_fifo:query_messages_total/1) of"
            " {ok, {_, N}, _} -> N; _ -> 1 end"
            f' || Q <- rabbit_amqqueue:list(<<"{_vhost_of(url)}">>), amqqueue:get_type(Q) =:= rabbit_quorum_queue,'
            f' binary:longest_common_suffix([element(4, amqqueue:get_name(Q)), <<"{DEAD_SUFFIX}">>])'
            f" =/= {len(DEAD_SUFFIX)}])"
        )
        return int(self.eval(count))

    def ctl(self, *arguments: str) -> str:
        """Run ``rabbitmqctl``, which takes about a second; returns what it prints."""
        command = [str(_SCRIPTS / "rabbitmqctl"), "--quiet", *arguments]
        done = subprocess.run(command, env=self._env(), cwd=self.folder, capture_output=True, text=True, timeout=60)
        if done.returncode:
            raise Failed(f"{self}: rabbitmqctl {' '.join(arguments)}: {done.stdout}{done.stderr}")
        return done.stdout

    def join(self) -> None:
        """Become one of the cluster of the node that this one was made beside; what it has is gone. Takes some seconds."""
        assert self._beside is not None
        for command in (["stop_app"], ["join_cluster", self._beside.node], ["start_app"]):
            self.ctl(*command)
        self.wait_until_ready()

    def sync(self) -> None:
        """Bring to the disk what the node writes only every half second: without it `kill` loses, for good, the quorum queues
        that were declared just before, with all that was confirmed in them.
        """
        self.eval("[ok = dets:sync(Table) || Table <- dets:all()]")

    def kill(self) -> None:
        super().kill()
        if self._epmd is not None:
            self._epmd.kill()
            self._epmd.wait(60)
            self._epmd = None

    def _spawn(self) -> subprocess.Popen[bytes]:
        server = _SCRIPTS / "rabbitmq-server"
        if not server.exists():
            raise Missing(f"no {server} on this machine (make services installs what the tests need)")
        if self._beside is None:
            epmd = [program("epmd"), "-address", HOST, "-port", str(self._epmd_port)]
            self._epmd = spawn(epmd, log=self.log, folder=self.folder)
        return spawn([str(server)], log=self.log, folder=self.folder, env=self._env())

    def _env(self) -> dict[str, str]:
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("RABBITMQ_", "ERL_"))}
        return inherited | {
            "HOME": str(self.folder),  # of the cookie
            "ERL_EPMD_ADDRESS": HOST,
            "ERL_EPMD_PORT": str(self._epmd_port),
            "RABBITMQ_CONF_ENV_FILE": str(self.folder / "none"),  # not the machine's
            "RABBITMQ_CONFIG_FILE": str(self.folder / "rabbitmq.conf"),
            "RABBITMQ_DIST_PORT": str(self.dist_port),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self.folder / "enabled_plugins"),
            "RABBITMQ_LOGS": "-",
            "RABBITMQ_LOG_BASE": str(self.folder),
            "RABBITMQ_MNESIA_BASE": str(self.folder / "data"),
            "RABBITMQ_NODENAME": self.node,
            "RABBITMQ_SERVER_ERL_ARGS": self._erl_args,
            "RABBITMQ_PID_FILE": str(self.folder / "pid"),
            "RUNNING_UNDER_SYSTEMD": "true",  # the script becomes the node, instead of standing between it and signals
        }

    def _ready(self) -> bool:
        # The listener opens when all else has started; only a broker answers the header with a frame of its own.
        with socket.create_connection((HOST, self.port), timeout=5) as client:
            client.sendall(b"AMQP\0\0\x09\x01")
            answered = client.recv(1) == b"\x01"
        if answered and self.tls_port:  # that listener opens a moment later
            socket.create_connection((HOST, self.tls_port), timeout=5).close()
        return answered


def _vhost_of(url: str) -> str:
    return unquote(urlsplit(url).path.removeprefix("/"))


def _value(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
