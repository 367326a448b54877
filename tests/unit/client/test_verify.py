"""`kedge.verify` on fake servers: a right one, and wrong ones, each of which some rows must catch."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import kedge
from kedge import optim
from kedge.client import Client
from kedge.errors import KedgeError
from kedge.transport import NewRun, Push, in_process
from kedge.verify import Row, adabelief, bench, noise, verify


class WrongExchange:
    def __init__(self, exchange: Any, change: Callable[[Push, int], Push]) -> None:
        self._exchange = exchange
        self._change = change
        self._count = 0

    def push(self, push: Push) -> Any:
        self._count += 1
        return self._exchange.push(self._change(push, self._count))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._exchange, name)


class WrongTransport:
    """A server that takes something else than it is asked for."""

    def __init__(
        self,
        transport: Any,
        *,
        run: Callable[[NewRun], NewRun] = lambda run: run,
        push: Callable[[Push, int], Push] = lambda push, _: push,
    ) -> None:
        self._transport = transport
        self._run = run
        self._push = push

    def create_run(self, run: NewRun) -> Any:
        return self._transport.create_run(self._run(run))

    def open_exchange(self, manifest: Any, *_: Any) -> WrongExchange:
        return WrongExchange(self._transport.open_exchange(manifest), self._push)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


@contextmanager
def client_of(**wrong: Any) -> Iterator[Client]:
    """A client of a fake server that is wrong in these ways."""
    address = in_process.new_address()
    with kedge.testing.FakeServer() as server:
        in_process.publish(address, WrongTransport(in_process.transport_to(server.address), **wrong))
        with kedge.connect(address) as client:
            yield client
        in_process.withdraw(address)


@pytest.fixture
def client() -> Iterator[Client]:
    with client_of() as client:
        yield client


def takes(change: Callable[[Any], Any], kind: type) -> Callable[[NewRun], NewRun]:
    """Changes the optimizers of one kind, also those inside Lookahead."""

    def changed(optimizer: Any) -> Any:
        if isinstance(optimizer, kind):
            return change(optimizer)
        if isinstance(optimizer, optim.Lookahead):
            return replace(optimizer, base_optimizer=changed(optimizer.base_optimizer))
        return optimizer

    return lambda run: run._replace(optimizer=changed(run.optimizer))


def adabelief_with(**options: Any) -> dict[str, Any]:
    return {"run": takes(lambda optimizer: replace(optimizer, **options), optim.AdaBelief)}


def lookahead_with(**options: Callable[[Any], Any]) -> dict[str, Any]:
    def change(optimizer: optim.Lookahead) -> optim.Lookahead:
        return replace(optimizer, **{name: new(getattr(optimizer, name)) for name, new in options.items()})

    return {"run": takes(change, optim.Lookahead)}


def first_alone(run: NewRun) -> NewRun:
    """The first contribution of a round is the step."""
    is_synchronous = isinstance(run.aggregation, kedge.Synchronous)
    return run._replace(aggregation=kedge.Synchronous(quorum=1)) if is_synchronous else run


def forgetful(push: Push, count: int) -> Push:
    """What is repeated is taken for something new."""
    return push._replace(sequence=count)


def overflowing(push: Push, _: int) -> Push:
    return push._replace(arrays=[np.full_like(array, np.inf) for array in push.arrays])


# What is wrong with the server, and which rows say so: those whose names begin like this, of all others none.
WRONG_SERVERS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "AdaBelief with another eps": (
        adabelief_with(eps=1e-10),
        (
            "AdaBelief, first step / lr, g = -0.01",
            "AdaBelief, first step / lr, g = 1e-07",
            "AdaBelief, constant gradient, step",
        ),
    ),
    "AdaBelief without eps in the recursion": (
        adabelief_with(eps_root=0.0),
        ("AdaBelief, first step / lr, g = 1e-07",),
    ),
    "AdaBelief with half of b2's memory": (
        adabelief_with(betas=(0.9, 0.998)),
        ("AdaBelief, first step / lr, g = 1e-07", "AdaBelief, constant gradient, step", "AdaBelief on Beale"),
    ),
    "AdaBelief with another b1": (
        adabelief_with(betas=(0.89, 0.999)),
        ("AdaBelief, first step / lr", "AdaBelief, constant gradient, step", "AdaBelief on Beale"),
    ),
    "Adam for AdaBelief": (
        {"run": takes(lambda optimizer: optim.Adam(optimizer.lr, optimizer.betas), optim.AdaBelief)},
        ("AdaBelief, first step / lr", "AdaBelief, constant gradient, step", "AdaBelief on Beale"),
    ),
    "SGD with a twentieth too much": (
        {"run": takes(lambda optimizer: replace(optimizer, lr=1.05 * optimizer.lr), optim.SGD)},
        (
            "Lookahead from 3",
            "Lookahead's variance",
            "SGD's variance",
            "weighted mean of 4 workers",
            "a push sent twice",
        ),
    ),
    "Lookahead with a smaller alpha": (
        lookahead_with(alpha=lambda alpha: 0.95 * alpha),
        ("Lookahead from 3", "Lookahead(", "Lookahead's variance"),
    ),
    "Lookahead with a sync a step late": (
        lookahead_with(sync_period=lambda period: period + 1),
        ("Lookahead from 3", "Lookahead after a sync", "Lookahead(SGD, k = 1)", "Lookahead's variance"),
    ),
    "Lookahead with a sync a step early": (
        lookahead_with(sync_period=lambda period: max(period - 1, 1)),
        ("Lookahead from 3", "Lookahead before a sync", "Lookahead after a sync", "Lookahead's variance"),
    ),
    "contributions all of one weight": (
        {"push": lambda push, _: push._replace(example_count=1)},
        ("weighted mean of 4 workers",),
    ),
    "the first contribution for the mean": (
        {"run": first_alone},
        ("SGD's variance, mean of 4 workers", "weighted mean of 4 workers"),
    ),
    "repeated pushes taken for new ones": ({"push": forgetful}, ("a push sent twice",)),
}


@pytest.mark.parametrize(("wrong", "names"), WRONG_SERVERS.values(), ids=WRONG_SERVERS)
def test_wrong_server_fails_the_rows_that_it_should_and_no_others(
    wrong: dict[str, Any], names: tuple[str, ...]
) -> None:
    with client_of(**wrong) as client:
        rows = list(verify(client))
    assert {row.check for row in rows if not row.passes} == {row.check for row in rows if row.check.startswith(names)}


def test_every_row_is_failed_by_one_of_these_servers(client: Client) -> None:
    told = tuple(name for _, names in WRONG_SERVERS.values() for name in names)
    assert [row.check for row in verify(client) if not row.check.startswith(told)] == []


def test_right_server_passes_every_row_and_is_left_as_it_was(client: Client) -> None:
    run = client.create_run(
        "mine", params=np.zeros(1, np.float32), optimizer=optim.SGD(), aggregation=kedge.Asynchronous()
    )
    rows = list(verify(client))
    assert [row for row in rows if not row.passes] == []
    assert len({row.check for row in rows}) == len(rows)
    assert [info.name for info in client.list_runs()] == [run.name]


def test_longer_trajectories_are_of_the_full_verification_only(client: Client) -> None:
    usual = {row.check for row in verify(client)}
    rows = list(verify(client, full=True))
    assert all(row.passes for row in rows)
    assert {row.check for row in rows} - usual == {
        "AdaBelief, constant gradient, step 5000 / lr",
        "AdaBelief on Beale, step 5000",
        "AdaBelief on Beale, step 10000",
        "AdaBelief on Beale, step 20000",
    }


def test_gradients_that_are_refused_fail_their_rows_and_end_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "PATIENCE_SECONDS", 0.0)
    with client_of(push=overflowing) as client:
        rows = list(verify(client))
        assert [row.check for row in rows if row.passes] == []
        assert client.list_runs() == []


def test_runs_are_deleted_when_a_call_fails() -> None:
    def lost(push: Push, count: int) -> Push:
        raise KedgeError("RUN_FAILED", "an update failed", run=push.lease.worker)

    with client_of(push=lost) as client:
        with pytest.raises(KedgeError, match="RUN_FAILED"):
            list(verify(client))
        assert client.list_runs() == []


def test_runs_are_deleted_when_the_iterator_is_closed(client: Client) -> None:
    rows = verify(client)
    next(row for row in rows if row.check.startswith("AdaBelief, constant gradient"))
    assert [info.name.startswith("runs/verify-") for info in client.list_runs()] == [True]
    rows.close()
    assert client.list_runs() == []


def test_run_whose_creation_failed_is_reported_as_that() -> None:
    def refused(run: NewRun) -> NewRun:
        raise KedgeError("TOO_MANY_RUNS", "the server holds 3 runs, as many as limits.runs allows", limit=3)

    with client_of(run=refused) as client, pytest.raises(KedgeError, match="TOO_MANY_RUNS"):
        next(verify(client))


# ---------------------------------------------------------------------------------------------------------- one row


@pytest.mark.parametrize(
    ("got", "tolerance", "passes"),
    [
        ((1.0, 2.0), 0.0, True),
        ((1.0, 2.5), 0.5, True),
        ((1.0, 2.5), 0.49, False),
        ((1.0, math.nextafter(2.0, 3.0)), 0.0, False),
        ((math.nan, 2.0), 1.0, False),
        ((1.0, math.inf), 1.0, False),
    ],
)
def test_row_passes_if_every_value_is_within_the_tolerance(
    got: tuple[float, ...], tolerance: float, passes: bool
) -> None:
    assert Row("check", (1.0, 2.0), got, tolerance).passes is passes


# --------------------------------------------------------------------------------------------- what is expected of it


@pytest.mark.parametrize(
    ("time", "published"), [(1, 1.1111), (2, 1.1680), (10, 1.6354), (100, 4.955), (1000, 20.03), (5000, 185.7)]
)
def test_closed_form_of_the_constant_gradient_has_the_published_values(time: int, published: float) -> None:
    assert adabelief.step_over_rate(1.0, time) == pytest.approx(published, rel=2e-4)


def test_closed_form_of_the_constant_gradient_is_what_the_recursion_adds_up_to() -> None:
    for gradient in (1.0, -0.01, 1e-7):
        m = s = 0.0
        for time in range(1, 200):
            m = 0.9 * m + 0.1 * gradient
            s = 0.999 * s + 0.001 * (gradient - m) ** 2 + 1e-16
            step = m / (1 - 0.9**time) / (math.sqrt(s / (1 - 0.999**time)) + 1e-16)
            assert adabelief.step_over_rate(gradient, time) == pytest.approx(step, rel=1e-9)


@pytest.mark.parametrize(("setting", "published"), list(zip(noise.SETTINGS, (0.11340, 0.02331, 0.14287), strict=True)))
def test_variance_of_lookahead_is_the_published_one(setting: noise.Setting, published: float) -> None:
    assert noise.lookahead_variance(setting) == pytest.approx(published, rel=3e-4)


@pytest.mark.parametrize("setting", noise.SETTINGS)
def test_variance_of_lookahead_is_the_fixed_point_of_a_sync_period(setting: noise.Setting) -> None:
    curvature, sigma, rate, sync_period, alpha = setting
    slow = 0.0
    for _ in range(1000):
        # Fast begins at slow: after k steps it is r^k slow + noise, and slow (1 - alpha) slow + alpha fast.
        kept, noise_variance = 1.0, 0.0
        for _ in range(sync_period):
            kept *= 1 - rate * curvature
            noise_variance = (1 - rate * curvature) ** 2 * noise_variance + (rate * curvature * sigma) ** 2
        slow = (1 - alpha + alpha * kept) ** 2 * slow + alpha**2 * noise_variance
    assert noise.lookahead_variance(setting) == pytest.approx(slow, rel=1e-12)
