"""A lease belongs to who joined: in the table, in what is stored, and in what an older server stored."""

import json

import pytest

from kedge.wire.errors import KedgeError
from kedge_server.core.commits import Joined
from kedge_server.core.leases import Lease, LeaseTable
from kedge_server.storage import plain

RUN = "runs/r"


@pytest.fixture
def table() -> LeaseTable:
    return LeaseTable(RUN, worker_limit=4, first_epoch=1)


def join(table: LeaseTable, owner: str, *, epoch: int, worker: str = "w", now: float = 0.0) -> Lease:
    return table.join(worker, epoch=epoch, duration_seconds=10.0, now_seconds=now, owner=owner)


def refused(table: LeaseTable, owner: str, epoch: int | None = None) -> bool:
    try:
        table.require_owner("w", owner, epoch)
    except KedgeError as error:
        return (error.reason, error.metadata) == ("WRONG_IDENTITY", {"worker": f"{RUN}/workers/w"})
    return False


def test_lease_is_its_owners_alone(table: LeaseTable) -> None:
    join(table, "a", epoch=1)
    assert not refused(table, "a", 1)
    assert not refused(table, "a")
    for epoch in (1, None, 0, 2, 99):
        assert refused(table, "b", epoch)


def test_nobody_joins_over_a_live_lease_of_another_and_its_owner_may(table: LeaseTable) -> None:
    lease = join(table, "a", epoch=1)
    with pytest.raises(KedgeError) as caught:
        join(table, "b", epoch=2)
    assert caught.value.reason == "WRONG_IDENTITY"
    assert "'a'" not in str(caught.value)
    assert table.is_live(lease)
    assert join(table, "a", epoch=3).epoch == 3


def test_name_is_free_when_its_lease_has_ended_and_each_keeps_what_was_theirs(table: LeaseTable) -> None:
    join(table, "a", epoch=1)
    table.expire(11.0)
    join(table, "b", epoch=2, now=11.0)
    assert not refused(table, "a", 1)  # it may learn what became of its contributions, and that it was superseded
    assert refused(table, "b", 1)
    assert refused(table, "a", 2)
    assert refused(table, "a")
    assert not refused(table, "b", 2)
    assert not refused(table, "b")


def test_lease_that_ended_is_its_owners_still(table: LeaseTable) -> None:
    join(table, "a", epoch=1)
    table.leave("w", 1)
    assert refused(table, "b", 1)
    assert not refused(table, "a", 1)


def test_name_that_nobody_joined_under_is_nobodys(table: LeaseTable) -> None:
    assert not refused(table, "b", 1)
    assert not refused(table, "b")


def test_lease_of_when_nobody_was_asked_is_anybodys(table: LeaseTable) -> None:
    join(table, "", epoch=1)
    assert not refused(table, "b", 1)
    assert join(table, "b", epoch=2).owner == "b"
    assert refused(table, "c")


def test_where_nobody_is_asked_nobody_is_refused(table: LeaseTable) -> None:
    """As when a server that asked is started anew without that."""
    join(table, "a", epoch=1)
    assert not refused(table, "", 1)
    assert join(table, "", epoch=2).owner == ""


def test_owner_outlives_the_server(table: LeaseTable) -> None:
    join(table, "a", epoch=1)
    join(table, "a", epoch=2)
    resumed = LeaseTable(RUN, worker_limit=4, first_epoch=1)
    resumed.resume(table.state())
    assert [refused(resumed, owner, epoch) for owner in "ab" for epoch in (1, 2)] == [False, False, True, True]


def test_owner_is_stored_with_the_commit() -> None:
    stored = plain.encode(Joined("w", 1, 10.0, owner="a"))
    assert json.loads(stored)["Joined"]["owner"] == "a"
    assert plain.decode(stored) == Joined("w", 1, 10.0, owner="a")


def test_what_a_server_wrote_that_knew_no_owners_is_read() -> None:
    joined = b'{"Joined":{"worker_id":"w","epoch":7,"duration_seconds":10.0,"bad_count":2}}'
    assert plain.decode(joined) == Joined("w", 7, 10.0, 2, "")
    lease = (
        b'{"LeaseState":{"worker_id":"w","epoch":7,"duration_seconds":10.0,"clock":0,"bad_count":0,"applied_count":3,'
        b'"rejected_count":0,"last_staleness":0,"last_loss":null,"eviction_cause":null,"last_sequence":3,"holes":[],'
        b'"entries":[]}}'
    )
    assert plain.decode(lease).owner == ""
