"""Configuration and manifests: between the plain values and their protobuf forms. Client and server share this one way.

Decoding checks as constructing does; whatever is out of range becomes an error of the catalogue.
"""

from dataclasses import fields
from typing import Any

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message

from kedge import optim, policies
from kedge.v1 import optimizer_pb2, run_pb2, tensor_pb2
from kedge.wire.errors import KedgeError
from kedge.wire.manifest import DTYPES, Manifest

_DTYPE_TO_WIRE = {name: tensor_pb2.Dtype.Value(f"DTYPE_{name.upper()}") for name in DTYPES}
_DTYPE_FROM_WIRE = {number: name for name, number in _DTYPE_TO_WIRE.items()}

_RULES: dict[str, type[Any]] = {
    "sgd": optim.SGD,
    "adam": optim.Adam,
    "adamw": optim.AdamW,
    "adabelief": optim.AdaBelief,
}
_SCHEDULES: dict[str, type[Any]] = {
    "constant_lr": optim.ConstantLR,
    "step_lr": optim.StepLR,
    "exponential_lr": optim.ExponentialLR,
}


def dtype_to_wire(dtype: str) -> Any:
    """The enum value of a key of `DTYPES`."""
    return _DTYPE_TO_WIRE[dtype]


def dtype_from_wire(number: int, *, default: str | None = None) -> str:
    """The key of `DTYPES` for an enum value.

    Raises:
        KedgeError: UNSUPPORTED_DTYPE.
    """
    name = _DTYPE_FROM_WIRE.get(number, default if number == 0 else None)
    if name is None:
        raise KedgeError(
            "UNSUPPORTED_DTYPE",
            f"dtype number {number} is none of DTYPE_FLOAT32, DTYPE_BFLOAT16, DTYPE_FLOAT16",
            tensor="",
            dtype=number,
        )
    return name


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
        raise _invalid(field, f"{field} is {seconds} seconds: it must be 0 to {MAX_DURATION_SECONDS:.0f}")
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


def optimizer_to_wire(optimizer: optim.Optimizer) -> optimizer_pb2.Optimizer:
    """The optimizer, laid flat."""
    spec = optimizer.spec()
    message = optimizer_pb2.Optimizer(
        grad_clip_norm=spec.grad_clip_norm,
        grad_clip_value=spec.grad_clip_value,
        weight_decay=spec.weight_decay,
        lr=_rate_to_wire(spec.lr),
    )
    rule = getattr(message, _kind_of(spec.base, _RULES))
    rule.SetInParent()
    _fill(rule, spec.base)
    if spec.sync_period is not None:
        message.lookahead.sync_period = spec.sync_period
        message.lookahead.alpha = spec.alpha
    return message


def optimizer_from_wire(message: optimizer_pb2.Optimizer) -> optim.Optimizer:
    """The optimizer.

    Raises:
        KedgeError: INVALID_CONFIGURATION.
    """
    kind = message.WhichOneof("rule")
    if kind is None:
        raise _invalid("optimizer.rule", "no optimizer rule is set, or one that this server does not know")
    rate = _rate_from_wire(message.lr)
    with _Refusing("optimizer"):
        lookahead = message.lookahead if message.HasField("lookahead") else None
        return optim.from_spec(
            optim.UpdateSpec(
                message.grad_clip_norm if message.HasField("grad_clip_norm") else None,
                message.grad_clip_value if message.HasField("grad_clip_value") else None,
                message.weight_decay,
                _RULES[kind](**_values(getattr(message, kind))),
                rate,
                lookahead.sync_period if lookahead else None,
                lookahead.alpha if lookahead else 0.0,
            )
        )


def policy_to_wire(policy: policies.Policy) -> run_pb2.Aggregation:
    """The aggregation policy."""
    if isinstance(policy, policies.Synchronous):
        timeout = duration_to_wire(policy.timeout_seconds)
        return run_pb2.Aggregation(synchronous=run_pb2.Synchronous(quorum=policy.quorum, timeout=timeout))
    scaling = f"STALENESS_SCALING_{policy.scaling.upper()}"
    return run_pb2.Aggregation(asynchronous=run_pb2.Asynchronous(max_staleness=policy.max_staleness, scaling=scaling))


def policy_from_wire(message: run_pb2.Aggregation) -> policies.Policy:
    """The aggregation policy.

    Raises:
        KedgeError: INVALID_CONFIGURATION.
    """
    kind = message.WhichOneof("policy")
    with _Refusing("aggregation"):
        if kind == "synchronous":
            timeout = duration_from_wire(message.synchronous, "timeout")
            return policies.Synchronous(message.synchronous.quorum, timeout_seconds=timeout)
        if kind == "asynchronous":
            bound = message.asynchronous.max_staleness if message.asynchronous.HasField("max_staleness") else None
            inverse = message.asynchronous.scaling == run_pb2.STALENESS_SCALING_INVERSE
            return policies.Asynchronous(bound, "inverse" if inverse else "none")
    raise _invalid("aggregation.policy", "no aggregation policy is set, or one that this server does not know")


class _Refusing:
    """Turns a constructor's refusal into INVALID_CONFIGURATION."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        pass

    def __exit__(self, _type: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, ValueError | TypeError) and not isinstance(error, KedgeError):
            # Every message of these constructors begins with the field's name.
            field = str(error).split(" ", 1)[0]
            raise _invalid(f"{self._what}.{field}", str(error)) from error


def _invalid(field: str, message: str) -> KedgeError:
    return KedgeError("INVALID_CONFIGURATION", message, field=field)


def _kind_of(value: object, kinds: dict[str, type[Any]]) -> str:
    return next(kind for kind, of in kinds.items() if type(value) is of)


def _rate_to_wire(rate: float | optim.Schedule) -> optimizer_pb2.LearningRate:
    if isinstance(rate, float):
        return optimizer_pb2.LearningRate(value=rate)
    message = optimizer_pb2.LearningRate()
    schedule = getattr(message, _kind_of(rate, _SCHEDULES))
    schedule.SetInParent()
    _fill(schedule, rate)
    return message


def _rate_from_wire(message: optimizer_pb2.LearningRate) -> float | optim.Schedule:
    kind = message.WhichOneof("kind")
    if kind is None:
        raise _invalid("optimizer.lr", "no learning rate is set, or a schedule that this server does not know")
    if kind == "value":
        return message.value
    with _Refusing(f"optimizer.lr.{kind}"):
        schedule: optim.Schedule = _SCHEDULES[kind](**_values(getattr(message, kind)))
        return schedule


def _fill(message: Message, value: Any) -> None:
    """Sets each field of the message from the attribute of the same name."""
    names = {field.name for field in fields(value)}
    for descriptor in message.DESCRIPTOR.fields:
        assert descriptor.name in names, f"{type(value).__name__} lacks the field {descriptor.name} of its message"
        attribute = getattr(value, descriptor.name)
        if isinstance(attribute, tuple):
            getattr(message, descriptor.name).extend(attribute)
        elif attribute is not None:
            setattr(message, descriptor.name, attribute)


def _values(message: Message) -> dict[str, Any]:
    """The message's fields by name, as constructor arguments; unset optional ones are None."""
    values: dict[str, Any] = {}
    for descriptor in message.DESCRIPTOR.fields:
        value = getattr(message, descriptor.name)
        if descriptor.has_presence and not message.HasField(descriptor.name):
            value = None
        values[descriptor.name] = value if isinstance(value, int | float | bool | None) else tuple(value)
    return values
