"""Parameter groups and changes of hyperparameters: between the plain values and their protobuf forms."""

from typing import Any

from google.protobuf.message import Message

from kedge import optim
from kedge.optim.controls import Change, RecordedChange
from kedge.optim.groups import check_groups
from kedge.v1 import run_pb2
from kedge.wire.reflection import Refusing
from kedge.wire.schedules import rate_from_wire, rate_to_wire


def group_to_wire(group: optim.Group) -> run_pb2.ParameterGroup:
    """A parameter group."""
    return run_pb2.ParameterGroup(
        name=group.name,
        patterns=group.patterns,
        lr=None if group.lr is None else rate_to_wire(group.lr),
        weight_decay=group.weight_decay,
        grad_clip_norm=group.grad_clip_norm,
        grad_clip_value=group.grad_clip_value,
        frozen=group.frozen,
    )


def groups_from_wire(messages: Any) -> tuple[optim.Group, ...]:
    """The parameter groups of a run.

    Raises:
        KedgeError: INVALID_CONFIGURATION.
    """
    groups = []
    for at, message in enumerate(messages):
        field = f"groups[{at}]"
        lr = rate_from_wire(message.lr, f"{field}.lr") if message.HasField("lr") else None
        with Refusing(field):
            group = optim.Group(
                tuple(message.patterns), lr=lr, frozen=message.frozen, name=message.name, **_overrides(message)
            )
        groups.append(group)
    with Refusing():
        return check_groups(groups)


def change_to_wire(group: str, change: Change, *, step: int = 0) -> run_pb2.HyperparameterChange:
    """A change of hyperparameters; `step` is the server's to say."""
    return run_pb2.HyperparameterChange(
        group=group,
        lr=None if change.lr is None else rate_to_wire(change.lr),
        weight_decay=change.weight_decay,
        grad_clip_norm=change.grad_clip_norm,
        grad_clip_value=change.grad_clip_value,
        step=step,
    )


def change_from_wire(message: run_pb2.HyperparameterChange) -> RecordedChange:
    """A change of hyperparameters, with the step that the server gave it.

    Raises:
        KedgeError: INVALID_CONFIGURATION for a rate that cannot be. The rest is checked where it is applied.
    """
    lr = rate_from_wire(message.lr, "hyperparameters.lr") if message.HasField("lr") else None
    return RecordedChange(message.step, message.group, Change(lr, **_overrides(message)))


def _overrides(message: Message) -> dict[str, float | None]:
    """The settings that groups and changes have alike; None where they are not set."""
    fields = ("weight_decay", "grad_clip_norm", "grad_clip_value")
    return {field: getattr(message, field) if message.HasField(field) else None for field in fields}
