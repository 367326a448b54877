"""Leases and epochs: who may contribute, and what those are told who may not."""

import pytest

from kedge.wire.errors import KedgeError
from kedge_server.core.leases import Lease, LeaseTable

FIRST_EPOCH = 100


def table(*, ended_limit: int | None = None, worker_limit: int = 4) -> LeaseTable:
    return LeaseTable("runs/r", worker_limit=worker_limit, first_epoch=FIRST_EPOCH, ended_limit=ended_limit)


def join(leases: LeaseTable, worker_id: str, epoch: int) -> Lease:
    return leases.join(worker_id, epoch=epoch, duration_seconds=10, now_seconds=0)


def reason(leases: LeaseTable, worker_id: str, epoch: int) -> str:
    with pytest.raises(KedgeError) as caught:
        leases.require_live(leases.find(worker_id, epoch))
    return caught.value.reason


def test_who_is_told_what() -> None:
    leases = table()
    join(leases, "a", 101)
    join(leases, "a", 102)
    join(leases, "b", 103)
    leases.expire(10)
    assert reason(leases, "a", 101) == "WORKER_SUPERSEDED"
    assert reason(leases, "b", 103) == "LEASE_EXPIRED"
    assert reason(leases, "c", 104) == "WORKER_NOT_FOUND"
    assert reason(leases, "b", 104) == "WORKER_NOT_FOUND", "an epoch that was never granted has not expired"
    assert reason(leases, "c", 0) == "WORKER_NOT_FOUND"


def test_worker_of_an_earlier_run_of_the_name_is_told_that_its_run_is_gone() -> None:
    leases = table()
    join(leases, "a", 101)
    assert reason(leases, "a", 99) == "RUN_NOT_FOUND"
    assert reason(leases, "b", 1) == "RUN_NOT_FOUND"


def test_forgotten_epoch_is_never_mistaken_for_one_that_may_push_again() -> None:
    leases = table(ended_limit=2)
    for epoch, worker_id in enumerate("abcd", start=101):
        join(leases, worker_id, epoch)
        assert leases.leave(worker_id, epoch)
    assert reason(leases, "a", 101) == "EPOCH_FORGOTTEN"
    assert reason(leases, "b", 102) == "EPOCH_FORGOTTEN"
    assert reason(leases, "c", 103) == "LEASE_EXPIRED"
    assert len(leases._ended) == len(leases._last_epochs) == 2


def test_ended_leases_outnumber_the_workers_that_one_partition_can_end() -> None:
    leases = table(worker_limit=3000)
    for number in range(3000):
        join(leases, f"w{number}", 101 + number)
    leases.expire(10)
    assert all(leases.find(f"w{number}", 101 + number) for number in range(3000))


def test_leaving_says_whether_there_was_a_lease_to_leave() -> None:
    leases = table()
    join(leases, "a", 101)
    assert not leases.leave("a", 100)
    assert leases.leave("a", 101)
    assert not leases.leave("a", 101)
