"""Saving and loading, copying, and the end of an optimizer."""

import copy
import gc
import io
import os
import pickle
import subprocess
import sys

import pytest
from server_process import ServerProcess

import kedge
from kedge import KedgeError, optim

torch = pytest.importorskip("torch")

from kedge.adapters.torch import RemoteOptimizer  # noqa: E402  it needs PyTorch

SGD = optim.SGD(lr=1.0)
lr_scheduler = torch.optim.lr_scheduler


def linear():
    return torch.nn.Linear(1, 1)


def step(optimizer):
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def values(model):
    return [parameter.item() for parameter in model.parameters()]


# State


def test_state_names_run_worker_and_step_and_has_no_tensors(client, run_name):
    with RemoteOptimizer.create(linear(), client, run_name, SGD, worker_name="w1") as optimizer:
        step(optimizer)
        state = optimizer.state_dict()

    assert state["kedge"]["run"] == f"runs/{run_name}"
    assert state["kedge"]["worker"] == f"runs/{run_name}/workers/w1"
    assert state["kedge"]["step"] == 1
    assert state["state"] == {}
    assert state["param_groups"] == [
        {"lr": 1.0, "weight_decay": 0.0, "params": [0, 1], "param_names": ["weight", "bias"]}
    ]
    assert through_a_file(state) == state


def test_loading_a_state_goes_on_with_the_run_as_it_is_now(client, run_name):
    model, other = linear(), linear()
    with RemoteOptimizer.create(model, client, run_name, SGD) as optimizer:
        step(optimizer)
        state = through_a_file(optimizer.state_dict())
        step(optimizer)
    with RemoteOptimizer(other.named_parameters(), run=client.get_run(run_name)) as again:
        with torch.no_grad():
            other.weight.fill_(100.0)  # as an older checkpoint of the module might
        again.load_state_dict(state)
        assert values(other) == values(model)
        assert again.worker.step_number == 2
        step(again)
    assert values(other) == pytest.approx([value - 1 for value in values(model)])


