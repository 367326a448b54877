"""Virtual time, and a network that delays, repeats, reorders and loses what it carries."""

import heapq
import itertools
from collections.abc import Callable
from random import Random
from typing import NamedTuple

Action = Callable[[], None]


class Loop:
    """Does things at their virtual times, one after the other.

    Args:
        after_each: called after each thing that was done.
    """

    def __init__(self, after_each: Action) -> None:
        self.now = 0.0
        self._after_each = after_each
        self._order = itertools.count()
        self._due: list[tuple[float, int, Action]] = []

    def after(self, seconds: float, action: Action) -> None:
        heapq.heappush(self._due, (self.now + seconds, next(self._order), action))

    def run_until(self, seconds: float) -> None:
        while self._due and self._due[0][0] <= seconds:
            at, _, action = heapq.heappop(self._due)
            self.now = max(self.now, at)
            action()
            self._after_each()
        self.now = max(self.now, seconds)

    def sleep(self, seconds: float) -> None:
        """Lets time pass in which nothing is done: what is due by then is done late."""
        self.now += seconds


class Faults(NamedTuple):
    """What a network does to a message."""

    loss: float = 0.0
    repetition: float = 0.0
    delay_seconds: float = 0.02
    """At most; each message has its own, so that they overtake each other."""
    straggling: float = 0.0
    """How many messages are much later."""
    straggling_seconds: float = 0.0


class Network:
    """Carries messages, each with its own faults."""

    def __init__(self, loop: Loop, random: Random, faults: Faults) -> None:
        self.faults = faults
        self._loop = loop
        self._random = random

    def send(self, deliver: Action) -> None:
        chance = self._random.random
        if chance() >= self.faults.loss:
            self._loop.after(self._delay(), deliver)
        if chance() < self.faults.repetition:
            self._loop.after(self._delay(), deliver)

    def _delay(self) -> float:
        faults, chance = self.faults, self._random.random
        longest = faults.straggling_seconds if chance() < faults.straggling else faults.delay_seconds
        return longest * chance()
