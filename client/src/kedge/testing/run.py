"""One run of the fake server: its workers, its ledger, its open round. Without locks and without a clock of its own."""

from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np

from kedge.optim.controls import Change, Controls
from kedge.policies import Asynchronous
from kedge.testing.optimizers import Updater
from kedge.transport import Lease, NewRun, Push, PushResult, RoundStatus, RunInfo, RunStatus, WorkerStatus
from kedge.wire.errors import KedgeError
from kedge.wire.reflection import Refusing

LEDGER_WINDOW = 64
"""The results of so many contributions are remembered for each lease."""


@dataclass
class Entry:
    """A contribution in the ledger. Without a result it waits in the open round."""

    push: Push
    gradient: np.ndarray
    staleness: int
    result: PushResult | None = None


@dataclass
class Member:
    """A worker that holds a lease."""

    lease: Lease
    expires_at: float
    applied_count: int = 0
    rejected_count: int = 0
    last: Entry | None = None


@dataclass
class Ledger:
    """What became of the contributions of one lease."""

    last_sequence: int = 0
    entries: dict[int, Entry] = field(default_factory=dict)

    def find(self, sequence: int) -> Entry | None:
        """The entry of a sequence; None for the next one.

        Raises:
            KedgeError: SEQUENCE_FORGOTTEN or SEQUENCE_GAP.
        """
        if sequence in self.entries:
            return self.entries[sequence]
        if 1 <= sequence <= self.last_sequence:
            oldest = min(self.entries)
            raise KedgeError(
                "SEQUENCE_FORGOTTEN",
                f"sequence {sequence} is no longer recorded, the oldest that is is {oldest}",
                got=sequence,
                oldest=oldest,
            )
        if sequence != self.last_sequence + 1:
            raise KedgeError(
                "SEQUENCE_GAP",
                f"sequence {sequence} came where {self.last_sequence + 1} was due",
                expected=self.last_sequence + 1,
                got=sequence,
            )
        return None

    def record(self, entry: Entry) -> None:
        """Takes the entry of the next sequence."""
        self.last_sequence = entry.push.sequence
        self.entries[self.last_sequence] = entry
        self.entries.pop(self.last_sequence - LEDGER_WINDOW, None)


