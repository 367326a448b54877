"""What somebody without credentials can have the server hold: nothing to speak of."""

import struct
from collections.abc import Callable, Iterator

import psutil
import pytest
from crowd import Connection, Crowd, data_frames, message, request_headers
from server_process import ServerProcess
from tokens_file import TokensFile

MESSAGE_BYTES = (4 << 20) - 4096
CALL_COUNT = 40
METHODS = [
    "RunService/ListRuns",
    "RunService/JoinRun",
    "RunService/WatchRun",
    "OptimizerService/PullWeights",
    "OptimizerService/PushGradients",
    "OptimizerService/Exchange",
    "CheckpointService/ForkCheckpoint",
]


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    tokens = TokensFile(tmp_path_factory.mktemp("tokens") / "tokens")
    tokens.add("alice", "admin")
    tokens.write()
    with ServerProcess(environment=tokens.environment) as server:
        yield server


@pytest.fixture
def stranger(closed: ServerProcess) -> Iterator[Connection]:
    with Crowd(closed.address) as crowd:
        yield crowd.connect()


def send(stranger: Connection, stream: int, path: str, body: bytes, *, ends: bool = False) -> None:
    stranger.send(request_headers(stream, path) + data_frames(stream, body, ends=ends))


@pytest.mark.parametrize("method", METHODS)
def test_no_message_is_waited_for(
    stranger: Connection, method: str, eventually: Callable[[Callable[[], object]], None]
) -> None:
    """Each call stays open, nothing of its message or half of it is there, and it is refused all the same."""
    send(stranger, 1, f"/kedge.v1.{method}", b"")
    send(stranger, 3, f"/kedge.v1.{method}", message(bytes(100))[:50])
    eventually(lambda: stranger.ended_streams == {1, 3})


@pytest.mark.parametrize("method", METHODS)
def test_no_message_is_held(
    closed: ServerProcess, stranger: Connection, method: str, eventually: Callable[[Callable[[], object]], None]
) -> None:
    """Calls all but the last byte of whose messages are sent: 160 MiB in all."""
    server = psutil.Process(closed.process.pid)
    before = server.memory_info().rss
    most = before
    almost_whole = struct.pack(">BI", 0, MESSAGE_BYTES) + bytes(MESSAGE_BYTES - 1)
    for stream in range(1, 2 * CALL_COUNT, 2):
        send(stranger, stream, f"/kedge.v1.{method}", almost_whole)
        most = max(most, server.memory_info().rss)
    # It hangs up on who sends more than it was told to, as this one does where the server is slow.
    eventually(lambda: stranger.is_closed or len(stranger.ended_streams) == CALL_COUNT)
    assert most - before < 50 << 20


def test_of_health_checks_few_may_be_about_to_ask(
    closed: ServerProcess, stranger: Connection, eventually: Callable[[Callable[[], object]], None]
) -> None:
    for stream in range(1, 2 * 100, 2):
        send(stranger, stream, "/grpc.health.v1.Health/Check", b"")
    eventually(lambda: len(stranger.ended_streams) >= 100 - 64)
    eventually(lambda: len(stranger.ended_streams) == 100)  # nor may those for long
    send(stranger, 201, "/grpc.health.v1.Health/Check", message(b""), ends=True)
    eventually(lambda: 201 in stranger.ended_streams)


def test_a_call_that_ends_without_its_message_is_answered(
    server: ServerProcess, eventually: Callable[[Callable[[], object]], None]
) -> None:
    with Crowd(server.address) as crowd:
        caller = crowd.connect()
        send(caller, 1, "/kedge.v1.RunService/ListRuns", b"", ends=True)
        send(caller, 3, "/kedge.v1.OptimizerService/PullWeights", message(b"ab")[:6], ends=True)
        eventually(lambda: caller.ended_streams == {1, 3})


def test_what_strangers_do_is_no_defect(closed: ServerProcess) -> None:
    assert not any("defect" in line or "Traceback" in line for line in closed.log)
