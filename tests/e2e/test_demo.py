"""`make demo`, as a user sees it: real processes, a real kill, real digits."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
from safetensors.numpy import load_file

DEMO = Path(__file__).parents[2] / "examples" / "digits" / "demo.py"


Launch = Callable[..., subprocess.Popen[str]]


class Finished(NamedTuple):
    lines: list[str]
    code: int
    output: Path
    left_over: list[psutil.Process]


def start(*arguments: str, mark: str) -> subprocess.Popen[str]:
    """Starts the demo; `mark` in its environment is how its processes are recognised."""
    return subprocess.Popen(
        [sys.executable, str(DEMO), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"KEDGE_TEST_MARK": mark},
    )


def marked(mark: str) -> list[psutil.Process]:
    """The live processes that have this mark in their environment."""
    return [process for process in psutil.process_iter() if _mark_of(process) == mark]


def _mark_of(process: psutil.Process) -> str | None:
    try:
        return process.environ().get("KEDGE_TEST_MARK")
    except psutil.Error:
        return None


@pytest.fixture
def mark(request: pytest.FixtureRequest) -> Iterator[str]:
    value = f"{request.node.name}-{os.getpid()}"
    yield value
    for process in marked(value):
        process.kill()


@pytest.fixture
def launch(mark: str) -> Iterator[Launch]:
    """Starts demos, and ends what a failed test leaves of them."""
    demos: list[subprocess.Popen[str]] = []

    def start_marked(*arguments: str) -> subprocess.Popen[str]:
        demos.append(start(*arguments, mark=mark))
        return demos[-1]

    yield start_marked
    for demo in demos:
        demo.kill()
        demo.communicate()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    output = tmp_path_factory.mktemp("demo") / "slow.safetensors"
    mark = f"demo-{os.getpid()}"
    demo = start("--plain", "--steps", "1500", "--output", str(output), mark=mark)
    text, _ = demo.communicate(timeout=110)
    return Finished(text.splitlines(), demo.returncode, output, marked(mark))


pytestmark = pytest.mark.slow


def test_it_succeeds_and_its_last_line_says_how_good_the_slow_weights_are(finished: Finished) -> None:
    assert finished.code == 0, "\n".join(finished.lines)
    accuracy = re.fullmatch(r"slow weights: accuracy (\d\.\d{3})", finished.lines[-1])
    assert accuracy, finished.lines[-1]
    assert float(accuracy[1]) >= 0.95


def test_it_shows_the_killed_worker_and_the_new_one(finished: Finished) -> None:
    text = "\n".join(finished.lines)
    assert "worker-3 was killed with SIGKILL" in text
    assert "worker-3 is lost: its lease has expired" in text
    assert "worker-5 joined" in text


def test_what_the_workers_count_is_what_the_run_counts(finished: Finished) -> None:
    rows = [re.fullmatch(r"(worker-\d) +(\d+) +(\d+)  (\w+)", line) for line in finished.lines]
    table = {row[1]: (int(row[2]), row[4]) for row in rows if row}
    assert {name: state for name, (_, state) in table.items()} == {
        "worker-1": "done",
        "worker-2": "done",
        "worker-3": "lost",
        "worker-4": "done",
        "worker-5": "done",
    }
    total = f"the run counts {sum(applied for applied, _ in table.values())} contributions applied in 1500 steps"
    assert total in finished.lines


def test_the_slow_weights_can_be_loaded(finished: Finished) -> None:
    tensors = load_file(finished.output)
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        "hidden.w": (64, 128),
        "hidden.b": (128,),
        "output.w": (128, 10),
        "output.b": (10,),
    }
    assert {str(tensor.dtype) for tensor in tensors.values()} == {"float32"}


def test_it_leaves_no_process_behind(finished: Finished) -> None:
    assert finished.left_over == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_every_process(mark: str, number: signal.Signals, code: int) -> None:
    demo = start("--plain", mark=mark)
    assert demo.stdout is not None
    assert "a server listens on" in demo.stdout.readline()
    demo.send_signal(number)
    demo.communicate(timeout=60)
    assert demo.returncode == code
    assert marked(mark) == []


def test_a_worker_that_crashes_is_shown_and_fails_the_demo(launch: Launch, mark: str) -> None:
    demo = launch("--plain")
    assert demo.stdout is not None
    assert "a server listens on" in demo.stdout.readline()
    _worker(mark, "worker-2").send_signal(signal.SIGABRT)
    text, _ = demo.communicate(timeout=60)
    assert demo.returncode == 1
    assert "worker-2 ended with exit code -6" in text
    assert marked(mark) == []


def _worker(mark: str, name: str) -> psutil.Process:
    for _ in range(600):
        for process in marked(mark):
            if name in process.cmdline():
                return process
        time.sleep(0.05)
    raise AssertionError(f"{name} did not start")
