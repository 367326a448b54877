"""`BoundedStaleness`: how far a worker is ahead of the slowest one."""

from typing import NamedTuple

from kedge.policies import BoundedStaleness, Policy
from kedge.testing.members import Members
from kedge.wire.errors import KedgeError


class Gap(NamedTuple):
    """Two clocks, and how far they may be apart."""

    clock: int
    slowest_clock: int
    bound: int

    @property
    def is_over(self) -> bool:
        """Whether the worker has to wait."""
        return self.clock - self.slowest_clock > self.bound

    def __str__(self) -> str:
        return f"it is at clock {self.clock}, the slowest at {self.slowest_clock}, the bound is {self.bound}"

    def error(self, worker: str) -> KedgeError:
        """What a pull fails with that waited in vain."""
        return KedgeError("WAITING_FOR_SLOWEST", f"{worker} is held back: {self}", **self._asdict())


def gap_of(worker: str | None, members: Members, policy: Policy) -> Gap | None:
    """That of a worker; None where no clock matters: under another policy, or without a live lease."""
    member, slowest = members.live.get(worker or ""), members.slowest_clock
    if member is None or slowest is None or not isinstance(policy, BoundedStaleness):
        return None
    return Gap(member.clock, slowest, policy.bound)


def slowest_awaited(members: Members, policy: Policy) -> str:
    """Whose contribution others wait for, in words; empty if they do not."""
    gaps = [gap for name in members.live if (gap := gap_of(name, members, policy)) is not None and gap.is_over]
    if not gaps:
        return ""
    clock, slowest, bound = max(gaps)
    name = min(name for name, member in members.live.items() if member.clock == slowest)
    return f"{name} to contribute: it is at clock {slowest}, others wait at {clock}, the bound is {bound}"