def test_training_that_is_interrupted_and_taken_up_has_the_rates_of_one_that_is_not(client, run_name):
    """A scheduler moves the rate after the step, so the checkpoint holds a rate that the run has not been told yet."""

    def schedulers(optimizer):
        return lr_scheduler.ExponentialLR(optimizer, gamma=0.5)

    with RemoteOptimizer.create(linear(), client, run_name, SGD) as optimizer:
        scheduler = schedulers(optimizer)
        for _ in range(2):
            step(optimizer)
            scheduler.step()
        saved = through_a_file({"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()})
    with RemoteOptimizer(linear().named_parameters(), run=client.get_run(run_name)) as again:
        scheduler = schedulers(again)
        scheduler.load_state_dict(saved["scheduler"])
        again.load_state_dict(saved["optimizer"])
        for _ in range(2):
            step(again)
            scheduler.step()
        changes = [(made.step, made.change.lr) for made in again.run.info().changes]

    assert changes == [(2, 0.5), (3, 0.25), (4, 0.125)]


def test_loading_a_state_does_not_bring_back_a_rate_that_the_run_has_left(client, run_name):
    schedule = optim.ExponentialLR(base_lr=1.0, gamma=0.5)
    with RemoteOptimizer.create(linear(), client, run_name, optim.SGD(lr=schedule)) as optimizer:
        state = optimizer.state_dict()
        step(optimizer)
        lr_scheduler.LinearLR(optimizer, start_factor=0.5)  # whose first act is to set the rate
        optimizer.load_state_dict(state)

        assert optimizer.param_groups[0]["lr"] == 0.5
        step(optimizer)
        assert optimizer.run.info().changes == ()


def test_entries_of_schedulers_are_loaded(client, run_name):
    with RemoteOptimizer.create(linear(), client, run_name, SGD) as optimizer:
        lr_scheduler.OneCycleLR(optimizer, max_lr=0.5, total_steps=9, cycle_momentum=False)
        state = optimizer.state_dict()
    with RemoteOptimizer(linear().named_parameters(), run=client.get_run(run_name)) as again:
        again.load_state_dict(state)
        assert again.param_groups[0]["max_lr"] == 0.5


def test_state_of_another_run_is_refused(client, run_name):
    with RemoteOptimizer.create(linear(), client, run_name, SGD) as optimizer:
        state = optimizer.state_dict()
    model = linear()
    with RemoteOptimizer.create(model, client, f"{run_name}-2", SGD) as other:
        before = values(model)
        with pytest.raises(ValueError, match=rf"of runs/{run_name}, created .* of runs/{run_name}-2, created"):
            other.load_state_dict(state)
        assert values(model) == before


def test_state_of_a_run_that_was_made_anew_under_its_name_is_refused(client, run_name):
    with RemoteOptimizer.create(linear(), client, run_name, SGD) as optimizer:
        state = optimizer.state_dict()
        optimizer.run.delete()
    with (
        RemoteOptimizer.create(linear(), client, run_name, SGD) as other,
        pytest.raises(ValueError, match="open the run that it names"),
    ):
        other.load_state_dict(state)


def test_state_of_another_kind_of_optimizer_is_refused(client, run_name):
    model = linear()
    with (
        RemoteOptimizer.create(model, client, run_name, SGD) as optimizer,
        pytest.raises(ValueError, match="of another kind of optimizer"),
    ):
        optimizer.load_state_dict(torch.optim.Adam(model.parameters()).state_dict())


@pytest.mark.parametrize("kedges", [{}, {"run": "runs/a"}, None, "runs/a"])
def test_state_that_names_no_run_is_refused(client, run_name, kedges):
    with RemoteOptimizer.create(linear(), client, run_name, SGD) as optimizer:
        state = optimizer.state_dict() | {"kedge": kedges}
        with pytest.raises(ValueError, match="of another kind of optimizer"):
            optimizer.load_state_dict(state)


def test_state_of_other_parameter_groups_is_refused(client, run_name):
    model = linear()
    with RemoteOptimizer.create(model, client, run_name, SGD) as optimizer:
        groups = [{"params": [("weight", model.weight)]}, {"params": [("bias", model.bias)]}]
        with RemoteOptimizer(groups, run=optimizer.run) as other:
            state = other.state_dict()
        with pytest.raises(ValueError, match="different number of parameter groups"):
            optimizer.load_state_dict(state)
        step(optimizer)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_copies_are_refused_with_what_to_do(client, run_name, duplicate):
    with (
        RemoteOptimizer.create(linear(), client, run_name, SGD) as optimizer,
        pytest.raises(TypeError, match=r"use its state_dict\(\)"),
    ):
        duplicate(optimizer)


# The end


def test_leaving_the_block_gives_the_lease_back(client, run_name):
    with RemoteOptimizer.create(linear(), client, run_name, SGD, worker_name="a", lease_seconds=30) as optimizer:
        (worker,) = optimizer.run.status().workers
        assert worker.name == optimizer.worker.name == f"runs/{run_name}/workers/a"
        assert worker.lease_remaining_seconds > 20
    assert optimizer.run.status().workers == ()
    optimizer.close()
    with pytest.raises(ValueError, match="closed: make a new RemoteOptimizer"):
        step(optimizer)


def test_forgotten_optimizer_gives_its_lease_back(client, run_name, eventually):
    optimizer = RemoteOptimizer.create(linear(), client, run_name, SGD)
    run = optimizer.run
    cycle = [optimizer]
    cycle.append(cycle)  # so that it is the collector's
    assert len(run.status().workers) == 1
    del optimizer, cycle
    gc.collect()
    eventually(lambda: run.status().workers == ())


def test_failed_first_pull_gives_the_lease_back(client, run_name, monkeypatch):
    model = linear()
    run = client.create_run(run_name, params=model.state_dict(), optimizer=SGD, aggregation=kedge.Synchronous(quorum=1))

    def fail(*_):
        raise KedgeError("SERVER_UNAVAILABLE", "no answer")

    monkeypatch.setattr(kedge.Worker, "pull", fail)
    with pytest.raises(KedgeError, match="no answer") as error:
        RemoteOptimizer(model.named_parameters(), run=run)
    assert error.traceback, "which keeps the optimizer, so that it is not the collector that ends it"
    assert run.status().workers == ()


def test_worker_that_is_given_stays_open(client, run_name):
    model = linear()
    run = client.create_run(run_name, params=model.state_dict(), optimizer=SGD, aggregation=kedge.Synchronous(quorum=1))
    with run.join("mine") as worker:
        with RemoteOptimizer(model.named_parameters(), run=run, worker=worker) as optimizer:
            step(optimizer)
        assert [status.name for status in run.status().workers] == [worker.name]
        assert worker.pull()["weight"].item() == model.weight.item()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"name": "b"}, "leave name, wire_dtype and lease_seconds out"),
        ({"wire_dtype": "bfloat16"}, "leave name"),
        ({"lease_seconds": 3.0}, "leave name"),
    ],
)
def test_worker_that_is_given_has_joined_already(client, run_name, options, text):
    model = linear()
    with RemoteOptimizer.create(model, client, run_name, SGD) as optimizer, pytest.raises(ValueError, match=text):
        RemoteOptimizer(model.parameters(), run=optimizer.run, worker=optimizer.worker, **options)


