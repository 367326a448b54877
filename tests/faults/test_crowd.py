"""A crowd that only stands in the way, and one worker that trains on.

500 silent connections, 500 idle streams, 50 streams of a byte or a tiny chunk a second, 50 readers that never read.
"""

import resource
import socket
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import psutil
import pytest
from crowd import (
    DESCRIPTORS,
    Connection,
    Crowd,
    allow_descriptors,
    idle_streams,
    openers,
    pushers,
    reader,
    silent_connections,
)
from google.protobuf.duration_pb2 import Duration
from server_process import ServerProcess
from wire_client import WireClient, push_header

import kedge
from kedge import optim
from kedge.v1 import optimizer_service_pb2 as pb

RUN = "runs/crowded"
ELEMENTS = 1 << 20  # 4 MiB of weights: far more than a reader's window
GRADIENT = {"t0": np.ones(ELEMENTS, np.float32)}

# Small, so that the test is short: a message may wait for 2 s, an upload has 4 s on the whole.
LIMITS = {
    "KEDGE_LIMITS__UPLOAD_IDLE_SECONDS": "2",
    "KEDGE_LIMITS__UPLOAD_MIN_BYTES_PER_SECOND": str(2 << 20),
    "KEDGE_LIMITS__READ_IDLE_SECONDS": "2",
    "KEDGE_LIMITS__READING_BYTES": str(8 << 20),
}


@pytest.fixture(scope="module", autouse=True)
def enough_descriptors() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    if (allowed := allow_descriptors(DESCRIPTORS)) < DESCRIPTORS:
        pytest.skip(f"a process may open {allowed} descriptors here, and the crowd needs {DESCRIPTORS}")
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


class Scene(NamedTuple):
    """A server with a run, and a worker that trains."""

    server: ServerProcess
    process: psutil.Process
    worker: kedge.Worker
    header: pb.PushHeader
    """What a dribbling push begins with."""

    def steps(self, count: int) -> None:
        for _ in range(count):
            before = self.worker.step_number
            self.worker.step(GRADIENT)
            assert self.worker.step_number == before + 1

    def resident_mib(self) -> float:
        """The median over some steps: what the allocator gives back at once and takes again is no growth."""
        samples = []
        for _ in range(15):
            self.steps(2)
            samples.append(self.process.memory_info().rss / (1 << 20))
        return float(np.median(samples))


@pytest.fixture
def scene() -> Iterator[Scene]:
    with ServerProcess(environment=LIMITS) as server:
        wire = WireClient(server.address)
        with kedge.connect(server.address) as client:
            params = {"t0": np.zeros(ELEMENTS, np.float32)}
            run = client.create_run(
                "crowded", params=params, optimizer=optim.SGD(lr=1e-3), aggregation=kedge.Asynchronous()
            )
            lease = wire.join(RUN, "dribbler", lease=Duration(seconds=300))
            header = push_header(lease, wire.run(RUN, full=True).manifest.digest, size_bytes=4 * ELEMENTS)
            with run.join(transport="grpc") as worker:
                worker.pull()
                yield Scene(server, psutil.Process(server.process.pid), worker, header)
        wire.close()


def is_closed_by_server(silent: socket.socket) -> bool:
    silent.setblocking(False)
    try:
        while silent.recv(1 << 16):
            pass
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def test_worker_goes_on_in_a_crowd_and_the_server_neither_grows_nor_keeps_anything_of_it(
    scene: Scene, eventually: Callable[[Callable[[], Any]], None]
) -> None:
    scene.steps(60)
    descriptor_count = scene.process.num_fds()
    before_mib = scene.resident_mib()
    with Crowd(scene.server.address) as crowd:
        silent = silent_connections(crowd, 500)
        idle = idle_streams(crowd, 500)
        readers = []
        for number in range(50):  # each of them at weights of its own
            readers.append(reader(crowd, RUN, is_polite=number % 2 == 0))
            scene.steps(1)
        openers(crowd, 10)
        dribblers = pushers(crowd, 40, scene.header)
        growth_mib = [scene.resident_mib() - before_mib]

        def are_ended(connections: list[Connection]) -> bool:
            scene.steps(1)
            return all(connection.ended_streams for connection in connections)

        eventually(lambda: are_ended(dribblers))
        eventually(lambda: are_ended(readers[::2]))
        growth_mib.append(scene.resident_mib() - before_mib)
        eventually(lambda: all(is_closed_by_server(connection.socket) for connection in silent))
        assert not any(connection.ended_streams or connection.is_closed for connection in idle)
        for _ in range(10):  # they leave while a message waits for them
            reader(crowd, RUN, is_polite=True)
        scene.steps(5)
    eventually(lambda: scene.process.num_fds() <= descriptor_count)
    growth_mib.append(scene.resident_mib() - before_mib)
    assert max(growth_mib) < 64, growth_mib
    assert scene.server.log == [], "nobody's coming or going is a defect"
