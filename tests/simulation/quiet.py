"""A run in which nothing is lost and everybody behaves, with its workers there from the start."""

from collections.abc import Callable
from random import Random

from kedge.policies import Admission, Policy
from kedge_server.core.coordinator import Bounds

from .disk import Weights
from .loop import Action, Faults, Loop, Network
from .server import Server, Setup
from .workers import Manners, Process

NewProcess = Callable[[str, float, Callable[[Weights], int]], Process]
"""Adds a worker: its name, its lease in seconds, and its gradients."""


def quiet_run(
    policy: Policy, random: Random, faults: Faults, *, apply_seconds: float, look: Action = lambda: None
) -> tuple[Server, NewProcess]:
    """A run, and what adds workers to it. They begin as the loop does. `look` is called after every event."""

    def after_each() -> None:
        server.follow()
        look()

    loop = Loop(after_each)
    server = Server(loop, random, Setup(policy, Admission(), Bounds(8, 64), apply_seconds * random.random(), 0.0))
    network = Network(loop, random, faults)

    def new_process(name: str, lease_seconds: float, gradient: Callable[[Weights], int]) -> Process:
        manners = Manners(think_seconds=random.choice([0.1, 0.6]))
        process = Process(
            name, lease_seconds, manners, server=server, network=network, random=random, gradient=gradient
        )
        server.join(name, lease_seconds, lambda epoch: loop.after(0.0, lambda: process.begin(epoch)))
        return process

    return server, new_process
