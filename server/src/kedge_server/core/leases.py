"""Who may contribute: the leases of a run's workers. Time comes in as an argument."""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from kedge.wire.errors import KedgeError
from kedge_server.core.contributions import Contribution
from kedge_server.core.ledger import Ledger


@dataclass
class Lease:
    """One epoch of one worker, and what is known of its contributions."""

    worker_id: str
    epoch: int
    duration_seconds: float
    joined_at_seconds: float
    expires_at_seconds: float
    ledger: Ledger[Contribution] = field(default_factory=Ledger)
    applied_count: int = 0
    rejected_count: int = 0
    last_staleness: int = 0
    last_loss: float | None = None
    clock: int = 0
    """Under `BoundedStaleness`: its judged contributions, counted from the slowest worker's clock when it joined."""
    bad_count: int = 0
    """Contributions in a row that were rejected for their values."""
    eviction_cause: str | None = None
    """Why it was sent away; None if it was not."""
    owner: str = ""
    """Whose credentials it was joined with, and who alone may use it; "" where nobody was asked, and anybody may."""


class Block(NamedTuple):
    """A worker's name that nobody may join under for a while."""

    until_seconds: float
    cause: str


class LeaseTableState(NamedTuple):
    """What a table holds."""

    first_epoch: int
    live: tuple[Lease, ...]
    ended: tuple[Lease, ...]
    """The one that ended first first."""
    last_epochs: dict[str, int]
    last_forgotten_epoch: int
    blocks: tuple[tuple[str, float, str], ...]
    """Worker, until when, why."""


