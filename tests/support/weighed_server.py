"""`kedge-server` that says in its log, on SIGUSR1, how many bytes malloc has given out: `weighed_server.py serve ...`.

What a process holds of the system's memory says less: malloc keeps what is free, and how much depends on the moment.
"""

import ctypes
import gc
import signal
import sys

from kedge_server import cli

WORD = "bytes in use: "


class _Mallinfo2(ctypes.Structure):
    """glibc's `struct mallinfo2`, see mallinfo(3)."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in [
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        ]
    ]


def is_able() -> bool:
    """Whether this machine's C library tells."""
    return hasattr(ctypes.CDLL(None), "mallinfo2")


def in_use_bytes() -> int:
    """What malloc has given out, after a collection of garbage."""
    gc.collect()
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = _Mallinfo2
    told = mallinfo2()
    return told.uordblks + told.hblkhd


if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, lambda *_: print(f"{WORD}{in_use_bytes()}", file=sys.stderr, flush=True))
    cli.main()
