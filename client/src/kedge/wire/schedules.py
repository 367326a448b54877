"""Learning rates: between the plain values and their protobuf forms."""

from collections.abc import Iterable
from itertools import chain, islice
from typing import Any

from kedge import optim
from kedge.optim._checks import check
from kedge.optim.rules import check_lr
from kedge.optim.schedules.composite import MAX_DEPTH, MAX_SCHEDULES, Composite
from kedge.v1 import schedule_pb2
from kedge.wire.reflection import Refusing, fill, invalid, kind_of, values

_KINDS: dict[str, type[Any]] = {
    "constant_lr": optim.ConstantLR,
    "step_lr": optim.StepLR,
    "exponential_lr": optim.ExponentialLR,
    "multi_step_lr": optim.MultiStepLR,
    "exponential_decay_lr": optim.ExponentialDecayLR,
    "cosine_annealing_lr": optim.CosineAnnealingLR,
    "cosine_annealing_warm_restarts": optim.CosineAnnealingWarmRestarts,
    "polynomial_lr": optim.PolynomialLR,
    "linear_lr": optim.LinearLR,
    "cyclic_lr": optim.CyclicLR,
    "one_cycle_lr": optim.OneCycleLR,
    "warmup_scheduler": optim.WarmupScheduler,
    "warmup_cosine_schedule": optim.WarmupCosineSchedule,
    "piecewise_constant_schedule": optim.PiecewiseConstantSchedule,
    "chained_scheduler": optim.ChainedScheduler,
    "sequential_lr": optim.SequentialLR,
    "reduce_lr_on_plateau": optim.ReduceLROnPlateau,
}
MAX_MESSAGE_BYTES = 32 << 10
"""Of one learning rate: a run's answer holds those of its groups and last changes, and has to fit one message."""

_CAPITALS = {"t_max": "T_max", "t_0": "T_0", "t_mult": "T_mult"}


def rate_to_wire(rate: float | optim.Schedule) -> schedule_pb2.LearningRate:
    """A learning rate."""
    if not isinstance(rate, optim.Schedule):
        return schedule_pb2.LearningRate(value=rate)
    message = schedule_pb2.LearningRate(
        steps_per_epoch=rate.steps_per_tick, tick=f"TICK_{rate.tick.upper()}", last_epoch=rate.last_epoch
    )
    schedule = getattr(message, kind_of(rate, _KINDS))
    schedule.SetInParent()
    fill(schedule, rate)
    if isinstance(rate, Composite):
        schedule.schedulers.extend(rate_to_wire(inner) for inner in rate.schedulers)
    return message


def rate_from_wire(message: schedule_pb2.LearningRate, field: str) -> float | optim.Schedule:
    """A learning rate; `field` is the message's own path, as "optimizer.lr".

    Raises:
        KedgeError: INVALID_CONFIGURATION.
    """
    _check_size(message, field)
    return _rate_from_wire(message, field)


def _rate_from_wire(message: schedule_pb2.LearningRate, field: str) -> float | optim.Schedule:
    kind = message.WhichOneof("kind")
    if kind is None:
        raise invalid(field, "no learning rate is set, or a schedule that this server does not know")
    if kind == "value":
        return _constant(message, field)
    inner = [_rate_from_wire(each, f"{field}.{kind}.schedulers[{at}]") for at, each in enumerate(_inner(message))]
    with Refusing(field):
        ticks = _ticks(message, kind)
    with Refusing(f"{field}.{kind}"):
        arguments = {_CAPITALS.get(name, name): value for name, value in values(getattr(message, kind)).items()}
        if issubclass(_KINDS[kind], Composite):
            arguments["schedulers"] = inner
        schedule: optim.Schedule = _KINDS[kind](**arguments, **ticks)
        return schedule


def _constant(message: schedule_pb2.LearningRate, field: str) -> float:
    for name in ("steps_per_epoch", "tick", "last_epoch"):
        if getattr(message, name):
            raise invalid(f"{field}.{name}", f"{name} is set beside value: a rate that stays the same has no ticks")
    try:
        check_lr(message.value)
    except ValueError as error:
        raise invalid(field, str(error)) from error
    return message.value


def _ticks(message: schedule_pb2.LearningRate, kind: str) -> dict[str, Any]:
    """What the message says besides the schedule, as constructor arguments."""
    ticks = {name: value for name, value in values(message).items() if name != "value" and value}
    optim.ConstantLR(**ticks)  # refuses what every schedule would, before the path leads to this one's own fields
    if kind == "one_cycle_lr":
        steps = ticks.pop("steps_per_epoch", 1)
        check("steps_per_epoch", steps, steps == 1, "1 or unset: the total_steps of OneCycleLR are ticks of one step")
    return ticks


def _check_size(message: schedule_pb2.LearningRate, field: str) -> None:
    """Refuses a message of too many schedules before anything is made of it."""
    level, count, depth = [message], 1, 0
    while level:
        level = list(islice(chain.from_iterable(map(_inner, level)), MAX_SCHEDULES))
        count += len(level)
        depth += 1
        if count > MAX_SCHEDULES or depth > MAX_DEPTH + 1:
            most = f"{MAX_SCHEDULES} schedules and {MAX_DEPTH} levels"
            raise invalid(field, f"the schedule is made of too many others: at most {most} are allowed")
    if message.ByteSize() > MAX_MESSAGE_BYTES:
        raise invalid(field, f"the schedule takes {message.ByteSize()} bytes: it must be at most {MAX_MESSAGE_BYTES}")


def _inner(message: schedule_pb2.LearningRate) -> Iterable[schedule_pb2.LearningRate]:
    """The schedules directly inside of a schedule of schedules."""
    kind = message.WhichOneof("kind")
    composite = kind is not None and issubclass(_KINDS.get(kind, object), Composite)
    return getattr(message, kind).schedulers if composite else ()
