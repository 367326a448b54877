"""The log: structlog on standard error, as text or JSON.

Writing never blocks the caller and never raises: lines go through a bounded queue to a thread, and when whoever reads
standard error does not keep up, or is gone, lines are lost instead of calls.
"""

import atexit
import contextlib
import logging
import queue
import sys
import threading
from typing import Any, TextIO

import structlog

_QUEUE_LINES = 10_000
_FLUSH_SECONDS = 1.0
_sinks: "list[LineSink]" = []


def configure(*, level: str, format: str) -> None:
    """Sets the process's log up. Called once, before anything logs."""
    sink = LineSink(sys.stderr)
    _sinks.append(sink)
    atexit.register(flush)
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.StackInfoRenderer(),
            *_renderers(format),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=lambda *_: sink,
    )


def flush() -> None:
    """Writes what was logged so far, for a process that is about to end. What is logged later is lost."""
    while _sinks:
        _sinks.pop().close()


def _renderers(format: str) -> list[Any]:
    if format == "json":
        return [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    plain = structlog.dev.plain_traceback  # a traceback with local values would put what peers sent into the log
    return [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=plain)]


class LineSink:
    """Takes lines from any thread, and writes them from one of its own."""

    def __init__(self, stream: TextIO, *, line_limit: int = _QUEUE_LINES) -> None:
        self._stream = stream
        self._lines: queue.Queue[str | None] = queue.Queue(line_limit)
        self._thread = threading.Thread(target=self._write, name="kedge-log", daemon=True)
        self._thread.start()

    def msg(self, line: str) -> None:
        """Takes a line; loses it when the queue is full."""
        with contextlib.suppress(queue.Full):
            self._lines.put_nowait(line)

    debug = info = warning = error = critical = exception = msg

    def close(self) -> None:
        """Writes what was taken, as far as that is possible in a second."""
        with contextlib.suppress(queue.Full):
            self._lines.put_nowait(None)
        self._thread.join(_FLUSH_SECONDS)

    def _write(self) -> None:
        while (line := self._lines.get()) is not None:
            with contextlib.suppress(OSError, ValueError):  # closed, or nobody reads it any more
                self._stream.write(f"{line}\n")
                self._stream.flush()
