"""Training with few messages: each worker makes twenty steps by itself, and the server averages what they came to.

Start a server with `kedge-server serve --listen 127.0.0.1:50051`, then this twice with KEDGE_ADDRESS=127.0.0.1:50051
(or once with `--quorum 1`). It ends with the accuracy on digits that were not trained on, and with how many gradients
it took. `--sync-period 1` exchanges after every step, for comparison.
"""

import argparse

import numpy as np
from sklearn.datasets import load_digits

import kedge
from kedge import optim

BATCH_SIZE = 32
TEST_COUNT = 360

Weights = dict[str, np.ndarray]


def load() -> tuple[np.ndarray, np.ndarray]:
    """Images of shape [count, 64] with their labels, in the same random order in every process."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    return (images[order] / 16).astype(np.float32), labels[order]


def init(hidden: int = 64) -> Weights:
    """A network of one hidden layer. All workers begin with the weights of the one that creates the run."""
    rng = np.random.default_rng(1)
    return {
        "w1": rng.normal(0, 0.2, (64, hidden)).astype(np.float32),
        "b1": np.zeros(hidden, np.float32),
        "w2": rng.normal(0, 0.2, (hidden, 10)).astype(np.float32),
        "b2": np.zeros(10, np.float32),
    }


def forward(weights: Weights, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The hidden units, and the logits of shape [count, 10]."""
    hidden = np.maximum(images @ weights["w1"] + weights["b1"], 0)
    return hidden, hidden @ weights["w2"] + weights["b2"]


def loss_and_gradient(weights: Weights, images: np.ndarray, labels: np.ndarray) -> tuple[float, Weights]:
    """The mean cross entropy, and its gradient in the structure of the weights."""
    hidden, logits = forward(weights, images)
    logits = logits - logits.max(axis=1, keepdims=True)
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    rows = np.arange(len(labels))
    loss = -float(np.mean(np.log(shares[rows, labels] + 1e-30)))
    shares[rows, labels] -= 1
    at_logits = shares / len(labels)
    at_hidden = (at_logits @ weights["w2"].T) * (hidden > 0)
    gradient = {"w1": images.T @ at_hidden, "b1": at_hidden.sum(axis=0)}
    return loss, gradient | {"w2": hidden.T @ at_logits, "b2": at_logits.sum(axis=0)}


def accuracy(weights: Weights, images: np.ndarray, labels: np.ndarray) -> float:
    """The share of images that the network reads right."""
    return float(np.mean(forward(weights, images)[1].argmax(axis=1) == labels))


def train(run: kedge.Run, images: np.ndarray, labels: np.ndarray, *, steps: int, sync_period: int) -> None:
    """Makes so many local steps on random minibatches."""
    rng = np.random.default_rng()
    with run.join() as worker:
        local = worker.local_steps(optim.AdamW(lr=3e-3), sync_period=sync_period)
        weights = local.pull()
        for step in range(1, steps + 1):
            batch = rng.integers(len(labels), size=BATCH_SIZE)
            loss, gradient = loss_and_gradient(weights, images[batch], labels[batch])
            weights = local.step(gradient, loss=loss, example_count=BATCH_SIZE)
            if step % max(1, steps // 5) == 0:
                print(f"local step {step}, step {worker.step_number}: loss {loss:.3f}", flush=True)
        local.flush()


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Train on digits against the server at KEDGE_ADDRESS.")
    parser.add_argument("--run", default="local-steps", help="its name; one that exists is trained further")
    parser.add_argument("--steps", type=int, default=400, help="how many local steps each worker makes")
    parser.add_argument("--sync-period", type=int, default=20, help="the local steps from one exchange to the next")
    parser.add_argument("--quorum", type=int, default=2, help="how many workers are averaged")
    arguments = parser.parse_args()
    images, labels = load()
    with kedge.connect() as client:
        mean, policy = optim.SGD(lr=1.0), kedge.Synchronous(quorum=arguments.quorum)
        run = client.get_or_create_run(arguments.run, params=init(), optimizer=mean, aggregation=policy)
        train(run, images[TEST_COUNT:], labels[TEST_COUNT:], steps=arguments.steps, sync_period=arguments.sync_period)
        score = accuracy(run.pull(), images[:TEST_COUNT], labels[:TEST_COUNT])
        print(f"accuracy {score:.3f} after {run.status().applied_count} gradients")


if __name__ == "__main__":
    main()
