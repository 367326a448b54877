"""Aggregation, admission, durability and checkpoints on the wire."""

from typing import Any

from kedge import policies
from kedge.v1 import run_pb2
from kedge.wire.convert import duration_from_wire, duration_to_wire
from kedge.wire.reflection import Refusing, invalid

_COMBINES: dict[int, policies.Combine] = {
    run_pb2.COMBINE_UNSPECIFIED: "mean",
    run_pb2.COMBINE_MEAN: "mean",
    run_pb2.COMBINE_TRIMMED_MEAN: "trimmed_mean",
    run_pb2.COMBINE_MEDIAN: "median",
}

_SCALINGS: dict[int, policies.Scaling | None] = {
    run_pb2.STALENESS_SCALING_UNSPECIFIED: None,
    run_pb2.STALENESS_SCALING_NONE: "none",
    run_pb2.STALENESS_SCALING_INVERSE: "inverse",
}

_DURABILITIES: dict[int, policies.Durability | None] = {
    run_pb2.DURABILITY_UNSPECIFIED: None,
    run_pb2.DURABILITY_MEMORY: "memory",
    run_pb2.DURABILITY_CHECKPOINT: "checkpoint",
    run_pb2.DURABILITY_JOURNAL: "journal",
    run_pb2.DURABILITY_JOURNAL_SYNC: "journal-sync",
}
_DURABILITY_NUMBERS = {durability: number for number, durability in _DURABILITIES.items()}


def policy_to_wire(policy: policies.Policy) -> run_pb2.Aggregation:
    """The aggregation."""
    match policy:
        case policies.Synchronous():
            timeout = duration_to_wire(policy.timeout_seconds)
            message = run_pb2.Synchronous(quorum=policy.quorum, timeout=timeout, **_combination_to_wire(policy))
            return run_pb2.Aggregation(synchronous=message)
        case policies.Asynchronous():
            return run_pb2.Aggregation(asynchronous=run_pb2.Asynchronous(**_staleness_to_wire(policy)))
        case policies.BoundedStaleness():
            return run_pb2.Aggregation(bounded_staleness=run_pb2.BoundedStaleness(bound=policy.bound))
        case policies.Buffered():
            fields = _staleness_to_wire(policy) | _combination_to_wire(policy)
            return run_pb2.Aggregation(buffered=run_pb2.Buffered(size=policy.size, **fields))


def policy_from_wire(message: run_pb2.Aggregation) -> policies.Policy:
    """The aggregation.

    Raises:
        KedgeError: INVALID_CONFIGURATION.
    """
    kind = message.WhichOneof("policy")
    with Refusing(f"aggregation.{kind}"):
        match kind:
            case "synchronous":
                timeout = duration_from_wire(message.synchronous, "timeout")
                fields = _combination_from_wire(message.synchronous)
                return policies.Synchronous(message.synchronous.quorum, timeout_seconds=timeout, **fields)
            case "asynchronous":
                return policies.Asynchronous(**_staleness_from_wire(message.asynchronous, default="none"))
            case "bounded_staleness":
                return policies.BoundedStaleness(message.bounded_staleness.bound)
            case "buffered":
                fields = _staleness_from_wire(message.buffered, default="inverse")
                return policies.Buffered(message.buffered.size, **fields, **_combination_from_wire(message.buffered))
    raise invalid("aggregation.policy", "no aggregation policy is set, or one that this server does not know")


def admission_to_wire(admission: policies.Admission) -> run_pb2.Admission:
    """The admission."""
    return run_pb2.Admission(
        max_norm=admission.max_norm,
        outlier_factor=admission.outlier_factor,
        quarantine_after=admission.quarantine_after,
        quarantine=duration_to_wire(admission.quarantine_seconds),
    )


def admission_from_wire(message: run_pb2.Admission) -> policies.Admission:
    """The admission.

    Raises:
        KedgeError: INVALID_CONFIGURATION.
    """
    given: dict[str, Any] = {
        name: getattr(message, name)
        for name in ("max_norm", "outlier_factor", "quarantine_after")
        if message.HasField(name)
    }
    with Refusing("admission"):
        seconds = duration_from_wire(message, "quarantine")
        if seconds is not None:
            given["quarantine_seconds"] = seconds
        return policies.Admission(**given)


def durability_to_wire(durability: policies.Durability | None) -> Any:
    """The enum value; None: the server's choice."""
    return _DURABILITY_NUMBERS[durability]


def durability_from_wire(number: int) -> policies.Durability | None:
    """The durability; None where it is not set.

    Raises:
        KedgeError: INVALID_CONFIGURATION.
    """
    if number not in _DURABILITIES:
        raise invalid("durability", f"durability is {number}: this server does not know that number")
    return _DURABILITIES[number]


def checkpoints_to_wire(checkpoints: policies.Checkpoints) -> run_pb2.Checkpointing:
    """When checkpoints are taken, and which are kept."""
    return run_pb2.Checkpointing(
        every_steps=checkpoints.every_steps,
        every=duration_to_wire(checkpoints.every_seconds),
        keep_latest=checkpoints.keep_latest,
        keep_every_steps=checkpoints.keep_every_steps,
        max_age=duration_to_wire(checkpoints.max_age_seconds),
        keep_best=checkpoints.keep_best,
        metric=checkpoints.metric,
        is_greater_better=checkpoints.is_greater_better,
    )


def checkpoints_from_wire(message: run_pb2.Checkpointing) -> policies.Checkpoints:
    """When checkpoints are taken, and which are kept. What is not set has its default.

    Raises:
        KedgeError: INVALID_CONFIGURATION.
    """
    given: dict[str, Any] = {
        name: getattr(message, name) for name in ("keep_latest", "metric") if getattr(message, name)
    } | {name: getattr(message, name) for name in ("every_steps", "keep_every_steps") if message.HasField(name)}
    with Refusing("checkpointing"):
        return policies.Checkpoints(
            every_seconds=duration_from_wire(message, "every"),
            max_age_seconds=duration_from_wire(message, "max_age"),
            keep_best=message.keep_best,
            is_greater_better=message.is_greater_better,
            **given,
        )


def _combination_to_wire(policy: policies.Synchronous | policies.Buffered) -> dict[str, Any]:
    trim_count = policy.trim_count if policy.combine == "trimmed_mean" else 0
    combine = f"COMBINE_{policy.combine.upper()}"
    return {"combine": combine, "trim_count": trim_count, "deterministic": policy.deterministic}


def _combination_from_wire(message: run_pb2.Synchronous | run_pb2.Buffered) -> dict[str, Any]:
    if message.combine not in _COMBINES:
        raise ValueError(f"combine is {message.combine}: this server does not know that number")
    return {
        "combine": _COMBINES[message.combine],
        "trim_count": message.trim_count or 1,
        "deterministic": message.deterministic if message.HasField("deterministic") else True,
    }


def _staleness_to_wire(policy: policies.Asynchronous | policies.Buffered) -> dict[str, Any]:
    return {"max_staleness": policy.max_staleness, "scaling": f"STALENESS_SCALING_{policy.scaling.upper()}"}


def _scaling_from_wire(number: int) -> policies.Scaling | None:
    """None if it is not set."""
    if number not in _SCALINGS:
        raise ValueError(f"scaling is {number}: this server does not know that number")
    return _SCALINGS[number]


def _staleness_from_wire(
    message: run_pb2.Asynchronous | run_pb2.Buffered, *, default: policies.Scaling
) -> dict[str, Any]:
    return {
        "max_staleness": message.max_staleness if message.HasField("max_staleness") else None,
        "scaling": _scaling_from_wire(message.scaling) or default,
    }
