"""A disk that does not take what was written: the server ends, and the next one knows what is there."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from durable_server import DurableServer

import kedge
from kedge import optim

SYNC_FAILED = 74  # EX_IOERR

# Stands in front of the C library's: fails as a disk that lost a write does, once, and then says that all is well.
SHIM = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

static int fails(void) {
    const char *path = getenv("FAILING_SYNC");
    return path && unlink(path) == 0;
}

int fdatasync(int fd) {
    if (fails()) { errno = EIO; return -1; }
    return ((int (*)(int))dlsym(RTLD_NEXT, "fdatasync"))(fd);
}
"""


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler, for a library that makes fsync fail")
    directory = tmp_path_factory.mktemp("shim")
    (directory / "shim.c").write_text(SHIM)
    library = directory / "shim.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, directory / "shim.c", "-ldl"], check=True)
    return library


@pytest.fixture
def flag(tmp_path: Path) -> Path:
    """Where it is, the next sync fails."""
    return tmp_path / "fail"


@pytest.fixture
def server(tmp_path: Path, shim: Path, flag: Path) -> Iterator[DurableServer]:
    environment = {"LD_PRELOAD": str(shim), "FAILING_SYNC": str(flag)}
    with DurableServer(tmp_path / "data", environment=environment) as durable:
        yield durable.start()


def counting(client: kedge.Client, durability: kedge.policies.Durability) -> kedge.Run:
    """A run whose weight is the number of ones that were applied to it."""
    params = {"w": np.zeros(1, np.float32)}
    return client.create_run(
        "r", params=params, optimizer=optim.SGD(lr=1.0), aggregation=kedge.Asynchronous(), durability=durability
    )


@pytest.mark.parametrize("durability", ["journal", "journal-sync"])
def test_failed_sync_ends_the_server_and_the_next_one_has_what_was_acknowledged(
    server: DurableServer, flag: Path, durability: kedge.policies.Durability
) -> None:
    ones = {"w": -np.ones(1, np.float32)}
    with kedge.connect(server.address) as client:
        run = counting(client, durability)
        with run.join("w") as worker:
            worker.pull()
            for _ in range(5):
                worker.step(ones)
            impatient = kedge.connect(server.address, retry_seconds=0)
            with impatient, impatient.get_run("r").join("other") as other:
                flag.touch()
                if durability == "journal-sync":
                    with pytest.raises(kedge.KedgeError):
                        other.push(ones, base_step=5)
                else:  # acknowledged first, and synced within half a second
                    assert other.push(ones, base_step=5).outcome == "applied"
                assert server.process.process.wait(20) == SYNC_FAILED
                assert not flag.exists()
                server.start()
            for _ in range(5):
                weights = worker.step(ones)
            assert run.status().applied_count == weights["w"][0], "each of them once"
            assert weights["w"][0] >= 10
            assert worker.last_result.outcome == "applied"
    assert "could not be brought to the disk" in server.log


def test_failed_sync_of_a_checkpoint_ends_the_server_too(server: DurableServer, flag: Path) -> None:
    with kedge.connect(server.address, retry_seconds=0) as client:
        run = counting(client, "checkpoint")
        with run.join("w") as worker:
            worker.pull()
            worker.push({"w": -np.ones(1, np.float32)})
        flag.touch()
        with pytest.raises(kedge.KedgeError):
            run.checkpoint()
    assert server.process.process.wait(20) == SYNC_FAILED
    server.start()
    with kedge.connect(server.address) as client:
        assert client.get_run("r").checkpoints() == []
        assert client.get_run("r").pull()["w"].tolist() == [0]
