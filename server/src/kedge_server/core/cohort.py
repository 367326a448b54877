"""What a run remembers of its workers as a whole: whether they have all been there, and where the slowest stands."""

from dataclasses import dataclass

from kedge.policies import Policy
from kedge_server.core import rounds
from kedge_server.core.leases import LeaseTable


@dataclass
class Cohort:
    """The workers of a run as a whole."""

    is_formed: bool = False
    """Whether as many workers as the quorum have been alive at one time since the run was last empty."""
    formed_at_seconds: float = 0.0
    slowest_clock: int = 0
    """Under `BoundedStaleness`, the least clock of a live worker."""
    barrier_step: int = 0
    """Under `BoundedStaleness`, the closed step when the slowest worker's clock last rose."""

    def gather(self, leases: LeaseTable, policy: Policy, now_seconds: float) -> None:
        """Looks whether the workers are enough now."""
        if not self.is_formed and rounds.is_formed(len(leases), policy):
            self.is_formed, self.formed_at_seconds = True, now_seconds

    def disperse(self, leases: LeaseTable) -> None:
        """Looks whether all have gone."""
        self.is_formed = self.is_formed and bool(leases)

    def note_slowest(self, leases: LeaseTable, closed_step: int) -> None:
        """Looks where the slowest is."""
        slowest = leases.slowest_clock
        if slowest > self.slowest_clock or not leases:
            self.barrier_step = closed_step
        self.slowest_clock = slowest

    def waiting_for(self, run: str, leases: LeaseTable, bound: int) -> str:
        """Under `BoundedStaleness`, which worker of a run keeps others waiting, in words; empty if none."""
        live = leases.live
        ahead = max((lease.clock for lease in live), default=0)
        if ahead - self.slowest_clock <= bound:
            return ""
        slowest = min(live, key=lambda lease: lease.clock)
        return (
            f"{run}/workers/{slowest.worker_id} to contribute: it is at clock {slowest.clock}, others wait at {ahead}, "
            f"the bound is {bound}"
        )

    def begin_anew(self, leases: LeaseTable, closed_step: int) -> None:
        """Under another policy: all live workers begin side by side."""
        leases.reset_clocks()
        self.is_formed = False
        self.slowest_clock, self.barrier_step = 0, closed_step
