"""A transport that fails as a test wants it, on the way to a fake server, and time that stands still."""

import numpy as np

from kedge.errors import KedgeError


class FaultyExchange:
    """Fails as `faults` says: before the other side has it ("lost"), or after ("unanswered"), or not (None)."""

    is_outdated = False

    def __init__(self, exchange, transport):
        self._exchange = exchange
        self._transport = transport
        self.is_closed = False

    def push(self, push):
        assert not self.is_closed
        self._transport.pushes.append((push.lease.epoch, push.sequence))
        return self._faulty(lambda: self._exchange.push(push))

    def pull(self, worker, request):
        assert not self.is_closed
        return self._faulty(lambda: self._exchange.pull(worker, request))

    def close(self):
        self.is_closed = True
        self._exchange.close()

    def _faulty(self, use):
        fault, error = next(self._transport.faults, (None, None))
        if fault == "lost":
            raise error
        answer = use()
        if fault == "unanswered":
            raise error
        return answer


class FaultyTransport:
    def __init__(self, transport):
        self._transport = transport
        self.faults = iter(())
        self.pushes = []
        self.exchanges = []

    def __getattr__(self, name):
        return getattr(self._transport, name)

    def open_exchange(self, manifest, *_):
        self.exchanges.append(FaultyExchange(self._transport.open_exchange(manifest), self))
        return self.exchanges[-1]


class Time:
    """A clock that moves only when it is told to, or when something waits."""

    now = 0.0

    def __call__(self):
        return self.now

    def wait(self, seconds):
        self.now += seconds


def grad(value=1.0):
    return {"w": np.array([value], np.float32)}


def gone(reason="SERVER_UNAVAILABLE"):
    return KedgeError(reason, "as the test wants it")
