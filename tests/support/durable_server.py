"""A server with a data directory, in a process of its own, that is killed and comes back at the same address."""

import itertools
import json
import os
import random
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from server_process import EXECUTABLE, ServerEndedError, ServerProcess

# Below those that the system gives to outgoing connections: else one of them could take the port while no server has
# it, and a client that calls there meanwhile could be connected to itself.
_PORTS = range(20_000, 32_000)


class DurableServer:
    """Starts when it is told to, always on one data directory and one port.

    Args:
        data_dir: where its runs are kept.
        environment: of every process.
        arguments: of every process.

    Attributes:
        address: HOST:PORT of all its processes.
        processes: all that were started, the present one last.
        ready_seconds: how long each took from its start until it served.
    """

    def __init__(self, data_dir: Path, *arguments: str, environment: dict[str, str] | None = None) -> None:
        self.data_dir = data_dir
        self.address = f"127.0.0.1:{free_port()}"
        self.processes: list[ServerProcess] = []
        self.ready_seconds: list[float] = []
        self._arguments = ("--listen", self.address, "--data-dir", str(data_dir), *arguments)
        self._environment = environment or {}

    @property
    def process(self) -> ServerProcess:
        """The present one."""
        return self.processes[-1]

    @property
    def log(self) -> str:
        """What all of them have logged."""
        return "".join(itertools.chain.from_iterable(process.log for process in self.processes))

    def start(self, failpoint: str = "") -> Self:
        """Starts a process, with a failpoint armed or none.

        Raises:
            ServerEndedError: if it does not come to serve.
        """
        self._bury()
        environment = self._environment | ({"KEDGE_FAILPOINT": failpoint} if failpoint else {})
        began_at = time.monotonic()
        try:
            process = ServerProcess(*self._arguments, environment=environment)
        except ServerEndedError as ended:
            self.processes.append(ended.process)
            raise
        self.ready_seconds.append(time.monotonic() - began_at)
        self.processes.append(process)
        return self

    def start_in_vain(self, seconds: float) -> None:
        """Starts a process and kills it so soon, whatever it has come to."""
        command = [EXECUTABLE, "serve", *self._arguments]
        with subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=os.environ | self._environment
        ) as process:
            try:
                process.wait(timeout=seconds)
                raise AssertionError(f"the server ended by itself: {process.stderr.read()}")
            except subprocess.TimeoutExpired:
                process.kill()

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()

    def restart(self) -> None:
        """SIGKILL, and another process."""
        self.kill()
        self.start()

    def stop(self) -> int:
        """SIGTERM, and the exit code."""
        return self.process.stop()

    def _bury(self) -> None:
        """Closes what is left of processes that ended by themselves."""
        for process in self.processes:
            process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if self.processes and self.process.process.poll() is None:
            self.kill()
        self._bury()


class Revival:
    """Starts a server again each time that it is killed: with the next failpoint armed, and at last with none.

    Args:
        server: not started yet.
        failpoints: to be killed at, one after the other, as KEDGE_FAILPOINT has them.

    Attributes:
        deaths: the failpoints that it was killed at so far.
    """

    def __init__(self, server: DurableServer, failpoints: Iterable[str]) -> None:
        self.deaths: list[str] = []
        self._server = server
        self._settings = iter([*failpoints, ""])
        self._setting = ""
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._is_stopping = threading.Event()
        self._start_next()
        self._thread.start()

    def stop(self) -> int:
        """SIGTERM, again if it is killed at a failpoint as it ends; the exit code."""
        self._is_stopping.set()
        self._thread.join(timeout=60)
        while (code := self._server.stop()) == -signal.SIGKILL:
            self._start_next(has_died=True)
        return code

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._is_stopping.set()
        self._thread.join(timeout=60)

    def _follow(self) -> None:
        while not self._is_stopping.is_set():
            if self._server.process.process.poll() == -signal.SIGKILL:
                self._start_next(has_died=True)
            self._is_stopping.wait(0.02)

    def _start_next(self, *, has_died: bool = False) -> None:
        """Starts it so often until it serves."""
        while True:
            if has_died:
                self.deaths.append(self._setting)
            self._setting = next(self._settings)
            try:
                self._server.start(self._setting)
                return
            except ServerEndedError as ended:
                if ended.process.process.returncode != -signal.SIGKILL:
                    raise
                has_died = True


def free_port() -> int:
    """A port of loopback that nobody has."""
    for port in random.sample(_PORTS, len(_PORTS)):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("there is no free port")


def kedge_server(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs `kedge-server` to its end."""
    command = [EXECUTABLE, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=os.environ)


def inspected(data_dir: Path) -> dict[str, dict[str, Any]]:
    """What `kedge-server inspect` says of each run, by name. In this process, since to start another takes longer."""
    from kedge_server.tools import inspection, text
    from kedge_server.tools.reading import chosen_runs, opened

    with opened(data_dir) as directory:
        reports, _ = inspection.inspect(chosen_runs(directory, None))
        said = text.as_json(directory.generation, reports, directory.problems)
    return {run["run"]: run for run in json.loads(said)["runs"]}


def essence(run: dict[str, Any]) -> dict[str, Any]:
    """Of what is said of a run: all that does not depend on the clock. Epochs are counted from 1 for each worker."""
    ledger = sorted(run["ledger"], key=lambda entry: (entry["worker"], entry["epoch"], entry["sequence"]))
    epochs: dict[str, list[int]] = {}
    for entry in ledger:
        known = epochs.setdefault(entry["worker"], [])
        if entry["epoch"] not in known:
            known.append(entry["epoch"])
    numbered = [entry | {"epoch": epochs[entry["worker"]].index(entry["epoch"]) + 1} for entry in ledger]
    kept = ("step", "lookahead_sync_count", "digests", "applied_count", "rejected_counts")
    return {name: run[name] for name in kept} | {"ledger": numbered}
