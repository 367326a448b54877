"""A coordinator that a test calls by hand."""

import math
from typing import Any

import pytest

from kedge.policies import Admission, Policy
from kedge.wire.errors import KedgeError
from kedge_server.core.admission import Inspection
from kedge_server.core.commits import Commit
from kedge_server.core.contributions import Contribution
from kedge_server.core.coordinator import Bounds, Coordinator
from kedge_server.core.values import ContributionHeader

DIGEST = b"digest"


class Hand:
    """A coordinator, what it was told to tell, and short ways to call it. Time stands still until `now` is set."""

    def __init__(
        self,
        policy: Policy,
        *workers: str,
        admission: Admission | None = None,
        contribution_limit: int = 64,
        now: float = 0.0,
    ) -> None:
        self.told: list[tuple[str, dict[str, Any]]] = []
        self.now = now
        self.coordinator = Coordinator(
            "runs/r",
            digest=DIGEST,
            policy=policy,
            admission=admission or Admission(),
            bounds=Bounds(8, contribution_limit),
            first_epoch=1,
            tell=self._tell,
            commit=self._commit,
        )
        self._epoch = 0
        self._sequences: dict[tuple[str, int], int] = {}
        for worker in workers:
            self.join(worker)

    def _tell(self, kind: str, **about: Any) -> None:
        self.told.append((kind, about))

    def _commit(self, commit: Commit) -> None:
        """For one that keeps them."""

    def join(self, worker: str, lease_seconds: float = 10.0) -> int:
        self._epoch += 1
        self.coordinator.join(worker, epoch=self._epoch, duration_seconds=lease_seconds, now_seconds=self.now)
        return self._epoch

    def push(
        self, worker: str, *, norm: float = 1.0, base_step: int | None = None, epoch: int | None = None
    ) -> Contribution:
        if epoch is None:
            epoch = self.coordinator.leases.of_worker(worker).epoch
        sequence = self._sequences.get((worker, epoch), 0) + 1
        contribution = self.submit(self.header(worker, epoch, sequence, base_step=base_step), norm)
        self._sequences[worker, epoch] = sequence
        return contribution

    def header(self, worker: str, epoch: int, sequence: int, *, base_step: int | None = None) -> ContributionHeader:
        return ContributionHeader(
            worker_id=worker,
            epoch=epoch,
            sequence=sequence,
            base_step=self.coordinator.closed_step if base_step is None else base_step,
            manifest_digest=DIGEST,
            example_count=1,
            loss=None,
        )

    def submit(self, header: ContributionHeader, norm: float = 1.0) -> Contribution:
        inspection = Inspection()
        inspection.sum_of_squares = norm**2
        inspection.non_finite_element = 0 if math.isnan(norm) else None
        return self.coordinator.submit(Contribution(header), inspection, self.now)

    def set_policy(self, policy: Policy) -> None:
        self.coordinator.set_policy(policy, self.now)

    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.coordinator.advance(self.now)

    def closed(self) -> list[tuple[str, list[str]]]:
        """The rounds that have closed since: why, and of whom."""
        return [
            (closed.close_reason, [c.header.worker_id for c in closed.contributions])
            for closed in self.coordinator.take_closed()
        ]

    def clocks(self) -> dict[str, int]:
        return {lease.worker_id: lease.clock for lease in self.coordinator.leases.live}

    def kinds(self) -> list[str]:
        return [kind for kind, _ in self.told]

    def facts_of(self, kind: str) -> list[dict[str, Any]]:
        return [about for told, about in self.told if told == kind]


def reason_of(contribution: Contribution) -> str:
    assert contribution.result is not None
    assert contribution.result.outcome == "rejected"
    return contribution.result.reason


def refused(do: Any) -> KedgeError:
    with pytest.raises(KedgeError) as caught:
        do()
    return caught.value
