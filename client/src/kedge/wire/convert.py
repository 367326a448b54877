"""Configuration and manifests: between the plain values and their protobuf forms. Client and server share this one way.

Decoding checks as constructing does; whatever is out of range becomes an error of the catalogue.
"""

from typing import Any

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message

from kedge.v1 import tensor_pb2
from kedge.wire.compressed import COMPRESSED
from kedge.wire.errors import KedgeError
from kedge.wire.manifest import DTYPES, Manifest
from kedge.wire.optimizers import optimizer_from_wire, optimizer_to_wire
from kedge.wire.reflection import invalid

__all__ = [
    "MAX_DURATION_SECONDS",
    "dtype_from_wire",
    "dtype_to_wire",
    "duration_from_wire",
    "duration_to_wire",
    "gradient_dtype_from_wire",
    "manifest_from_wire",
    "manifest_to_wire",
    "optimizer_from_wire",
    "optimizer_to_wire",
]

_DTYPE_TO_WIRE = {name: tensor_pb2.Dtype.Value(f"DTYPE_{name.upper()}") for name in (*DTYPES, *COMPRESSED)}
_DTYPE_FROM_WIRE = {number: name for name, number in _DTYPE_TO_WIRE.items()}


def dtype_to_wire(dtype: str) -> Any:
    """The enum value of a key of `DTYPES`, or of one of `COMPRESSED`."""
    return _DTYPE_TO_WIRE[dtype]


def dtype_from_wire(number: int, *, default: str | None = None) -> str:
    """The key of `DTYPES` for an enum value.

    Raises:
        KedgeError: UNSUPPORTED_DTYPE, also for those that only gradients can be sent as.
    """
    name = _DTYPE_FROM_WIRE.get(number, default if number == 0 else None)
    if name not in DTYPES:
        raise _unsupported(number, list(DTYPES))
    return name


def gradient_dtype_from_wire(number: int) -> str:
    """The key of `DTYPES`, or the one of `COMPRESSED`, for an enum value.

    Raises:
        KedgeError: UNSUPPORTED_DTYPE.
    """
    name = _DTYPE_FROM_WIRE.get(number)
    if name is None:
        raise _unsupported(number, list(_DTYPE_TO_WIRE))
    return name


def _unsupported(number: int, allowed: list[str]) -> KedgeError:
    names = ", ".join(f"DTYPE_{name.upper()}" for name in allowed)
    return KedgeError("UNSUPPORTED_DTYPE", f"dtype number {number} is none of {names}", tensor="", dtype=number)


MAX_DURATION_SECONDS = 315_576_000_000.0
"""The longest Duration that protobuf defines, 10,000 years."""


def duration_to_wire(seconds: float | None) -> Duration | None:
    """A Duration, or None for None. What is longer than any Duration becomes the longest."""
    if seconds is None:
        return None
    duration = Duration()
    duration.FromNanoseconds(round(min(seconds, MAX_DURATION_SECONDS) * 1e9))
    return duration


def duration_from_wire(message: Message, field: str) -> float | None:
    """The seconds of a Duration field; None where it is not set.

    Raises:
        KedgeError: INVALID_CONFIGURATION for one that is negative, or longer than protobuf allows.
    """
    if not message.HasField(field):
        return None
    duration: Duration = getattr(message, field)
    seconds = duration.seconds + duration.nanos / 1e9
    if not 0 <= seconds <= MAX_DURATION_SECONDS:
        raise invalid(field, f"{field} is {seconds} seconds: it must be 0 to {MAX_DURATION_SECONDS:.0f}")
    return seconds


def manifest_to_wire(manifest: Manifest) -> tensor_pb2.Manifest:
    """The manifest with its digest."""
    return tensor_pb2.Manifest(
        tensors=[
            tensor_pb2.TensorSpec(name=t.name, shape=t.shape, dtype=dtype_to_wire(t.dtype), offset=t.offset)
            for t in manifest.tensors
        ],
        digest=manifest.digest,
    )


def manifest_from_wire(message: tensor_pb2.Manifest) -> Manifest:
    """The manifest, laid out anew and compared.

    Raises:
        KedgeError: MANIFEST_INVALID or UNSUPPORTED_DTYPE.
    """
    manifest = Manifest.from_specs((t.name, tuple(t.shape), dtype_from_wire(t.dtype)) for t in message.tensors)
    for spec, tensor in zip(manifest.tensors, message.tensors, strict=True):
        if spec.offset != tensor.offset:
            raise KedgeError(
                "MANIFEST_INVALID",
                f"tensor {spec.name!r} has offset {tensor.offset}; the tensors before it end at {spec.offset}",
                tensor=spec.name,
            )
    if message.digest and message.digest != manifest.digest:
        raise KedgeError(
            "MANIFEST_INVALID",
            f"the digest {message.digest[:32].hex()} is not that of these tensors, {manifest.digest.hex()}: "
            "compute it as tensor.proto says, or leave it empty",
            tensor="",
        )
    return manifest