def test_worker_of_another_run_is_refused(client, run_name):
    model = linear()
    with (
        RemoteOptimizer.create(model, client, run_name, SGD) as one,
        RemoteOptimizer.create(model, client, f"{run_name}-2", SGD) as two,
        pytest.raises(ValueError, match=f"none of runs/{run_name}: join that run"),
    ):
        RemoteOptimizer(model.parameters(), run=one.run, worker=two.worker)


SETTING = """
import os, sys, torch, kedge
from kedge.adapters.torch import RemoteOptimizer
model = torch.nn.Linear(1, 1)
client = kedge.connect(sys.argv[1], retry_seconds=1)
optimizer = RemoteOptimizer.create(model, client, sys.argv[2], kedge.optim.SGD(lr=1.0), lease_seconds=60)
model(torch.ones(1)).backward()
optimizer.step()
"""

WAITING = """
print("stepped", flush=True)
sys.stdin.read()
"""

FORKING = """
dataset = torch.utils.data.TensorDataset(torch.ones(8, 1))
for batch, in torch.utils.data.DataLoader(dataset, batch_size=4, num_workers=2):
    optimizer.step()
child = os.fork()
if not child:
    sys.exit(0)
os.waitpid(child, 0)
print(len(optimizer.run.status().workers))
optimizer.step()
print(optimizer.run.status().step, optimizer.worker.last_result.outcome)
"""


@pytest.fixture
def start(run_name):
    """Starts programs with standard input and output, and ends what a failed test leaves of them."""
    started = []

    def start(source, address):
        command = [sys.executable, "-W", "error", "-c", SETTING + source, address, run_name]
        pipe = subprocess.PIPE
        environment = os.environ | {"GRPC_VERBOSITY": "ERROR"}  # else gRPC mentions every fork
        started.append(subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_end_of_the_process_gives_the_lease_back(server, run_name, start):
    process = start(WAITING, server.address)
    assert process.stdout.readline() == "stepped\n"
    with kedge.connect(server.address) as client:
        run = client.get_run(run_name)
        assert len(run.status().workers) == 1
        _, errors = process.communicate(timeout=60)
        assert (process.returncode, errors) == (0, "")
        assert run.status().workers == ()


def test_end_of_the_process_does_not_wait_for_a_server_that_is_gone(start):
    with ServerProcess() as server:
        process = start(WAITING, server.address)
        assert process.stdout.readline() == "stepped\n"
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors


def test_forks_leave_the_lease_to_the_process_that_has_it(server, start):
    process = start(FORKING, server.address)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")
    assert output == "1\n4 applied\n"
