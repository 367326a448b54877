"""A worker's process: it does what the SDK does, and now and then what nobody should."""

from collections.abc import Callable
from random import Random
from typing import NamedTuple

from kedge_server.core.values import ContributionHeader, PushResult

from .disk import Weights
from .loop import Loop, Network
from .model import Gradient
from .server import DIGEST, Reply, Server

RETRY_SECONDS = 0.8
NOT_NOW = {"QUEUE_FULL", "SEQUENCE_GAP"}
"""What is sent again as it was: there is no room; or what was sent before it has not come, or was lost."""
LOST = {"LEASE_EXPIRED", "WORKER_SUPERSEDED", "WORKER_EVICTED"}


class Manners(NamedTuple):
    """How often a process does what it should not, and how long it thinks."""

    think_seconds: float = 0.4
    not_finite: float = 0.0
    too_large: float = 0.0
    without_pull: float = 0.0
    from_old_weights: float = 0.0
    ahead_of_itself: float = 0.0
    impatient: float = 0.0
    """How often it sends another one before it is told what became of the first."""


class Process:
    """One process under a worker's name.

    Args:
        gradient: of the weights that it pulled; what does not depend on them is no other's.
    """

    def __init__(
        self,
        name: str,
        lease_seconds: float,
        manners: Manners,
        *,
        server: Server,
        network: Network,
        random: Random,
        gradient: Callable[[Weights], int],
    ) -> None:
        self.name, self.lease_seconds, self.manners = name, lease_seconds, manners
        self.is_paused = self.is_dead = False
        self.scale = 1.0
        self.answered_count = 0
        self._server, self._network, self._random, self._gradient = server, network, random, gradient
        self._loop: Loop = server.loop
        self._epoch = self._sequence = self._call_number = 0
        self._weights = Weights(0, 0)

    def start(self) -> None:
        """Joins anew, with nothing on its way any more."""
        self._epoch = 0
        self._call(lambda reply: self._server.join(self.name, self.lease_seconds, reply), self._on_joined)

    def leave(self) -> None:
        """Says so, and ends."""
        if self._epoch:
            self._network.send(lambda: self._server.leave(self.name, self._epoch))
        self.is_dead = True

    def _on_joined(self, answer: object) -> None:
        if not isinstance(answer, int):
            self._later(0.3 + self._random.random(), self.start)
            return
        self.begin(answer)

    def begin(self, epoch: int) -> None:
        """Goes to work with a lease."""
        self._epoch, self._sequence = epoch, 0
        self._beat(epoch)
        self._pull()

    def _pull(self) -> None:
        self._call(lambda reply: self._server.pull(self, self.name, reply), self._on_pulled)

    def _on_pulled(self, weights: object) -> None:
        assert isinstance(weights, Weights)
        self._weights = weights
        self._later(self.manners.think_seconds * self._random.random(), self._push)

    def _push(self) -> None:
        self._sequence += 1
        header, gradient = self._header(), self._new_gradient()
        self._network.send(lambda: self._server.check(header))
        self._misbehave(header)
        self._send(header, gradient)
        if self._random.random() < self.manners.impatient:
            self._sequence += 1
            self._send_beside(self._header(), self._new_gradient())

    def _send(self, header: ContributionHeader, gradient: Gradient) -> None:
        self._call(
            lambda reply: self._server.push(header, gradient, reply),
            lambda answer: self._on_pushed(header, gradient, answer),
        )

    def _send_beside(self, header: ContributionHeader, gradient: Gradient) -> None:
        """Sends it until it is answered, whatever else goes on; only what is lost with its lease is given up."""
        is_answered = False

        def on_answer(answer: object, _: int) -> None:
            nonlocal is_answered
            is_answered |= isinstance(answer, PushResult) or answer == "deferred"

        def attempt() -> None:
            if self.is_dead or is_answered or self._epoch != header.epoch:
                return
            self._network.send(lambda: self._server.push(header, gradient, self._reply(on_answer, 0)))
            self._loop.after(RETRY_SECONDS, attempt)

        attempt()

    def _on_pushed(self, header: ContributionHeader, gradient: Gradient, answer: object) -> None:
        if answer in NOT_NOW:
            self._later(0.2, lambda: self._send(header, gradient))
        elif isinstance(answer, PushResult) or answer == "deferred":
            self.answered_count += 1
            goes_on = self._random.random() < self.manners.without_pull
            self._later(0.05, self._push) if goes_on else self._pull()
        else:
            assert answer in LOST, answer
            self._later(0.2 * self._random.random(), self.start)

    # Within

    def _header(self, sequence_ahead: int = 0, base_ahead: int = 0) -> ContributionHeader:
        chance, step = self._random.random, self._weights.step
        is_old = chance() < self.manners.from_old_weights
        return ContributionHeader(
            worker_id=self.name,
            epoch=self._epoch,
            sequence=self._sequence + sequence_ahead,
            base_step=(max(step - 2, 0) if is_old else step) + base_ahead,
            manifest_digest=DIGEST,
            example_count=1,
            loss=None,
        )

    def _new_gradient(self) -> Gradient:
        chance, value = self._random.random, self._gradient(self._weights)
        if chance() < self.manners.not_finite:
            return Gradient(value, float("nan"), is_finite=False)
        if chance() < self.manners.too_large:
            return Gradient(value, self._random.choice([9.0, 1e3, 1e30]))
        return Gradient(value, self.scale * (1.0 + chance()))

    def _misbehave(self, header: ContributionHeader) -> None:
        """Sends what is refused without a trace: a sequence or a base step that nobody has come to yet."""
        if self._random.random() >= self.manners.ahead_of_itself:
            return
        gap, future = self._header(sequence_ahead=2), self._header(base_ahead=self._random.choice([1, 1000]))
        assert header.epoch == self._epoch
        self._network.send(lambda: self._server.push(gap, Gradient(-1), _nobody))
        self._network.send(lambda: self._server.check(future))

    def _beat(self, epoch: int) -> None:
        if self.is_dead or epoch != self._epoch:
            return
        if not self.is_paused:
            self._network.send(lambda: self._server.heartbeat(self.name, epoch, self._reply(self._on_beat, epoch)))
        self._loop.after(self.lease_seconds / 3, lambda: self._beat(epoch))

    def _on_beat(self, reason: object, epoch: int) -> None:
        if reason and epoch == self._epoch:
            self.start()

    def _call(self, send: Callable[[Reply], None], then: Callable[[object], None]) -> None:
        """Sends a request until an answer to it comes; what comes of an earlier one is not heard."""
        self._call_number += 1
        number = self._call_number

        def on_answer(answer: object, _: int) -> None:
            if number == self._call_number:
                self._call_number += 1
                then(answer)

        def attempt() -> None:
            if self.is_dead or number != self._call_number:
                return
            if not self.is_paused:
                self._network.send(lambda: send(self._reply(on_answer, 0)))
            self._loop.after(RETRY_SECONDS, attempt)

        attempt()

    def _reply(self, take: Callable[[object, int], None], about: int) -> Reply:
        def deliver(answer: object) -> None:
            if not self.is_dead and not self.is_paused:
                take(answer, about)

        return lambda answer: self._network.send(lambda: deliver(answer))

    def _later(self, seconds: float, action: Callable[[], None]) -> None:
        """Does something after a while, unless something else is begun first; a pause makes it wait."""
        self._call_number += 1
        number = self._call_number

        def act() -> None:
            if self.is_dead or number != self._call_number:
                return
            if self.is_paused:
                self._loop.after(0.2, act)
            else:
                action()

        self._loop.after(seconds, act)


def _nobody(answer: object) -> None:
    """Hears an answer that nobody waits for."""
