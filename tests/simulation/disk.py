"""What a simulated server keeps: commits on their way to a journal that outlives it, and what comes of them.

A commit is written some time after it was taken, in order; one that a gradient belongs to not before that is there.
"""

from collections import deque
from collections.abc import Mapping
from random import Random
from typing import NamedTuple

from kedge import optim
from kedge.policies import Admission, Policy
from kedge.wire.manifest import Manifest
from kedge_server.core.commits import Commit, Created, Held, Joined, Rejected, Restored, RunConfig, Stepped
from kedge_server.core.commits import Ended as LeaseEnded
from kedge_server.core.image import HeldKey, ImageState, RunImage
from kedge_server.storage.plain import decode, encode

from . import facts
from .loop import Action, Loop
from .model import Gradient

EPOCH_SECONDS = 2.0**30
"""Seconds since 1970 when the virtual time is 0."""
MODULUS = (1 << 61) - 1


class Weights(NamedTuple):
    """What a pull is answered with."""

    step: int
    value: int


CONFIG = RunConfig(
    name="runs/r",
    manifest=Manifest.from_specs([("w", (1,), "float32")]),
    optimizer=optim.SGD(lr=0.1),
    created_at_seconds=EPOCH_SECONDS,
    durability="journal",
    block_elements=1,
    first_epoch=1,
)


class Ticket:
    """A commit on its way, the fact beside it, and the gradient that belongs to it."""

    def __init__(self, commit: Commit, fact: facts.AnyFact, at_seconds: float) -> None:
        self.commit, self.fact, self.at_seconds = commit, fact, at_seconds
        self.payload: int | Gradient | None = None
        self.is_ready = not isinstance(commit, Stepped)
        self.then: list[Action] = []


class Checkpoint(NamedTuple):
    """A state that a run can go on from."""

    image: ImageState
    weights: Weights
    held: Mapping[HeldKey, Gradient]
    fact_count: int


