"""What carries a gradient leaves no trace: the golden trajectories over gRPC and through shared memory."""

import numpy as np
import pytest
from server_process import ServerProcess

import kedge

from . import golden_inputs
from .test_golden import OPTIMIZERS, TOLERANCE, load


def trajectory(address: str, run_id: str, name: str, transport: str) -> list[np.ndarray]:
    params = {"w": golden_inputs.weights().astype(np.float32)}
    with kedge.connect(address) as client:
        run = client.create_run(
            run_id, params=params, optimizer=OPTIMIZERS[name], aggregation=kedge.Synchronous(quorum=1)
        )
        with run.join(transport=transport) as worker:
            worker.pull()
            return [worker.step({"w": gradient.astype(np.float32)})["w"] for gradient in golden_inputs.gradients()]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_golden_trajectory_is_the_same_to_the_last_bit_whatever_carries_it(server: ServerProcess, name: str) -> None:
    paths = {
        transport: trajectory(server.address, f"golden-{name}-{transport}", name, transport)
        for transport in ("grpc", "shared_memory", "auto")
    }
    as_bytes = {transport: [weights.tobytes() for weights in path] for transport, path in paths.items()}
    assert as_bytes["shared_memory"] == as_bytes["grpc"] == as_bytes["auto"]
    scale = max(np.abs(weights).max() for weights in paths["grpc"])
    for step, want in load(name)["fast"].items():
        got = paths["shared_memory"][int(step) - 1]
        np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE * scale, err_msg=f"step {step}")
