"""What somebody without credentials can have the server hold: nothing to speak of."""

import select
import struct
from collections.abc import Callable, Iterator

import psutil
import pytest
from crowd import Connection, data_frames, message, request_headers
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


class Caller(Connection):
    """Calls from one thread, so that no answer to the server comes in the middle of a frame."""

    def __init__(self, address: str) -> None:
        super().__init__(address)
        self.greet()

    def begin(self, stream: int, path: str, body: bytes, *, ends: bool = False) -> None:
        """Sends what there is of a call, and takes what has come meanwhile."""
        self.send(request_headers(stream, path) + data_frames(stream, body, ends=ends))
        while not self.is_closed and select.select([self.socket], [], [], 0)[0]:
            self.receive()

    def wait(self, holds: Callable[[], object]) -> None:
        """Takes what comes until something holds; at most as long as the socket waits for anything."""
        while not holds():
            assert not self.is_closed, "the server hung up, or says nothing"
            self.receive()


@pytest.fixture
def stranger(closed: ServerProcess) -> Iterator[Caller]:
    caller = Caller(closed.address)
    yield caller
    caller.close()


@pytest.mark.parametrize("method", METHODS)
def test_no_message_is_waited_for(stranger: Caller, method: str) -> None:
    """Each call stays open, nothing of its message or half of it is there, and it is refused all the same."""
    stranger.begin(1, f"/kedge.v1.{method}", b"")
    stranger.begin(3, f"/kedge.v1.{method}", message(bytes(100))[:50])
    stranger.wait(lambda: stranger.ended_streams == {1, 3})


@pytest.mark.parametrize("method", METHODS)
def test_no_message_is_held(closed: ServerProcess, stranger: Caller, method: str) -> None:
    """Calls all but the last byte of whose messages are sent, 160 MiB in all, until the server hangs up."""
    server = psutil.Process(closed.process.pid)
    most = before = server.memory_info().rss
    almost_whole = struct.pack(">BI", 0, MESSAGE_BYTES) + bytes(MESSAGE_BYTES - 1)
    for stream in range(1, 2 * CALL_COUNT, 2):
        if stranger.is_closed:  # more was sent than it has said may come
            break
        stranger.begin(stream, f"/kedge.v1.{method}", almost_whole)
        most = max(most, server.memory_info().rss)
    assert most - before < 50 << 20


def test_of_health_checks_few_may_be_about_to_ask(stranger: Caller) -> None:
    for stream in range(1, 2 * 100, 2):
        stranger.begin(stream, "/grpc.health.v1.Health/Check", b"")
    stranger.wait(lambda: len(stranger.ended_streams) >= 100 - 64)
    stranger.wait(lambda: len(stranger.ended_streams) == 100)  # nor may those for long
    stranger.begin(201, "/grpc.health.v1.Health/Check", message(b""), ends=True)
    stranger.wait(lambda: 201 in stranger.ended_streams)


def test_a_call_that_ends_without_its_message_is_answered(server: ServerProcess) -> None:
    caller = Caller(server.address)
    caller.begin(1, "/kedge.v1.RunService/ListRuns", b"", ends=True)
    caller.begin(3, "/kedge.v1.OptimizerService/PullWeights", message(b"ab")[:6], ends=True)
    caller.wait(lambda: caller.ended_streams == {1, 3})
    caller.close()


def test_what_strangers_do_is_no_defect(closed: ServerProcess) -> None:
    assert not any("defect" in line or "Traceback" in line for line in closed.log)
