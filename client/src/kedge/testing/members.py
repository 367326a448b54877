"""The workers of a run: who holds a lease, who was sent away, and whose name is blocked."""

from dataclasses import dataclass, field
from typing import NamedTuple

from kedge.testing.admission import Norms
from kedge.testing.ledger import Entry, Ledger
from kedge.transport import Lease, WorkerStatus
from kedge.wire.errors import KedgeError


@dataclass
class Member:
    """A worker that holds a lease, or did."""

    lease: Lease
    joined_at: float
    expires_at: float
    clock: int
    """Under `BoundedStaleness`; otherwise 0."""
    unfit_in_a_row: int
    """Its last contributions that were rejected for their values, also those under earlier leases of its name."""
    ledger: Ledger = field(default_factory=Ledger)
    norms: Norms = field(default_factory=Norms)
    applied_count: int = 0
    rejected_count: int = 0
    last: Entry | None = None
    eviction_cause: str | None = None

    def status(self, now: float) -> WorkerStatus:
        """What the server says of it."""
        return WorkerStatus(
            name=self.lease.worker,
            epoch=self.lease.epoch,
            lease_remaining_seconds=self.expires_at - now,
            last_sequence=self.ledger.last_sequence,
            applied_count=self.applied_count,
            rejected_count=self.rejected_count,
            last_staleness=self.last.staleness if self.last else 0,
            last_loss=self.last.push.loss if self.last else None,
            clock=self.clock,
        )


class Block(NamedTuple):
    """Nobody may join under a name."""

    until: float
    cause: str


class Members:
    """Those of one run.

    Attributes:
        live: those that hold a lease, by name.
    """

    def __init__(self) -> None:
        self.live: dict[str, Member] = {}
        self._ever: dict[tuple[str, int], Member] = {}
        self._epochs: dict[str, int] = {}
        self._blocks: dict[str, Block] = {}

    @property
    def slowest_clock(self) -> int | None:
        """That of the slowest live worker; None if there is none."""
        return min((member.clock for member in self.live.values()), default=None)

    def check_admitted(self, worker: str, now: float) -> None:
        """Refuses a name that is blocked.

        Raises:
            KedgeError: WORKER_EVICTED.
        """
        block = self._blocks.get(worker)
        if block is not None and now < block.until:
            message = f"{worker} was evicted and is blocked for {block.until - now:g} s: {block.cause}"
            raise KedgeError("WORKER_EVICTED", message, worker=worker, cause=block.cause)

    def join(self, lease: Lease, now: float) -> Member | None:
        """Takes a worker in; the answer is the one of the same name that loses its lease by it."""
        superseded = self.live.get(lease.worker)
        clock = superseded.clock if superseded else self.slowest_clock or 0
        earlier = self._ever.get((lease.worker, self._epochs.get(lease.worker, 0)))
        unfit_in_a_row = earlier.unfit_in_a_row if earlier else 0
        member = Member(lease, now, now + lease.lease_seconds, clock, unfit_in_a_row)
        self.live[lease.worker] = self._ever[lease.worker, lease.epoch] = member
        self._epochs[lease.worker] = lease.epoch
        return superseded

    def leave(self, lease: Lease) -> Member | None:
        """Lets a worker go; None if it does not hold this lease any more."""
        member = self.live.get(lease.worker)
        if member is None or member.lease.epoch != lease.epoch:
            return None
        return self.live.pop(lease.worker)

    def expire(self, now: float) -> list[Member]:
        """Ends the leases that are due, the oldest first."""
        due = [member for member in self.live.values() if member.expires_at <= now]
        for member in due:
            del self.live[member.lease.worker]
        return sorted(due, key=lambda member: member.expires_at)

    def evict(self, worker: str, cause: str, blocked_until: float) -> Member:
        """Ends a lease from outside.

        Raises:
            KedgeError: WORKER_NOT_FOUND if nobody holds it.
        """
        if worker not in self.live:
            message = f"{worker} holds no lease: look at the workers of its run"
            raise KedgeError("WORKER_NOT_FOUND", message, worker=worker)
        self._blocks[worker] = Block(blocked_until, cause)
        member = self.live.pop(worker)
        member.eviction_cause = cause
        return member

    def find(self, lease: Lease) -> Member | None:
        """Who holds a lease, or did; None if nobody ever did."""
        return self._ever.get((lease.worker, lease.epoch))

    def check_not_evicted(self, lease: Lease) -> None:
        """Refuses a lease that was ended from outside.

        Raises:
            KedgeError: WORKER_EVICTED.
        """
        worker, member = lease.worker, self.find(lease)
        if member is not None and member.eviction_cause is not None:
            cause = member.eviction_cause
            raise KedgeError("WORKER_EVICTED", f"{worker} was evicted: {cause}", worker=worker, cause=cause)

    def renew(self, lease: Lease, now: float) -> Member:
        """Renews a lease.

        Raises:
            KedgeError: WORKER_NOT_FOUND, WORKER_EVICTED, WORKER_SUPERSEDED or LEASE_EXPIRED.
        """
        worker, epoch, _ = lease
        member = self.find(lease)
        current = self._epochs.get(worker)
        if current is None:
            raise KedgeError("WORKER_NOT_FOUND", f"{worker} has not joined: join first", worker=worker)
        self.check_not_evicted(lease)
        if member is None or current != epoch:
            message = f"{worker} was joined again by another process, in epoch {current}"
            raise KedgeError("WORKER_SUPERSEDED", message, worker=worker, epoch=epoch, current_epoch=current)
        if worker not in self.live:
            message = f"the lease of {worker} ran out: join again"
            raise KedgeError("LEASE_EXPIRED", message, worker=worker, epoch=epoch)
        member.expires_at = now + member.lease.lease_seconds
        return member
