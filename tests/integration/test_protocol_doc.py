"""docs/protocol.md's worked example, sent to a real server byte by byte."""

import hashlib
import re
from pathlib import Path

import pytest
from wire_client import WireClient, crc32c

from kedge.v1 import optimizer_service_pb2 as pb

DOCUMENT = Path(__file__).parents[2] / "docs" / "protocol.md"


def _examples() -> dict[str, str]:
    text = DOCUMENT.read_text(encoding="utf-8")
    return dict(re.findall(r"<!-- example: ([a-z ]+) -->\n```text\n(.*?)```", text, re.DOTALL))


EXAMPLES = _examples()


def example_bytes(name: str) -> bytes:
    return bytes.fromhex("".join(line.partition("#")[0] for line in EXAMPLES[name].splitlines()))


def parts(prefix: str) -> list[bytes]:
    return [example_bytes(f"{prefix} {part}") for part in ("header", "chunk", "trailer")]


@pytest.fixture
def run(wire: WireClient) -> str:
    create = wire.channel.stream_unary("/kedge.v1.RunService/CreateRun")
    create(iter(parts("create")), timeout=30)
    return "runs/bytes"


def test_the_digest_is_that_of_the_text() -> None:
    text = EXAMPLES["manifest"].replace("\n", "").replace("\\t", "\t").replace("\\n", "\n")
    assert hashlib.sha256(text.encode()).digest() == example_bytes("digest")


@pytest.mark.parametrize(("prefix", "stated"), [("create", "805104b9"), ("push", "3c88b378"), ("pull", "e8ea64ab")])
def test_the_trailers_hold_the_checksums_that_the_comments_state(prefix: str, stated: str) -> None:
    chunk = pb.PushGradientsRequest.FromString(example_bytes(f"{prefix} chunk")).chunk
    assert f"{crc32c(chunk.data):08x}" == stated
    assert stated in EXAMPLES[f"{prefix} trailer"]
    assert int.from_bytes(example_bytes(f"{prefix} trailer")[-4:], "little") == int(stated, 16)


def test_the_server_answers_the_bytes_with_those_that_the_document_shows(wire: WireClient, run: str) -> None:
    lease = wire.join(run, "ada")
    push = wire.channel.stream_unary("/kedge.v1.OptimizerService/PushGradients")
    pull = wire.channel.unary_stream("/kedge.v1.OptimizerService/PullWeights")
    header, *values = parts("push")
    response = push(iter([_with_epoch(header, lease.epoch), *values]), timeout=30)
    assert response == example_bytes("push response")
    assert list(pull(example_bytes("pull request"), timeout=30)) == parts("pull")


def _with_epoch(header: bytes, epoch: int) -> bytes:
    """The header under the epoch that the server has granted: the one thing that no document can know."""
    message = pb.PushGradientsRequest.FromString(header)
    assert message.header.epoch == 7
    assert message.SerializeToString() == header
    message.header.epoch = epoch
    return message.SerializeToString()
