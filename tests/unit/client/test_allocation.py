"""What freed memory costs to have again, in processes of their own: it is a setting of the whole process."""

import functools
import json
import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc's")

_SCRIPT = """
import json, resource
from kedge.wire.allocation import keep_freed_memory, set_apart

def faults(size, count):
    def churn():
        held = [b"x" * size for _ in range(count)]
    churn()
    churn()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        churn()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

made = [keep_freed_memory(arena_count=1), keep_freed_memory()]
result = {"made": made}
with set_apart():
    result["apart"] = faults(4 << 20, 1)
result["after"] = faults(4 << 20, 1)
result["messages"] = faults(1 << 20, 8)
print(json.dumps(result))
"""

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
FRESH_FAULTS = 10 * (8 << 20) // PAGE_BYTES
"""Of ten times eight messages, if each touches memory that is fresh."""


def run(**environment: str) -> dict:
    own = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_", "KEDGE_"))}
    result = subprocess.run([sys.executable, "-c", _SCRIPT], env=own | environment, capture_output=True, check=True)
    return json.loads(result.stdout)


@functools.cache
def with_setting() -> dict:
    return run()


def test_messages_reuse_memory_that_the_last_ones_had() -> None:
    result = with_setting()
    assert result["made"] == [True, True]
    assert result["messages"] < FRESH_FAULTS / 100


def test_what_is_set_apart_goes_back_to_the_system_and_nothing_after_it() -> None:
    result = with_setting()
    assert result["apart"] > 10 * (4 << 20) / PAGE_BYTES / 2
    assert result["after"] < 10 * (4 << 20) / PAGE_BYTES / 100


@pytest.mark.parametrize(
    "environment",
    [
        {"KEDGE_KEEP_MEMORY": "0"},
        {"KEDGE_KEEP_MEMORY": " False"},
        {"MALLOC_TRIM_THRESHOLD_": "131072"},
        {"MALLOC_ARENA_MAX": "8"},
        {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"},
    ],
    ids=lambda environment: next(iter(environment)),
)
def test_what_the_user_has_set_is_left_as_it_is(environment: dict[str, str]) -> None:
    result = run(**environment)
    assert result["made"] == [False, False]
    if "KEDGE_KEEP_MEMORY" in environment:
        assert result["messages"] > FRESH_FAULTS / 2


@pytest.mark.parametrize(
    "environment", [{"KEDGE_KEEP_MEMORY": "1"}, {"GLIBC_TUNABLES": "glibc.rtld.optional_static_tls=512"}]
)
def test_settings_of_something_else_do_not_matter(environment: dict[str, str]) -> None:
    assert run(**environment)["made"] == [True, True]
