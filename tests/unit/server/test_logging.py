"""The log's sink: it never blocks and never raises, whatever becomes of standard error."""

import contextlib
import io
import os
import threading

from kedge_server.telemetry.logging import LineSink


def test_lines_are_written_in_order() -> None:
    stream = io.StringIO()
    sink = LineSink(stream)
    for number in range(100):
        sink.info(f"line {number}")
    sink.close()
    assert stream.getvalue().splitlines() == [f"line {number}" for number in range(100)]


def test_reader_that_does_not_read_stops_nobody() -> None:
    reading, writing = os.pipe()
    stream = open(writing, "w", encoding="ascii")  # noqa: PTH123, SIM115  closed by hand, as below
    sink = LineSink(stream, line_limit=10)
    done = threading.Event()

    def log() -> None:
        for _ in range(10_000):
            sink.warning("x" * 100)
        done.set()

    threading.Thread(target=log, daemon=True).start()
    assert done.wait(10)
    os.close(reading)
    sink.close()
    with contextlib.suppress(BrokenPipeError):
        stream.close()


def test_closed_standard_error_is_no_error_of_the_caller() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    stream = open(writing, "w", encoding="ascii")  # noqa: PTH123, SIM115  closed by hand, it cannot be flushed
    sink = LineSink(stream)
    sink.error("nobody hears it")
    sink.close()
    with contextlib.suppress(BrokenPipeError):
        stream.close()
