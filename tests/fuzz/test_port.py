"""A server's port, thrown at it what is no call at all, while somebody trains there."""

import contextlib
import random
import socket
import ssl
import struct
import time
import zlib
from collections.abc import Iterator

import numpy as np
import pytest

from .assaults import ASSAULTS, BEFORE_TLS, Assault
from .figures import CALLS, SEED, Figures
from .victim import Victim, persistently

_TLS_SHARE = 10
"""Behind a handshake comes the same as without: a tenth of the inputs."""
_OPEN_AT_ONCE = 200
_CONNECT_SECONDS = 30
"""More come than a busy machine accepts, and one whose turn does not come is tried again by TCP, after seconds."""
_ANSWER_EVERY = 100
_ANSWER_SECONDS = 0.5
_SILENCE_SECONDS = 0.01
"""Of a handshake that is not whole a server awaits the rest, and says nothing."""
_RESET = struct.pack("ii", 1, 0)

pytestmark = pytest.mark.timeout(1200)


@pytest.fixture(scope="module", params=[False, True], ids=["asks nobody", "TLS and tokens"])
def victim(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    victim = Victim(tmp_path_factory.mktemp("victim"), asks=request.param, over_tls=request.param)
    try:
        client = victim.client()
        client.create("fuzz", np.ones(4, np.float32))
        client.close()
        yield victim
    finally:
        victim.close()


def connected(port: int, number: int) -> socket.socket:
    """A connection from one of many addresses of this host, for ports are few."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    connection.settimeout(_CONNECT_SECONDS)
    try:
        connection.bind((f"127.0.{1 + number // 200 % 200}.{1 + number % 200}", 0))
        connection.connect(("127.0.0.1", port))
    except OSError:
        connection.close()
        raise
    return connection


def behind_tls(connection: socket.socket, context: ssl.SSLContext) -> ssl.SSLSocket:
    """The connection, after its handshake."""
    try:
        return context.wrap_socket(connection, server_hostname="localhost")
    except OSError:
        connection.close()
        raise


def tls_context(victim: Victim) -> ssl.SSLContext | None:
    """What a client of gRPC has for its handshakes; None: the server speaks no TLS."""
    if victim.authority is None:
        return None
    context = ssl.create_default_context(cafile=victim.authority.ca_file)
    context.set_alpn_protocols(["h2"])
    return context


def dismiss(connection: socket.socket) -> None:
    """Closes a connection that the server has taken: it says something at once, or hangs up."""
    with connection, contextlib.suppress(OSError):
        connection.recv(1)


def assail(
    victim: Victim,
    assault: Assault,
    count: int,
    rng: random.Random,
    figures: Figures,
    context: ssl.SSLContext | None = None,
) -> None:
    """Throws so many, a few of them at once, and calls in between as others would."""
    port, opened = int(victim.address.rpartition(":")[2]), []
    is_silent = victim.authority is not None and context is None
    client = victim.client()
    try:
        for number in range(count):
            raw, connection = assault(rng), connected(port, number)
            if context is not None:
                connection = behind_tls(connection, context)
            opened.append(connection)
            with contextlib.suppress(OSError):  # the server may have hung up
                connection.settimeout(_SILENCE_SECONDS if is_silent else _ANSWER_SECONDS)
                connection.sendall(raw)
                if rng.random() < 0.5:
                    connection.shutdown(socket.SHUT_WR)
            if len(opened) == _OPEN_AT_ONCE:
                dismiss(opened.pop(0))
            if number % _ANSWER_EVERY == 0:
                begun = time.monotonic()
                persistently(lambda: client.run("runs/fuzz"))
                figures.note(time.monotonic() - begun, raw, count=0)
            figures.input_count += 1
    finally:
        for connection in opened:
            connection.close()
        client.close()


@pytest.mark.parametrize("name", ASSAULTS)
def test_port_bears_what_is_no_call(victim: Victim, name: str) -> None:
    rng = random.Random(SEED ^ zlib.crc32(name.encode()))
    context = None if name in BEFORE_TLS else tls_context(victim)
    where = "TLS" if context else "no TLS" if victim.authority is None else "for TLS"
    assail(victim, ASSAULTS[name], 100, rng, Figures(""), context)
    count = CALLS // _TLS_SHARE if context else CALLS
    with victim.under(f"{name}, {where}") as figures:
        assail(victim, ASSAULTS[name], count, rng, figures, context)
