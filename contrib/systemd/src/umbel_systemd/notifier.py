"""The datagrams that systemd takes from a service."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import MutableMapping

from umbel.errors import UmbelError

logger = logging.getLogger("umbel.systemd")


class Notifier:
    """A socket to systemd. ``send`` never blocks and never raises: nothing of the work depends on what systemd hears."""

    def __init__(self, address: str) -> None:
        """Raises ``UmbelError`` for an address of a kind that is not a local socket."""
        if not address.startswith(("/", "@")):
            raise UmbelError(
                f"systemd: NOTIFY_SOCKET is {address!r}, which is no socket of this host; take 'systemd' out of [plugins] hooks"
            )
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._heard = True
        self._unheard: dict[str, str] = {}

    def send(self, **fields: object) -> None:
        """Tell fields, ``READY=1`` and the like, together in one datagram, with those that were not heard before.

        What is not heard, because systemd does not come to read or is gone, is logged once in a row, and told again by the next
        call; a sign of life is not, since it would be an old one.
        """
        wanted = {**self._unheard, **{name: str(value).replace("\n", " ") for name, value in fields.items()}}
        if not wanted:
            return
        try:
            self._socket.sendto("\n".join(f"{name}={value}" for name, value in wanted.items()).encode(), self._address)
            self._unheard, self._heard = {}, True
        except OSError as error:
            if self._heard:
                logger.warning("systemd does not hear at NOTIFY_SOCKET: %s", error)
            wanted.pop("WATCHDOG", None)
            self._unheard, self._heard = wanted, False

    def close(self) -> None:
        """Free the socket."""
        self._socket.close()


def take_from(environment: MutableMapping[str, str]) -> tuple[Notifier | None, float | None]:
    """The notifier and the seconds of the watchdog that systemd has asked of this process, taken out of the environment:
    programs that tasks start are not the service. None: it has not asked. Raises ``UmbelError``."""
    address = environment.pop("NOTIFY_SOCKET", "")
    period, process = environment.pop("WATCHDOG_USEC", ""), environment.pop("WATCHDOG_PID", "")
    if not address:
        return None, None
    if not period.isdigit() or int(period) == 0 or process not in ("", str(os.getpid())):
        return Notifier(address), None
    return Notifier(address), int(period) / 1e6
