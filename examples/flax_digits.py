"""A Flax network on handwritten digits: a convolution, in the usual loop of value_and_grad, with any number of workers.

Start a server with `kedge-server serve --listen 127.0.0.1:50051`, then this with KEDGE_ADDRESS=127.0.0.1:50051; with
`--quorum 2` start it twice. It ends with the accuracy of the slow weights on digits that were not trained on.
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike
from sklearn.datasets import load_digits

import kedge
import kedge.adapters.jax
from kedge import optim

BATCH_SIZE = 32
TEST_COUNT = 360

Batch = tuple[np.ndarray, np.ndarray]


class Network(nnx.Module):
    """Scores of shape [count, 10] for images of shape [count, 8, 8, 1]."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.convolution = nnx.Conv(1, 16, kernel_size=(3, 3), strides=2, rngs=rngs)
        self.hidden = nnx.Linear(4 * 4 * 16, 64, rngs=rngs)
        self.output = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, images: ArrayLike) -> jax.Array:
        """The greater the score the likelier the digit."""
        seen = nnx.relu(self.convolution(jnp.asarray(images)))
        return self.output(nnx.relu(self.hidden(seen.reshape(len(seen), -1))))


def load() -> tuple[Batch, Batch]:
    """Images with their labels: those to train with, and those to test with."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    images, labels = (images[order] / 16).astype(np.float32).reshape(-1, 8, 8, 1), labels[order]
    return (images[TEST_COUNT:], labels[TEST_COUNT:]), (images[:TEST_COUNT], labels[:TEST_COUNT])


def train(network: Network, digits: Batch, run: kedge.adapters.jax.JaxRun, steps: int) -> None:
    """Contributes until the run has made so many steps."""
    structure, _ = nnx.split(network, nnx.Param)

    @jax.jit
    @jax.value_and_grad
    def value_and_grad(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        log_odds = jax.nn.log_softmax(nnx.merge(structure, params)(images))
        return -jnp.mean(jnp.take_along_axis(log_odds, labels[:, None], axis=1))

    images, labels = digits
    generator = np.random.default_rng()
    with run.join() as worker:
        params = worker.pull()
        while worker.step_number < steps:
            rows = generator.integers(len(labels), size=BATCH_SIZE)
            loss, grads = value_and_grad(params, images[rows], labels[rows])
            params = worker.step(grads, loss=loss, example_count=BATCH_SIZE)
            if worker.step_number % 50 == 0:
                print(f"step {worker.step_number}: loss {loss:.3f}")


def accuracy(network: Network, images: np.ndarray, labels: np.ndarray) -> float:
    """The share of images that are read right."""
    return float(jnp.mean(jnp.argmax(network(images), axis=1) == labels))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Train on digits against the server at KEDGE_ADDRESS.")
    parser.add_argument("--steps", type=int, default=500, help="stop when the run has made so many steps")
    parser.add_argument("--quorum", type=int, default=1, help="workers that make a step together")
    arguments = parser.parse_args()
    train_digits, test_digits = load()
    network = Network(nnx.Rngs(0))
    with kedge.connect() as client:
        run = kedge.adapters.jax.get_or_create_run(
            client,
            "flax-digits",
            params=nnx.state(network, nnx.Param),
            optimizer=optim.Lookahead(optim.Adam(lr=2e-3), sync_period=5, alpha=0.5),
            aggregation=kedge.Synchronous(quorum=arguments.quorum),
        )
        train(network, train_digits, run, arguments.steps)
        nnx.update(network, run.pull("slow"))
    print(f"slow weights: accuracy {accuracy(network, *test_digits):.3f}")


if __name__ == "__main__":
    main()
