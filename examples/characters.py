"""A character model of the Python standard library's own source text, trained by four worker processes in plain NumPy.

Start a server with `kedge-server serve --listen 127.0.0.1:50051`, then this with KEDGE_ADDRESS=127.0.0.1:50051.
"""

import argparse
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

import kedge
from kedge import optim

WORKERS, CONTEXT, WIDTH, HIDDEN, BATCH_SIZE = 4, 10, 24, 192, 256
CHARACTERS, UNSEEN = 128, 100_000  # ASCII; so many characters at the end of the text no worker sees
Weights = dict[str, np.ndarray]


def read_text() -> np.ndarray:
    """The modules of the standard library one after the other, as codes below 128: the little else there is is cut."""
    modules = sorted(Path(os.__file__).parent.glob("*.py"))
    return np.frombuffer(b"".join(module.read_bytes() for module in modules), np.uint8) % CHARACTERS


def init() -> Weights:
    """An embedding of each character, a hidden layer on the last CONTEXT of them, and the scores of the next one."""
    rng = np.random.default_rng(0)
    shapes = {"embedding": (CHARACTERS, WIDTH), "hidden": (CONTEXT * WIDTH, HIDDEN), "output": (HIDDEN, CHARACTERS)}
    return {name: rng.normal(0, shape[0] ** -0.5, shape).astype(np.float32) for name, shape in shapes.items()}


def forward(weights: Weights, contexts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Embedded contexts, hidden values, and the probabilities of the next character, each [count, ...]."""
    embedded = weights["embedding"][contexts].reshape(len(contexts), -1)
    hidden = np.tanh(embedded @ weights["hidden"])
    scores = hidden @ weights["output"]
    odds = np.exp(scores - scores.max(axis=1, keepdims=True))
    return embedded, hidden, odds / odds.sum(axis=1, keepdims=True)


def loss_and_gradient(weights: Weights, contexts: np.ndarray, nexts: np.ndarray) -> tuple[float, Weights]:
    """The mean cross entropy in nats, and its gradient, backwards through `forward`."""
    embedded, hidden, probabilities = forward(weights, contexts)
    loss = -float(np.log(probabilities[np.arange(len(nexts)), nexts]).mean())
    to_scores = (probabilities - np.eye(CHARACTERS, dtype=np.float32)[nexts]) / len(nexts)
    to_hidden = to_scores @ weights["output"].T * (1 - hidden**2)
    to_embedding = np.zeros_like(weights["embedding"])
    np.add.at(to_embedding, contexts, (to_hidden @ weights["hidden"].T).reshape(*contexts.shape, WIDTH))
    return loss, {"embedding": to_embedding, "hidden": embedded.T @ to_hidden, "output": hidden.T @ to_scores}


def draw(text: np.ndarray, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Random contexts [count, CONTEXT] of a text, and the characters [count] that follow them."""
    chosen = text[rng.integers(len(text) - CONTEXT, size=(count, 1)) + np.arange(CONTEXT + 1)]
    return chosen[:, :-1], chosen[:, -1]


def work(run_name: str, last_step: int, part: int) -> None:
    """A worker process: contributes gradients of its own part of the text."""
    text, rng = np.array_split(read_text()[:-UNSEEN], WORKERS)[part], np.random.default_rng()
    with kedge.connect() as client, client.get_run(run_name).join() as worker:
        weights = worker.pull()
        while worker.step_number < last_step:
            loss, gradient = loss_and_gradient(weights, *draw(text, BATCH_SIZE, rng))
            weights = worker.step(gradient, loss=loss, example_count=BATCH_SIZE)


def sample(weights: Weights, length: int) -> str:
    """Text of the model's own. Likely characters are drawn a little oftener than their probability says."""
    codes, rng = list(b"import os\n"), np.random.default_rng(0)
    for _ in range(length):
        odds = forward(weights, np.array([codes[-CONTEXT:]]))[2][0].astype(np.float64) ** 1.5
        codes.append(int(rng.choice(CHARACTERS, p=odds / odds.sum())))
    return bytes(codes).decode("ascii")


def train(run: kedge.Run, steps: int) -> None:
    """Starts the workers, and prints the loss ten times on the way. A run that exists is trained further."""
    first, unseen = run.status().step, draw(read_text()[-UNSEEN:], 4096, np.random.default_rng(0))
    with ProcessPoolExecutor(WORKERS, multiprocessing.get_context("spawn")) as pool:  # gRPC does not survive a fork
        done = pool.map(work, [run.name] * WORKERS, [first + steps] * WORKERS, range(WORKERS))
        for step in range(first, first + steps + 1, max(1, steps // 10)):
            loss, _ = loss_and_gradient(run.pull("slow", min_step=step), *unseen)
            print(f"step {step}: loss {loss:.3f} of unseen text", flush=True)
        list(done)  # raises what a worker raised


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train a character model against the server at KEDGE_ADDRESS.")
    parser.add_argument("--steps", type=int, default=2000, help="how many to make")
    steps = parser.parse_args().steps
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # of each worker: all of them share this machine's cores
    with kedge.connect() as client:
        optimizer, four = optim.Lookahead(optim.Adam(lr=2e-3), sync_period=5), kedge.Synchronous(quorum=WORKERS)
        run = client.get_or_create_run("characters", params=init(), optimizer=optimizer, aggregation=four)
        train(run, steps)
        print(sample(run.pull("slow"), length=300))
