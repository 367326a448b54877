"""The processes of the demo: one server and its workers. Each is started here, watched here and ended here."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self

_HERE = Path(__file__).parent
_START_SECONDS = 60.0
_END_SECONDS = 5.0
_LOG_LINES = 30

# Five processes that compute on a few cores: one thread each for arithmetic, and no worker on an accelerator.
_ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
}


class ProcessCrashedError(Exception):
    """A process ended that should not have. The message has the end of its log."""


class Fleet:
    """A server on a free port of loopback, and workers. Leaving the `with` block ends all of them."""

    def __init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="kedge-digits-")
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._killed: set[str] = set()
        self._address = ""

    def start_server(self) -> None:
        """Starts the server; `wait_for_server` says where it listens."""
        command = Path(sys.executable).with_name("kedge-server")
        self._start("server", [str(command), "serve", "--listen", "127.0.0.1:0"], _ONE_THREAD)

    def wait_for_server(self) -> str:
        """Blocks until the server serves, and returns its address."""
        give_up_at = time.monotonic() + _START_SECONDS
        while time.monotonic() < give_up_at:
            self.check()
            found = re.search(r"^listening on (\S+)$", self._log("server"), re.MULTILINE)
            if found:
                self._address = found[1]
                return self._address
            time.sleep(0.05)
        log = self._log("server")
        raise ProcessCrashedError(f"the server did not begin to serve within {_START_SECONDS:.0f} s; its log:\n{log}")

    def start_worker(self, name: str, *, part: int, parts: int, steps: int) -> None:
        """Starts a worker on its part of the images."""
        options = {"--part": part, "--parts": parts, "--steps": steps}
        command = [sys.executable, str(_HERE / "worker.py"), name]
        command += [str(word) for option in options.items() for word in option]
        environment = {"KEDGE_ADDRESS": self._address, "JAX_PLATFORMS": "cpu"}
        self._start(name, command, _ONE_THREAD | environment)

    def kill(self, name: str) -> None:
        """Kills a process with SIGKILL: it gets no chance to say goodbye."""
        self._killed.add(name)
        self._processes[name].kill()
        self._processes[name].wait()

    def check(self) -> None:
        """Raises ProcessCrashedError if a process has ended by a failure of its own, or the server has ended at all."""
        for name, process in self._processes.items():
            code = process.poll()
            if code is None or name in self._killed or (code == 0 and name != "server"):
                continue
            tail = "\n".join(self._log(name).splitlines()[-_LOG_LINES:])
            raise ProcessCrashedError(f"{name} ended with exit code {code}; its log ends with:\n{tail}")

    def is_running(self, name: str) -> bool:
        """Whether a process has not ended."""
        return self._processes[name].poll() is None

    def is_training(self) -> bool:
        """Whether a worker is still at work."""
        return any(self.is_running(name) for name in self._processes if name != "server")

    def counts(self, name: str) -> tuple[int, int]:
        """What a worker that has finished says of itself: contributions applied and rejected."""
        found = re.search(r"^(\d+) applied, (\d+) rejected$", self._log(name), re.MULTILINE)
        return (int(found[1]), int(found[2])) if found else (0, 0)

    def stop(self) -> None:
        """Asks every process to end, and kills those that do not."""
        try:
            self._end_all()
        finally:
            for process in self._processes.values():
                process.kill()  # does nothing to one that has ended
                process.wait()
            self._directory.cleanup()

    def _end_all(self) -> None:
        for process in self._processes.values():
            process.send_signal(signal.SIGTERM)
        give_up_at = time.monotonic() + _END_SECONDS
        while time.monotonic() < give_up_at and any(process.poll() is None for process in self._processes.values()):
            time.sleep(0.05)

    def _start(self, name: str, command: list[str], environment: dict[str, str]) -> None:
        with self._log_path(name).open("wb") as log:
            self._processes[name] = subprocess.Popen(
                command,
                env=os.environ | environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                process_group=0,  # Ctrl-C reaches the demo alone, which then ends the others
            )

    def _log(self, name: str) -> str:
        return self._log_path(name).read_text(encoding="utf-8", errors="replace")

    def _log_path(self, name: str) -> Path:
        return Path(self._directory.name) / f"{name}.log"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.stop()
