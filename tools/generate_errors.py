"""Writes docs/errors.md and proto/kedge/v1/error_reason.proto from the catalogue, or checks that they are fresh.

The numbers of the proto's enum are kept from the file that is there: a new reason takes the next free one.
"""

import argparse
import re
import sys
from pathlib import Path

from kedge.wire.errors import CATALOGUE, DOMAIN, Entry, Retry

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs/errors.md"
PROTO = ROOT / "proto/kedge/v1/error_reason.proto"

_RETRY_TEXT = {
    Retry.NEVER: "the same call fails again: change it first",
    Retry.BACKOFF: "the SDK repeats the call by itself, with growing delays, for `retry_seconds`",
    Retry.REJOIN: "the SDK takes a new lease and repeats the call once",
    Retry.PULL: "pull newer weights and compute the gradient anew",
}


def document() -> str:
    """The text of docs/errors.md."""
    lines = [
        "# Errors",
        "",
        "<!-- Written by tools/generate_errors.py from kedge.wire.errors: change it there, then `make docs`. -->",
        "",
        f"Every failed call carries a `google.rpc.ErrorInfo` with domain `{DOMAIN}`, a `reason` from this table and",
        "the metadata listed. In Python it is a `kedge.KedgeError` with `.reason` and `.metadata`, of the class named.",
        "A reason keeps its meaning from version to version; the message's text may change.",
        "",
        "A *rejected* contribution is not a failed call: its `PushResult` carries one of these reasons.",
        "",
        "| retry rule | meaning |",
        "|---|---|",
        *(f"| {rule} | {text} |" for rule, text in _RETRY_TEXT.items()),
        "",
        "| reason | status | retry | exception | metadata | what happened, what to do |",
        "|---|---|---|---|---|---|",
        *(_row(reason, entry) for reason, entry in CATALOGUE.items()),
    ]
    return "\n".join(lines) + "\n"


def _row(reason: str, entry: Entry) -> str:
    metadata = ", ".join(f"`{key}`" for key in entry.metadata)
    return f"| `{reason}` | {entry.status} | {entry.retry} | `{entry.exception.__name__}` | {metadata} | {entry.help} |"


def proto(previous: str) -> str:
    """The text of error_reason.proto, with the numbers of the previous one kept."""
    numbers = {name: int(number) for name, number in re.findall(r"ERROR_REASON_(\w+) = (\d+);", previous)}
    following = max(numbers.values(), default=0) + 1
    for reason in CATALOGUE:
        if reason not in numbers:
            numbers[reason], following = following, following + 1
    values = [f"  // {CATALOGUE[name].help}\n  ERROR_REASON_{name} = {numbers[name]};" for name in CATALOGUE]
    return _PROTO_HEAD + "\n".join(values) + "\n}\n"


_PROTO_HEAD = f"""syntax = "proto3";

// The reasons of errors and rejections: ErrorInfo.reason and PushResult.reason hold these names without ERROR_REASON_.
// Written by tools/generate_errors.py from kedge.wire.errors: change it there.
package kedge.v1;

// Why a call failed, or a contribution was rejected. ErrorInfo.domain is "{DOMAIN}". docs/errors.md has statuses, retry
// rules and metadata.
enum ErrorReason {{
  // Never sent.
  ERROR_REASON_UNSPECIFIED = 0;
"""


def main() -> int:
    """Writes or checks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail when a file is not what it should be")
    is_check = parser.parse_args().check
    previous = PROTO.read_text(encoding="utf-8") if PROTO.exists() else ""
    stale = []
    for path, text in ((DOCUMENT, document()), (PROTO, proto(previous))):
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(path.relative_to(ROOT))
            if not is_check:
                path.write_text(text, encoding="utf-8")
    for path in stale:
        print(f"{path} {'is not what the catalogue says: run `make docs`' if is_check else 'written'}")
    return 1 if stale and is_check else 0


if __name__ == "__main__":
    sys.exit(main())
