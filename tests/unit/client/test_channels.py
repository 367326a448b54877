"""When a connection is in doubt, and when it is replaced. Time stands still unless a test moves it."""

import gc
import weakref

import pytest
from faulty_transport import Time, gone

from kedge.errors import KedgeError
from kedge.transport.channels import Channels


class FakeChannel:
    is_closed = False

    def close(self):
        self.is_closed = True


class Bench:
    """The connections as they were made, and what becomes of heartbeats on them."""

    def __init__(self):
        self.made = []
        self.time = Time()
        self.channels = Channels(self._make, clock=self.time)
        (self.main,) = self.made

    def _make(self):
        self.made.append(FakeChannel())
        return self.made[-1]

    def answered(self):
        used = []
        self.channels.beat(used.append)
        return used[0].channel

    def fails(self, reason="SERVER_UNAVAILABLE", meanwhile=lambda: None):
        """A heartbeat that fails so, after something else has happened."""
        used = []

        def call(connection):
            used.append(connection)
            meanwhile()
            raise gone(reason)

        with pytest.raises(KedgeError) as error:
            self.channels.beat(call)
        assert error.value.reason == reason
        return used[0].channel

    @property
    def is_main_replaced(self):
        return self.channels.main.channel is not self.main

    @property
    def open_count(self):
        return sum(not channel.is_closed for channel in self.made)


@pytest.fixture
def bench():
    return Bench()


@pytest.fixture
def beating(bench):
    """One on which a heartbeat was answered and something was heard, long ago."""
    bench.answered()
    bench.channels.main.heard()
    bench.time.now = 100.0
    return bench


def test_second_connection_comes_with_the_first_need_for_it(bench):
    assert bench.made == [bench.main]
    assert bench.channels.unhindered is bench.channels.main
    beats = bench.channels.for_beats().channel
    assert bench.answered() is beats
    assert bench.made == [bench.main, beats]
    assert bench.channels.unhindered.channel is beats


def test_answered_heartbeats_replace_nothing(beating):
    for beating.time.now in range(100, 1000, 3):
        beating.answered()
    assert len(beating.made) == 2
    assert beating.open_count == 2


def test_lost_heartbeat_replaces_its_connection_and_an_answered_one_the_main_one(beating):
    lost = beating.fails()
    assert lost.is_closed
    assert not beating.main.is_closed
    beating.time.now += 1
    assert beating.answered() is not lost
    assert beating.is_main_replaced
    assert beating.main.is_closed
    assert beating.open_count == 2


def test_doubt_replaces_the_main_connection_once(beating):
    beating.fails()
    beating.answered()
    made = list(beating.made)
    for beating.time.now in range(101, 200):
        beating.answered()
    assert beating.made == made


@pytest.mark.parametrize("reason", ["LEASE_EXPIRED", "WORKER_SUPERSEDED", "WORKER_EVICTED", "RUN_NOT_FOUND"])
def test_refused_heartbeat_is_an_answer(beating, reason):
    beating.fails(reason)
    beating.answered()
    assert len(beating.made) == 2
    assert beating.open_count == 2


def test_upload_that_goes_on_keeps_its_connection(beating):
    beating.fails()
    for beating.time.now in range(100, 160):
        if beating.time.now % 4 == 0:
            beating.channels.main.sent()
        beating.answered()
    assert not beating.is_main_replaced


def test_upload_that_stands_still_loses_its_connection_five_seconds_later(beating):
    beating.fails()
    beating.time.now = 102.0
    beating.channels.main.sent()
    beating.time.now = 106.9
    beating.answered()
    assert not beating.is_main_replaced
    beating.time.now = 107.0
    beating.answered()
    assert beating.is_main_replaced


def test_what_is_heard_ends_the_doubt(beating):
    beating.fails()
    beating.time.now = 101.0
    beating.channels.main.heard()
    beating.time.now = 200.0
    beating.answered()
    assert not beating.is_main_replaced


def test_what_was_heard_before_the_last_lost_heartbeat_ends_no_doubt(beating):
    beating.fails()
    beating.time.now = 101.0
    beating.channels.main.heard()
    beating.time.now = 110.0
    beating.fails()
    beating.answered()
    assert beating.is_main_replaced


def test_refused_heartbeat_settles_the_doubt_at_once(beating):
    # It is the last of its lease: no other would notice that the push that has just begun gets nowhere.
    beating.fails()
    beating.channels.main.sent()
    beating.fails("LEASE_EXPIRED")
    assert beating.is_main_replaced


