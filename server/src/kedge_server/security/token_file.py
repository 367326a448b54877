"""The file of tokens, as `kedge-server token new` writes it."""

from pathlib import Path

from kedge_server.security.files import alone_in, replace
from kedge_server.security.roles import Role, parse_runs
from kedge_server.security.tokens import Token, new_token, parse_tokens


def make(identity: str, *, role: str, runs: str, file: Path | None) -> tuple[str, str]:
    """Makes a token, and adds its line to a file if one is given.

    Returns:
        The token, and a word on its line.

    Raises:
        OSError: the file cannot be written.
        ValueError: for what cannot stand in a file, or a file that is none of tokens.
    """
    token, line = new_token(identity, Role.parse(role), parse_runs(runs))
    if file is None:
        return token, f"add this line to the file that access.tokens_file names:\n{line.line}"
    count = add(file, line)
    others = f"; {identity} has {count} tokens now, so take the old lines out once nobody uses them"
    return token, f"its line was added to {file}{others if count > 1 else ''}"


def add(path: Path, token: Token) -> int:
    """Adds a line to a file: whoever reads it meanwhile sees all of the old file or all of the new one.

    A file that is made is only its owner's. One that is there keeps its owner, its mode and all that stands in it.

    Returns:
        How many tokens of the same id are in it now.

    Raises:
        OSError: it cannot be written.
        ValueError: what is there is no file of tokens; it is left as it is.
    """
    path = path.resolve()  # a link goes on pointing where it does
    with alone_in(path.parent):
        content = path.read_bytes() if path.exists() else b""
        try:
            known = parse_tokens(content.decode("utf-8-sig", "replace"))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        gap = "\n" if content and not content.endswith(b"\n") else ""
        replace(path, content + f"{gap}{token.line}\n".encode(), mode=0o600)
    return [other.caller.identity for other in known].count(token.caller.identity) + 1
