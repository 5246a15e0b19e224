"""Each fault of the proxy, as a client's and a server's socket see it."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from cluster import until
from servers.process import HOST, free_port
from servers.proxy import CLIENT, SERVER, Proxy, Side

Connect = Callable[[], tuple[socket.socket, socket.socket]]


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server((HOST, 0)) as listener:
        listener.settimeout(5)
        yield listener


@pytest.fixture
def proxy(listener: socket.socket, make_proxy: Callable[[int], Proxy]) -> Proxy:
    return make_proxy(listener.getsockname()[1])


@pytest.fixture
def connect(proxy: Proxy, listener: socket.socket) -> Iterator[Connect]:
    """Both ends of a new connection through the proxy."""
    opened: list[socket.socket] = []

    def connect() -> tuple[socket.socket, socket.socket]:
        client = socket.create_connection((HOST, proxy.port), timeout=5)
        opened.append(client)
        server, _ = listener.accept()
        opened.append(server)
        server.settimeout(5)
        return client, server

    yield connect
    for end in opened:
        end.close()


def exactly(end: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        chunk = end.recv(size - len(data))
        assert chunk, f"ended after {len(data)} of {size} bytes"
        data += chunk
    return data


def is_open(end: socket.socket) -> bool:
    """Open, and silent."""
    end.settimeout(0.1)
    try:
        end.recv(1)
    except TimeoutError:
        return True
    finally:
        end.settimeout(5)
    return False


def test_bytes_pass_in_both_directions_whole_and_in_order(connect: Connect) -> None:
    client, server = connect()
    sent = bytes(range(256)) * 20_000
    for source, target in ((client, server), (server, client)):
        sender = threading.Thread(target=source.sendall, args=(sent,))
        sender.start()
        assert exactly(target, len(sent)) == sent
        sender.join(30)


def test_an_end_of_stream_passes_and_the_answer_to_it_still_comes(proxy: Proxy, connect: Connect) -> None:
    client, server = connect()
    client.sendall(b"last words")
    client.shutdown(socket.SHUT_WR)
    assert exactly(server, 10) == b"last words"
    assert server.recv(1) == b""
    server.sendall(b"heard")
    server.close()
    assert exactly(client, 5) == b"heard"
    assert client.recv(1) == b""
    until(lambda: proxy.live == 0, "no connection is live")


def test_connections_are_counted(proxy: Proxy, connect: Connect) -> None:
    assert (proxy.live, proxy.accepted) == (0, 0)
    first, server = connect()
    connect()
    assert (proxy.live, proxy.accepted) == (2, 2)
    first.close()
    assert server.recv(1) == b""
    server.close()
    until(lambda: proxy.live == 1, "one connection is live")
    assert proxy.accepted == 2


def test_reset_is_an_error_at_both_ends(proxy: Proxy, connect: Connect) -> None:
    pairs = [connect(), connect()]
    assert proxy.reset() == 2
    for end in (end for pair in pairs for end in pair):
        with pytest.raises(ConnectionResetError):
            end.recv(1)
    assert proxy.live == 0
    client, server = connect()
    client.sendall(b"again")
    assert exactly(server, 5) == b"again"


def test_the_reset_of_one_end_reaches_the_other(proxy: Proxy, connect: Connect) -> None:
    client, server = connect()
    server.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    server.close()
    with pytest.raises(ConnectionResetError):
        client.recv(1)
    until(lambda: proxy.live == 0, "no connection is live")


@pytest.mark.parametrize("to", [CLIENT, SERVER])
def test_a_stall_holds_back_one_direction_and_loses_nothing(proxy: Proxy, connect: Connect, to: Side) -> None:
    client, server = connect()
    stalled, free = (client, server) if to is CLIENT else (server, client)
    proxy.stall(to)
    free.sendall(b"held back")
    assert is_open(stalled)
    stalled.sendall(b"passes")
    assert exactly(free, 6) == b"passes"
    proxy.heal()
    assert exactly(stalled, 9) == b"held back"


def test_a_stall_holds_back_both_directions_and_new_connections(proxy: Proxy, connect: Connect) -> None:
    old = connect()
    proxy.stall()
    new = connect()
    for client, server in (old, new):
        client.sendall(b"a")
        server.sendall(b"b")
        assert is_open(client)
        assert is_open(server)
    proxy.heal()
    for client, server in (old, new):
        assert (exactly(client, 1), exactly(server, 1)) == (b"b", b"a")


def test_a_stall_for_some_time_ends_by_itself(proxy: Proxy, connect: Connect) -> None:
    client, server = connect()
    begun = time.monotonic()
    proxy.stall(seconds=30)
    proxy.stall(seconds=0.3)  # the last word counts
    client.sendall(b"a")
    assert exactly(server, 1) == b"a"
    assert time.monotonic() - begun >= 0.3


def test_a_close_does_not_overtake_a_stall(proxy: Proxy, connect: Connect) -> None:
    client, server = connect()
    proxy.stall(CLIENT)
    server.sendall(b"bye")
    server.close()
    assert is_open(client)
    proxy.heal()
    assert exactly(client, 3) == b"bye"
    assert client.recv(1) == b""


def test_a_stalled_connection_can_be_reset(proxy: Proxy, connect: Connect) -> None:
    client, server = connect()
    proxy.stall()
    client.sendall(b"lost")
    proxy.reset()
    with pytest.raises(ConnectionResetError):
        server.recv(4)
    proxy.heal()
    assert proxy.live == 0


def test_delay(proxy: Proxy, connect: Connect) -> None:
    client, server = connect()
    proxy.delay(0.3, SERVER)
    begun = time.monotonic()
    client.sendall(b"late")
    assert exactly(server, 4) == b"late"
    assert time.monotonic() - begun >= 0.3
    proxy.heal()
    client.sendall(b"soon")
    assert exactly(server, 4) == b"soon"


@pytest.mark.parametrize("keeps", [CLIENT, SERVER])
def test_half_open(proxy: Proxy, connect: Connect, keeps: Side) -> None:
    client, server = connect()
    kept, gone = (client, server) if keeps is CLIENT else (server, client)
    assert proxy.half_open(keeps) == 1
    assert gone.recv(1) == b""
    kept.sendall(b"into the void" * 100_000)
    assert is_open(kept)
    assert proxy.live == 0
    connect()
    assert proxy.live == 1
    proxy.reset()
    with pytest.raises(ConnectionResetError):
        kept.recv(1)


def test_a_half_that_closes_is_let_go(proxy: Proxy, connect: Connect) -> None:
    client, _ = connect()
    proxy.half_open(CLIENT)
    client.shutdown(socket.SHUT_WR)
    assert client.recv(1) == b""


@pytest.mark.parametrize("to", [CLIENT, SERVER])
def test_cut_in_mid_frame(proxy: Proxy, connect: Connect, to: Side) -> None:
    client, server = connect()
    target, source = (client, server) if to is CLIENT else (server, client)
    source.sendall(b"before")
    assert exactly(target, 6) == b"before"
    cut = proxy.cut(10, to)
    source.sendall(b"12345")
    assert exactly(target, 5) == b"12345"
    assert not cut.is_set()
    source.sendall(b"67890 never seen")
    assert exactly(target, 5) == b"67890"
    assert target.recv(1) == b""
    assert cut.wait(5)
    assert proxy.live == 0
    client, server = connect()
    client.sendall(b"more than ten bytes")
    assert exactly(server, 19) == b"more than ten bytes"


def test_a_cut_waits_for_a_connection_to_come(proxy: Proxy, connect: Connect) -> None:
    cut = proxy.cut(3, CLIENT)
    client, server = connect()
    server.sendall(b"hello")
    assert exactly(client, 3) == b"hel"
    assert client.recv(1) == b""
    assert cut.wait(5)


def test_refused_and_accepted_again_on_the_same_port(proxy: Proxy, connect: Connect) -> None:
    client, server = connect()
    proxy.refuse()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((HOST, proxy.port), timeout=5)
    client.sendall(b"still here")
    assert exactly(server, 10) == b"still here"
    proxy.heal()
    connect()


def test_a_server_that_is_down_is_a_reset(make_proxy: Callable[[int], Proxy]) -> None:
    proxy = make_proxy(free_port())
    with pytest.raises(ConnectionResetError), socket.create_connection((HOST, proxy.port), timeout=5) as client:
        client.recv(1)
    assert proxy.live == 0


def test_faults_while_traffic_runs_leave_nothing_behind(proxy: Proxy, listener: socket.socket) -> None:
    """Descriptors are used again at once: a fault of one connection must never touch the next."""
    over = threading.Event()

    def echo() -> None:
        listener.settimeout(0.1)
        threads = []
        while not over.is_set():
            try:
                end, _ = listener.accept()
            except TimeoutError:
                continue
            threads.append(threading.Thread(target=serve, args=(end,)))
            threads[-1].start()
        for thread in threads:
            thread.join(30)

    def serve(end: socket.socket) -> None:
        with end:
            end.settimeout(5)
            try:
                while chunk := end.recv(65_536):
                    end.sendall(chunk)
            except ConnectionError:
                return

    def talk(mark: bytes) -> None:
        """Every byte that comes back must be this talker's own."""
        while not over.is_set():
            try:
                with socket.create_connection((HOST, proxy.port), timeout=5) as end:
                    while not over.is_set():
                        end.sendall(mark * 1000)
                        left = 1000
                        while left and (chunk := end.recv(left)):
                            strange.extend(byte for byte in chunk if byte != mark[0])
                            left -= len(chunk)
                        if left:
                            break
            except ConnectionError:
                continue

    strange: list[int] = []
    threads = [threading.Thread(target=echo), *(threading.Thread(target=talk, args=(b"%c" % i,)) for i in b"abcd")]
    for thread in threads:
        thread.start()
    faults = [
        proxy.reset,
        lambda: proxy.half_open(CLIENT),
        proxy.reset,
        lambda: proxy.half_open(SERVER),
        lambda: proxy.cut(777, CLIENT).wait(0.5),
        lambda: proxy.stall(seconds=0.01),
        lambda: proxy.cut(1, SERVER).wait(0.5),
    ]
    for _ in range(15):
        for fault in faults:
            fault()
            time.sleep(0.003)
    over.set()
    proxy.heal()
    proxy.reset()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert not strange
    until(lambda: proxy.live == 0, "no connection is live")
    assert proxy.accepted > 30
