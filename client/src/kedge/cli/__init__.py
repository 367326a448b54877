"""The `kedge` command: looks at the runs of a server, their workers and checkpoints, and fetches weights.

It needs the extra `kedge[cli]`, which only `main` loads: importing `kedge` never does.
"""

import sys

__all__ = ["main"]

_EXTRA = frozenset({"click", "rich", "safetensors", "typer"})


def main() -> None:
    """The entry point of the command."""
    try:
        from kedge.cli import command
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _EXTRA:
            raise
        print('error: the kedge command needs its extra: pip install "kedge[cli]"', file=sys.stderr)
        sys.exit(2)
    command.run()
