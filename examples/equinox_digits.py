"""An Equinox network on handwritten digits, in a loop that is written for optax: only the transformation is another.

Start a server with `kedge-server serve --listen 127.0.0.1:50051`, then this with KEDGE_ADDRESS=127.0.0.1:50051. It ends
with the accuracy on digits that were not trained on.
"""

import argparse

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import kedge
import kedge.adapters.jax
from kedge.adapters.optax import from_optax

BATCH_SIZE = 32
TEST_COUNT = 360

Batch = tuple[jax.Array, jax.Array]


def load() -> tuple[Batch, Batch]:
    """Images of shape [count, 64] with their labels: those to train with, and those to test with."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    images, labels = jnp.asarray(images[order] / 16, jnp.float32), jnp.asarray(labels[order])
    return (images[TEST_COUNT:], labels[TEST_COUNT:]), (images[:TEST_COUNT], labels[:TEST_COUNT])


@eqx.filter_jit
@eqx.filter_value_and_grad
def value_and_grad(model: eqx.nn.MLP, images: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean cross entropy of a minibatch, and its gradient."""
    log_odds = jax.nn.log_softmax(jax.vmap(model)(images))
    return -jnp.mean(jnp.take_along_axis(log_odds, labels[:, None], axis=1))


def train(model: eqx.nn.MLP, digits: Batch, run: kedge.adapters.jax.JaxRun, steps: int) -> eqx.nn.MLP:
    """The model after so many steps."""
    images, labels = digits
    generator = np.random.default_rng()
    with kedge.adapters.jax.remote(run) as tx:
        model = eqx.combine(tx.pull(), model)
        state = tx.init(eqx.filter(model, eqx.is_inexact_array))
        while state.step < steps:
            rows = generator.integers(len(labels), size=BATCH_SIZE)
            loss, grads = value_and_grad(model, images[rows], labels[rows])
            params = eqx.filter(model, eqx.is_inexact_array)
            updates, state = tx.update(grads, state, params, value=loss, example_count=BATCH_SIZE)
            model = eqx.apply_updates(model, updates)
            if state.step % 100 == 0:
                print(f"step {state.step}: loss {loss:.3f}")
    return model


def accuracy(model: eqx.nn.MLP, images: jax.Array, labels: jax.Array) -> float:
    """The share of images that are read right."""
    return float(jnp.mean(jnp.argmax(jax.vmap(model)(images), axis=1) == labels))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Train on digits against the server at KEDGE_ADDRESS.")
    parser.add_argument("--steps", type=int, default=500, help="stop when the run has made so many steps")
    steps = parser.parse_args().steps
    train_digits, test_digits = load()
    model = eqx.nn.MLP(64, 10, width_size=64, depth=1, key=jax.random.key(0))
    with kedge.connect() as client:
        run = kedge.adapters.jax.get_or_create_run(
            client,
            "equinox-digits",
            params=eqx.filter(model, eqx.is_inexact_array),
            optimizer=from_optax(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(3e-3))),
            aggregation=kedge.Synchronous(quorum=1),
        )
        model = train(model, train_digits, run, steps)
    print(f"accuracy {accuracy(model, *test_digits):.3f}")


if __name__ == "__main__":
    main()
