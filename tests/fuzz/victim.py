"""A server that is fuzzed, in a process of its own, with an honest worker that trains on it all the while."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
from certificates import Authority
from google.protobuf.duration_pb2 import Duration
from secure_wire import SecureWireClient, secure_server
from server_process import ServerProcess
from tokens_file import TokensFile
from wire_client import WireClient, push_stream

from kedge.v1 import optimizer_service_pb2 as pb

from .figures import MAX_GROWTH_BYTES, MAX_SECONDS, Figures, measured

ENVIRONMENT = {
    "KEDGE_LIMITS__RUNS": "8",
    "KEDGE_LIMITS__WORKERS_PER_RUN": "64",
    "KEDGE_LIMITS__EVENTS_PER_RUN": "256",
    "KEDGE_LIMITS__CONTRIBUTIONS_PER_RUN": "64",
    "KEDGE_LIMITS__PARAMETERS_PER_RUN": "10000",
    "KEDGE_LIMITS__UPLOAD_IDLE_SECONDS": "2",
    "KEDGE_LEASES__MAX_SECONDS": "3600",
}
"""What a peer may have the server hold, so that what is measured is what it should not hold."""

LONG = Duration(seconds=3600)
LOG_BYTES_PER_1000_INPUTS = 100_000
_WEIGHTS = np.linspace(-1, 1, 6, dtype=np.float32)
_PAUSE_SECONDS = 0.01
_SETTLE_SECONDS = 30
_SPARE_DESCRIPTORS = 8
_PASSING = (grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE)
_FORBIDDEN = ("defect", "Traceback", "INTERNAL", "Unexpected", "exception")


class HonestWorker:
    """Pushes one gradient after the other, and notes how long each takes.

    Args:
        client: its own.
    """

    def __init__(self, client: WireClient) -> None:
        self._client = client
        run = client.create("honest", _WEIGHTS)
        self._digest = run.manifest.digest
        self._lease = client.join(run.name, "steady", lease=LONG)
        self.step_count = 0
        self.slowest_seconds = 0.0
        self.failure: BaseException | None = None
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._train, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends it."""
        self._ends.set()
        self._thread.join(60)
        self._client.close()

    def _train(self) -> None:
        try:
            while not self._ends.wait(_PAUSE_SECONDS):
                self._push()
        except BaseException as error:
            self.failure = error

    def _push(self) -> None:
        fields = {"sequence": self.step_count + 1, "base_step": self.step_count, "wait": Duration(seconds=20)}
        begun = time.monotonic()
        requests = push_stream(self._lease, self._digest, np.ones_like(_WEIGHTS), **fields)
        result = persistently(lambda: self._client.push(requests))
        self.slowest_seconds = max(self.slowest_seconds, time.monotonic() - begun)
        assert result.outcome == pb.PUSH_OUTCOME_APPLIED, result
        self.step_count += 1
        assert result.step == self.step_count, "another worker has stepped on this run"


class Victim:
    """A server with its honest worker.

    Args:
        folder: for its files of tokens and certificates.
        asks: whether it asks for tokens.
        over_tls: whether it speaks TLS.
    """

    def __init__(self, folder: Path, *, asks: bool = False, over_tls: bool = False) -> None:
        tokens = TokensFile(folder / "tokens")
        honest_token = tokens.add("honest", "admin") if asks else None
        self.token = tokens.add("fuzz", "admin", "fuzz*,x*") if asks else None
        tokens.write()
        self.authority = Authority(folder) if over_tls else None
        self.process = self._start(tokens.path if asks else None)
        self.address = self.process.address
        self.pid = self.process.process.pid
        self.honest = HonestWorker(self._client(honest_token))

    def client(self) -> WireClient:
        """One of the fuzzer's."""
        return self._client(self.token)

    def _start(self, tokens_file: Path | None) -> ServerProcess:
        if self.authority is not None:
            return secure_server(self.authority.issue("server"), tokens_file=tokens_file, others=ENVIRONMENT)
        asks = {} if tokens_file is None else {"KEDGE_ACCESS__TOKENS_FILE": str(tokens_file)}
        return ServerProcess(environment=ENVIRONMENT | asks)

    def _client(self, token: str | None) -> WireClient:
        if self.authority is None:
            return WireClient(self.address, token=token)
        return SecureWireClient(self.address, self.authority, token=token)

    def close(self) -> None:
        """Ends all of it."""
        self.honest.stop()
        assert self.process.stop() == 0

    @contextlib.contextmanager
    def under(self, name: str) -> Iterator[Figures]:
        """Around a series of inputs: what it must leave as it was."""
        process = psutil.Process(self.pid)
        descriptors, steps, log = process.num_fds(), self.honest.step_count, self._log_bytes()
        self.honest.slowest_seconds = 0.0
        with measured(name, self.pid) as figures:
            yield figures
            self._settle(lambda: process.num_fds() <= descriptors + _SPARE_DESCRIPTORS)
        figures.log_bytes = self._log_bytes() - log
        figures.honest_count = self.honest.step_count - steps
        figures.honest_slowest_seconds = self.honest.slowest_seconds
        self._check(figures, steps)

    def _check(self, figures: Figures, steps: int) -> None:
        self._settle(lambda: self.honest.failure or self.honest.step_count > steps)
        assert self.honest.failure is None, repr(self.honest.failure)
        assert self.process.process.poll() is None, "the server ended"
        text = "".join(self.process.log)
        assert not any(word in text for word in _FORBIDDEN), text[-4000:]
        assert figures.log_bytes <= LOG_BYTES_PER_1000_INPUTS * max(1, figures.input_count / 1000)
        assert figures.growth_bytes < MAX_GROWTH_BYTES
        assert figures.slowest_seconds < 2 * MAX_SECONDS, figures.slowest
        assert figures.honest_slowest_seconds < 2 * MAX_SECONDS

    def _settle(self, holds: Any) -> None:
        until = time.monotonic() + _SETTLE_SECONDS
        while not holds() and time.monotonic() < until:
            time.sleep(0.05)
        assert holds(), "the server keeps descriptors, or the honest worker stands still"

    def _log_bytes(self) -> int:
        return sum(len(line) for line in self.process.log)


def persistently(call: Callable[[], Any]) -> Any:
    """Makes a call as the SDK does: gRPC cancels calls when very many wait to be taken, and they are made again."""
    until = time.monotonic() + _SETTLE_SECONDS
    while True:
        try:
            return call()
        except grpc.RpcError as error:
            if error.code() not in _PASSING or time.monotonic() > until:
                raise
            time.sleep(_PAUSE_SECONDS)
