"""What a decoder is to the fuzzer, and the valid values that its inputs come from."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from google.protobuf.message import Message

from kedge import optim, policies
from kedge.v1 import run_service_pb2 as run_pb
from kedge.wire.codec import Malformed, parse_message
from kedge.wire.errors import KedgeError
from kedge.wire.manifest import Manifest
from kedge_server.core.commits import RunConfig

ELEMENTS = 3000
OPTIMIZERS: list[optim.Optimizer] = [
    optim.SGD(0.1),
    optim.Lookahead(optim.AdaBelief(optim.CosineAnnealingLR(1e-3, 100), weight_decay=0.01), 5, 0.5),
    optim.AdamW(optim.SequentialLR([optim.LinearLR(), optim.StepLR(0.1, 3)], [4]), grad_clip_norm=1.0),
    optim.Adam(optim.ReduceLROnPlateau(0.1, patience=1, steps_per_epoch=2)),
    optim.Optax("adam", lr=0.1, b1=0.8, nesterov=True),
]
SCHEDULES = [
    optim.CyclicLR(0.1, 0.7, 3, mode="exp_range"),
    optim.OneCycleLR(0.1, 50),
    optim.PiecewiseConstantSchedule(0.1, [2, 4], [0.1, 0.2, 0.3]),
    optim.ChainedScheduler([optim.StepLR(0.1, 3), optim.ExponentialLR(0.1, 0.9)]),
]
GROUPS = (optim.Group("*.bias", weight_decay=0.0, lr=0.1, name="bias"), optim.Group("head.*", frozen=True))
POLICIES = [
    policies.Synchronous(3, timeout_seconds=2, combine="trimmed_mean", trim_count=1),
    policies.Asynchronous(max_staleness=4, scaling="inverse"),
    policies.BoundedStaleness(2),
    policies.Buffered(3),
]
MANIFEST = Manifest.from_specs([("w", (30, 50), "float32"), ("b", (1500,), "bfloat16")])
VALUES = np.linspace(-1, 1, ELEMENTS, dtype=np.float32)


class Refused(Exception):  # noqa: N818  it is what should happen
    """The input was told apart from a valid one in another way than by an error."""


class Decoder(NamedTuple):
    """Something that reads.

    Attributes:
        read: takes an input.
        corpus: valid inputs.
        refusals: what it may raise, as its documentation says.
        message_type: of which the inputs are, if they are messages.
    """

    read: Callable[[bytes], object]
    corpus: Sequence[bytes]
    refusals: tuple[type[Exception], ...] = (KedgeError,)
    message_type: Callable[[], Message] | None = None


def of_messages(
    message_type: Callable[..., Message],
    convert_message: Callable[[Any], object],
    corpus: Iterable[Message],
) -> Decoder:
    """A decoder of a message: protobuf's, and what makes values of it."""

    def read(raw: bytes) -> None:
        message = parse_message(message_type, raw)
        if isinstance(message, Malformed):
            raise Refused
        convert_message(message)

    return Decoder(read, [message.SerializeToString() for message in corpus], (KedgeError, Refused), message_type)


def pieces(raw: bytes) -> list[bytes]:
    """Cuts an input at each `|`, since some decoders take several."""
    return raw.split(b"|")


CONFIG = RunConfig(
    name="runs/a",
    manifest=MANIFEST,
    optimizer=OPTIMIZERS[1],
    groups=GROUPS,
    created_at_seconds=1.5,
    block_elements=1024,
    first_epoch=1,
)
LEASE = run_pb.JoinRunResponse(worker="runs/a/workers/w", epoch=3)
