"""Repeated pushes, below the worker, which numbers its pushes by itself."""

import contextlib

import numpy as np
import pytest

import kedge
from kedge import optim
from kedge.errors import ConflictError, LeaseError
from kedge.transport import Push

SGD = optim.SGD(lr=1.0)
ALONE = kedge.Synchronous(quorum=1)
PAIR = kedge.Synchronous(quorum=2)


def grad(*values):
    return {"w": np.array(values, np.float32)}


@pytest.fixture
def repeat(client, new_run):
    """A run with a quorum as asked for, and a function that pushes a sequence of one of its workers."""

    def begin(aggregation):
        run = new_run(SGD, aggregation)
        lease = client._transport.join(run.name, "a", 60.0)

        def push(sequence, value=1.0, **changes):
            contribution = Push(lease, sequence, 0, 1, None, [np.array([value], np.float32)], "float32", 0.0, None)
            with contextlib.closing(client._transport.open_exchange(run.manifest, lease)) as exchange:
                return exchange.push(contribution._replace(**changes))[0]

        return run, push

    return begin


def test_repeated_push_gets_the_recorded_result_and_is_applied_once(repeat):
    run, push = repeat(ALONE)
    first = push(1)

    assert first.outcome == "applied"
    assert push(1, value=100.0) == first
    assert run.pull()["w"] == [2.0]


def test_repeated_rejection_is_the_same_rejection(repeat):
    _, push = repeat(ALONE)
    first = push(1, value=np.nan)

    assert push(1) == first
    assert first.reason == "NON_FINITE_GRADIENT"


def test_repeated_deferred_push_learns_what_became_of_it(repeat):
    run, push = repeat(PAIR)
    assert push(1).outcome == "deferred"
    assert push(1, value=100.0).outcome == "deferred"
    with run.join("b") as other:
        other.pull()
        other.push(grad(3))

    assert push(1)[:3] == ("applied", "QUORUM_REACHED", 1)
    assert run.pull()["w"] == [1.0]


def test_skipped_sequence_is_refused_and_records_nothing(repeat):
    _, push = repeat(ALONE)
    for sequence in (0, 2):
        with pytest.raises(ConflictError) as error:
            push(sequence)
        assert error.value.reason == "SEQUENCE_GAP"
        assert error.value.metadata == {"expected": "1", "got": str(sequence)}
    assert push(1).outcome == "applied"


def test_result_is_recorded_for_sixty_four_sequences(repeat):
    _, push = repeat(kedge.Asynchronous())
    first = push(1)
    for sequence in range(2, 65):
        push(sequence)
    assert push(1) == first

    push(65)
    with pytest.raises(ConflictError) as error:
        push(1)
    assert error.value.reason == "SEQUENCE_FORGOTTEN"
    assert error.value.metadata == {"got": "1", "oldest": "2"}


def test_push_that_came_before_the_lease_ended_keeps_its_result(repeat, client):
    run, push = repeat(ALONE)
    first = push(1)
    client._transport.join(run.name, "a", 60.0)

    assert push(1) == first
    with pytest.raises(LeaseError):
        push(2)


def test_push_of_a_worker_that_never_joined_is_refused(repeat, client):
    run, push = repeat(ALONE)
    lease = client._transport.join(run.name, "b", None)
    with pytest.raises(LeaseError) as error:
        push(1, lease=lease._replace(worker=f"{run.name}/workers/nobody"))
    assert error.value.reason == "WORKER_NOT_FOUND"