def test_server_that_is_away_for_long_costs_no_main_connection_and_few_others(beating):
    for beating.time.now in range(100, 700):
        beating.fails()
    assert not beating.is_main_replaced
    assert len(beating.made) <= 2 + 600 / 6
    assert beating.open_count == 2
    beating.answered()
    assert beating.is_main_replaced
    assert beating.open_count == 2


def test_connection_for_heartbeats_that_was_heard_on_is_given_up_at_once(bench):
    bench.channels.for_beats().heard()
    assert bench.fails().is_closed


def test_new_connection_has_six_seconds_for_its_first_answer(beating):
    beating.fails()
    beating.time.now += 5.9
    assert not beating.fails().is_closed
    beating.time.now += 0.1
    assert beating.fails().is_closed


def test_workers_that_lose_heartbeats_on_one_connection_have_one_doubt(beating):
    seen = []

    def meanwhile():
        # While the first worker waits in vain, the second has done so, too, and its next heartbeat is answered.
        seen.append(beating.fails())
        beating.answered()

    assert beating.fails(meanwhile=meanwhile) is seen[0]
    made = list(beating.made)
    assert (len(made), beating.open_count) == (4, 2)
    for beating.time.now in range(101, 200):
        beating.answered()
    assert beating.made == made


def test_patience_doubles_while_nothing_comes_of_replacements_and_is_short_again_after_it():
    bench = Bench()
    bench.channels.main.heard()

    def quiet_seconds_until_replaced():
        before = bench.channels.main
        before.sent()
        bench.fails()
        began_at = bench.time.now
        while bench.channels.main is before:
            bench.time.now += 1
            bench.answered()
        return bench.time.now - began_at

    assert [quiet_seconds_until_replaced() for _ in range(6)] == [5, 10, 20, 40, 60, 60]
    bench.channels.main.heard()
    assert [quiet_seconds_until_replaced() for _ in range(2)] == [5, 10]


def test_closing_closes_all_and_nothing_is_made_after_it(beating):
    beating.channels.close()
    beating.channels.close()
    assert beating.channels.is_closed
    assert beating.open_count == 0
    beating.fails()
    beating.answered()
    assert (len(beating.made), beating.open_count) == (2, 0)


def test_heartbeat_after_closing_gets_what_is_closed(bench):
    bench.channels.close()
    assert bench.answered().is_closed
    assert bench.made == [bench.main]


def test_closing_while_a_heartbeat_waits_ends_the_doubt_too(beating):
    beating.fails(meanwhile=beating.channels.close)
    assert (len(beating.made), beating.open_count) == (2, 0)


# Credentials


class Rotating:
    """Credentials that change when a test says so."""

    metadata = None

    def __init__(self):
        self.have_new = False

    def have_changed(self, *, at_once=False):
        changed, self.have_new = self.have_new, False
        return changed


@pytest.fixture
def rotating(bench):
    bench.channels._credentials = rotating = Rotating()
    return rotating


def test_other_credentials_make_other_connections_and_end_no_call(bench, rotating):
    before = bench.channels.main
    beats = bench.channels.for_beats()
    rotating.have_new = True
    assert bench.channels.main is not before
    assert bench.channels.for_beats() is not beats
    assert before.is_retired
    assert bench.channels.is_outdated(before)
    assert not bench.channels.is_outdated(bench.channels.main)
    assert not before.channel.is_closed, "what is under way goes on"
    assert bench.open_count == 4
    bench.channels.close()
    assert bench.open_count == 0, "also the one whose calls may go on"


def test_what_nobody_calls_on_any_more_is_let_go(bench, rotating):
    kept = bench.channels.main
    rotating.have_new = True
    forgotten = weakref.ref(bench.channels.main)
    rotating.have_new = True
    assert forgotten() is not bench.channels.main
    gc.collect()
    assert forgotten() is None
    assert kept.is_retired


def test_other_credentials_end_a_doubt(bench, rotating):
    bench.answered()
    bench.fails()
    rotating.have_new = True
    main = bench.channels.main
    bench.time.now += 100
    bench.answered()
    assert bench.channels.main is main, "it is new, and in no doubt"


def test_after_closing_nothing_is_made(bench, rotating):
    bench.channels.close()
    rotating.have_new = True
    assert bench.channels.main.channel is bench.main
    assert len(bench.made) == 1
