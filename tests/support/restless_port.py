"""A process with a port whose certificate counts as replaced again and again: `restless_port.py CERT KEY`.

Writes the port, and the number of replacements when its input ends. It replaces a hundred times as fast as a server
could, with pauses that are short accordingly.
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import structlog

from kedge_server.config import TlsSection
from kedge_server.security import tls

_PAUSE_SECONDS = 0.005


class _Restless(tls.ServerCertificates):
    """Has other files whenever it is asked."""

    count = 0

    def _configuration(self) -> grpc.ServerCertificateConfiguration:
        self.count += 1
        self._version += 1
        return super()._configuration()


def main() -> None:
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    tls._HANDSHAKE_BEGINS_SECONDS = _PAUSE_SECONDS
    certificates = _Restless(TlsSection(cert_file=Path(sys.argv[1]), key_file=Path(sys.argv[2])))
    server = grpc.server(ThreadPoolExecutor(1))
    print(server.add_secure_port("127.0.0.1:0", certificates.credentials()), flush=True)
    server.start()
    sys.stdin.read()
    print(certificates.count, flush=True)


if __name__ == "__main__":
    main()
