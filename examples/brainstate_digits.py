"""A brainstate network on handwritten digits: braintools' own training loop, with an optimizer that a server holds.

Start a server with `kedge-server serve --listen 127.0.0.1:50051`, then this with KEDGE_ADDRESS=127.0.0.1:50051. It ends
with the accuracy of the slow weights on digits that were not trained on.
"""

import argparse
from collections.abc import Iterator

import brainstate
import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits

import kedge
from kedge import optim
from kedge.adapters import brainstate as kb

BATCH_SIZE = 32
TEST_COUNT = 360

Batch = tuple[jax.Array, jax.Array]


def load() -> tuple[Batch, Batch]:
    """Images of shape [count, 64] with their labels: those to train with, and those to test with."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    images, labels = jnp.asarray(images[order] / 16, jnp.float32), jnp.asarray(labels[order])
    return (images[TEST_COUNT:], labels[TEST_COUNT:]), (images[:TEST_COUNT], labels[:TEST_COUNT])


def batches(images: jax.Array, labels: jax.Array) -> Iterator[Batch]:
    """Every image once, in another order each time."""
    order = np.random.default_rng().permutation(len(labels))
    for start in range(0, len(order) - BATCH_SIZE + 1, BATCH_SIZE):
        rows = order[start : start + BATCH_SIZE]
        yield images[rows], labels[rows]


def make_model() -> brainstate.nn.Module:
    """64 inputs, 64 hidden units, 10 scores."""
    return brainstate.nn.Sequential(brainstate.nn.Linear(64, 64), brainstate.nn.ReLU(), brainstate.nn.Linear(64, 10))


def train(model: brainstate.nn.Module, digits: Batch, optimizer: kb.RemoteOptimizer, epochs: int) -> None:
    """The usual loop. The gradient is compiled; `update` talks to the server, and so it stands outside."""

    def mean_loss(images: jax.Array, labels: jax.Array) -> jax.Array:
        log_odds = jax.nn.log_softmax(model(images))
        return -jnp.mean(jnp.take_along_axis(log_odds, labels[:, None], axis=1))

    weights = model.states(brainstate.ParamState)
    gradient = brainstate.transform.jit(brainstate.transform.grad(mean_loss, weights, return_value=True))
    for epoch in range(1, epochs + 1):
        losses = []
        for images, labels in batches(*digits):
            grads, loss = gradient(images, labels)
            optimizer.update(grads, loss=loss, example_count=len(labels))
            losses.append(float(loss))
        print(
            f"epoch {epoch}: step {optimizer.step_count.value}, loss {np.mean(losses):.3f}, "
            f"rate {optimizer.current_lr:g}"
        )
        optimizer.lr.step()


def accuracy(model: brainstate.nn.Module, images: jax.Array, labels: jax.Array) -> float:
    """The share of images that are read right."""
    return float(jnp.mean(jnp.argmax(model(images), axis=1) == labels))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Train on digits against the server at KEDGE_ADDRESS.")
    parser.add_argument("--epochs", type=int, default=15, help="times to go through the images")
    epochs = parser.parse_args().epochs
    train_digits, test_digits = load()
    model = make_model()
    rate = kb.StepLR(base_lr=2e-3, step_size=5, gamma=0.5)
    with kedge.connect() as client, kb.Lookahead(optim.AdaBelief(), lr=rate, client=client) as optimizer:
        optimizer.register_trainable_weights(model.states(brainstate.ParamState))
        train(model, train_digits, optimizer, epochs)
        optimizer.pull("slow")
        print(f"slow weights: accuracy {accuracy(model, *test_digits):.3f}")


if __name__ == "__main__":
    main()
