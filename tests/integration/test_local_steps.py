"""What local steps and an optimizer on a server come to: Lookahead, NumPy by hand, and a small training."""

import itertools
from collections.abc import Callable, Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kedge
from kedge import optim

EXAMPLE = Path(__file__).parents[2] / "examples" / "local_steps.py"
SIZE = 50
PERIOD = 4
EXCHANGES = 6
ALONE = kedge.Synchronous(quorum=1)
_run_numbers = itertools.count(1)


@pytest.fixture(params=["fake", "real"])
def client(request: pytest.FixtureRequest) -> Iterator[kedge.Client]:
    if request.param == "real":
        with kedge.connect(request.getfixturevalue("server").address) as client:
            yield client
    else:
        with kedge.testing.FakeServer() as fake, fake.connect() as client:
            yield client


def initial() -> np.ndarray:
    return np.random.default_rng(0).normal(size=SIZE).astype(np.float32)


def gradients(count: int, seed: int = 1) -> np.ndarray:
    """With a mean, so that the weights go somewhere."""
    return np.random.default_rng(seed).normal(0.3, 1.0, (count, SIZE)).astype(np.float32)


def new_run(client: kedge.Client, optimizer: optim.Optimizer, aggregation: Any = ALONE) -> kedge.Run:
    name = f"local-{next(_run_numbers)}"
    return client.create_run(name, params={"w": initial()}, optimizer=optimizer, aggregation=aggregation)


def by_local_steps(run: kedge.Run, optimizer: optim.Rule, seen: np.ndarray, **options: Any) -> np.ndarray:
    """The weights after every exchange."""
    with run.join() as worker:
        local = worker.local_steps(optimizer, sync_period=PERIOD)
        local.pull()
        return np.array([local.step({"w": gradient}, **options)["w"] for gradient in seen])[PERIOD - 1 :: PERIOD]


def assert_close(got: np.ndarray, expected: np.ndarray) -> None:
    """Within 1e-5 of the size of the weights, exchange by exchange."""
    assert got.shape == expected.shape
    size = np.linalg.norm(expected, axis=1)
    assert np.max(np.linalg.norm(got - expected, axis=1) / size) < 1e-5


@pytest.mark.parametrize("alpha", [0.5, 0.8, 1.0])
@pytest.mark.parametrize(
    "inner",
    [
        optim.SGD(lr=0.1),
        optim.Momentum(lr=0.05, momentum=0.9),
        optim.Adam(lr=optim.ExponentialLR(0.05, 0.98), weight_decay=0.01),
        optim.AdamW(lr=0.05, weight_decay=0.1),
        optim.AdaBelief(lr=0.05, grad_clip_norm=5.0),
    ],
    ids=lambda rule: type(rule).__name__,
)
def test_one_worker_and_sgd_of_alpha_are_lookahead(client: kedge.Client, inner: optim.Rule, alpha: float) -> None:
    seen = gradients(PERIOD * EXCHANGES)
    got = by_local_steps(new_run(client, optim.SGD(lr=alpha)), inner, seen)

    run = new_run(client, optim.Lookahead(inner, sync_period=PERIOD, alpha=alpha))
    with run.join() as worker:
        worker.pull()
        expected = np.array([worker.step({"w": gradient})["w"] for gradient in seen])[PERIOD - 1 :: PERIOD]
    assert np.linalg.norm(expected[-1] - initial()) > 0.5
    assert_close(got, expected)


def test_two_workers_and_sgd_of_one_are_the_mean_of_their_trajectories(
    client: kedge.Client, in_background: Callable[..., Any]
) -> None:
    rate, momentum, counts = 0.05, 0.9, (1, 3)
    run = new_run(client, optim.SGD(lr=1.0), kedge.Synchronous(quorum=2))
    seen = [gradients(PERIOD * EXCHANGES, seed) for seed in (1, 2)]
    futures = [
        in_background(by_local_steps, run, optim.Momentum(lr=rate, momentum=momentum), own, example_count=count)
        for own, count in zip(seen, counts, strict=True)
    ]
    got = [future.result(90) for future in futures]

    weights, velocity, expected = initial().astype(np.float64), np.zeros((2, SIZE)), []
    for exchange in range(EXCHANGES):
        ends = np.array([weights, weights])
        for step in range(exchange * PERIOD, (exchange + 1) * PERIOD):
            velocity = momentum * velocity + np.array([own[step] for own in seen])
            ends = ends - rate * velocity
        weights = np.average(ends, axis=0, weights=counts)
        expected.append(weights)
    for trajectory in got:
        assert_close(trajectory, np.array(expected))


def test_nesterov_over_pseudo_gradients_is_dilocos_outer_step(client: kedge.Client) -> None:
    rate = 0.1
    seen = gradients(PERIOD * EXCHANGES)
    outer = optim.SGD(lr=0.7, momentum=0.9, nesterov=True)
    got = by_local_steps(new_run(client, outer), optim.SGD(lr=rate), seen)

    weights, velocity, expected = initial().astype(np.float64), np.zeros(SIZE), []
    for own in seen.astype(np.float64).reshape(EXCHANGES, PERIOD, SIZE):
        difference = rate * own.sum(axis=0)
        velocity = 0.9 * velocity + difference
        weights = weights - 0.7 * (difference + 0.9 * velocity)
        expected.append(weights)
    assert_close(got, np.array(expected))


def load_example() -> Any:
    spec = spec_from_file_location("local_steps_example", EXAMPLE)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def train_on_digits(
    client: kedge.Client, in_background: Callable[..., Any], optimizer: optim.Rule, *, locally: int | None
) -> tuple[float, int]:
    """Two workers, 400 steps on the same batches each: the accuracy in the end, and the messages that it took."""
    example = load_example()
    images, labels = example.load()
    tested = slice(0, example.TEST_COUNT)
    name = f"local-{next(_run_numbers)}"
    run = client.create_run(name, params=example.init(), optimizer=optimizer, aggregation=kedge.Synchronous(quorum=2))

    def work(index: int) -> None:
        rng = np.random.default_rng(index)
        with run.join(f"worker-{index}") as worker:
            steps = worker.local_steps(optim.AdamW(lr=3e-3), sync_period=locally) if locally else worker
            weights = steps.pull()
            for _ in range(400):
                batch = example.TEST_COUNT + rng.integers(len(labels) - example.TEST_COUNT, size=example.BATCH_SIZE)
                loss, gradient = example.loss_and_gradient(weights, images[batch], labels[batch])
                weights = steps.step(gradient, loss=loss, example_count=example.BATCH_SIZE)

    for future in [in_background(work, index) for index in range(2)]:
        future.result(100)
    return example.accuracy(run.pull(), images[tested], labels[tested]), run.status().applied_count


def test_digits_are_learnt_as_well_with_a_twentieth_of_the_messages(
    client: kedge.Client, in_background: Callable[..., Any]
) -> None:
    accuracy, message_count = train_on_digits(client, in_background, optim.AdamW(lr=3e-3), locally=None)
    assert message_count == 800
    for outer in (optim.SGD(lr=1.0), optim.SGD(lr=0.7, momentum=0.9, nesterov=True)):
        few, few_count = train_on_digits(client, in_background, outer, locally=20)
        print(f"accuracy {few:.3f} by {few_count} messages, {accuracy:.3f} by {message_count}")
        assert few_count == 40
        assert few >= accuracy - 0.02
    assert accuracy > 0.95
