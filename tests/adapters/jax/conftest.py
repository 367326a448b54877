import itertools
from collections.abc import Iterator

import pytest

from kedge import testing
from kedge.client import Client, connect

_run_numbers = itertools.count(1)


@pytest.fixture(params=["fake", "real"])
def client(request: pytest.FixtureRequest) -> Iterator[Client]:
    """Of a fake server, and of a real one."""
    if request.param == "real":
        with connect(request.getfixturevalue("server").address) as client:
            yield client
        return
    with testing.FakeServer() as server, server.connect() as client:
        yield client


@pytest.fixture
def fake_client() -> Iterator[Client]:
    with testing.FakeServer() as server, server.connect() as client:
        yield client


@pytest.fixture
def run_name() -> str:
    """Unique, since the real server lives as long as the suite."""
    return f"jax-{next(_run_numbers)}"
