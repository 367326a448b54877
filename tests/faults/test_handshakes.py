"""Many handshakes begin while certificates are replaced: gRPC frees what one of them may be about to use."""

import contextlib
import socket
import struct
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from certificates import Authority

_SCRIPT = Path(__file__).parents[1] / "support" / "restless_port.py"
_THREADS = 4
_SECONDS = 4.0
_RESET = struct.pack("ii", 1, 0)


def begin_handshakes(port: int, until: float) -> int:
    """Begins one after the other, and ends none. Returns how many."""
    count = 0
    while time.monotonic() < until:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            connection.sendall(b"\x16\x03\x01")
            count += 1
    return count


def test_port_outlives_that_certificates_are_replaced_while_handshakes_begin(tmp_path: Path) -> None:
    pair = Authority(tmp_path).issue("server")
    with subprocess.Popen(
        [sys.executable, _SCRIPT, pair.cert_file, pair.key_file],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        port, until = int(process.stdout.readline()), time.monotonic() + _SECONDS
        with ThreadPoolExecutor(_THREADS) as pool:
            count = sum(pool.map(lambda _: begin_handshakes(port, until), range(_THREADS)))
        replaced, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert int(replaced) > 20
    assert count > 100
