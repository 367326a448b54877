"""A worker in a process of its own: least squares on a shard of made-up data, gradients in NumPy.

Run as a script: ADDRESS RUN INDEX STEPS. It prints `step N` after each step, and at the end `done` with its result as
`weights HEX`. With INDEX negative it is a worker that stops before its push in step 3 and waits to be killed.
"""

import signal
import sys

import numpy as np

import kedge

FEATURES = 8
SHARD_SIZES = (10, 20, 30, 40)


def shard(index: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets of a worker, float32."""
    random = np.random.default_rng(index)
    inputs = random.standard_normal((SHARD_SIZES[index], FEATURES)).astype(np.float32)
    return inputs, (inputs @ np.arange(FEATURES) + 0.1 * random.standard_normal(len(inputs))).astype(np.float32)


def gradient(weights: np.ndarray, index: int) -> np.ndarray:
    """Of the mean of squared errors over a shard."""
    inputs, targets = shard(index)
    return 2 * inputs.T @ (inputs @ weights - targets) / len(inputs)


def main(address: str, run_name: str, index: int, step_count: int) -> None:
    """Trains."""
    is_victim = index < 0
    index = abs(index)
    with kedge.connect(address) as client, client.get_run(run_name).join(f"w{index}", lease_seconds=3) as worker:
        weights = worker.pull()
        for step in range(step_count):
            grads = {"w": gradient(weights["w"], index)}
            if is_victim and step == 3:
                print("victim waits", flush=True)
                signal.pause()
            weights = worker.step(grads, example_count=SHARD_SIZES[index])
            print(f"step {worker.step_number}", flush=True)
        print("weights", weights["w"].tobytes().hex(), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
