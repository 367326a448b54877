"""What a worker does in the background, over a way that is held up or fails as a test wants it."""

import contextlib
import gc
import itertools
import re
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
from faulty_transport import FaultyExchange, gone, grad

import kedge
from kedge.errors import KedgeError
from kedge.pending import Lane

PAGE = (Path(__file__).parents[3] / "docs" / "asynchronous.md").read_text(encoding="utf-8")


class Gate:
    """Faults for a transport: none, but whoever comes by is held up until the gate is open."""

    def __init__(self):
        self.reached = threading.Event()
        self.opened = threading.Event()

    def __iter__(self):
        return self

    def __next__(self):
        self.reached.set()
        assert self.opened.wait(30)
        return None, None


@pytest.fixture
def gate(transport, worker):
    """A closed gate in the way of a worker that has pulled."""
    transport.faults = gate = Gate()
    yield gate
    gate.opened.set()


@pytest.fixture
def sent(monkeypatch):
    """The contributions that were sent, as they were at that time: base step and value."""
    seen = []
    push = FaultyExchange.push

    def note(exchange, contribution):
        seen.append((contribution.base_step, contribution.arrays[0].item()))
        return push(exchange, contribution)

    monkeypatch.setattr(FaultyExchange, "push", note)
    return seen


def background_threads(worker_name):
    return [thread for thread in threading.enumerate() if thread.name == f"kedge exchange {worker_name}"]


# ------------------------------------------------------------------------------------------------ while it is under way


def test_caller_computes_while_its_exchange_is_held_up(worker, gate):
    pending = worker.step_async(grad())
    assert gate.reached.wait(30)
    computed = sum(range(1000))  # the exchange cannot end before the gate is opened, below
    assert not pending.is_done
    assert (worker.step_number, worker.last_result) == (0, None)

    gate.opened.set()
    assert computed == 499_500
    assert pending.result()["w"] == [2.0]
    assert worker.last_result.outcome == "applied"


@pytest.mark.parametrize("call", ["step", "push", "pull"])
def test_result_is_what_the_blocking_call_returns(run, worker, call):
    with run.join("b") as other:
        other.pull()
        arguments = [] if call == "pull" else [grad()]
        blocking = getattr(other, call)(*arguments)
        result = getattr(worker, f"{call}_async")(*arguments).result()
        assert type(result) is type(blocking)
        assert worker.step_number == {"step": 2, "push": 0, "pull": 1}[call] - (call == "pull")
        if call == "push":
            assert (result.outcome, result.staleness, worker.last_result) == ("applied", 1, result)


def test_nothing_changes_behind_the_callers_back(run, worker, eventually):
    pending = worker.step_async(grad())
    eventually(lambda: pending.is_done)
    assert run.status().step == 1
    assert (worker.step_number, worker.last_result) == (0, None)

    pending.result()
    assert (worker.step_number, worker.last_result.step) == (1, 1)


def test_gradient_is_of_the_weights_that_were_taken_last_when_it_was_sent(worker, sent):
    first = worker.step_async(grad(1))
    second = worker.step_async(grad(2))
    first.result()
    third = worker.step_async(grad(3))
    second.result()
    worker.push_async(grad(4))
    worker.push_async(grad(5), base_step=1).result()
    third.result()

    assert sent == [(0, 1), (0, 2), (1, 3), (2, 4), (1, 5)]


def test_results_may_be_taken_in_any_order_and_again(worker):
    first, second = worker.step_async(grad(1)), worker.step_async(grad(1))
    newer, older = second.result(), first.result()

    assert (newer["w"], older["w"]) == ([1.0], [2.0])
    assert worker.step_number == 1  # of the weights that were returned last
    assert worker.last_result.step == 1
    assert second.result() is newer
    assert worker.step_number == 2


def test_blocking_calls_go_behind_those_in_the_background(worker, gate, monkeypatch):
    wait_until_idle = Lane.wait_until_idle

    def open_and_wait(lane):
        gate.opened.set()  # only now: who does not wait finds it closed
        wait_until_idle(lane)

    monkeypatch.setattr(Lane, "wait_until_idle", open_and_wait)
    for value, use in ((1, worker.pull), (2, lambda: worker.step(grad(0))), (4, lambda: worker.push(grad(0)))):
        gate.opened.clear()
        worker.push_async(grad(value))
        use()
    assert worker.pull()["w"] == [3 - 1 - 2 - 4]


