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

from kedge_server.security.roles import Caller, Role, parse_runs

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_PREFIX: Final = "kedge_"
_SECRET_BYTES = 32
_ALL_RUNS = ("*",)


class Token(NamedTuple):
    """A line of the file."""

    caller: Caller
    sha256: bytes

    @property
    def line(self) -> str:
        """As it stands in a file."""
        runs = [] if self.caller.runs == _ALL_RUNS else [",".join(self.caller.runs)]
        return ":".join([self.caller.identity, self.caller.role.text, *runs, self.sha256.hex()])


def new_token(identity: str, role: Role, runs: tuple[str, ...] = _ALL_RUNS) -> tuple[str, Token]:
    """Makes a token of 256 random bits.

    Returns:
        The token, which is kept nowhere, and its line.

    Raises:
        ValueError: for an identity that cannot stand in a file.
    """
    _check_identity(identity)
    token = _PREFIX + secrets.token_urlsafe(_SECRET_BYTES)
    return token, Token(Caller(identity, role, runs), _digest(token))


def parse_tokens(text: str) -> tuple[Token, ...]:
    """What a file says.

    Raises:
        ValueError: for a line that is none. The message has its number, and not what stands in it.
    """
    tokens: list[Token] = []
    for number, line in enumerate(text.splitlines(), 1):
        stripped = line.strip()
        if stripped and not stripped.startswith("#"):
            try:
                tokens.append(_parse_line(stripped))
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from None
    return tuple(tokens)


def find(tokens: Iterable[Token], presented: str) -> Caller | None:
    """Whose token it is; None if nobody's. Takes as long for a token that is nearly right as for any other."""
    digest, found = _digest(presented), None
    for token in tokens:
        if hmac.compare_digest(token.sha256, digest):
            found = token.caller
    return found


def _parse_line(line: str) -> Token:
    fields = line.split(":")
    if len(fields) not in (3, 4):
        raise ValueError("write id:role:sha256, or id:role:runs:sha256")
    identity, role, *runs, digest = fields
    _check_identity(identity)
    if not _DIGEST.fullmatch(digest):
        raise ValueError("the last field is the SHA-256 of a token, 64 hexadecimal digits in lower case")
    return Token(Caller(identity, Role.parse(role), parse_runs(runs[0]) if runs else _ALL_RUNS), bytes.fromhex(digest))


def _check_identity(identity: str) -> None:
    if not _ID.fullmatch(identity):
        raise ValueError(
            "an id has 1 to 63 letters, digits, dots, dashes or underscores, and begins with a letter or digit"
        )


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()
