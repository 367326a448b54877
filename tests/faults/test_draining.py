"""SIGTERM under load: the server ends in order and in time, and nothing that it acknowledged is lost."""

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from counting_run import CountingRun, wait_for_more
from durable_server import DurableServer, inspected
from worker_fleet import Fleet

import kedge

GRACE_SECONDS = 10.0


@pytest.fixture
def server(tmp_path: Path, grace_seconds: float) -> Iterator[DurableServer]:
    with DurableServer(tmp_path / "data", environment={"KEDGE_SERVER__GRACE_SECONDS": str(grace_seconds)}) as durable:
        yield durable.start()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("grace_seconds", "signals", "levels"),
    [
        pytest.param(GRACE_SECONDS, 1, ("checkpoint", "journal", "journal-sync"), id="once"),
        pytest.param(GRACE_SECONDS, 2, ("journal", "journal-sync"), id="twice"),
        pytest.param(0.0, 1, ("journal", "journal-sync"), id="without grace"),
    ],
)
def test_signal_ends_it_under_load_and_its_workers_go_on_when_it_is_back(
    server: DurableServer, fleet: Fleet, grace_seconds: float, signals: int, levels: tuple[str, ...]
) -> None:
    is_in_order = signals == 1 and grace_seconds > 0
    with kedge.connect(server.address) as client:
        runs = [
            CountingRun(
                client,
                fleet,
                address=server.address,
                name=level,
                aggregation=kedge.Synchronous(2) if level == "journal" else kedge.Asynchronous(),
                pace_seconds=0.0,
                durability=level,
            )
            for level in levels
        ]
        wait_for_more(fleet, 10)
        began_at = time.monotonic()
        for _ in range(signals):
            server.process.process.send_signal(signal.SIGTERM)
        code = server.process.wait(seconds=GRACE_SECONDS + 20)
        took_seconds = time.monotonic() - began_at
        kept = inspected(server.data_dir)

        assert took_seconds <= GRACE_SECONDS + 2
        assert code == 0 or signals > 1
        for run in runs:
            state = kept[run.run.name]
            assert state["problems"] == []
            # Of each worker one may be applied that it has not heard of yet.
            assert run.told_count <= state["applied_count"] <= run.told_count + 2
            if is_in_order:
                assert max(checkpoint["step"] for checkpoint in state["checkpoints"]) == state["step"]

        server.start()
        wait_for_more(fleet, 5)
        assert fleet.finish() == [0] * len(fleet.members), fleet
        for run in runs:
            run.assert_each_contribution_is_applied_once()
