"""Runs of every kind, each with an interruption in the middle of its life, and all that they do known beforehand.

A life is a generator: it makes a run, works on it, yields where the server may be killed, and works on.
"""

from collections.abc import Callable, Iterator

import numpy as np
import pytest

import kedge
from kedge import optim

SIZE = 40
SEED = 31
LEASE_SECONDS = 600.0

Life = Callable[[kedge.Client], Iterator[None]]


def params() -> dict[str, np.ndarray]:
    return {"w": np.linspace(-1, 1, SIZE, dtype=np.float32).reshape(5, 8), "b": np.ones(8, np.float32)}


def gradient(weights: dict[str, np.ndarray], number: int) -> dict[str, np.ndarray]:
    """Of what was pulled, so that whatever is lost shows in all that follows."""
    random = np.random.default_rng((SEED, number))
    noise = {name: random.standard_normal(value.shape).astype(np.float32) for name, value in weights.items()}
    return {name: noise[name] + np.float32(0.2) * value for name, value in weights.items()}


def join(run: kedge.Run, name: str) -> kedge.Worker:
    worker = run.join(name, lease_seconds=LEASE_SECONDS)
    worker.pull()
    return worker


def step(worker: kedge.Worker, number: int, *, loss: float | None = None) -> None:
    """Pulls, pushes what follows from it, and has that applied at once."""
    result = worker.push(gradient(worker.pull(), number), loss=loss, example_count=1 + number % 3, wait_seconds=30)
    assert result.outcome == "applied"


def together(client: kedge.Client) -> Iterator[None]:
    """Synchronous, with Lookahead, groups, and schedules that tick by themselves and by hand."""
    run = client.create_run(
        "together",
        params=params(),
        optimizer=optim.Lookahead(
            optim.AdaBelief(lr=optim.CosineAnnealingLR(0.1, T_max=9)), sync_period=4, alpha=0.5, lr=None
        ),
        groups=[optim.Group("b", lr=optim.StepLR(0.05, step_size=1, gamma=0.5, tick="manual"), weight_decay=0.01)],
        aggregation=kedge.Synchronous(2),
        admission=kedge.Admission(max_norm=50.0),
        checkpoints=kedge.Checkpoints(every_steps=5),
    )
    workers = [join(run, name) for name in ("w0", "w1")]

    def work(numbers: range) -> None:
        for number in numbers:
            held = workers[0].push(gradient(workers[0].pull(min_step=number), number), loss=1.0 / (1 + number))
            assert held.outcome == "deferred"
            workers[1].pull(min_step=number)
            step(workers[1], 1000 + number)

    work(range(7))
    run.tick_schedule(group="b")
    too_great = {name: 100 * np.ones_like(value) for name, value in params().items()}
    assert workers[1].push(too_great).outcome == "rejected"
    held = workers[1].push(gradient(workers[1].pull(min_step=7), 2000))
    assert held.outcome == "deferred"
    yield
    # The round that was open is closed by the one whose contribution was missing.
    workers[0].pull(min_step=7)
    step(workers[0], 2001)
    assert run.tick_schedule(group="b", to=2) == 2
    work(range(8, 13))


def unfit(client: kedge.Client) -> Iterator[None]:
    """A round in which one has contributed, and another has had its chance."""
    run = client.create_run(
        "unfit", params=params(), optimizer=optim.RMSprop(lr=0.01), aggregation=kedge.Synchronous(3)
    )
    workers = [join(run, name) for name in ("w0", "w1", "w2")]
    not_a_number = {name: np.full_like(value, np.nan) for name, value in params().items()}
    assert workers[0].push(gradient(workers[0].pull(), 0)).outcome == "deferred"
    assert workers[1].push(not_a_number).outcome == "rejected"
    yield
    assert run.status().round.contribution_count == 1
    step(workers[2], 1)
    assert run.status().applied_count == 2
    assert workers[0].push(gradient(workers[0].pull(min_step=1), 2)).outcome == "deferred"


