"""A server's port, thrown at it what is no call at all, while somebody trains there."""

import contextlib
import random
import socket
import struct
import time
import zlib
from collections.abc import Iterator

import numpy as np
import pytest

from .assaults import ASSAULTS, Assault
from .figures import CALLS, SEED, Figures
from .victim import Victim, persistently

_TOKENS_SHARE = 10
_OPEN_AT_ONCE = 200
_CONNECT_SECONDS = 30
"""More come than a busy machine accepts, and one whose turn does not come is tried again by TCP, after seconds."""
_ANSWER_EVERY = 100
_RESET = struct.pack("ii", 1, 0)

pytestmark = pytest.mark.timeout(1200)


@pytest.fixture(scope="module", params=[False, True], ids=["asks nobody", "asks for tokens"])
def victim(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    victim = Victim(tmp_path_factory.mktemp("victim"), asks=request.param)
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


def dismiss(connection: socket.socket) -> None:
    """Closes a connection that the server has taken: it says something at once, or hangs up."""
    with connection, contextlib.suppress(OSError):
        connection.recv(1)


def assail(victim: Victim, assault: Assault, count: int, rng: random.Random, figures: Figures) -> None:
    """Throws so many, a few of them at once, and calls in between as others would."""
    port, opened = int(victim.address.rpartition(":")[2]), []
    client = victim.client()
    try:
        for number in range(count):
            raw, connection = assault(rng), connected(port, number)
            opened.append(connection)
            with contextlib.suppress(OSError):  # the server may have hung up
                connection.settimeout(0.5)
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
    assail(victim, ASSAULTS[name], 100, rng, Figures(""))
    count = CALLS // _TOKENS_SHARE if victim.token else CALLS
    with victim.under(f"{name}, {'tokens' if victim.token else 'no tokens'}") as figures:
        assail(victim, ASSAULTS[name], count, rng, figures)
