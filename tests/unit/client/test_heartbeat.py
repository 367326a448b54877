"""When heartbeats are sent."""

import pytest
from faulty_transport import gone

from kedge.heartbeat import Waiting, _beat
from kedge.transport import Lease


class Stopped:
    """An event that never comes until it was waited for so often. `delays` is how long it was waited for."""

    def __init__(self, beat_count):
        self._beat_count = beat_count
        self.delays = []

    def wait(self, seconds):
        self.delays.append(seconds)
        return len(self.delays) > self._beat_count

    def is_set(self):
        return False


class Server:
    def __init__(self, *failures):
        self._failures = list(failures)

    def heartbeat(self, lease):
        if self._failures and (failure := self._failures.pop(0)):
            raise failure


@pytest.mark.parametrize(
    ("lease_seconds", "interval"), [(0.03, 0.05), (1.5, 0.5), (9.0, 3.0), (60.0, 3.0), (3600.0, 3.0)]
)
def test_heartbeats_come_every_third_of_a_lease_and_at_least_every_three_seconds(lease_seconds, interval):
    stopped = Stopped(3)
    _beat(Server(), Lease("runs/r/workers/a", 1, lease_seconds), Waiting(), stopped)
    assert stopped.delays == [interval] * 4


def test_lost_heartbeat_is_followed_by_another_soon():
    stopped = Stopped(4)
    _beat(Server(None, gone(), gone()), Lease("runs/r/workers/a", 1, 60.0), Waiting(), stopped)
    assert stopped.delays == [3.0, 3.0, 1.0, 1.0, 3.0]