def test_condition_of_a_pull_and_slow_weights(run, worker):
    worker.push(grad())

    assert worker.pull_async(if_newer_than=1).result() is None
    assert worker.step_number == 0
    assert worker.pull_async(if_newer_than=0).result()["w"] == [2.0]
    assert worker.step_number == 1
    waits = worker.pull_async(min_step=9, timeout_seconds=0)
    with pytest.raises(KedgeError) as error:
        waits.result()
    assert error.value.reason == "STEP_NOT_REACHED"


def test_slow_weights_leave_the_step_number_as_it_is(transport, worker, monkeypatch):
    worker.push(grad())
    pull = FaultyExchange.pull

    def noting_pull(exchange, of, request):
        assert request.weights == "slow"
        return pull(exchange, of, request._replace(weights="fast"))  # this run has none

    monkeypatch.setattr(FaultyExchange, "pull", noting_pull)
    assert worker.pull_async("slow").result()["w"] == [2.0]
    assert worker.step_number == 0


def test_result_that_does_not_come_in_time_may_be_asked_for_again(worker, gate):
    pending = worker.step_async(grad())
    with pytest.raises(TimeoutError, match="runs/r/workers/a with a gradient of step 0 is not done after 0 s"):
        pending.result(timeout_seconds=0)
    assert "under way" in repr(pending)

    gate.opened.set()
    assert pending.result(timeout_seconds=30)["w"] == [2.0]
    assert "done" in repr(pending)


# ------------------------------------------------------------------------------------------------------------ gradients


def test_gradient_may_be_overwritten_at_once(run, worker, gate):
    gradient = grad(1)
    pending = [worker.push_async(gradient)]
    gradient["w"][:] = 10
    pending.append(worker.push_async(gradient))
    gradient["w"][:] = np.nan
    gate.opened.set()

    assert [one.result().outcome for one in pending] == ["applied", "applied"]
    assert run.pull()["w"] == [3 - 1 - 10]


def test_gradient_that_is_not_copied_is_the_callers_own(worker, monkeypatch):
    own, seen = grad(), []
    push = FaultyExchange.push
    monkeypatch.setattr(FaultyExchange, "push", lambda exchange, it: (seen.append(it.arrays[0]), push(exchange, it))[1])

    worker.step_async(own, copy=False).result()
    worker.step_async(own).result()
    assert [np.shares_memory(own["w"], array) for array in seen] == [True, False]


def test_copies_are_made_in_the_same_memory_again(worker, monkeypatch):
    seen = []
    push = FaultyExchange.push
    monkeypatch.setattr(FaultyExchange, "push", lambda exchange, it: (seen.append(it.arrays[0]), push(exchange, it))[1])

    for value in range(3):
        worker.push_async(grad(value)).result()
    assert np.shares_memory(seen[0], seen[1])
    assert np.shares_memory(seen[0], seen[2])


def test_gradients_of_other_dtypes_follow_one_another(run, worker):
    value = 2.0**-13  # less than what float16 can add to 1
    for dtype in (np.float16, np.float32):
        worker.push_async({"w": np.array([1 + value], dtype)}).result()
    assert run.pull()["w"] == [3 - 1 - (1 + value)]


def test_what_is_wrong_with_a_gradient_is_raised_at_once(transport, run, worker):
    for wrong, reason in (({}, "TENSOR_MISSING"), ({"w": np.zeros(2, np.float32)}, "TENSOR_SHAPE_MISMATCH")):
        for call in (worker.step_async, worker.push_async):
            with pytest.raises(KedgeError) as error:
                call(wrong)
            assert error.value.reason == reason
    with pytest.raises(ValueError, match="base_step is -1"):
        worker.step_async(grad(), base_step=-1)
    with pytest.raises(ValueError, match="weights is 'medium'"):
        worker.pull_async("medium")
    with run.join("b") as other, pytest.raises(ValueError, match="pull"):
        other.step_async(grad())
    assert transport.pushes == []


# ------------------------------------------------------------------------------------------------------------- failures


@pytest.mark.parametrize("fault", ["lost", "unanswered"])
def test_steps_through_a_failing_way_are_as_if_nothing_had_happened(transport, run, worker, fault):
    transport.faults = itertools.cycle([(fault, gone()), (fault, gone()), (None, None)])

    pending = [worker.step_async(grad()) for _ in range(3)]
    assert [one.result()["w"].item() for one in pending] == [2.0, 1.0, 0.0]
    assert run.status().applied_count == 3


