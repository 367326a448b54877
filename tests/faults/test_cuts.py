"""The connections between workers and server fail, and are healed: all go on, and each contribution is applied once."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import get_args

import pytest
from outage import LARGE_BYTES, MOMENTS, Moment, Outage, Outcome, assert_resumed_with_each_contribution_applied_once
from server_process import ServerProcess
from tcp_proxy import Fault, TcpProxy
from worker_fleet import Fleet

import kedge

FAULT_SECONDS = 3.0

Outcomes = dict[tuple[Fault, Moment], Future[Outcome]]


def play(fault: Fault, moment: Moment, address: str) -> Outcome:
    with kedge.connect(address) as client, TcpProxy(address) as proxy, Fleet() as fleet:
        name = f"{fault}-{moment}".replace(" ", "-")
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
        return outage.play(fail, proxy.heal, seconds=FAULT_SECONDS)


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest, server: ServerProcess) -> Iterator[Outcomes]:
    """All cases that were asked for, side by side: most of their time is waiting."""
    items = [item for item in request.session.items if item.path == request.path]
    cases = [(item.callspec.params["fault"], item.callspec.params["moment"]) for item in items]
    with ThreadPoolExecutor(len(cases)) as pool:
        yield {case: pool.submit(play, *case, server.address) for case in cases}


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("fault", get_args(Fault))
def test_workers_resume_soon_after_healing_and_each_contribution_is_applied_once(
    outcomes: Outcomes, fault: Fault, moment: Moment
) -> None:
    assert_resumed_with_each_contribution_applied_once(outcomes[fault, moment].result(90), moment)
