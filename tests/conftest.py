from collections.abc import Iterator

import pytest
from server_process import ServerProcess
from wire_client import WireClient


@pytest.fixture(scope="session")
def server() -> Iterator[ServerProcess]:
    """One real server for all tests that only need runs of their own on it."""
    with ServerProcess() as process:
        yield process


@pytest.fixture
def wire(server: ServerProcess) -> Iterator[WireClient]:
    """A client made from the .proto files alone."""
    client = WireClient(server.address)
    yield client
    client.close()


@pytest.fixture
def run_id(request: pytest.FixtureRequest) -> str:
    """A run id that no other test uses."""
    return f"r{abs(hash(request.node.nodeid)):x}"
