"""A training of which every step is known beforehand, for a server that may be killed at any moment of it.

Two workers in one thread make a synchronous run with everything that a server has to keep: Lookahead's pair, moments,
schedules that tick by themselves and by hand, groups, changed hyperparameters, contributions that are held, and some
that are rejected. The gradients depend on the weights that were pulled, so that whatever is lost shows in all that
follows.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np

import kedge
from kedge import client as kedge_client
from kedge import optim
from kedge.retry import Retrier
from kedge.transport.grpc import GrpcTransport

STEPS = 12
SEED = 20
SHAPES = {"w1": (40, 30), "b1": (30,), "w2": (30, 24), "b2": (24,)}

SETTINGS = {
    "KEDGE_STORAGE__SEGMENT_BYTES": "20000",  # two records
    "KEDGE_STORAGE__SYNC_SECONDS": "0.02",
    "KEDGE_DEVICE__BLOCK_ELEMENTS": "700",  # so that the state has several
}
"""The environment of its server."""


@contextlib.contextmanager
def impatient_client(address: str) -> Iterator[kedge.Client]:
    """A client that tries again after a tenth of the usual time."""
    with kedge_client.Client(GrpcTransport(address), Retrier(60, jitter=lambda: 0.1)) as client:
        yield client


def initial_params() -> dict[str, np.ndarray]:
    random = np.random.default_rng(SEED)
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}


def gradient(weights: dict[str, np.ndarray], step: int, worker: int) -> dict[str, np.ndarray]:
    """What a worker computes of the weights of a step."""
    random = np.random.default_rng((SEED, step, worker))
    noise = {name: random.standard_normal(value.shape).astype(np.float32) for name, value in weights.items()}
    return {name: noise[name] + np.float32(0.1) * value for name, value in weights.items()}


def not_a_number() -> dict[str, np.ndarray]:
    return {name: np.full(shape, np.nan, np.float32) for name, shape in SHAPES.items()}


def create(client: kedge.Client, durability: Any, name: str = "main") -> kedge.Run:
    return client.create_run(
        name,
        params=initial_params(),
        optimizer=optim.Lookahead(
            optim.AdaBelief(lr=optim.StepLR(0.01, step_size=4, gamma=0.5)), sync_period=5, alpha=0.5
        ),
        groups=[optim.Group("b*", lr=optim.ExponentialLR(0.02, gamma=0.5, tick="manual"), name="biases")],
        aggregation=kedge.Synchronous(2),
        durability=durability,
        checkpoints=kedge.Checkpoints(every_steps=3),
    )


class Training:
    """The run `main`, and what its two workers do in each step."""

    def __init__(self, client: kedge.Client, durability: Any) -> None:
        self._client = client
        self.run = create(client, durability)
        self.workers = [self.run.join(name, lease_seconds=120) for name in ("a", "b")]

    def make_all_steps(self) -> None:
        for step in range(STEPS):
            self.make_step(step)

    def make_step(self, step: int) -> None:
        """The next step, and what belongs to it."""
        first, second = self.workers
        if step % 4 == 1:
            assert first.push(not_a_number(), base_step=step).outcome == "rejected"
        weights = [worker.pull(min_step=step) for worker in self.workers]
        assert [worker.step_number for worker in self.workers] == [step, step]
        held = first.push(gradient(weights[0], step, 0), loss=1.0 + step, example_count=3)
        assert held.outcome == "deferred"
        if step == 10:  # then the first one's is all that the round gets
            assert second.push(not_a_number()).outcome == "rejected"
        else:
            result = second.push(gradient(weights[1], step, 1), loss=2.0, wait_seconds=60)
            assert (result.outcome, result.step) == ("applied", step + 1)
        self._do_besides(step)

    def _do_besides(self, step: int) -> None:
        if step == 4:
            self.run.set_hyperparameters(grad_clip_norm=0.5)
        if step in (2, 6, 7):
            assert self.run.tick_schedule(group="biases", to=None) == {2: 1, 6: 2, 7: 3}[step]
        if step in (4, 7, 9):
            self.run.checkpoint()
        if step in (3, 9):
            self._create_another_and_delete_it(f"side{step}")

    def _create_another_and_delete_it(self, name: str) -> None:
        create(self._client, None, name)
        # An attempt that was answered too late has deleted it.
        with contextlib.suppress(kedge.errors.NotFoundError):
            self._client.delete_run(name)

    def close(self) -> None:
        for worker in self.workers:
            worker.close()