class FakeRun:
    """A run. `now` is the same clock's reading in every call."""

    def __init__(self, new: NewRun, weights: np.ndarray) -> None:
        self.new = new
        self.name = f"runs/{new.run_id}"
        self.updater = Updater(new.optimizer, new.groups, new.manifest, weights)
        self.controls = Controls.begin(new.optimizer.spec(), new.groups)
        self.members: dict[str, Member] = {}
        self._create_time = datetime.now(UTC)
        self._epochs: dict[str, int] = {}
        self._ledgers: dict[tuple[str, int], Ledger] = {}
        self._is_formed = False
        self._round: list[Entry] = []
        self._round_began_at = 0.0
        self._applied_count = 0
        self._rejected_counts: Counter[str] = Counter()
        self._loss: float | None = None

    @property
    def step(self) -> int:
        """The number of updates applied."""
        return self.updater.step

    def join(self, lease: Lease, now: float) -> None:
        """Takes a worker in, in the place of one of the same name."""
        self._epochs[lease.worker] = lease.epoch
        self.members[lease.worker] = Member(lease, now + lease.lease_seconds)
        self.advance(now)

    def leave(self, lease: Lease, now: float) -> None:
        """Lets a worker go, if it still holds this lease."""
        if self._epochs.get(lease.worker) == lease.epoch:
            self.members.pop(lease.worker, None)
        self.advance(now)

    def renew(self, lease: Lease, now: float) -> Member:
        """Renews a lease.

        Raises:
            KedgeError: WORKER_NOT_FOUND, WORKER_SUPERSEDED or LEASE_EXPIRED.
        """
        current = self._epochs.get(lease.worker)
        about: dict[str, Any] = {"worker": lease.worker, "epoch": lease.epoch}
        if current is None:
            raise KedgeError("WORKER_NOT_FOUND", f"{lease.worker} has not joined: join first", worker=lease.worker)
        if current != lease.epoch:
            message = f"{lease.worker} was joined again by another process, in epoch {current}"
            raise KedgeError("WORKER_SUPERSEDED", message, **about, current_epoch=current)
        if lease.worker not in self.members:
            raise KedgeError("LEASE_EXPIRED", f"the lease of {lease.worker} ran out: join again", **about)
        member = self.members[lease.worker]
        member.expires_at = now + member.lease.lease_seconds
        return member

    def contribute(self, push: Push, gradient: np.ndarray, now: float) -> Entry:
        """Records a contribution, or finds the record of a repeated one.

        Args:
            push: the contribution.
            gradient: float64 of shape [n], as it came over the wire.
            now: seconds.

        Raises:
            KedgeError: whatever keeps it from being recorded.
        """
        ledger = self._ledgers.setdefault((push.lease.worker, push.lease.epoch), Ledger())
        entry = ledger.find(push.sequence) if ledger.last_sequence else None
        if entry is not None:
            return entry
        member = self.renew(push.lease, now)
        ledger.find(push.sequence)
        self._check(push)
        entry = Entry(push, gradient, self.step - push.base_step)
        ledger.record(entry)
        member.last = entry
        self._judge(entry, member, now)
        return entry

    def advance(self, now: float) -> None:
        """Ends the leases and the round that are due at `now`."""
        self.members = {name: member for name, member in self.members.items() if member.expires_at > now}
        policy = self.new.aggregation
        if isinstance(policy, Asynchronous):
            return
        self._is_formed = bool(self.members) and (self._is_formed or len(self.members) >= policy.quorum)
        timeout = policy.timeout_seconds
        if len(self._round) >= policy.quorum:
            self._close("QUORUM_REACHED")
        elif self._round and len(self._round) >= self._required_count():
            self._close("ALL_LIVE_CONTRIBUTED")
        elif self._round and timeout is not None and now >= self._round_began_at + timeout:
            self._close("TIMEOUT")

    def set_hyperparameters(self, group: str, change: Change) -> int:
        """Changes what the next step is made with."""
        step = self.step + 1
        with Refusing("hyperparameters"):
            self.controls = self.controls.changed(group, change, step=step)
        return step

    def tick_schedule(self, group: str, to: int | None) -> int:
        """Ticks a schedule by hand."""
        with Refusing("schedule"):
            self.controls = self.controls.ticked(group, to)
        return self.controls.rate_state(group).tick

    def info(self, now: float, *, with_manifest: bool) -> RunInfo:
        """What the server says of it."""
        manifest = self.new.manifest
        return RunInfo(
            name=self.name,
            create_time=self._create_time,
            parameter_count=manifest.element_count,
            optimizer=self.new.optimizer,
            aggregation=self.new.aggregation,
            groups=self.new.groups,
            changes=self.controls.changes,
            status=self._status(now),
            manifest=manifest if with_manifest else None,
        )

    def _check(self, push: Push) -> None:
        if push.example_count < 1:
            message = f"example_count is {push.example_count}: it must be at least 1"
            raise KedgeError("INVALID_EXAMPLE_COUNT", message, example_count=push.example_count)
        if push.base_step > self.step:
            raise KedgeError(
                "BASE_STEP_AHEAD",
                f"base_step is {push.base_step}, the run is at step {self.step}: send the step of the weights",
                base_step=push.base_step,
                step=self.step,
            )

    def _judge(self, entry: Entry, member: Member, now: float) -> None:
        reason = self._objection(entry)
        if reason is not None:
            member.rejected_count += 1
            self._rejected_counts[reason] += 1
            message = f"base_step {entry.push.base_step}, step {self.step}: see docs/errors.md"
            entry.result = PushResult("rejected", reason, self.step, entry.staleness, message)
            return
        if not self._round:
            self._round_began_at = now
        self._round.append(entry)
        if isinstance(self.new.aggregation, Asynchronous):
            self._close("EACH_CONTRIBUTION")
        else:
            self.advance(now)

    def _objection(self, entry: Entry) -> str | None:
        policy = self.new.aggregation
        limit = policy.max_staleness if isinstance(policy, Asynchronous) else 0
        if not np.isfinite(entry.gradient).all():
            return "NON_FINITE_GRADIENT"
        if np.square(entry.gradient).sum() > np.finfo(np.float32).max:
            return "GRADIENT_TOO_LARGE"
        if limit is not None and entry.staleness > limit:
            return "STALE_GRADIENT"
        if entry.push.lease.worker in self._contributors():
            return "ALREADY_CONTRIBUTED"
        return None

    def _required_count(self) -> int:
        policy = self.new.aggregation
        if isinstance(policy, Asynchronous):
            return 1
        awaited = self.members.keys() - self._contributors()
        return min(policy.quorum, len(self._round) + len(awaited)) if self._is_formed else policy.quorum

    def _contributors(self) -> set[str]:
        return {entry.push.lease.worker for entry in self._round}

    def _close(self, reason: str) -> None:
        """Applies the mean of the round."""
        entries, self._round = self._round, []
        total = sum(entry.push.example_count for entry in entries)
        gradient = sum((self._weighted(entry) for entry in entries), np.zeros(())) / total
        self.updater.apply(gradient, self.controls.values())
        self._applied_count += len(entries)
        losses = [(entry.push.loss, entry.push.example_count) for entry in entries if entry.push.loss is not None]
        counted = sum(n for _, n in losses)
        self._loss = sum(loss * n for loss, n in losses) / counted if losses else None
        self.controls = self.controls.after_step(self._loss, counted)
        for entry in entries:
            entry.result = PushResult("applied", reason, self.step, entry.staleness, f"part of step {self.step}")
            member = self.members.get(entry.push.lease.worker)
            if member is not None and member.lease.epoch == entry.push.lease.epoch:
                member.applied_count += 1

    def _weighted(self, entry: Entry) -> np.ndarray:
        policy = self.new.aggregation
        is_inverse = isinstance(policy, Asynchronous) and policy.scaling == "inverse"
        scale = 1 / (1 + entry.staleness) if is_inverse else 1.0
        return entry.gradient * (scale * entry.push.example_count)

    def _status(self, now: float) -> RunStatus:
        held, required = len(self._round), self._required_count()
        return RunStatus(
            step=self.step,
            lookahead_sync_count=self.updater.lookahead_sync_count,
            learning_rate=self.controls.learning_rate,
            workers=tuple(self._worker_status(self.members[name], now) for name in sorted(self.members)),
            round=RoundStatus(held, required) if held else None,
            applied_count=self._applied_count,
            rejected_counts=dict(self._rejected_counts),
            loss=self._loss,
            waiting_for=self._waiting_for(held, required),
        )

    def _waiting_for(self, held: int, required: int) -> str:
        policy = self.new.aggregation
        live = len(self.members)
        if isinstance(policy, Asynchronous) or not live:
            return ""
        missing = policy.quorum - live
        if missing > 0 and not self._is_formed:
            return f"{missing} more worker{'s' * (missing > 1)} to join: the quorum is {policy.quorum}, {live} live"
        more = required - held
        return f"{more} more contribution{'s' * (more > 1)} to the round, which needs {required}" if held else ""

    def _worker_status(self, member: Member, now: float) -> WorkerStatus:
        ledger = self._ledgers.get((member.lease.worker, member.lease.epoch), Ledger())
        return WorkerStatus(
            name=member.lease.worker,
            epoch=member.lease.epoch,
            lease_remaining_seconds=member.expires_at - now,
            last_sequence=ledger.last_sequence,
            applied_count=member.applied_count,
            rejected_count=member.rejected_count,
            last_staleness=member.last.staleness if member.last else 0,
            last_loss=member.last.push.loss if member.last else None,
        )
