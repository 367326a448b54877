"""The `kedge` command and a client, of the server that all these tests share."""

import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
from kedge_command import Command, run_kedge
from server_process import ServerProcess

import kedge
from kedge.client import Client


@pytest.fixture
def command(server: ServerProcess) -> Command:
    """Runs the command against the server."""

    def run(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
        return run_kedge(*arguments, address=server.address, **options)

    return run


@pytest.fixture
def client(server: ServerProcess) -> Iterator[Client]:
    with kedge.connect(server.address) as client:
        yield client