def test_failure_is_raised_where_the_result_is_taken_and_says_so(transport, worker):
    transport.faults = iter([("lost", gone("BASE_STEP_AHEAD"))])
    failed, good = worker.push_async(grad()), worker.push_async(grad())

    assert good.result().outcome == "applied"
    for _ in range(2):
        with pytest.raises(KedgeError) as error:
            failed.result()
        assert error.value.reason == "BASE_STEP_AHEAD"
        (note,) = error.value.__notes__
        assert "push_async() of runs/r/workers/a with a gradient of step 0" in note
    assert worker.last_result.outcome == "applied"


@pytest.mark.parametrize("reason", ["SERVER_UNAVAILABLE", "INTERNAL"])
@pytest.mark.parametrize("fault", ["lost", "unanswered"])
def test_push_behind_one_of_unknown_fate_is_never_taken_for_it(transport, run, worker, fault, reason):
    lost, epoch = 0 if fault == "unanswered" else 1, worker.epoch
    is_over = iter([False] * 1000)

    def fail_the_first():
        while (worker.epoch, next(is_over)) == (epoch, False):
            yield fault, gone(reason)

    transport.faults = fail_the_first()
    first, second = worker.push_async(grad(1)), worker.push_async(grad(10))
    with pytest.raises(KedgeError) as error:
        first.result()
    assert error.value.reason == reason
    assert second.result().outcome == "applied"
    assert worker.epoch > epoch
    assert run.pull()["w"] == [3 - 1 - 10 + lost]


def test_lost_lease_is_taken_again_in_the_background(transport, run, worker, server_time):
    epoch = worker.epoch
    server_time.now += 61.0
    pending = [worker.step_async(grad()), worker.step_async(grad())]

    assert [one.result()["w"].item() for one in pending] == [2.0, 1.0]
    assert worker.epoch > epoch
    assert transport.pushes == [(epoch, 1), (worker.epoch, 1), (worker.epoch, 2)]


@pytest.fixture
def no_garbage_collection():
    gc.disable()
    yield
    gc.enable()


def test_failure_that_nobody_asked_for_is_logged(transport, worker, caplog, eventually, no_garbage_collection):
    transport.faults = iter([("lost", gone("BASE_STEP_AHEAD"))] * 2)
    with pytest.raises(KedgeError):
        worker.push_async(grad()).result()
    worker.push_async(grad())
    worker.pull()

    eventually(lambda: "nobody asked" in caplog.text)
    gc.collect()  # what was asked for is not told of when it goes, either
    assert caplog.text.count("nobody asked for its result: as the test wants it [BASE_STEP_AHEAD]") == 1


def test_step_that_the_run_went_back_behind_gives_the_weights_to_go_on_with(transport, worker):
    transport.faults = iter([("lost", gone("BASE_STEP_AHEAD"))])
    pending = worker.step_async(grad())

    assert pending.result()["w"] == [3.0]
    assert (worker.last_result.outcome, worker.last_result.reason) == ("rejected", "BASE_STEP_AHEAD")


# -------------------------------------------------------------------------------------------- what the encoding is told


class NotingEncoding:
    dtype = weights_dtype = "float32"

    def __init__(self):
        self.seen = []

    def encode(self, arrays):
        self.seen.append(arrays[0].item())
        return arrays

    def settle(self, *, is_taken):
        self.seen.append(is_taken)


@pytest.fixture
def encoding(worker):
    worker._session._encoding = NotingEncoding()
    return worker._session._encoding


def test_each_contribution_is_encoded_when_the_one_before_is_settled(worker, encoding, gate):
    pending = [worker.push_async(grad(1)), worker.push_async(grad(np.inf))]
    gate.opened.set()
    pending.append(worker.step_async(grad(3)))
    pending[-1].result()
    worker.push(grad(4))

    assert encoding.seen == [1, True, np.inf, False, 3, True, 4, True]


@pytest.mark.parametrize(
    ("faults", "is_taken"),
    [
        ([("lost", gone())] * 3, True),
        ([("unanswered", gone("INTERNAL"))], True),
        ([("lost", gone("INTERNAL"))], True),
        ([("unanswered", KeyboardInterrupt())], True),
        ([("lost", gone("BASE_STEP_AHEAD"))], False),
        ([("lost", gone("WORKER_SUPERSEDED"))], False),
        ([("lost", gone("LEASE_EXPIRED"))], True),
    ],
    ids=["repeated", "unanswered", "unknown", "interrupted", "refused", "superseded", "lease lost"],
)
def test_what_may_have_been_applied_is_settled_as_taken(transport, worker, encoding, faults, is_taken):
    transport.faults = iter(faults)
    with contextlib.suppress(KedgeError, KeyboardInterrupt):
        worker.push(grad(1))
    assert encoding.seen == [1, is_taken]


