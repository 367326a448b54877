"""Bearer tokens: what a file of them says, and how one is made.

A line of the file is `id:role:sha256`, or `id:role:runs:sha256` for some runs only; empty lines and those that begin
with # are skipped. An id may stand on several lines, each with a token of its own, so that one is replaced by another
without a gap. The file holds no token, only the SHA-256 of each: who reads it cannot call.
"""

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable
from typing import Final, NamedTuple

from kedge_server.security.roles import ALL_RUNS, Caller, Role, check_identity, parse_caller

_DIGEST = re.compile(r"[0-9a-f]{64}")
_PREFIX: Final = "kedge_"
_SECRET_BYTES = 32


class Token(NamedTuple):
    """A line of the file."""

    caller: Caller
    sha256: bytes

    @property
    def line(self) -> str:
        """As it stands in a file."""
        runs = [] if self.caller.runs == ALL_RUNS else [",".join(self.caller.runs)]
        return ":".join([self.caller.identity, self.caller.role.text, *runs, self.sha256.hex()])


def new_token(identity: str, role: Role, runs: tuple[str, ...] = ALL_RUNS) -> tuple[str, Token]:
    """Makes a token of 256 random bits.

    Returns:
        The token, which is kept nowhere, and its line.

    Raises:
        ValueError: for an identity that cannot stand in a file.
    """
    token = _PREFIX + secrets.token_urlsafe(_SECRET_BYTES)
    return token, Token(Caller(check_identity(identity), role, runs), digest(token))


def parse_tokens(text: str) -> tuple[Token, ...]:
    """What a file says.

    Raises:
        ValueError: for a line that is none, or has the token of another one. The message has its number, and not what
            stands in it.
    """
    tokens: list[Token] = []
    lines_of: dict[bytes, int] = {}
    for number, line in enumerate(text.split("\n"), 1):
        stripped = line.strip()
        if not stripped or stripped.startswith("#"):
            continue
        try:
            token = _parse_line(stripped)
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None
        # Else to take one of the lines out would look like an end of the token, and be none.
        if token.sha256 in lines_of:
            raise ValueError(f"line {number}: the token of line {lines_of[token.sha256]} again: keep one of the lines")
        lines_of[token.sha256] = number
        tokens.append(token)
    return tuple(tokens)


def find(tokens: Iterable[Token], presented: bytes) -> Caller | None:
    """Whose token has this digest; None if nobody's. Takes as long for one that is nearly right as for any other."""
    found = None
    for token in tokens:
        if hmac.compare_digest(token.sha256, presented):
            found = token.caller
    return found


def digest(token: str) -> bytes:
    """The SHA-256 of a token, whatever stands in it."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()


def _parse_line(line: str) -> Token:
    fields = line.split(":")
    if len(fields) not in (3, 4):
        raise ValueError("write id:role:sha256, or id:role:runs:sha256")
    *caller, sha256 = fields
    if not _DIGEST.fullmatch(sha256):
        raise ValueError("the last field is the SHA-256 of a token, 64 hexadecimal digits in lower case")
    return Token(parse_caller(*caller), bytes.fromhex(sha256))
