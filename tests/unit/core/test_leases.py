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


def test_an_evicted_worker_is_told_why_in_its_old_epoch_and_at_the_door() -> None:
    leases = table()
    leases.evict(join(leases, "a", 101), "too hot", 20)
    for attempt in (lambda: leases.require_live(leases.find("a", 101)), lambda: join(leases, "a", 102)):
        with pytest.raises(KedgeError) as caught:
            attempt()
        assert caught.value.reason == "WORKER_EVICTED"
        assert caught.value.metadata == {"worker": "runs/r/workers/a", "cause": "too hot"}
    assert len(leases) == 0


@pytest.mark.parametrize(("now", "is_blocked"), [(0.0, True), (19.9, True), (20.0, False), (99.0, False)])
def test_a_block_ends_at_its_time(now: float, is_blocked: bool) -> None:
    leases = table()
    leases.evict(join(leases, "a", 101), "too hot", 20)
    if not is_blocked:
        assert leases.join("a", epoch=102, duration_seconds=10, now_seconds=now).epoch == 102
        assert leases._blocks == {}
        return
    with pytest.raises(KedgeError, match="too hot"):
        leases.join("a", epoch=102, duration_seconds=10, now_seconds=now)
    assert len(leases) == 0


def test_without_a_block_an_evicted_worker_may_join_at_once_but_not_write_with_its_old_epoch() -> None:
    leases = table()
    leases.evict(join(leases, "a", 101), "", None)
    assert join(leases, "a", 102).epoch == 102
    assert reason(leases, "a", 101) == "WORKER_EVICTED"


def test_a_block_is_of_one_name() -> None:
    leases = table()
    leases.evict(join(leases, "a", 101), "too hot", 20)
    assert join(leases, "b", 102).worker_id == "b"


def test_a_later_block_replaces_an_earlier_one() -> None:
    leases = table()
    leases.evict(join(leases, "a", 101), "first", 5)
    later = leases.join("a", epoch=102, duration_seconds=10, now_seconds=6)
    leases.evict(later, "second", 30)
    with pytest.raises(KedgeError, match="second"):
        leases.join("a", epoch=103, duration_seconds=10, now_seconds=29)


def test_blocks_are_bounded_and_the_oldest_is_lifted_first() -> None:
    leases = table(ended_limit=2)
    for epoch, worker_id in enumerate("abc", start=101):
        leases.evict(join(leases, worker_id, epoch), "too hot", 100)
    assert list(leases._blocks) == ["b", "c"]
    assert join(leases, "a", 104).worker_id == "a"


def test_a_full_table_takes_nobody_new_but_lets_a_worker_take_over_its_own_lease() -> None:
    leases = table(worker_limit=2)
    join(leases, "a", 101)
    join(leases, "b", 102)
    with pytest.raises(KedgeError) as caught:
        join(leases, "c", 103)
    assert caught.value.reason == "TOO_MANY_WORKERS"
    assert join(leases, "a", 104).epoch == 104
    assert [(lease.worker_id, lease.epoch) for lease in leases.live] == [("a", 104), ("b", 102)]


def test_clock_of_a_newcomer_is_the_slowest_ones_and_of_a_takeover_its_own() -> None:
    leases = table()
    fast, slow = join(leases, "a", 101), join(leases, "b", 102)
    assert (fast.clock, slow.clock) == (0, 0)
    fast.clock, slow.clock = 7, 5
    assert join(leases, "c", 103).clock == 5
    assert join(leases, "a", 104).clock == 7
    assert leases.leave("b", 102)
    assert leases.leave("c", 103)
    assert leases.slowest_clock == 7
    assert leases.leave("a", 104)
    assert (leases.slowest_clock, join(leases, "a", 105).clock) == (0, 0)


@pytest.mark.parametrize("how", ["taken over", "left", "evicted"])
def test_bad_ones_in_a_row_are_handed_on_and_what_was_counted_is_not(how: str) -> None:
    leases = table()
    first = join(leases, "a", 101)
    first.bad_count, first.rejected_count = 2, 5
    if how == "left":
        assert leases.leave("a", 101)
    elif how == "evicted":
        leases.evict(first, "", None)
    second = join(leases, "a", 102)
    assert (second.bad_count, second.rejected_count) == (2, 0)
    assert join(leases, "b", 103).bad_count == 0


def test_bad_ones_of_a_lease_that_is_forgotten_are_forgotten_with_it() -> None:
    leases = table(ended_limit=1)
    join(leases, "a", 101).bad_count = 2
    assert leases.leave("a", 101)
    join(leases, "b", 102)
    assert leases.leave("b", 102)
    assert join(leases, "a", 103).bad_count == 0


def test_lease_knows_when_it_was_granted_however_often_it_is_renewed() -> None:
    leases = table()
    lease = leases.join("a", epoch=101, duration_seconds=10, now_seconds=3)
    leases.renew(lease, 5)
    assert (lease.joined_at_seconds, lease.expires_at_seconds) == (3, 15)
    assert leases.join("a", epoch=102, duration_seconds=10, now_seconds=7).joined_at_seconds == 7


def test_only_the_present_lease_is_counted_for() -> None:
    leases = table()
    old, new = join(leases, "a", 101), join(leases, "a", 102)
    leases.count_applied("a", 101)
    leases.count_rejected("a", 101)
    leases.count_applied("a", 102)
    leases.count_rejected("a", 102)
    assert (old.applied_count, old.rejected_count, new.applied_count, new.rejected_count) == (0, 0, 1, 1)


def test_expiry_is_at_the_end_of_the_lease_and_names_those_that_ran_out() -> None:
    leases = table()
    first = join(leases, "a", 101)
    leases.renew(join(leases, "b", 102), 5)
    assert leases.next_expiry_seconds == 10
    assert leases.expire(9.9) == []
    assert leases.expire(10) == [first]
    assert leases.next_expiry_seconds == 15
    assert leases.expire(10) == []
