"""A file of tokens, written by the format's description alone."""

import hashlib
import secrets
from pathlib import Path


class TokensFile:
    """Tokens in a file, each change of which is seen whole.

    Args:
        path: where it is written, at once and empty.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines: dict[str, str] = {}
        self.write()

    @property
    def environment(self) -> dict[str, str]:
        """What tells a server of it."""
        return {"KEDGE_ACCESS__TOKENS_FILE": str(self.path)}

    @property
    def digests(self) -> list[str]:
        """Of its tokens."""
        return [sha256(token) for token in self._lines]

    def add(self, identity: str, role: str, runs: str | None = None, *, token: str | None = None) -> str:
        """Adds a token, a new one if none is given; the file has it after `write`."""
        token = token or f"kedge_{secrets.token_urlsafe(32)}"
        self._lines[token] = ":".join([identity, role, *([runs] if runs else []), sha256(token)])
        return token

    def remove(self, token: str) -> None:
        """Takes a token out; the file has it until `write`."""
        del self._lines[token]

    def write(self) -> None:
        """Replaces the file."""
        self.write_text("".join(f"{line}\n" for line in self._lines.values()))

    def write_text(self, text: str) -> None:
        """Replaces the file, whatever tokens there are."""
        fresh = self.path.with_suffix(".fresh")
        fresh.write_text(text)
        fresh.replace(self.path)


def sha256(token: str) -> str:
    """As a file has it."""
    return hashlib.sha256(token.encode()).hexdigest()
