"""A Kedge server within the process, for tests of code that uses Kedge. It needs no network and no accelerator.

It keeps to the server's rules for runs, leases, aggregation, admission, events and repeated pushes, and to its
optimizers (in float64, so results differ from a real server's in the last bits). It is naive: every pull copies,
nothing is bounded, and a step is applied at the moment when its round closes. Its runs are kept in memory, as by a
server without a data directory: they have no checkpoints.
"""

import time
from collections.abc import Callable

from kedge.client import Client, connect
from kedge.testing.transport import FakeTransport
from kedge.transport import in_process

__all__ = ["FakeServer"]


class FakeServer:
    """A server to connect to within this process. Thread-safe; close it, or use it in a `with` block.

    Args:
        clock: seconds that only grow. Leases, rounds and waiting calls go by it, so a test may let time pass at will.

    Attributes:
        address: what `kedge.connect` takes.

    Example:
        >>> with kedge.testing.FakeServer() as server:
        ...     client = kedge.connect(server.address)
        ...     run = client.create_run(
        ...         "test",
        ...         params={"w": np.float32(3)},
        ...         optimizer=kedge.optim.SGD(lr=1.0),
        ...         aggregation=kedge.Synchronous(quorum=1),
        ...     )
        ...     with run.join() as worker:
        ...         weights = worker.pull()
        ...         worker.step({"w": np.float32(1)})
        {'w': array(2., dtype=float32)}
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.address = in_process.new_address()
        self._transport = FakeTransport(self.address, clock)
        in_process.publish(self.address, self._transport)

    def connect(self, *, retry_seconds: float = 60.0) -> Client:
        """A client of this server, as `kedge.connect(server.address)` makes it."""
        return connect(self.address, retry_seconds=retry_seconds)

    def close(self) -> None:
        """Ends it: every call fails with SERVER_UNAVAILABLE from now on. May be called twice."""
        in_process.withdraw(self.address)
        self._transport.shut_down()

    def __enter__(self) -> "FakeServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
