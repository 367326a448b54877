"""BoundedStaleness: who waits for whom, and for which weights."""

import contextlib

import numpy as np
import pytest

import kedge
from kedge import optim
from kedge.errors import WaitTimeoutError
from kedge.transport import PullRequest

SGD = optim.SGD(lr=1.0)


def grad(*values):
    return {"w": np.array(values, np.float32)}


def clocks(run):
    return {worker.name.split("/")[-1]: worker.clock for worker in run.status().workers}


def assert_held_back(worker, clock, slowest_clock, bound):
    with pytest.raises(WaitTimeoutError) as error:
        worker.pull(timeout_seconds=0.05)
    assert error.value.reason == "WAITING_FOR_SLOWEST"
    expected = {"clock": clock, "slowest_clock": slowest_clock, "bound": bound}
    assert error.value.metadata == {key: str(value) for key, value in expected.items()}


@pytest.fixture
def ahead(new_run):
    """A run of bound 1 with two workers, of which "a" is ahead by more than that."""
    run = new_run(optim.Lookahead(SGD, sync_period=50), kedge.BoundedStaleness(1))
    with run.join("a") as a, run.join("b") as b:
        for _ in range(2):
            a.pull()
            assert a.push(grad(1)).outcome == "applied"
        yield run, a, b


def test_every_contribution_is_a_step_however_stale(new_run):
    run = new_run(SGD, kedge.BoundedStaleness(100))
    with run.join() as worker:
        results = [worker.push(grad(1), base_step=0, example_count=7)[:4] for _ in range(3)]

    assert results == [("applied", "EACH_CONTRIBUTION", n + 1, n) for n in range(3)]
    assert run.pull()["w"] == [0.0]


def test_worker_that_is_ahead_by_more_than_the_bound_waits_at_its_pull(ahead):
    run, a, b = ahead

    assert clocks(run) == {"a": 2, "b": 0}
    assert_held_back(a, 2, 0, 1)
    waiting_for = run.status().waiting_for
    assert b.name in waiting_for
    assert a.name not in waiting_for


def test_nobody_else_waits_and_no_other_pull(ahead):
    run, a, b = ahead

    assert b.pull()["w"] == run.pull()["w"] == [1.0]
    assert a.pull("slow", timeout_seconds=0.05)["w"] == run.pull("slow")["w"] == [3.0]


def test_fast_weights_together_with_the_slow_ones_are_held_back_too(client, ahead):
    run, a, _ = ahead
    exchange = client._transport.open_exchange(run.manifest)
    with contextlib.closing(exchange), pytest.raises(WaitTimeoutError) as error:
        exchange.pull(a.name, PullRequest("fast_and_slow"))
    assert error.value.reason == "WAITING_FOR_SLOWEST"


def test_worker_at_the_bound_goes_on(ahead):
    run, a, b = ahead
    b.push(grad(1), base_step=0)

    assert a.pull(timeout_seconds=0.05)["w"] == [0.0]
    assert run.status().waiting_for == ""


@pytest.mark.parametrize(
    "let_go",
    [
        lambda run, b: b.push(grad(0), base_step=0),
        lambda run, b: b.push(grad(np.nan), base_step=0),
        lambda run, b: b.close(),
        lambda run, b: run.evict("b"),
        lambda run, b: run.join("b", lease_seconds=0.3)._session._stop_heartbeats(),
        lambda run, b: run.set_aggregation(kedge.BoundedStaleness(2)),
        lambda run, b: run.set_aggregation(kedge.Asynchronous()),
    ],
    ids=["contributes", "is rejected", "leaves", "is evicted", "loses its lease", "other bound", "other policy"],
)
def test_waiting_pull_is_answered_once_nothing_holds_it_back(ahead, in_background, let_go):
    run, a, b = ahead
    waiting = in_background(a.pull)
    assert clocks(run) == {"a": 2, "b": 0}
    let_go(run, b)

    assert waiting.result(30)["w"] == [1.0]


def test_waiting_pull_of_a_worker_that_is_evicted_is_answered(ahead, in_background):
    run, a, _ = ahead
    waiting = in_background(a.pull)
    run.evict("a")

    assert waiting.result(30)["w"] == [1.0]


def test_push_without_the_pull_is_rejected_and_its_clock_stands_still(ahead):
    run, a, b = ahead

    result = a.push(grad(100))
    assert result[:4] == ("rejected", "AHEAD_OF_BOUND", 2, 1)
    assert result.message
    assert clocks(run) == {"a": 2, "b": 0}
    assert run.status().rejected_counts == {"AHEAD_OF_BOUND": 1}
    b.push(grad(1), base_step=0)
    assert a.push(grad(1)).outcome == "applied"
    assert run.pull()["w"] == [-1.0]


