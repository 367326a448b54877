"""The lane of operations, by itself."""

import threading

import pytest

from kedge.errors import KedgeError
from kedge.pending import MAX_IN_FLIGHT, Lane


@pytest.fixture
def lane():
    lane = Lane("runs/r/workers/a")
    yield lane
    lane.close()


def test_operations_run_in_order_and_one_at_a_time(lane):
    seen, running = [], threading.Lock()

    def operation(number):
        assert running.acquire(blocking=False)
        seen.append(number)
        running.release()
        return number

    outcomes = []
    for number in range(50):
        lane.wait_for_room()
        outcomes.append(lane.submit("it", lambda number=number: operation(number)))
    assert [outcome.result(30) for outcome in outcomes] == seen == list(range(50))


def test_caller_waits_while_two_are_not_done(lane, in_background, eventually):
    gates = [threading.Event() for _ in range(4)]
    submitted = []

    def submit_all():
        for gate in gates:
            lane.wait_for_room()
            submitted.append(lane.submit("it", lambda gate=gate: gate.wait(30)))

    done = in_background(submit_all)
    for number, gate in enumerate(gates):
        expected = min(number + MAX_IN_FLIGHT, len(gates))
        eventually(lambda expected=expected: len(submitted) == expected)
        gate.set()
    done.result(30)
    lane.wait_until_idle()
    assert all(outcome.done() for outcome in submitted)


def test_whoever_waits_for_room_is_let_go_by_the_end(lane, in_background, eventually):
    gate, began = threading.Event(), []
    for _ in range(MAX_IN_FLIGHT):
        lane.submit("it", lambda: began.append(1) or gate.wait(30))
    waiting = [in_background(lane.wait_for_room), in_background(lane.wait_until_idle)]
    eventually(lambda: began)
    assert lane.close() == MAX_IN_FLIGHT

    for future in waiting:
        error = future.exception(30)
        assert error is None or error.reason == "CANCELLED"  # None: it came when all had ended
    gate.set()
    assert began == [1]  # the second was never begun
    assert lane.close() == 0


@pytest.mark.parametrize("error", [ValueError("of a test"), MemoryError(), KeyboardInterrupt()])
def test_failure_of_one_is_not_that_of_the_next(lane, error):
    def fail():
        raise error

    failed = lane.submit("the first", fail)
    assert lane.submit("the second", lambda: 7).result(30) == 7
    assert failed.exception(30) is error
    assert error.__notes__ == ["This is what became of an earlier call: the first. Later calls go on by themselves."]


def test_nothing_is_taken_after_the_end(lane):
    lane.close()
    for use in (lane.wait_for_room, lambda: lane.submit("it", int)):
        with pytest.raises(KedgeError) as error:
            use()
        assert error.value.reason == "CANCELLED"


def test_failure_that_was_asked_for_or_cancelled_is_not_logged(lane, caplog):
    def fail():
        raise ValueError("of a test")

    asked_for = lane.submit("it", fail)
    asked_for.is_asked_for = True
    lane.submit("another", lambda: None).result(30)
    del asked_for
    gate = threading.Event()
    lane.submit("it", lambda: gate.wait(30))
    lane.close()
    gate.set()
    assert caplog.text == ""
