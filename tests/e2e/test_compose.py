"""`make up` and `make down` for real: a server, four workers and an evaluator in containers, two kinds of kills."""

import importlib.util
import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest
from containers import Deployment, docker, inspect, kill_process, logs, wait_until, what_is_missing

import kedge

DIGITS = Path(__file__).parents[2] / "examples" / "digits"
WORKERS = 4
SERVED_RUN = "digits"
LOST_WITHOUT_JOURNAL = 6000

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def deployed() -> Iterator[Deployment]:
    if what_is_missing():
        pytest.skip(what_is_missing())
    deployment = Deployment("kedge-test", WORKERS=str(WORKERS), STEPS="10000000")
    try:
        deployment.make("up")
        yield deployment
    finally:
        deployment.remove()


@pytest.fixture
def run(deployed: Deployment) -> Iterator[kedge.Run]:
    """The run, seen from the host."""
    with kedge.connect(deployed.address) as client:
        yield client.get_run(SERVED_RUN)


@pytest.fixture(autouse=True)
def times(deployed: Deployment, record_property: Callable[[str, object], None]) -> Iterator[None]:
    yield
    deployed.report(record_property)


class Sight(NamedTuple):
    step: int
    applied_count: int


def look(run: kedge.Run) -> Sight:
    status = run.status()
    return Sight(status.step, status.applied_count)


def worker_ids(run: kedge.Run) -> set[str]:
    return {worker.name.rpartition("/")[2] for worker in run.status().workers}


def is_healthy(container: str) -> bool:
    return inspect(container)["State"]["Health"]["Status"] == "healthy"


