"""Calls that are cancelled as they begin: gRPC's aio server keeps what is sent into one of them, so nothing is."""

import signal
import struct
import sys
from collections import deque
from collections.abc import Callable, Iterator

import pytest
import weighed_server
from crowd import Connection, frame, request_headers
from server_process import ServerProcess
from tokens_file import TokensFile

PATHS = [
    "/kedge.v1.OptimizerService/PullWeights",
    "/kedge.v1.OptimizerService/PushGradients",
    "/kedge.v1.RunService/GetRun",
    "/grpc.health.v1.Health/Check",
    "/kedge.v1.RunService/NoSuchMethod",
]
CONNECTIONS = 100
CALLS_PER_CONNECTION = 60
MAX_BYTES_PER_CALL = 30
SETTLED_BYTES = 10_000

_RST_STREAM, _PING, _ACK = 3, 6, 1
_CANCEL = struct.pack(">I", 8)

Eventually = Callable[[Callable[[], object]], None]

pytestmark = pytest.mark.skipif(not weighed_server.is_able(), reason="this C library does not tell what is in use")


class Canceller(Connection):
    """Begins calls and cancels them, and waits until the server has read that."""

    has_been_read = False

    def cancel_many(self, path: str) -> None:
        """Has all of its connection's calls begin and be cancelled."""
        self.greet()
        streams = range(1, 2 * CALLS_PER_CONNECTION, 2)
        calls = (request_headers(stream, path) + frame(_RST_STREAM, 0, stream, _CANCEL) for stream in streams)
        self.send(b"".join(calls) + frame(_PING, 0, 0, bytes(8)))
        while not self.has_been_read:
            assert not self.is_closed, "the server hung up"
            self.receive()

    def _take(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        super()._take(kind, flags, stream, payload)
        self.has_been_read = self.has_been_read or (kind == _PING and bool(flags & _ACK))


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    tokens = TokensFile(tmp_path_factory.mktemp("tokens") / "tokens")
    tokens.add("alice", "admin")
    tokens.write()
    with ServerProcess(environment=tokens.environment, command=[sys.executable, weighed_server.__file__]) as server:
        yield server


def told_bytes(server: ServerProcess, eventually: Eventually) -> int:
    """What malloc has given out in the server."""
    known = len(server.log)
    server.process.send_signal(signal.SIGUSR1)
    eventually(lambda: any(weighed_server.WORD in line for line in server.log[known:]))
    line = next(line for line in server.log[known:] if weighed_server.WORD in line)
    return int(line.removeprefix(weighed_server.WORD))


def settled_bytes(server: ServerProcess, eventually: Eventually) -> int:
    """The same, once the server is through with what it was sent."""
    told: deque[int] = deque(maxlen=5)

    def is_settled() -> bool:
        told.append(told_bytes(server, eventually))
        return len(told) == told.maxlen and max(told) - min(told) < SETTLED_BYTES

    eventually(is_settled)
    return min(told)


def cancel_calls(address: str, path: str, connections: int) -> None:
    """So many times the calls of a connection."""
    for _ in range(connections):
        canceller = Canceller(address)
        canceller.cancel_many(path)
        canceller.close()


@pytest.mark.parametrize("path", PATHS)
def test_strangers_who_cancel_their_calls_leave_nothing(
    closed: ServerProcess, path: str, eventually: Eventually, record_property: Callable[[str, object], None]
) -> None:
    cancel_calls(closed.address, path, CONNECTIONS // 5)
    before = settled_bytes(closed, eventually)
    cancel_calls(closed.address, path, CONNECTIONS)
    grown = settled_bytes(closed, eventually) - before
    per_call = grown / (CONNECTIONS * CALLS_PER_CONNECTION)
    record_property("measured", f"{per_call:.1f} bytes a call")
    assert per_call < MAX_BYTES_PER_CALL
