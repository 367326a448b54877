"""What a run takes, as its creation through the adapter says."""

import pytest

import kedge
from kedge import optim
from kedge.client import Client

torch = pytest.importorskip("torch", reason="PyTorch is not installed: make torch")
from kedge.adapters.torch import RemoteOptimizer  # noqa: E402  it needs PyTorch


def test_run_is_created_with_an_admission(any_client: Client, run_name: str) -> None:
    model = torch.nn.Linear(1, 1, bias=False)
    strict = kedge.Admission(max_norm=2.0)
    with RemoteOptimizer.create(model, any_client, run_name, optim.SGD(lr=1.0), admission=strict) as optimizer:
        assert optimizer.run.info().admission == strict
        before = model.weight.item()
        for gradient, reason in ((2.5, "NORM_ABOVE_LIMIT"), (1.5, "QUORUM_REACHED")):
            model.weight.grad = torch.tensor([[gradient]])
            optimizer.step()
            assert optimizer.worker.last_result.reason == reason
        assert model.weight.item() == pytest.approx(before - 1.5)
