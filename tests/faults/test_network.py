"""A real network drops every packet for a while: TCP and its time limits are part of what is tested."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future

import pytest
from outage import MOMENTS, Moment, Outage, Outcome, assert_resumed_with_each_contribution_applied_once
from routed_network import RoutedNetwork
from server_process import ServerProcess
from worker_fleet import Fleet

import kedge

pytestmark = pytest.mark.root


@pytest.fixture
def network() -> Iterator[RoutedNetwork]:
    if obstacle := RoutedNetwork.obstacle():
        pytest.skip(obstacle)
    with RoutedNetwork() as routed:
        yield routed


@pytest.fixture
def far_server(network: RoutedNetwork) -> Iterator[ServerProcess]:
    with ServerProcess("--listen", f"{network.address}:0", "--insecure") as process:
        yield process


def play(moment: Moment, network: RoutedNetwork, address: str, *, cut: threading.Barrier, seconds: float) -> Outcome:
    with kedge.connect(address) as client, Fleet(network.command) as fleet:
        outage = Outage(client, fleet, address=address, name=moment, moment=moment)

        def fail_as_they_push() -> None:
            cut.wait(60)
            outage.contribute()

        def fail_while_all_wait() -> None:
            outage.contribute()
            outage.wait_until_all_wait()
            cut.wait(60)

        fail = fail_as_they_push if moment == "pushing" else fail_while_all_wait
        return outage.play(fail, network.heal, seconds=seconds)


@pytest.mark.parametrize("seconds", [4.0, pytest.param(25.0, marks=pytest.mark.soak)])
def test_workers_resume_soon_after_packets_pass_again_and_each_contribution_is_applied_once(
    network: RoutedNetwork, far_server: ServerProcess, in_background: Callable[..., Future[Outcome]], seconds: float
) -> None:
    cut = threading.Barrier(len(MOMENTS), action=network.cut)
    played = {
        moment: in_background(play, moment, network, far_server.address, cut=cut, seconds=seconds) for moment in MOMENTS
    }
    for moment, outcome in played.items():
        assert_resumed_with_each_contribution_applied_once(outcome.result(110), moment)
