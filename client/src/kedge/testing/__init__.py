"""A Kedge server within the process, for tests of code that uses Kedge. It needs no network and no accelerator.

It keeps to the server's rules for runs, leases, rounds, staleness and repeated pushes, and to its optimizers (in
float64, so results differ from a real server's in the last bits). It is naive: every pull copies, nothing is bounded.
"""

import itertools
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from kedge.testing.transport import FakeTransport
from kedge.wire.errors import KedgeError

if TYPE_CHECKING:
    from kedge.client import Client

__all__ = ["FakeServer"]

_lock = threading.Lock()
_numbers = itertools.count(1)
_transports: dict[str, FakeTransport] = {}


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
        with _lock:
            self.address = f"fake://{next(_numbers)}"
            self._transport = _transports[self.address] = FakeTransport(self.address, clock)

    def connect(self, *, retry_seconds: float = 60.0) -> "Client":
        """A client of this server, as `kedge.connect(server.address)` makes it."""
        from kedge.client import connect

        return connect(self.address, retry_seconds=retry_seconds)

    def close(self) -> None:
        """Ends it: every call fails with SERVER_UNAVAILABLE from now on. May be called twice."""
        with _lock:
            _transports.pop(self.address, None)
        self._transport.shut_down()

    def __enter__(self) -> "FakeServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def transport_to(address: str) -> FakeTransport:
    """The transport of the fake server at an address.

    Raises:
        KedgeError: SERVER_UNAVAILABLE.
    """
    with _lock:
        transport = _transports.get(address)
    if transport is None:
        message = f"no FakeServer has the address {address} in this process: it was closed, or never made"
        raise KedgeError("SERVER_UNAVAILABLE", message, address=address)
    return transport
