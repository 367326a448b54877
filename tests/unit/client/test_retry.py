import pytest

from kedge.errors import KedgeError
from kedge.retry import AWAY_DELAY_SECONDS, FIRST_DELAY_SECONDS, MAX_DELAY_SECONDS, SILENCE_SECONDS, Retrier


class Time:
    """A clock that moves only when something waits."""

    def __init__(self):
        self.now = 1000.0
        self.waits = []

    def wait(self, seconds):
        self.waits.append(seconds)
        self.now += seconds


class Failing:
    """Raises so many times, then returns "done"."""

    def __init__(self, reason, times, **options):
        self.left = times
        self.calls = 0
        self._make = lambda: KedgeError(reason, "not now", **options)

    def __call__(self):
        self.calls += 1
        if self.left:
            self.left -= 1
            raise self._make()
        return "done"


@pytest.fixture
def time():
    return Time()


@pytest.fixture
def retrier(time):
    return Retrier(60.0, clock=lambda: time.now, wait=time.wait, jitter=lambda: 1.0)


@pytest.mark.parametrize(
    "reason",
    [
        "SERVER_UNAVAILABLE",
        "SERVER_DRAINING",
        "STAGING_FULL",
        "QUEUE_FULL",
        "TOO_MANY_STREAMS",
        "READER_STALLED",
        "STORAGE_FULL",
        "STORAGE_UNAVAILABLE",
        "CHECKSUM_MISMATCH",
    ],
)
def test_what_may_succeed_later_is_repeated(retrier, reason):
    attempt = Failing(reason, 3)

    assert retrier.call(attempt) == "done"
    assert attempt.calls == 4


@pytest.mark.parametrize(
    "reason",
    [
        "RUN_NOT_FOUND",
        "CHECKPOINT_DAMAGED",
        "DURABILITY_UNAVAILABLE",
        "LEASE_EXPIRED",
        "WORKER_SUPERSEDED",
        "WORKER_EVICTED",
        "WAITING_FOR_SLOWEST",
        "INTERNAL",
        "CANCELLED",
        "FROM_A_NEWER_SERVER",
    ],
)
def test_what_will_not_succeed_is_raised_at_once(retrier, time, reason):
    attempt = Failing(reason, 1)

    with pytest.raises(KedgeError):
        retrier.call(attempt)
    assert (attempt.calls, time.waits) == (1, [])


@pytest.mark.parametrize(
    ("reason", "limit"),
    [
        ("SERVER_UNAVAILABLE", AWAY_DELAY_SECONDS),
        ("SERVER_DRAINING", AWAY_DELAY_SECONDS),
        ("STAGING_FULL", MAX_DELAY_SECONDS),
        ("STORAGE_FULL", AWAY_DELAY_SECONDS),
    ],
)
def test_delays_double_up_to_a_limit(retrier, time, reason, limit):
    retrier.call(Failing(reason, 9))

    assert time.waits == [min(FIRST_DELAY_SECONDS * 2**n, limit) for n in range(9)]


def test_server_that_comes_back_is_waited_for_no_longer_than_a_second(retrier, time):
    back_at = time.now + 30.5

    def attempt():
        if time.now < back_at:
            raise KedgeError("SERVER_UNAVAILABLE", "not now")
        return time.now

    assert retrier.call(attempt) - back_at <= 1.0


def test_delays_are_spread(time):
    jitter = iter([0.5, 0.0, 1.0, 1.0])
    Retrier(60.0, clock=lambda: time.now, wait=time.wait, jitter=lambda: next(jitter)).call(
        Failing("SERVER_UNAVAILABLE", 3)
    )

    assert time.waits == pytest.approx([0.05, 0.02, 0.4])  # never less than a tenth


@pytest.mark.parametrize("reason", ["STAGING_FULL", "QUEUE_FULL", "TOO_MANY_STREAMS"])
def test_delay_that_the_server_asks_for_is_kept(retrier, time, reason):
    retrier.call(Failing(reason, 1, retry_after_seconds=7.0))

    assert time.waits == [7.0]


def test_last_error_is_raised_once_the_time_is_up(retrier, time):
    attempt = Failing("SERVER_UNAVAILABLE", 10**6)

    with pytest.raises(KedgeError) as error:
        retrier.call(attempt)
    assert error.value.reason == "SERVER_UNAVAILABLE"
    assert time.now == pytest.approx(1060.0)


def test_time_counts_from_the_first_failure_and_not_from_the_call(time):
    attempt = Failing("SERVER_UNAVAILABLE", 1)

    def slow_to_fail():
        time.now += 600.0
        return attempt()

    retrier = Retrier(60.0, clock=lambda: time.now, wait=time.wait, jitter=lambda: 1.0)
    assert retrier.call(slow_to_fail) == "done"


def test_time_counts_anew_after_an_attempt_that_was_longer_than_any_silence(time):
    began_at = time.now
    lasts = iter([0.0, SILENCE_SECONDS + 1.0, 0.0, SILENCE_SECONDS - 1.0])

    def attempt():
        time.now += next(lasts)
        raise KedgeError("SERVER_UNAVAILABLE", "not now")

    with pytest.raises(KedgeError):
        Retrier(10.0, clock=lambda: time.now, wait=time.wait, jitter=lambda: 1.0).call(attempt)
    assert next(lasts, None) is None  # the second outage was ridden through, the silent attempt was the last
    assert time.now == pytest.approx(began_at + 0.1 + 61.0 + (0.1 + 0.2) + 59.0)


def test_no_time_means_one_attempt(time):
    attempt = Failing("SERVER_UNAVAILABLE", 1)
    with pytest.raises(KedgeError):
        Retrier(0.0, clock=lambda: time.now, wait=time.wait).call(attempt)
    assert attempt.calls == 1


def test_closed_retrier_refuses():
    retrier = Retrier(60.0)
    retrier.close()

    with pytest.raises(KedgeError) as error:
        retrier.call(lambda: 1)
    assert error.value.reason == "CANCELLED"


def test_closing_ends_the_waiting():
    retrier = Retrier(60.0)

    def attempt():
        retrier.close()
        raise KedgeError("SERVER_UNAVAILABLE", "not now", retry_after_seconds=59.0)

    with pytest.raises(KedgeError) as error:
        retrier.call(attempt)
    assert error.value.reason == "CANCELLED"