def test_clocks_are_never_further_apart_than_the_bound_and_one(new_run):
    run = new_run(SGD, kedge.BoundedStaleness(1))
    with run.join("a") as a, run.join("b"):
        for value in (1, np.nan, 1, np.nan, np.inf):
            a.push(grad(value), base_step=0)
        assert clocks(run) == {"a": 2, "b": 0}


def test_step_waits_for_the_slowest(ahead, in_background, eventually):
    run, a, b = ahead
    b.push(grad(0), base_step=0)
    a.pull()
    waiting = in_background(a.step, grad(1))
    eventually(lambda: clocks(run) == {"a": 3, "b": 1})
    assert not waiting.done()
    b.push(grad(10), base_step=0)

    assert waiting.result(30)["w"] == [3 - 2 - 1 - 10]
    assert a.last_result[:3] == ("applied", "EACH_CONTRIBUTION", 4)


def test_worker_that_joins_begins_where_the_slowest_is(ahead):
    run, _, b = ahead
    b.push(grad(0), base_step=0)
    with run.join("c"):
        assert clocks(run) == {"a": 2, "b": 1, "c": 1}


def test_worker_that_takes_its_own_lease_over_keeps_its_clock(ahead):
    run, _, _ = ahead
    with run.join("a") as again:
        assert clocks(run) == {"a": 2, "b": 0}
        assert_held_back(again, 2, 0, 1)


def test_worker_that_left_begins_anew_and_the_first_one_at_zero(ahead):
    run, a, b = ahead
    a.close()
    with run.join("a"):
        assert clocks(run) == {"a": 0, "b": 0}
    b.push(grad(0), base_step=0)
    b.close()
    with run.join("b") as b:
        assert clocks(run) == {"b": 0}
        assert b.pull()["w"] == run.pull()["w"]


def test_with_bound_0_all_pull_the_weights_of_the_moment_when_the_slowest_had_contributed(new_run):
    run = new_run(SGD, kedge.BoundedStaleness(0))
    with run.join("a") as a, run.join("b") as b:
        a.pull()
        a.push(grad(1))
        assert b.pull()["w"] == [3.0]
        assert b.step_number == 0
        assert b.pull(if_newer_than=0) is None
        assert run.pull()["w"] == [2.0]
        assert_held_back(a, 1, 0, 0)
        b.push(grad(10))

        assert a.pull()["w"] == b.pull()["w"] == [-8.0]
        assert a.step_number == b.step_number == 2
        a.push(grad(1))
        with run.join("c") as c:
            assert c.pull()["w"] == [-8.0]
            assert c.step_number == 2


def test_with_bound_0_a_poisoned_worker_delays_nobody(new_run):
    run = new_run(SGD, kedge.BoundedStaleness(0))
    with run.join("a") as a, run.join("b") as b:
        for expected in (2.0, 1.0):
            a.pull()
            b.pull()
            assert a.push(grad(np.nan)).outcome == "rejected"
            assert b.push(grad(1)).outcome == "applied"
            assert a.pull()["w"] == b.pull()["w"] == [expected]


def test_with_bound_0_it_is_synchronous_at_as_many_times_the_rate(client, run_name, in_background):
    slopes, centres = {"a": 1.0, "b": 0.5, "c": 0.25}, {"a": 2.0, "b": -1.0, "c": 8.0}
    rate, start, rounds = 0.25, np.array([3.0, -5.0], np.float32), 6

    def trace_of(worker, who):
        weights, trace = worker.pull()["w"], []
        for _ in range(rounds):
            weights = worker.step({"w": np.float32(slopes[who]) * (weights - np.float32(centres[who]))})["w"]
            trace.append(weights)
        return trace

    def traces(name, policy, lr):
        run = client.create_run(name, params={"w": start}, optimizer=optim.SGD(lr=lr), aggregation=policy)
        with contextlib.ExitStack() as stack:
            workers = {who: stack.enter_context(run.join(who)) for who in slopes}
            return [future.result(60) for future in [in_background(trace_of, w, who) for who, w in workers.items()]]

    lockstep = np.array(traces(f"{run_name}-0", kedge.BoundedStaleness(0), rate))
    synchronous = np.array(traces(f"{run_name}-1", kedge.Synchronous(3), 3 * rate))

    exact, expected = start.astype(np.float64), []
    for _ in range(rounds):
        exact = exact - rate * sum(slopes[who] * (exact - centres[who]) for who in slopes)
        expected.append(exact)
    assert lockstep[0].tobytes() == lockstep[1].tobytes() == lockstep[2].tobytes()
    np.testing.assert_allclose(lockstep[0], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(synchronous[0], lockstep[0], rtol=1e-5, atol=1e-6)
