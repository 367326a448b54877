"""What `make up` starts, in containers of a project of its own."""

import json
import os
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
_BASE = re.search(r"^FROM (\S+)", (ROOT / "docker" / "server.Dockerfile").read_text(), re.MULTILINE)[1]
_WAIT_SECONDS = 120


@cache
def compose_command() -> tuple[str, ...]:
    """Compose, or nothing where there is none."""
    if shutil.which("docker") and _succeeds("docker", "compose", "version"):
        return ("docker", "compose")
    return ("docker-compose",) if shutil.which("docker-compose") else ()


@cache
def what_is_missing() -> str:
    """Why no containers can be started here; empty where they can."""
    if not shutil.which("docker"):
        return "there is no docker command"
    if not _succeeds("docker", "info"):
        return "no Docker engine answers"
    if not compose_command():
        return "there is no Compose"
    if not _succeeds("docker", "image", "inspect", _BASE) and not _succeeds("docker", "pull", _BASE):
        return f"the base image {_BASE} is neither here nor to be had"
    return ""


def _succeeds(*command: str) -> bool:
    return subprocess.run(command, capture_output=True, timeout=300, check=False).returncode == 0


class Deployment:
    """A project of Compose's that disturbs no other one: a name, a port, a tag and secrets of its own."""

    def __init__(self, name: str, **variables: str) -> None:
        self.project = f"{name}-{os.getpid()}"
        self.port = _free_port()
        self.times: dict[str, float] = {}
        self._environment = os.environ | {
            "COMPOSE_PROJECT_NAME": self.project,
            "KEDGE_PORT": str(self.port),
            "KEDGE_TAG": "test",
            **variables,
        }

    @property
    def address(self) -> str:
        return f"localhost:{self.port}"

    def make(self, target: str) -> str:
        """What `make up` or `make down` prints. It must succeed."""
        started_at = time.monotonic()
        done = subprocess.run(
            ["make", "--no-print-directory", "-C", ROOT, target],
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=1500,
            check=False,
        )
        assert done.returncode == 0, done.stdout
        self.times[f"make {target}"] = time.monotonic() - started_at
        return done.stdout

    def container(self, service: str, index: int = 1) -> str:
        """The id of a service's container."""
        return self.containers(f"service={service}", f"container-number={index}")[0]

    def containers(self, *labels: str) -> list[str]:
        """The ids of those that have been made, running or not."""
        filters = [f"--filter=label=com.docker.compose.{label}" for label in labels]
        return docker("ps", "--all", "--quiet", "--no-trunc", f"--filter={self._is_mine}", *filters).split()

    def networks(self) -> list[str]:
        return docker("network", "ls", "--quiet", f"--filter={self._is_mine}").split()

    def volumes(self) -> list[str]:
        return docker("volume", "ls", "--quiet", f"--filter={self._is_mine}").split()

    def remove(self) -> None:
        """Ends all of it, and removes its volume."""
        for container in self.containers():
            docker("rm", "--force", "--volumes", container)
        for network in self.networks():
            docker("network", "rm", network)
        for volume in self.volumes():
            docker("volume", "rm", volume)

    def timed(self, what: str) -> "_Timed":
        """Notes how long what is in the `with` block takes."""
        return _Timed(self.times, what)

    def report(self, record_property: Callable[[str, object], None]) -> None:
        """Has the times that were noted shown at the end of the tests, each once."""
        while self.times:
            what, seconds = self.times.popitem()
            record_property("measured", f"{what}: {seconds:.1f} s")

    @property
    def _is_mine(self) -> str:
        return f"label=com.docker.compose.project={self.project}"


def docker(*arguments: str) -> str:
    """What docker prints."""
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def logs(container: str) -> str:
    """What a container has printed, errors included."""
    done = subprocess.run(
        ["docker", "logs", container], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True
    )
    return done.stdout


def inspect(container: str) -> dict[str, Any]:
    """All that the engine knows of a container."""
    found: dict[str, Any] = json.loads(docker("inspect", container))[0]
    return found


def kill_process(container: str) -> None:
    """SIGKILL from the host, as when memory runs out. `docker kill` stops a container for good, whatever its policy."""
    state, image = inspect(container)["State"], inspect(container)["Config"]["Image"]
    kill = f"import os; os.kill({state['Pid']}, 9)"
    docker("run", "--rm", "--pid", "host", "--user", "0", "--entrypoint", "python", image, "-c", kill)


def wait_until(holds: Callable[[], Any], what: str) -> None:
    """Waits for what takes long with several containers on few cores."""
    give_up_at = time.monotonic() + _WAIT_SECONDS
    pause = threading.Event()
    while not holds():
        assert time.monotonic() < give_up_at, f"{what} did not come to hold"
        pause.wait(0.1)


class _Timed:
    def __init__(self, times: dict[str, float], what: str) -> None:
        self._times, self._what = times, what

    def __enter__(self) -> None:
        self._started_at = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._times[self._what] = time.monotonic() - self._started_at


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port