def plateau(client: kedge.Client) -> Iterator[None]:
    """A schedule that has a memory of losses; each contribution is synced."""
    run = client.create_run(
        "plateau",
        params=params(),
        optimizer=optim.Adam(lr=optim.ReduceLROnPlateau(0.1, patience=2, factor=0.5)),
        aggregation=kedge.Asynchronous(max_staleness=5, scaling="inverse"),
        durability="journal-sync",
    )
    worker = join(run, "w0")
    for number, loss in enumerate((3.0, 2.0, 2.0, 2.0)):
        step(worker, number, loss=loss)
    yield
    assert run.status().learning_rate == 0.1
    step(worker, 4, loss=2.0)  # the third in a row that is no better
    assert run.status().learning_rate == 0.05
    for number in range(5, 9):
        step(worker, number, loss=2.0)


def apart(client: kedge.Client) -> Iterator[None]:
    """Bounded staleness: a worker that is too far ahead waits for the other, before and after."""
    run = client.create_run(
        "apart",
        params=params(),
        optimizer=optim.Lookahead(optim.Momentum(lr=0.01), sync_period=3, alpha=0.8),
        aggregation=kedge.BoundedStaleness(bound=1),
    )
    fast, slow = join(run, "fast"), join(run, "slow")
    assert fast.push(gradient(fast.pull(), 0)).outcome == "applied"
    assert fast.push(gradient(fast.pull(), 1)).outcome == "applied"
    yield
    with pytest.raises(kedge.KedgeError, match="WAITING_FOR_SLOWEST"):
        fast.pull(timeout_seconds=0.0)
    step(slow, 2)
    step(fast, 3)
    step(slow, 4)


def buffered(client: kedge.Client) -> Iterator[None]:
    """Contributions that are held in a buffer, and whose workers have gone on."""
    run = client.create_run(
        "buffered",
        params=params(),
        optimizer=optim.Yogi(lr=0.01),
        aggregation=kedge.Buffered(4),
        checkpoints=kedge.Checkpoints(every_steps=2),
    )
    workers = [join(run, name) for name in ("w0", "w1")]
    outcomes = [workers[n % 2].push(gradient(workers[n % 2].pull(), n), loss=1.0 + n).outcome for n in range(7)]
    assert outcomes == ["deferred"] * 3 + ["applied"] + ["deferred"] * 3
    yield
    assert run.status().round.contribution_count == 3
    outcomes = [workers[n % 2].push(gradient(workers[n % 2].pull(), n), loss=1.0 + n).outcome for n in range(7, 13)]
    assert outcomes == ["applied"] + ["deferred"] * 3 + ["applied", "deferred"]


def changed(client: kedge.Client) -> Iterator[None]:
    """Aggregation, admission and hyperparameters are not those that it was created with."""
    run = client.create_run(
        "changed",
        params=params(),
        optimizer=optim.AdamW(lr=0.01, weight_decay=0.1),
        aggregation=kedge.Synchronous(3, combine="median"),
    )
    worker = join(run, "w0")
    run.set_aggregation(kedge.Asynchronous(max_staleness=7))
    step(worker, 0)
    run.set_hyperparameters(lr=optim.ExponentialLR(0.02, gamma=0.9), weight_decay=0.2, grad_clip_norm=2.0)
    run.set_admission(kedge.Admission(max_norm=1000.0, outlier_factor=50.0, quarantine_after=3))
    for number in range(1, 11):
        step(worker, number)
    yield
    for number in range(11, 14):
        step(worker, number)
    outlier = {name: 20 * np.ones_like(value) for name, value in params().items()}
    too_great = {name: 900 * np.ones_like(value) for name, value in params().items()}
    assert worker.push(outlier).outcome == "applied"
    assert [worker.push(too_great).reason for _ in range(2)] == ["NORM_ABOVE_LIMIT"] * 2


def evicted(client: kedge.Client) -> Iterator[None]:
    """A worker is sent away, and nobody may come under its name."""
    run = client.create_run("evicted", params=params(), optimizer=optim.SGD(lr=0.1), aggregation=kedge.Asynchronous())
    staying, leaving = join(run, "staying"), join(run, "leaving")
    step(leaving, 0)
    step(staying, 1)
    run.evict("leaving", "it burns", block_seconds=900)
    yield
    with pytest.raises(kedge.KedgeError, match="it burns") as refused:
        leaving.push(gradient(params(), 2), base_step=0)
    assert refused.value.reason == "WORKER_EVICTED"
    with pytest.raises(kedge.KedgeError) as refused:
        run.join("leaving")
    assert refused.value.reason == "WORKER_EVICTED"
    step(staying, 3)


LIVES: dict[str, Life] = {life.__name__: life for life in (together, unfit, plateau, apart, buffered, changed, evicted)}
