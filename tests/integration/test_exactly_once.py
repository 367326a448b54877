"""A push whose answer is lost is repeated by the SDK and applied once."""

import threading
from collections.abc import Callable

import numpy as np
import pytest
from server_process import ServerProcess
from tcp_proxy import TcpProxy

import kedge
from kedge import optim


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = threading.Event()
    for _ in range(3000):
        if condition():
            return
        deadline.wait(0.01)
    raise AssertionError("it did not happen within 30 s")


@pytest.mark.parametrize("call", ["push", "step"])
def test_swallowed_answer_is_asked_for_again_and_the_push_applied_once(
    server: ServerProcess, run_id: str, call: str
) -> None:
    with TcpProxy(server.address) as proxy, kedge.connect(server.address) as direct:
        run = direct.create_run(
            run_id,
            params={"w": np.float32([10, 20])},
            optimizer=optim.SGD(lr=1.0, momentum=0.5),
            aggregation=kedge.Synchronous(1),
        )
        with kedge.connect(proxy.address) as client, client.get_run(run_id).join(transport="grpc") as worker:
            worker.pull()
            proxy.swallow_answers()
            pushed = threading.Thread(target=getattr(worker, call), args=({"w": np.float32([1, 2])},))
            pushed.start()
            wait_until(lambda: run.status().step == 1 and proxy.swallowed_byte_count > 0)
            assert pushed.is_alive(), "the answer was lost, so the worker still waits"
            proxy.cut()
            pushed.join(timeout=60)
            assert not pushed.is_alive()
            result = worker.last_result
            assert (result.outcome, result.step) == ("applied", 1)
            worker.pull()
            # 10 -> 9 -> 9 - (0.5 * 1 + 1): the momentum saw the first gradient once, too.
            assert worker.step({"w": np.float32([1, 2])})["w"].tolist() == [7.5, 15]
        status = run.status()
    assert (status.step, status.applied_count, status.rejected_counts) == (2, 2, {})


def test_push_cut_off_halfway_is_not_seen_and_then_applied_once(server: ServerProcess, run_id: str) -> None:
    weights = np.zeros(8 << 20, np.float32)
    with TcpProxy(server.address) as proxy, kedge.connect(server.address) as direct:
        run = direct.create_run(
            run_id, params={"w": weights}, optimizer=optim.SGD(lr=1.0), aggregation=kedge.Synchronous(1)
        )
        with kedge.connect(proxy.address) as client, client.get_run(run_id).join(transport="grpc") as worker:
            worker.pull()
            proxy.cut_after_request_bytes(16 << 20)
            pulled = worker.step({"w": np.ones_like(weights)})
        assert proxy.cut_count == 1
        assert run.status().applied_count == 1
        np.testing.assert_array_equal(pulled["w"], -1)
