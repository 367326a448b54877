"""A worker: computes gradients of its part of the digits with JAX, pushes them, and goes on with what came of them.

The server's address is in KEDGE_ADDRESS. Start as many as you like, in any order:

    KEDGE_ADDRESS=127.0.0.1:50051 python worker.py worker-1 --part 0 --parts 4 --steps 1000
"""

import argparse
from collections import Counter
from collections.abc import Iterable

import jax
import jax.numpy as jnp

import data
import kedge
import model


def loss(weights: dict[str, dict[str, jax.Array]], images: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean cross entropy of a minibatch."""
    log_probabilities = jax.nn.log_softmax(model.logits(weights, images))
    return -jnp.mean(jnp.take_along_axis(log_probabilities, labels[:, None], axis=1))


def train(run: kedge.Run, name: str, batches: Iterable[data.Digits], *, steps: int) -> Counter[str]:
    """Contributes until the run has made so many steps, and counts what became of the contributions."""
    outcomes: Counter[str] = Counter()
    value_and_grad = jax.jit(jax.value_and_grad(loss))
    with run.join(name, lease_seconds=model.LEASE_SECONDS) as worker:
        weights = worker.pull()
        for images, labels in batches:
            if worker.step_number >= steps:
                break
            value, grads = value_and_grad(weights, images, labels)
            weights = worker.step(grads, loss=value, example_count=len(labels))
            if worker.last_result is not None:
                outcomes[worker.last_result.outcome] += 1
    return outcomes


def main() -> None:
    """The command."""
    arguments = _parse_arguments()
    train_digits, _ = data.load()
    shard = data.shard(train_digits, arguments.part, arguments.parts)
    batches = data.batches(shard, size=model.BATCH_SIZE, seed=arguments.part)
    with kedge.connect() as client:
        run = model.open_run(client, aggregation=kedge.Synchronous(quorum=arguments.parts))
        outcomes = train(run, arguments.name, batches, steps=arguments.steps)
    print(f"{outcomes['applied']} applied, {outcomes['rejected']} rejected")


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train on a part of the handwritten digits.")
    parser.add_argument("name", help="the worker's name, unique in the run")
    parser.add_argument("--part", type=int, default=0, help="which part of the training images is its own, from 0")
    parser.add_argument("--parts", type=int, default=1, help="how many parts there are; also the run's quorum")
    parser.add_argument("--steps", type=int, default=1000, help="stop when the run has made so many steps")
    return parser.parse_args()


if __name__ == "__main__":
    main()
