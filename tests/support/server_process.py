"""A real `kedge-server serve` in a process of its own."""

import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

EXECUTABLE = Path(sys.executable).with_name("kedge-server")
_START_SECONDS = 60


class ServerEndedError(AssertionError):
    """A server that ended before it served. `process` has its exit code and its log."""

    def __init__(self, process: "ServerProcess") -> None:
        super().__init__("the server ended: " + "".join(process.log))
        self.process = process


class ServerProcess:
    """Starts a server on a free port of loopback; ends it with SIGTERM.

    Args:
        arguments: of `serve`.
        environment: what it has besides this process's.
        command: what to start in the place of `kedge-server`, its first arguments along with it.

    Raises:
        ServerEndedError: if it ends instead of listening.
    """

    def __init__(
        self,
        *arguments: str,
        environment: dict[str, str] | None = None,
        command: Sequence[str | Path] | None = None,
    ) -> None:
        self.process = subprocess.Popen(
            [*(command or [EXECUTABLE]), "serve", "--listen", "127.0.0.1:0", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"KEDGE_LOG__LEVEL": "warning"} | (environment or {}),
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        self.log: list[str] = []
        self._threads = [
            threading.Thread(target=self._read_output, daemon=True),
            threading.Thread(target=self._read_log, daemon=True),
        ]
        for thread in self._threads:
            thread.start()
        try:
            self.address = self._read_address()
        except BaseException:
            self.stop()
            raise

    def _read_output(self) -> None:
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def _read_log(self) -> None:
        self.log.extend(self.process.stderr)

    def _read_address(self) -> str:
        line = self._lines.get(timeout=_START_SECONDS)
        if line is None:
            self._threads[1].join(timeout=5)
            self.process.wait(timeout=30)
            raise ServerEndedError(self)
        assert line.startswith("listening on "), line
        return line.removeprefix("listening on ").strip()

    def terminate(self) -> None:
        """SIGTERM, and no waiting."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.wait()

    def stop(self) -> int:
        """SIGTERM, and the exit code."""
        self.terminate()
        return self.wait()

    def wait(self, *, seconds: float = 30) -> int:
        """Waits until it has ended; the exit code."""
        try:
            code = self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise
        finally:
            for thread in self._threads:
                thread.join(timeout=5)
            self.process.stdout.close()
            self.process.stderr.close()
        return code

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.stop()