# ------------------------------------------------------------------------------------------------------------------ end


def test_closing_cancels_what_is_under_way_and_waits_for_nothing(run, worker, gate, caplog):
    pending = [worker.step_async(grad()), worker.push_async(grad())]
    assert gate.reached.wait(30)
    worker.close()  # the gate is closed still

    for one in pending:
        assert one.is_done
        with pytest.raises(KedgeError) as error:
            one.result()
        assert error.value.reason == "CANCELLED"
    assert run.status().workers == ()
    assert "closed while 2 of its calls were under way" in caplog.text


def test_thread_ends_with_the_worker_that_was_closed_and_another_begins_never(run, worker):
    worker.push_async(grad()).result()
    (thread,) = background_threads(worker.name)
    worker.close()
    thread.join(30)

    assert not thread.is_alive()
    for call in (worker.push_async, worker.step_async, lambda _: worker.pull_async()):
        with pytest.raises(KedgeError) as error:
            call(grad())
        assert error.value.reason == "CANCELLED"
    assert background_threads(worker.name) == []


def test_there_is_no_thread_before_it_is_needed(worker):
    worker.step(grad())
    assert background_threads(worker.name) == []


@pytest.mark.parametrize("is_busy", [False, True])
def test_thread_and_stream_end_with_a_worker_that_is_forgotten(transport, run, is_busy):
    worker = run.join("forgotten", lease_seconds=60.0)
    worker.pull_async().result()
    gate = Gate()
    if is_busy:
        transport.faults = gate
        worker.push_async(grad(), base_step=0)
        assert gate.reached.wait(30)
    (thread,) = background_threads(worker.name)
    del worker
    gc.collect()
    assert transport.exchanges[-1].is_closed
    gate.opened.set()
    thread.join(30)
    assert not thread.is_alive()


def test_lease_that_is_taken_while_the_worker_is_closed_is_given_back(transport, run, worker, server_time, eventually):
    join, leave, joined, is_closed, left = transport.join, transport.leave, threading.Event(), threading.Event(), []

    def slow_join(*arguments):
        lease = join(*arguments)
        joined.set()
        assert is_closed.wait(30)
        return lease

    transport.join, transport.leave = slow_join, lambda lease: (leave(lease), left.append(lease.epoch))
    server_time.now += 61.0
    worker.push_async(grad())
    assert joined.wait(30)
    epoch = worker.epoch
    worker.close()
    assert left == [epoch]
    is_closed.set()

    eventually(lambda: len(left) == 2)
    assert left[1] > epoch
    assert run.status().workers == ()
    assert transport.pushes == [(epoch, 1)]


def test_weights_are_kept_by_nobody_but_the_caller(worker, eventually):
    pending = worker.step_async(grad())
    weights = pending.result()["w"]
    base = weakref.ref(weights.base)
    del pending
    assert base() is not None
    del weights
    eventually(lambda: base() is None)


PROGRAM = """
import numpy as np, kedge
server = kedge.testing.FakeServer()
client = server.connect()
run = client.create_run("r", params={"w": np.zeros(1, np.float32)}, optimizer=kedge.optim.SGD(),
                        aggregation=kedge.Synchronous(quorum=2))
worker = run.join()
worker.pull()
pending = worker.step_async({"w": np.ones(1, np.float32)})  # a round that will never end
while run.status().round is None:
    pass
print("over", flush=True)
"""


def test_process_ends_though_something_is_under_way():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "over\n", "")


def test_pending_is_public():
    assert kedge.Pending.__module__ == "kedge.pending"


def test_documented_program_trains(monkeypatch):
    (program,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    with kedge.testing.FakeServer() as server:
        monkeypatch.setenv("KEDGE_ADDRESS", server.address)
        names = {}
        exec(program, names)
        status = names["run"].status()
    assert (status.step, status.applied_count) == (200, 200)
    # The labels are the sum of ten inputs, and 1: the loss is about 11 at weights of zero, and 0 at these.
    assert status.loss < 0.01
    np.testing.assert_allclose(names["weights"]["w"], np.ones(10), atol=0.05)
