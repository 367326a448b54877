"""The connections between workers and server fail, and are healed: all go on, and each contribution is applied once."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import get_args

import numpy as np
import pytest
import tcp_proxy
from outage import LARGE_BYTES, MOMENTS, Moment, Outage, Outcome, assert_resumed_with_each_contribution_applied_once
from server_process import ServerProcess
from tcp_proxy import Fault, TcpProxy
from worker_fleet import Fleet

import kedge
from kedge import optim

FAULT_SECONDS = 3.0
CASES = [
    *((fault, moment, FAULT_SECONDS) for fault in get_args(Fault) for moment in MOMENTS),
    *(("black hole", moment, 0.0) for moment in MOMENTS),  # forgotten in an instant, as when a middlebox restarts
]

Outcomes = dict[tuple[Fault, Moment, float], Future[Outcome]]


def play(fault: Fault, moment: Moment, seconds: float, address: str) -> Outcome:
    with kedge.connect(address) as client, TcpProxy(address) as proxy, Fleet() as fleet:
        name = f"{fault}-{moment}-{seconds:g}".replace(" ", "-")
        outage = Outage(client, fleet, address=proxy.address, name=name, moment=moment)

        def fail_in_the_middle_of_a_push() -> None:
            proxy.strike_after_request_bytes(LARGE_BYTES // 2, fault)
            outage.contribute()
            assert proxy.struck.wait(30)

        def fail_while_all_wait() -> None:
            outage.contribute()
            outage.wait_until_all_wait()
            proxy.strike(fault)

        fail = fail_in_the_middle_of_a_push if moment == "pushing" else fail_while_all_wait
        return outage.play(fail, proxy.heal, seconds=seconds)


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest, server: ServerProcess) -> Iterator[Outcomes]:
    """All cases that were asked for, side by side: most of their time is waiting."""
    items = [item for item in request.session.items if item.path == request.path and "outcomes" in item.fixturenames]
    cases = [tuple(item.callspec.params[name] for name in ("fault", "moment", "seconds")) for item in items]
    with ThreadPoolExecutor(len(cases)) as pool:
        yield {case: pool.submit(play, *case, server.address) for case in cases}


@pytest.mark.parametrize(("fault", "moment", "seconds"), CASES)
def test_workers_resume_soon_after_healing_and_each_contribution_is_applied_once(
    outcomes: Outcomes, fault: Fault, moment: Moment, seconds: float
) -> None:
    assert_resumed_with_each_contribution_applied_once(outcomes[fault, moment, seconds].result(90), moment)


@pytest.mark.soak
def test_push_gets_through_a_slow_link_at_its_first_attempt_and_its_lease_stays(
    server: ServerProcess, run_id: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """8 MiB at 200 kB/s take 42 s, four times the lease. On their connection heartbeats would wait so long."""
    monkeypatch.setattr(tcp_proxy, "SLOW_BYTES_PER_SECOND", 200_000)
    params = {"w": np.zeros(2 << 20, np.float32)}
    with TcpProxy(server.address) as proxy, kedge.connect(server.address) as direct:
        run = direct.create_run(run_id, params=params, optimizer=optim.SGD(lr=1.0), aggregation=kedge.Asynchronous())
        with kedge.connect(proxy.address) as client, client.get_run(run_id).join(lease_seconds=10) as worker:
            worker.pull()
            epoch = worker.epoch
            proxy.strike("slow")
            result = worker.push({"w": np.ones_like(params["w"])})
            proxy.heal()
            assert (result.outcome, worker.epoch) == ("applied", epoch)
        assert run.status().applied_count == 1
        assert run.pull()["w"].tolist() == [-1.0] * params["w"].size
    assert caplog.records == []  # else something was tried again