class Disk:
    """The journal and the checkpoints of one run.

    Attributes:
        image: what comes of what is written.
        written: the facts beside it.
        weights: of each applied step that is written.
        held: the gradients of the contributions that are held.
        checkpoints: by id.
    """

    def __init__(
        self, loop: Loop, random: Random, *, policy: Policy, admission: Admission, write_seconds: float
    ) -> None:
        self.image = RunImage.create(Created(CONFIG, policy, admission, ()))
        self.written: list[facts.AnyFact] = []
        self.weights = [Weights(0, 0)]
        self.held: dict[HeldKey, Gradient] = {}
        self.write_seconds = write_seconds
        self._journal: list[Ticket] = []
        self._pending: deque[Ticket] = deque()
        self._is_writing = False
        self._loop, self._random = loop, random
        self.checkpoints = {"0": self._checkpoint()}

    # The living server

    def commit(self, commit: Commit, fact: facts.AnyFact, payload: Gradient | None = None) -> Ticket:
        """Takes the next commit."""
        ticket = Ticket(commit, fact, EPOCH_SECONDS + self._loop.now)
        ticket.payload = payload
        self._pending.append(ticket)
        self._go_on()
        return ticket

    def provide(self, ticket: Ticket, payload: int) -> None:
        """Gives a step its gradient."""
        ticket.payload, ticket.is_ready = payload, True
        self._go_on()

    def acknowledge(self, then: Action) -> None:
        """Calls when all that was taken so far is written."""
        if self._pending:
            self._pending[-1].then.append(then)
        else:
            then()

    @property
    def taken(self) -> list[facts.AnyFact]:
        """What is written, and what will be."""
        return self.written + [ticket.fact for ticket in self._pending]

    @property
    def is_idle(self) -> bool:
        """Whether all that was taken is written."""
        return not self._pending

    def take_checkpoint(self) -> None:
        """Only between two steps on the device."""
        self.checkpoints[str(len(self.checkpoints))] = self._checkpoint()

    def _checkpoint(self) -> Checkpoint:
        return Checkpoint(self.image.state(), self.weights[-1], dict(self.held), len(self.written))

    def _go_on(self) -> None:
        if not self.write_seconds:
            self._write()
        elif not self._is_writing and self._pending and self._pending[0].is_ready:
            self._is_writing = True
            pending = self._pending
            delay = self.write_seconds * self._random.random()
            self._loop.after(delay, lambda: self._write() if pending is self._pending else None)

    def _write(self) -> None:
        """Writes some of what is there to be written, at least one."""
        self._is_writing = False
        while self._pending and self._pending[0].is_ready:
            ticket = self._pending.popleft()
            self._journal.append(ticket)
            self.written.append(ticket.fact)
            self._apply(self.image, self.held, self.weights, ticket)
            for then in ticket.then:
                then()
            if self.write_seconds and self._random.random() < 0.3:
                break
        if self._pending and self._pending[0].is_ready:
            self._go_on()

    # What comes of a commit

    def _apply(self, image: RunImage, held: dict[HeldKey, Gradient], weights: list[Weights], ticket: Ticket) -> None:
        commit = ticket.commit
        if isinstance(commit, Restored):
            checkpoint = self.checkpoints[commit.checkpoint_id]
            image.go_back(commit, RunImage.of(checkpoint.image))
            held.clear()
            go_back(weights, checkpoint.weights)
            return
        if isinstance(commit, Held):
            assert isinstance(ticket.payload, Gradient)
            held[_key(commit)] = ticket.payload
        elif isinstance(commit, Rejected):
            held.pop(_key(commit), None)
        elif isinstance(commit, Stepped):
            assert isinstance(ticket.payload, int)
            for judgement in commit.judgements:
                held.pop((judgement.worker_id, judgement.epoch, judgement.sequence), None)
            weights.append(Weights(commit.step, (weights[-1].value - ticket.payload) % MODULUS))
        image.apply(commit, ticket.at_seconds)

    # After the crash

    def crash(self) -> None:
        """All that is not written is lost; what is, is read again, one way or another, with the same result."""
        self._pending, self._is_writing = deque(), False
        before, held, weights = self.image.state(), self.held, self.weights
        checkpoint = self.checkpoints[self._random.choice(list(self.checkpoints))]
        recode = (lambda value: decode(encode(value))) if self._random.random() < 0.3 else (lambda value: value)
        self.image, self.held = RunImage.of(recode(checkpoint.image)), dict(checkpoint.held)
        found = list(self.weights)
        go_back(found, checkpoint.weights)
        for ticket in self._journal[checkpoint.image.next_index - 2 :]:
            again = Ticket(recode(ticket.commit), ticket.fact, ticket.at_seconds)
            again.payload = ticket.payload
            self._apply(self.image, self.held, found, again)
        assert self.image.state() == before, "a checkpoint and what came after it are not what was there"
        assert (self.held, found[-1]) == (held, weights[-1]), "another state"


def go_back(weights: list[Weights], to: Weights) -> None:
    """Makes these the newest. Where they are ahead, what is between was of another past, and is nobody's any more."""
    del weights[to.step :]
    weights += [to] * (to.step + 1 - len(weights))


def _key(commit: Held | Rejected) -> HeldKey:
    judgement = commit.judgement
    return judgement.worker_id, judgement.epoch, judgement.sequence


def check_said(commit: Commit, fact: facts.AnyFact) -> None:
    """A commit says what the fact beside it says."""
    match commit, fact:
        case Joined(), facts.Joined():
            nobody = ""  # no credentials are asked for here
            assert commit == (fact.name, fact.epoch, fact.duration_seconds, fact.bad_count, nobody)
        case LeaseEnded(), facts.Ended():
            assert (commit.worker_id, commit.epoch) == (fact.name, fact.epoch)
            assert (commit.eviction_cause is not None, commit.request_id) == (fact.is_evicted, fact.request_id)
            assert (commit.block_seconds is None) == (fact.blocked_until is None)
        case Rejected(), facts.Rejected():
            assert (_key(commit), commit.result.reason) == (fact.judged.entry.key, fact.reason)
        case _:
            raise AssertionError(f"{commit} is committed where the model says {fact}")
