"""Bound 0 equals the synchronous trace: which gradients are computed of which weights, and what comes of them."""

from random import Random

import pytest

from kedge.policies import BoundedStaleness, Policy, Synchronous

from .disk import MODULUS, Weights
from .history import gradient_of
from .loop import Faults
from .quiet import quiet_run
from .rerun import each_seed
from .server import Server

ROUND_COUNT = 8
FOR_EVER = 1e6

Trace = list[set[tuple[str, int]]]
"""For each clock who contributed, and the value of the weights that its gradient was computed of."""


def gradient(name: str, weights: int) -> int:
    """Of the worker and of the weights: of others it is another one."""
    return (weights * 6364136223846793005 + sum(name.encode())) % MODULUS


def plain_synchronous(names: list[str]) -> tuple[Trace, int]:
    """N workers compute of the same weights, and their gradients are added up; and the weights at the end."""
    weights, trace = 0, []
    for _ in range(ROUND_COUNT):
        trace.append({(name, weights) for name in names})
        weights = (weights - sum(gradient(name, weights) for name in names)) % MODULUS
    return trace, weights


def start(names: list[str], policy: Policy, random: Random) -> tuple[Server, dict[int, tuple[str, int]]]:
    """A run with these workers, behind a network that delays and repeats; and what each gradient is of."""
    faults = Faults(repetition=0.2, delay_seconds=random.choice([0.02, 0.5]), straggling=0.1, straggling_seconds=0.7)
    server, new_process = quiet_run(policy, random, faults, apply_seconds=0.5)
    computed_of: dict[int, tuple[str, int]] = {}

    def compute(name: str, weights: Weights) -> int:
        value = gradient(name, weights.value)
        computed_of[value] = name, weights.value
        return value

    for name in names:
        new_process(name, FOR_EVER, lambda weights, name=name: compute(name, weights))
    return server, computed_of


def simulated(names: list[str], policy: Policy, seed: int) -> tuple[Trace, int]:
    """What the steps were made of, N contributions at a time; and the weights after them."""
    server, computed_of = start(names, policy, Random(seed))
    wanted = ROUND_COUNT * len(names)
    while len(server.rounds.step_of) < wanted or len(server.weights) <= server.rounds.closed[-1].step:
        assert server.loop.now < 1000, "it does not go on"
        server.loop.run_until(server.loop.now + 0.5)
    values = [gradient_of(c).value for closed in server.rounds.closed for c in closed.contributions]
    trace = [{computed_of[value] for value in values[at : at + len(names)]} for at in range(0, wanted, len(names))]
    last_step = server.rounds.step_of[values[wanted - 1]]
    return trace, server.weights[last_step].value


def compare(seed: int, policy_of: type[Policy]) -> None:
    names = [f"w{number}" for number in range(Random(seed).randint(1, 8))]
    policy = Synchronous(quorum=len(names)) if policy_of is Synchronous else BoundedStaleness(0)
    assert simulated(names, policy, seed) == plain_synchronous(names)


@pytest.mark.parametrize("policy_of", [BoundedStaleness, Synchronous])
def test_workers_in_lockstep_do_what_plain_synchronous_ones_do(quiet_seeds: range, policy_of: type[Policy]) -> None:
    each_seed(quiet_seeds, "lockstep", lambda seed: compare(seed, policy_of))


def test_with_a_bound_of_one_the_trace_is_another_one() -> None:
    """The comparison can fail."""
    names = ["w0", "w1", "w2"]
    assert any(simulated(names, BoundedStaleness(1), seed) != plain_synchronous(names) for seed in range(5))
