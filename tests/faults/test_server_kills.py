"""A server that is killed again and again under workers that push: nothing they were told is lost, nothing is twice."""

import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from counting_run import CountingRun, wait_for_more
from durable_server import DurableServer, inspected
from worker_fleet import Fleet

import kedge
from kedge import optim

SEED = 11
READY_SECONDS = 10.0
LARGE = 10_000_000


@pytest.fixture
def server(tmp_path: Path) -> Iterator[DurableServer]:
    with DurableServer(tmp_path / "data", environment={"KEDGE_STORAGE__SEGMENT_BYTES": "100000"}) as durable:
        yield durable.start()


def kill_again_and_again(server: DurableServer, fleet: Fleet, count: int) -> None:
    """At random moments: most once it serves, each fifth one as it starts or recovers.

    Workers that meet nobody call less and less often, so that each third kill waits until all of them have gone on.
    """
    dice = random.Random(SEED)
    clock = threading.Event()
    for number in range(1, count + 1):
        if number % 5 == 0:
            server.start_in_vain(dice.uniform(0.5, 4.0))
        else:
            if number % 3 == 0:
                wait_for_more(fleet, 1)
            clock.wait(dice.uniform(0, 0.8))
            server.kill()
        if number % 5 != 4:
            server.start()


@pytest.mark.parametrize(
    "kills",
    [
        pytest.param(15, marks=[pytest.mark.slow, pytest.mark.timeout(300)]),
        pytest.param(300, marks=[pytest.mark.soak, pytest.mark.timeout(3600)]),
    ],
)
def test_killed_at_any_moment_it_has_applied_what_it_said_it_had_and_nothing_twice(
    server: DurableServer, fleet: Fleet, kills: int
) -> None:
    with kedge.connect(server.address) as client:
        runs = [
            CountingRun(
                client,
                fleet,
                address=server.address,
                name=name,
                aggregation=aggregation,
                checkpoints=kedge.Checkpoints(every_steps=50),
            )
            for name, aggregation in (("alone", kedge.Asynchronous()), ("together", kedge.Synchronous(2)))
        ]
        wait_for_more(fleet, 1)
        kill_again_and_again(server, fleet, kills)
        # They have worked between the kills, not only after the last one.
        assert all(len(member.steps) > kills // 3 for member in fleet.members)
        wait_for_more(fleet, 5)
        assert fleet.finish() == [0] * 4, fleet
        for run in runs:
            run.assert_each_contribution_is_applied_once()
    assert server.stop() == 0
    kept = inspected(server.data_dir)
    assert {name: run["applied_count"] for name, run in kept.items()} == {run.run.name: run.told_count for run in runs}
    told_count, slowest = sum(run.told_count for run in runs), max(server.ready_seconds)
    print(
        f"{kills} kills, {told_count} contributions applied once each; it served {slowest:.1f} s after a start at most"
    )


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_ten_million_parameters_are_there_again_within_ten_seconds_of_its_start(server: DurableServer) -> None:
    with kedge.connect(server.address) as client:
        run = client.create_run(
            "large",
            params={"w": np.zeros(LARGE, np.float32)},
            optimizer=optim.Lookahead(optim.AdaBelief(lr=1e-3), sync_period=5, alpha=0.5),
            aggregation=kedge.Asynchronous(),
        )
        with run.join(lease_seconds=60) as worker:
            worker.pull()
            for step in range(8):
                weights = worker.step({"w": np.full(LARGE, 1.0 + step, np.float32)})["w"]
            server.kill()
            began_at = time.monotonic()
            server.start()
            recovered = run.snapshot("fast")
            took_seconds = time.monotonic() - began_at
            print(f"{LARGE} parameters were there {took_seconds:.1f} s after the start")
            assert recovered.step == 8
            assert recovered.fast["w"].tobytes() == weights.tobytes()
            worker.step({"w": np.ones(LARGE, np.float32)})
            assert worker.step_number == 9
    assert took_seconds <= READY_SECONDS
