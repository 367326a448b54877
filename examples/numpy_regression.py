"""Kedge from plain NumPy: a linear regression whose gradient is worked out by hand.

Start a server with `kedge-server serve --listen 127.0.0.1:50051`, then this with KEDGE_ADDRESS=127.0.0.1:50051. It ends
with how far the slow weights are from the least-squares solution, which NumPy finds in one call.
"""

import argparse

import numpy as np

import kedge
from kedge import optim

FEATURES = 12
BATCH_SIZE = 64

Weights = dict[str, np.ndarray]


def make_data(count: int = 2000) -> tuple[np.ndarray, np.ndarray]:
    """Inputs of shape [count, FEATURES], and targets [count] that are a line through them with noise."""
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(count, FEATURES)).astype(np.float32)
    slope = rng.normal(size=FEATURES)
    noise = rng.normal(scale=0.1, size=count)
    return inputs, (inputs @ slope + 3 + noise).astype(np.float32)


def loss_and_gradient(weights: Weights, x: np.ndarray, y: np.ndarray) -> tuple[float, Weights]:
    """Half the mean square of the residuals, and its gradient in the structure of the weights."""
    residual = x @ weights["slope"] + weights["intercept"] - y
    gradient = {"slope": x.T @ residual / len(y), "intercept": residual.mean()}
    return 0.5 * float(np.mean(residual**2)), gradient


def least_squares(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The slope and, last, the intercept that no training can better."""
    return np.asarray(np.linalg.lstsq(np.column_stack([x, np.ones(len(x))]), y, rcond=None)[0])


def train(run: kedge.Run, x: np.ndarray, y: np.ndarray, steps: int) -> None:
    """Makes so many steps on random minibatches."""
    rng = np.random.default_rng()
    with run.join() as worker:
        weights = worker.pull()
        for step in range(1, steps + 1):
            batch = rng.integers(len(x), size=BATCH_SIZE)
            loss, gradient = loss_and_gradient(weights, x[batch], y[batch])
            weights = worker.step(gradient, loss=loss, example_count=BATCH_SIZE)
            if step % max(1, steps // 10) == 0:
                print(f"step {worker.step_number}: loss {loss:.4f}", flush=True)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Fit a line against the server at KEDGE_ADDRESS.")
    parser.add_argument("--run", default="regression", help="its name; one that exists is trained further")
    parser.add_argument("--steps", type=int, default=1000, help="how many to make")
    arguments = parser.parse_args()
    x, y = make_data()
    with kedge.connect() as client:
        run = client.get_or_create_run(
            arguments.run,
            params={"slope": np.zeros(FEATURES, np.float32), "intercept": np.zeros((), np.float32)},
            optimizer=optim.Lookahead(optim.AdaBelief(lr=optim.StepLR(0.1, step_size=100, gamma=0.5)), sync_period=5),
            aggregation=kedge.Synchronous(quorum=1),
        )
        train(run, x, y, arguments.steps)
        slow = run.pull("slow")
    distance = np.abs(np.append(slow["slope"], slow["intercept"]) - least_squares(x, y)).max()
    print(f"slow weights: at most {distance:.4f} from the least-squares solution")


if __name__ == "__main__":
    main()
