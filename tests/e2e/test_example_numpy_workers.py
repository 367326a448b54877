"""The scripts that docker/ runs in containers, as processes on this machine: opener, workers, evaluator."""

import importlib.util
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from server_process import ServerProcess

import kedge

DIGITS = Path(__file__).parents[2] / "examples" / "digits"


def start(script: str, *arguments: str, address: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-u", "-W", "error", DIGITS / script, *arguments],
        env=os.environ | {"KEDGE_ADDRESS": address, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_workers_train_and_leave_and_the_evaluator_tells_how_good_they_are(
    eventually: Callable[[Callable[[], Any]], None],
) -> None:
    with ServerProcess() as server, kedge.connect(server.address) as client:
        for step in (0, 0):  # the second one finds it open
            said, _ = start("open_run.py", address=server.address).communicate(timeout=60)
            assert said == f"runs/digits is open, at step {step}\n"
        run = client.get_run("digits")
        workers = [start("numpy_worker.py", "--steps", "2500", address=server.address) for _ in range(2)]
        endless = start("numpy_worker.py", "--steps", "10000000", address=server.address)
        evaluator = start("evaluator.py", address=server.address)
        ended = [worker.communicate(timeout=60)[0] for worker in workers]
        eventually(lambda: len(run.status().workers) == 1)
        endless.send_signal(signal.SIGTERM)
        assert endless.communicate(timeout=30)[0] == ""
        assert endless.returncode == 0
        assert run.status().workers == ()  # it has left, instead of being waited for
        evaluator.send_signal(signal.SIGTERM)
        lines = evaluator.communicate(timeout=30)[0].splitlines()
    assert [worker.returncode for worker in workers] == [0, 0]
    assert all(re.fullmatch(r"[1-9]\d* applied, 0 rejected\n", text) for text in ended), ended
    found = [re.fullmatch(r"step +(\d+)  slow weights: accuracy (\d\.\d{3})", line) for line in lines]
    assert all(found)
    steps = [int(match[1]) for match in found]
    assert steps == sorted(set(steps))
    assert float(found[-1][2]) >= 0.95


def test_the_gradient_is_that_of_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    module = _load(monkeypatch)
    generator = np.random.default_rng(1)
    weights = {
        "hidden": {"w": generator.normal(size=(5, 7)), "b": generator.normal(size=7)},
        "output": {"w": generator.normal(size=(7, 3)), "b": generator.normal(size=3)},
    }
    images, labels = generator.normal(size=(6, 5)), generator.integers(3, size=6)
    loss, grads = module.value_and_grad(weights, images, labels)
    assert loss == pytest.approx(_loss(weights, images, labels), rel=1e-12)
    for layer, name in (("hidden", "w"), ("hidden", "b"), ("output", "w"), ("output", "b")):
        array, grad = weights[layer][name], grads[layer][name]
        assert grad.shape == array.shape
        for index in np.ndindex(array.shape):
            assert grad[index] == pytest.approx(_slope(weights, images, labels, array, index), rel=1e-5, abs=1e-8)


def _load(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(DIGITS)
    spec = importlib.util.spec_from_file_location("numpy_worker_of_digits", DIGITS / "numpy_worker.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _loss(weights: Any, images: np.ndarray, labels: np.ndarray) -> float:
    """Sample by sample, in plain sums."""
    total = 0.0
    for image, label in zip(images, labels, strict=True):
        hidden = [
            max(0.0, float(image @ w + b))
            for w, b in zip(weights["hidden"]["w"].T, weights["hidden"]["b"], strict=True)
        ]
        logits = [
            float(np.dot(hidden, w) + b) for w, b in zip(weights["output"]["w"].T, weights["output"]["b"], strict=True)
        ]
        total += float(np.log(np.sum(np.exp(logits))) - logits[label])
    return total / len(labels)


def _slope(weights: Any, images: np.ndarray, labels: np.ndarray, array: np.ndarray, index: tuple[int, ...]) -> float:
    """A central difference."""
    held, width = array[index], 1e-6
    array[index] = held + width
    above = _loss(weights, images, labels)
    array[index] = held - width
    below = _loss(weights, images, labels)
    array[index] = held
    return (above - below) / (2 * width)
