"""A run's bits do not depend on how many devices it lies on, and it may move from any number to any other."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import on_devices
import pytest

from kedge_server.core.placement import Placement, SharedMemory
from kedge_server.core.plan import BlockPlan

SCRIPT = Path(on_devices.__file__)


@pytest.fixture(scope="module")
def told() -> Any:
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, SCRIPT], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", on_devices.CASES)
def test_several_devices_give_the_bits_of_one(told: Any, case: str) -> None:
    assert told["agreed"][case]


def test_a_run_resumes_on_any_number_of_devices(told: Any) -> None:
    assert told["agreed"]["moved"]


def test_every_device_has_a_share(told: Any) -> None:
    assert (told["device_count"], told["staged_count"]) == (4, 2)


def test_more_devices_than_there_are_is_an_error_that_says_so() -> None:
    count = len(jax.local_devices())
    with pytest.raises(ValueError, match=rf"device\.count is {count + 1}, but the devices here are {count}"):
        Placement.of(count + 1)


def test_blocks_are_dealt_in_ranges_of_about_as_many_elements() -> None:
    blocks = [BlockPlan(at, at + 10, 0, False, None) for at in range(0, 100, 10)]
    placement = Placement(jax.local_devices()[:1] * 4, SharedMemory())
    dealt = placement.deal(blocks)
    assert list(dealt) == sorted(dealt)
    assert {dealt.count(device) for device in range(4)} == {2, 3}
    assert placement.deal([]) == ()
