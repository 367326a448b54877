import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from server_process import ServerProcess
from wire_client import WireClient


def pytest_configure() -> None:
    """Where the tests run in the background, SIGINT is ignored, and every process that they start would ignore it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Shows what tests have measured, `record_property("measured", text)`, in whichever process they ran."""
    for report in terminalreporter.getreports(""):  # of setup and teardown; what fixtures measure comes in the latter
        for text in (value for name, value in report.user_properties if name == "measured"):
            terminalreporter.write_line(f"{report.nodeid}: {text}")


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


@pytest.fixture
def in_background() -> Iterator[Callable[..., Any]]:
    """Starts a function in a thread and gives its future."""
    with ThreadPoolExecutor(8) as pool:
        yield pool.submit


@pytest.fixture
def eventually() -> Callable[[Callable[[], Any]], None]:
    """Waits until something holds, and fails if it does not within half a minute."""

    def wait(holds: Callable[[], Any]) -> None:
        give_up_at = time.monotonic() + 30
        pause = threading.Event()
        while not holds():
            assert time.monotonic() < give_up_at, "it did not come to hold"
            pause.wait(0.02)

    return wait
