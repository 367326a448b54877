"""Whether a coordinator, and what comes of its commits, are the same run."""

from collections.abc import Callable

from kedge.policies import OUTLIER_WINDOW, BoundedStaleness
from kedge_server.core.coordinator import Coordinator
from kedge_server.core.image import RunImage
from kedge_server.core.leases import Lease
from kedge_server.core.values import PushResult

from .history import SimulatedContribution


def check_likeness(coordinator: Coordinator, image: RunImage) -> None:
    """Compares all that outlives a server. Everything that was decided must be written."""
    assert (coordinator.policy, coordinator.admission) == (image.policy, image.admission)
    assert (coordinator.closed_step, coordinator.applied_count) == (image.step, image.applied_count)
    assert coordinator.rejected_counts == image.rejected_counts
    assert coordinator._cohort.is_formed == image.cohort.is_formed
    if isinstance(coordinator.policy, BoundedStaleness):
        assert coordinator.slowest_clock == image.cohort.slowest_clock
    kept = [c.key for c in coordinator.held if isinstance(c, SimulatedContribution) and c.is_kept]
    assert sorted(kept) == sorted(image.held), "another contribution is held"
    unwritten = {c.header.worker_id for c in coordinator.held if isinstance(c, SimulatedContribution) and not c.is_kept}
    _check_leases(coordinator, image, unwritten)
    _check_norms(coordinator, image, unwritten)


def _check_leases(coordinator: Coordinator, image: RunImage, unwritten: set[str]) -> None:
    here, there = coordinator.leases.state(), image.leases.state()
    assert sorted(map(_name, here.live)) == sorted(map(_name, there.live))
    assert list(map(_name, here.ended)) == list(map(_name, there.ended))
    assert (here.last_epochs, here.last_forgotten_epoch) == (there.last_epochs, there.last_forgotten_epoch)
    assert [(name, cause) for name, _, cause in here.blocks] == [(name, cause) for name, _, cause in there.blocks]
    for lease in here.live:
        _check_lease(lease, image.leases.find(*_name(lease)), is_live=True, is_written=lease.worker_id not in unwritten)
    for lease in here.ended:
        _check_lease(
            lease, image.leases.find(*_name(lease)), is_live=False, is_written=lease.worker_id not in unwritten
        )


def _name(lease: Lease) -> tuple[str, int]:
    return lease.worker_id, lease.epoch


def _check_lease(here: Lease, there: Lease, *, is_live: bool, is_written: bool) -> None:
    assert here.eviction_cause == there.eviction_cause
    assert _results(here, lambda c: c.is_kept) == _results(there, lambda _: True)
    if is_live:
        assert (here.applied_count, here.rejected_count) == (there.applied_count, there.rejected_count)
    if is_live and is_written:
        assert here.ledger.last_sequence == there.ledger.last_sequence
        assert here.ledger.holes == there.ledger.holes
    if is_live and is_written and _came_in_order(here):
        assert here.clock == there.clock
        assert here.bad_count == there.bad_count
        assert (here.last_staleness, here.last_loss) == (there.last_staleness, there.last_loss)


def _came_in_order(lease: Lease) -> bool:
    """Whether the last sequence came last: what was lost in a crash may come again after it."""
    numbers = [entry.number for _, entry in lease.ledger.entries() if isinstance(entry, SimulatedContribution)]
    return not numbers or max(numbers) == numbers[-1]


def _results(
    lease: Lease, is_written: Callable[[SimulatedContribution], bool]
) -> dict[int, tuple[PushResult | None, int, int]]:
    """What the ledger answers to each sequence, but for what is taken and not written."""
    return {
        sequence: (entry.result, entry.staleness, entry.header.base_step)
        for sequence, entry in lease.ledger.entries()
        if entry.result is not None or not isinstance(entry, SimulatedContribution) or is_written(entry)
    }


def _check_norms(coordinator: Coordinator, image: RunImage, unwritten: set[str]) -> None:
    here = {name: rest for name, *rest in coordinator._norms.state() if name not in unwritten}
    there = {name: rest for name, *rest in image.norms.state() if name not in unwritten}
    assert here.keys() == there.keys()
    for name, (norms, is_outlier) in here.items():
        assert is_outlier == there[name][1], f"{name}'s last one"
        assert len(norms) == len(there[name][0])
        # They are kept as they came, and written as they were answered: of many, another one is the oldest.
        assert len(norms) == OUTLIER_WINDOW or sorted(norms) == sorted(there[name][0])
