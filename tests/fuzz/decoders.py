"""Everything that reads what somebody else wrote."""

import json
from pathlib import Path

from .answer_decoders import CLIENT
from .decoder import Decoder
from .kept_decoders import kept
from .request_decoders import REQUESTS
from .wire_decoders import WIRE


def decoders(directory: Path) -> dict[str, Decoder]:
    """All of them by name.

    Args:
        directory: for files; it is not touched before one of them reads.
    """
    requests = {f"request {name}": decoder for name, decoder in REQUESTS.items()}
    answers = {f"answer {name}": decoder for name, decoder in CLIENT.items()}
    return WIRE | requests | answers | kept(directory)


DEEP = [
    *(json.dumps(each).encode() for each in (0, "x")),
    b"[" * 50_000,
    b'{"list":' * 20_000,
    b"a = " + b"[" * 50_000,
    b"a" + b".a" * 20_000 + b" = 1",
    b"\x0a\x80\x01" * 5_000,
    b"\x0b" * 5_000,
]
"""Inputs that only recursion makes large; every decoder gets them."""
