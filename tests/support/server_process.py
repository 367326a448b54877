"""A real `kedge-server serve` in a process of its own."""

import os
import queue
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

EXECUTABLE = Path(sys.executable).with_name("kedge-server")
_START_SECONDS = 60


class ServerProcess:
    """Starts a server on a free port of loopback; ends it with SIGTERM."""

    def __init__(self, *arguments: str, environment: dict[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            [EXECUTABLE, "serve", "--listen", "127.0.0.1:0", *arguments],
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
        assert line is not None, "the server ended: " + "".join(self.log)
        assert line.startswith("listening on "), line
        return line.removeprefix("listening on ").strip()

    def stop(self) -> int:
        """SIGTERM, and the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(timeout=30)
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