def load_data() -> ModuleType:
    spec = importlib.util.spec_from_file_location("digits_data_of_compose", DIGITS / "data.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def accuracy(weights: Any) -> float:
    """On the images that nobody trains with. A run that is opened without a tree has its tensors by name."""
    _, test = load_data().load()
    hidden = np.maximum(test.images @ weights["hidden.w"] + weights["hidden.b"], 0)
    answers = (hidden @ weights["output.w"] + weights["output.b"]).argmax(axis=1)
    return float(np.mean(answers == test.labels))


def held_step(volume: str) -> int:
    """The step that the next server would go on from. Fails if anything there is damaged."""
    told = docker("run", "--rm", f"--volume={volume}:/data", "kedge-server:test", "inspect", "/data", "--json")
    (run,) = json.loads(told)["runs"]
    step: int = run["step"]
    return step


class Contributor:
    """A worker on the host whose gradients change next to nothing."""

    def __init__(self, run: kedge.Run) -> None:
        self._run = run
        self.stop = threading.Event()
        self.steps: list[int] = []
        """Those that its acknowledged contributions became, in order: each is a step of its own."""

    def contribute(self) -> int:
        """Until it is told to stop; how many of its contributions the run counts."""
        with self._run.join("on-the-host") as worker:
            zeros = {name: np.zeros_like(array) for name, array in worker.pull().items()}
            while not self.stop.is_set():
                worker.step(zeros, example_count=1)
                assert worker.last_result is not None
                assert worker.last_result.outcome == "applied"
                self.steps.append(worker.last_result.step)
            rows = [row for row in self._run.status().workers if row.name.endswith("/on-the-host")]
        return rows[0].applied_count


def test_what_runs_is_contained(deployed: Deployment) -> None:
    for service in ("server", "worker", "evaluator"):
        container = deployed.container(service)
        host = inspect(container)["HostConfig"]
        assert (host["ReadonlyRootfs"], host["CapDrop"], host["Privileged"]) == (True, ["ALL"], False)
        assert "no-new-privileges:true" in host["SecurityOpt"]
        assert docker("exec", container, "id", "-u").strip() == "10001"
        tools = "for tool in cc gcc c++ make ld; do command -v $tool; done; python -m pip --version 2>&1; true"
        assert docker("exec", container, "sh", "-c", tools).splitlines() == [
            "/opt/kedge/bin/python: No module named pip"
        ]
        assert docker("exec", container, "sh", "-c", "touch /opt/kedge/x /etc/x 2>/dev/null || echo no") == "no\n"
    published = inspect(deployed.container("server"))["HostConfig"]["PortBindings"]["50051/tcp"]
    assert published == [{"HostIp": "127.0.0.1", "HostPort": str(deployed.port)}]


def test_workers_have_no_jax_and_the_server_no_scikit_learn(deployed: Deployment) -> None:
    for service, absent in (("worker", ["jax", "kedge_server"]), ("server", ["sklearn", "pytest"])):
        command = f"import importlib.util as u; print([bool(u.find_spec(name)) for name in {absent}])"
        assert docker("exec", deployed.container(service), "python", "-c", command) == "[False, False]\n"


def test_four_workers_train_and_a_killed_one_holds_up_nobody(deployed: Deployment, run: kedge.Run) -> None:
    wait_until(lambda: len(worker_ids(run)) == WORKERS, "four workers")
    victim = deployed.container("worker", 2)
    with deployed.timed("after docker kill of a worker, until its lease is gone and 100 steps are made"):
        docker("kill", victim)
        before = look(run)
        wait_until(lambda: not any(name.startswith(victim[:12]) for name in worker_ids(run)), "without the worker")
        wait_until(lambda: look(run).step >= before.step + 100, "100 more steps")
    assert len(worker_ids(run)) == WORKERS - 1
    assert not inspect(victim)["State"]["Running"]


@pytest.mark.parametrize("kill", ["SIGKILL", "docker kill"])
def test_a_killed_server_loses_nothing_that_it_has_acknowledged(
    deployed: Deployment, run: kedge.Run, kill: str, in_background: Callable[..., Future[int]]
) -> None:
    server, contributor, workers = deployed.container("server"), Contributor(run), worker_ids(run)
    counted = in_background(contributor.contribute)
    try:
        # So many that a server without them would be far behind when it is asked next.
        wait_until(lambda: contributor.steps and look(run).step >= LOST_WITHOUT_JOURNAL, "steps that might be lost")
        before, restarts = look(run), inspect(server)["RestartCount"]
        with deployed.timed(f"after {kill} of the server, until 100 more steps are made"):
            if kill == "SIGKILL":
                kill_process(server)
                wait_until(lambda: inspect(server)["RestartCount"] == restarts + 1, "a restart by the policy")
            else:
                docker("kill", server)
                docker("start", server)
            first = look(run)
            wait_until(lambda: contributor.steps[-1] >= before.step + 100, "100 more steps")
    finally:
        contributor.stop.set()
    assert first.step >= before.step
    assert first.applied_count >= before.applied_count
    assert counted.result(timeout=60) == len(contributor.steps)
    assert contributor.steps == sorted(set(contributor.steps))
    assert workers <= worker_ids(run)
    wait_until(lambda: is_healthy(server), "the server's health")


def test_the_slow_weights_are_pulled_from_the_host(
    deployed: Deployment, run: kedge.Run, record_property: Callable[[str, object], None]
) -> None:
    with deployed.timed("until the slow weights are right on 97 % of unseen images"):
        wait_until(lambda: accuracy(run.pull("slow")) >= 0.97, "the accuracy")
    record_property("measured", f"accuracy of the slow weights: {accuracy(run.pull('slow')):.3f}")
    assert "slow weights: accuracy 0.9" in logs(deployed.container("evaluator"))


def test_a_server_that_is_stopped_takes_its_last_checkpoint(deployed: Deployment, run: kedge.Run) -> None:
    server = deployed.container("server")
    newest = run.checkpoints()
    with deployed.timed("docker stop of the server"):
        docker("stop", "--time", "30", server)
    assert inspect(server)["State"]["ExitCode"] == 0
    docker("start", server)
    wait_until(lambda: is_healthy(server), "the server's health")
    assert run.checkpoints()[0].step > (newest[0].step if newest else -1)


def test_up_says_what_next_and_starts_what_was_killed(deployed: Deployment, run: kedge.Run) -> None:
    said = deployed.make("up")
    assert f"The server answers on {deployed.address}, and 4 workers train runs/digits." in said
    assert "docker/compose.sh logs --follow evaluator" in said
    wait_until(lambda: len(worker_ids(run)) == WORKERS, "four workers")


def test_down_leaves_nothing_but_the_volume(deployed: Deployment, run: kedge.Run) -> None:
    before = look(run)
    deployed.make("down")
    assert deployed.containers() == []
    assert deployed.networks() == []
    (volume,) = deployed.volumes()
    assert volume == f"{deployed.project}_data"
    # Its owner stopped in good order, and all of the run is in it, whole.
    assert held_step(volume) >= before.step