class LeaseTable:
    """The leases of a run. Ended ones are remembered, so that a late repetition still finds its result.

    Args:
        run: the run's name, for messages.
        worker_limit: how many may be live at once.
        first_epoch: greater than any epoch that an earlier run of the same name granted.
        ended_limit: how many ended ones are remembered; None for a number that the worker limit suggests.
    """

    def __init__(self, run: str, *, worker_limit: int, first_epoch: int, ended_limit: int | None = None) -> None:
        self._run = run
        self._worker_limit = worker_limit
        self._first_epoch = first_epoch
        self._ended_limit = max(1024, 2 * worker_limit) if ended_limit is None else ended_limit
        self._last_forgotten_epoch = 0
        self._live: dict[str, Lease] = {}
        self._ended: dict[tuple[str, int], Lease] = {}
        self._last_epochs: dict[str, int] = {}
        self._blocks: OrderedDict[str, Block] = OrderedDict()
        self.change_count = 0
        """Leases granted and ended so far."""

    def __len__(self) -> int:
        """How many workers live."""
        return len(self._live)

    @property
    def live(self) -> list[Lease]:
        """The live leases, by worker."""
        return [self._live[worker_id] for worker_id in sorted(self._live)]

    @property
    def by_worker(self) -> Mapping[str, Lease]:
        """The live leases."""
        return self._live

    def of_worker(self, worker_id: str) -> Lease | None:
        """A worker's lease; None if it holds none."""
        return self._live.get(worker_id)

    @property
    def slowest_clock(self) -> int:
        """The least clock of a live worker; 0 if there is none."""
        return min((lease.clock for lease in self._live.values()), default=0)

    def reset_clocks(self) -> None:
        """Lets all live workers begin side by side."""
        for lease in self._live.values():
            lease.clock = 0

    @property
    def next_expiry_seconds(self) -> float | None:
        """When the next lease expires, if nothing renews it."""
        return min((lease.expires_at_seconds for lease in self._live.values()), default=None)

    def is_live(self, lease: Lease) -> bool:
        """Whether it is the worker's lease now."""
        return self._live.get(lease.worker_id) is lease

    def join(
        self, worker_id: str, *, epoch: int, duration_seconds: float, now_seconds: float, owner: str = ""
    ) -> Lease:
        """Grants a lease; one that the worker held ends, and hands its clock on. Bad ones in a row are remembered.

        Raises:
            KedgeError: TOO_MANY_WORKERS; WORKER_EVICTED while the name is blocked; WRONG_IDENTITY while another owner
                holds it.
        """
        self._require_not_blocked(worker_id, now_seconds)
        if worker_id in self._live:
            self.require_owner(worker_id, owner)
        if worker_id not in self._live and len(self._live) >= self._worker_limit:
            raise KedgeError(
                "TOO_MANY_WORKERS",
                f"{self._run} has {self._worker_limit} workers, as many as limits.workers_per_run allows",
                limit=self._worker_limit,
            )
        return self.grant(
            worker_id, epoch=epoch, duration_seconds=duration_seconds, now_seconds=now_seconds, owner=owner
        )

    def require_owner(self, worker_id: str, owner: str, epoch: int | None = None) -> None:
        """Lets nobody use a worker's lease, or learn what became of its contributions, but who joined it.

        Args:
            worker_id: the worker.
            owner: whose credentials the call has; "" where nobody is asked, and so nobody refused.
            epoch: of the lease that is meant; the last one counts where that is not remembered, or none is given.

        Raises:
            KedgeError: WRONG_IDENTITY.
        """
        lease = (None if epoch is None else self.remembered(worker_id, epoch)) or self._last_of(worker_id)
        if lease is not None and owner and lease.owner and lease.owner != owner:
            worker = f"{self._run}/workers/{worker_id}"
            raise KedgeError(
                "WRONG_IDENTITY",
                f"{worker} was joined with other credentials than those of {owner}: join under a name of your own",
                worker=worker,
            )

    def grant(
        self, worker_id: str, *, epoch: int, duration_seconds: float, now_seconds: float, owner: str = ""
    ) -> Lease:
        """Grants a lease that nothing speaks against."""
        held, last = self._live.get(worker_id), self._last_of(worker_id)
        lease = Lease(
            worker_id,
            epoch,
            duration_seconds,
            joined_at_seconds=now_seconds,
            expires_at_seconds=now_seconds + duration_seconds,
            clock=self.slowest_clock if held is None else held.clock,
            bad_count=0 if last is None else last.bad_count,
            owner=owner,
        )
        if held is not None:
            self._end(held)
        self._live[worker_id] = lease
        self._last_epochs[worker_id] = epoch
        self._blocks.pop(worker_id, None)
        self.change_count += 1
        return lease

    def _last_of(self, worker_id: str) -> Lease | None:
        """The last lease of a worker, live or ended; None if it is not remembered."""
        last_epoch = self._last_epochs.get(worker_id, 0)
        return self._live.get(worker_id) or self._ended.get((worker_id, last_epoch))

    def renew(self, lease: Lease, now_seconds: float) -> None:
        """A sign of life."""
        lease.expires_at_seconds = now_seconds + lease.duration_seconds

    def count_applied(self, worker_id: str, epoch: int) -> None:
        """Counts a contribution that became part of a step."""
        lease = self._live.get(worker_id)
        if lease is not None and lease.epoch == epoch:
            lease.applied_count += 1

    def count_rejected(self, worker_id: str, epoch: int) -> None:
        """Counts a contribution that changed nothing."""
        lease = self._live.get(worker_id)
        if lease is not None and lease.epoch == epoch:
            lease.rejected_count += 1

    def leave(self, worker_id: str, epoch: int) -> bool:
        """Ends a lease, and says whether it still was one."""
        lease = self._live.get(worker_id)
        if lease is None or lease.epoch != epoch:
            return False
        self._end(lease)
        return True

    def evict(self, lease: Lease, cause: str, block_until_seconds: float | None) -> None:
        """Ends a lease from outside; nobody may join under the worker's name until then."""
        lease.eviction_cause = cause
        self._end(lease)
        if block_until_seconds is None:
            return
        self._blocks[lease.worker_id] = Block(block_until_seconds, cause)
        self._blocks.move_to_end(lease.worker_id)
        while len(self._blocks) > self._ended_limit:
            self._blocks.popitem(last=False)

    def end_all(self) -> list[Lease]:
        """Ends every lease, and names them."""
        ended = self.live
        for lease in ended:
            self._end(lease)
        return ended

    def expire(self, now_seconds: float) -> list[Lease]:
        """Ends the leases that ran out, and names them."""
        expired = [lease for lease in self._live.values() if lease.expires_at_seconds <= now_seconds]
        for lease in expired:
            self._end(lease)
        return expired

    def find(self, worker_id: str, epoch: int) -> Lease:
        """The lease of an epoch, live or ended.

        Raises:
            KedgeError: WORKER_NOT_FOUND, WORKER_SUPERSEDED, EPOCH_FORGOTTEN; RUN_NOT_FOUND for an epoch of an earlier
                run of the same name.
        """
        lease = self.remembered(worker_id, epoch)
        if lease is None:
            raise self._unknown(worker_id, epoch)
        return lease

    def remembered(self, worker_id: str, epoch: int) -> Lease | None:
        """The lease of an epoch, live or ended; None if there was none, or none is remembered."""
        lease = self._live.get(worker_id)
        if lease is not None and lease.epoch == epoch:
            return lease
        return self._ended.get((worker_id, epoch))

    def state(self) -> "LeaseTableState":
        """All that outlives the server. The ledgers are with the leases."""
        return LeaseTableState(
            first_epoch=self._first_epoch,
            live=tuple(self._live.values()),
            ended=tuple(self._ended.values()),
            last_epochs=dict(self._last_epochs),
            last_forgotten_epoch=self._last_forgotten_epoch,
            blocks=tuple((worker_id, *block) for worker_id, block in self._blocks.items()),
        )

    def resume(self, state: "LeaseTableState") -> None:
        """Takes up what was there before the server was started anew. The table is empty and owns the leases then."""
        self._first_epoch = state.first_epoch
        self._live = {lease.worker_id: lease for lease in state.live}
        self._ended = {(lease.worker_id, lease.epoch): lease for lease in state.ended}
        self._last_epochs = dict(state.last_epochs)
        self._last_forgotten_epoch = state.last_forgotten_epoch
        self._blocks = OrderedDict((worker_id, Block(until, cause)) for worker_id, until, cause in state.blocks)

    def require_live(self, lease: Lease) -> None:
        """Lets only the worker's present lease through.

        Raises:
            KedgeError: LEASE_EXPIRED, WORKER_SUPERSEDED or WORKER_EVICTED.
        """
        if self.is_live(lease):
            return
        if lease.eviction_cause is not None:
            raise self._evicted(lease.worker_id, lease.eviction_cause)
        raise self._not_live(lease.worker_id, lease.epoch)

    def _require_not_blocked(self, worker_id: str, now_seconds: float) -> None:
        block = self._blocks.get(worker_id)
        if block is None:
            return
        if now_seconds < block.until_seconds:
            raise self._evicted(worker_id, block.cause)

    def _evicted(self, worker_id: str, cause: str) -> KedgeError:
        worker = f"{self._run}/workers/{worker_id}"
        return KedgeError(
            "WORKER_EVICTED",
            f"{worker} was sent away ({cause or 'no cause was given'}): look into that before it joins again",
            worker=worker,
            cause=cause,
        )

    def _unknown(self, worker_id: str, epoch: int) -> KedgeError:
        worker = f"{self._run}/workers/{worker_id}"
        if 0 < epoch < self._first_epoch:
            return KedgeError(
                "RUN_NOT_FOUND",
                f"the {self._run} that {worker} joined is gone, and another has its name: get the run and join anew",
                run=self._run,
            )
        if epoch < self._last_epochs.get(worker_id, 0):
            return self._not_live(worker_id, epoch)
        if 0 < epoch <= self._last_forgotten_epoch:
            return KedgeError(
                "EPOCH_FORGOTTEN",
                f"what became of the contributions of {worker} in epoch {epoch} is no longer recorded; "
                "nothing was applied now",
                worker=worker,
                epoch=epoch,
            )
        return KedgeError(
            "WORKER_NOT_FOUND", f"{worker} has not joined in epoch {epoch}: join the run first", worker=worker
        )

    def _not_live(self, worker_id: str, epoch: int) -> KedgeError:
        current, worker = self._last_epochs[worker_id], f"{self._run}/workers/{worker_id}"
        if epoch < current:
            return KedgeError(
                "WORKER_SUPERSEDED",
                f"another process has joined as {worker} since: this one may not write any more; "
                "give each process a worker name of its own",
                worker=worker,
                epoch=epoch,
                current_epoch=current,
            )
        return KedgeError(
            "LEASE_EXPIRED",
            f"the lease of {worker} has ended: join again; nothing of this call was taken",
            worker=worker,
            epoch=epoch,
        )

    def _end(self, lease: Lease) -> None:
        del self._live[lease.worker_id]
        self.change_count += 1
        self._ended[lease.worker_id, lease.epoch] = lease
        while len(self._ended) > self._ended_limit:
            worker_id, epoch = next(iter(self._ended))
            del self._ended[worker_id, epoch]
            self._last_forgotten_epoch = max(self._last_forgotten_epoch, epoch)
            if worker_id not in self._live and self._last_epochs.get(worker_id) == epoch:
                del self._last_epochs[worker_id]
