"""Optimizers: between the plain values and their protobuf form. Decoding checks as constructing does."""

from typing import Any

from kedge import optim
from kedge.optim.alias import check_argument_names
from kedge.v1 import optimizer_pb2
from kedge.wire.reflection import Refusing, fill, invalid, kind_of, values
from kedge.wire.schedules import rate_from_wire, rate_to_wire

_RULES: dict[str, type[Any]] = {
    "sgd": optim.SGD,
    "momentum": optim.Momentum,
    "momentum_nesterov": optim.MomentumNesterov,
    "lion": optim.Lion,
    "adam": optim.Adam,
    "adamw": optim.AdamW,
    "nadam": optim.Nadam,
    "radam": optim.RAdam,
    "adamax": optim.Adamax,
    "yogi": optim.Yogi,
    "adabelief": optim.AdaBelief,
    "rmsprop": optim.RMSprop,
    "adagrad": optim.Adagrad,
    "adadelta": optim.Adadelta,
    "lamb": optim.Lamb,
    "lars": optim.Lars,
    "adafactor": optim.Adafactor,
    "novograd": optim.Novograd,
    "optax": optim.Optax,
}
_NOT_OF_OPTAX = frozenset({"lr", "grad_clip_norm", "grad_clip_value"})
"""What the constructor of `optim.Optax` takes for itself."""


def optimizer_to_wire(optimizer: optim.Optimizer) -> optimizer_pb2.Optimizer:
    """The optimizer, laid flat."""
    spec = optimizer.spec()
    settings = spec.settings
    message = optimizer_pb2.Optimizer(
        grad_clip_norm=settings.grad_clip_norm,
        grad_clip_value=settings.grad_clip_value,
        weight_decay=settings.weight_decay,
        decoupled_weight_decay=settings.decoupled_weight_decay,
        lr=rate_to_wire(settings.lr),
    )
    rule = getattr(message, kind_of(spec.rule, _RULES))
    rule.SetInParent()
    if isinstance(spec.rule, optim.Optax):
        _fill_optax(rule, spec.rule)
    else:
        fill(rule, spec.rule)
    if spec.sync_period is not None:
        message.lookahead.sync_period = spec.sync_period
        message.lookahead.alpha = spec.alpha
        message.lookahead.reset_state = spec.reset_state
    return message


def optimizer_from_wire(message: optimizer_pb2.Optimizer) -> optim.Optimizer:
    """The optimizer.

    Raises:
        KedgeError: INVALID_CONFIGURATION, with the field's path.
    """
    bare = _bare_from_wire(message)
    settings = optim.Settings(
        lr=rate_from_wire(message.lr, "optimizer.lr"),
        weight_decay=message.weight_decay,
        decoupled_weight_decay=message.decoupled_weight_decay,
        grad_clip_norm=message.grad_clip_norm if message.HasField("grad_clip_norm") else None,
        grad_clip_value=message.grad_clip_value if message.HasField("grad_clip_value") else None,
    )
    with Refusing("optimizer"):
        return optim.from_spec(bare.spec()._replace(settings=settings))


def _bare_from_wire(message: optimizer_pb2.Optimizer) -> optim.Optimizer:
    """The optimizer without its settings."""
    rule = _rule_from_wire(message)
    if not message.HasField("lookahead"):
        return rule
    with Refusing("optimizer.lookahead"):
        return optim.Lookahead(rule, **values(message.lookahead))


def _rule_from_wire(message: optimizer_pb2.Optimizer) -> optim.Rule:
    kind = message.WhichOneof("rule")
    if kind is None:
        raise invalid("optimizer.rule", "no optimizer rule is set, or one that this server does not know")
    with Refusing(f"optimizer.{kind}"):
        rule: optim.Rule = (
            _optax_from_wire(message.optax) if kind == "optax" else _RULES[kind](**values(getattr(message, kind)))
        )
        return rule.without_settings()


def _fill_optax(message: optimizer_pb2.Optax, rule: optim.Optax) -> None:
    message.name = rule.name
    for name, value in rule.arguments:
        message.arguments[name].CopyFrom(_argument_to_wire(value))


def _argument_to_wire(value: Any) -> optimizer_pb2.OptaxArgument:
    match value:
        case None:
            return optimizer_pb2.OptaxArgument(none="NULL_VALUE")
        case bool():  # before int, which it is too
            return optimizer_pb2.OptaxArgument(flag=value)
        case int():
            return optimizer_pb2.OptaxArgument(integer=value)
        case float():
            return optimizer_pb2.OptaxArgument(number=value)
        case str():
            return optimizer_pb2.OptaxArgument(text=value)
    return optimizer_pb2.OptaxArgument(tuple=optimizer_pb2.OptaxTuple(elements=map(_argument_to_wire, value)))


def _optax_from_wire(message: optimizer_pb2.Optax) -> optim.Optax:
    check_argument_names(message.arguments)
    taken = sorted(_NOT_OF_OPTAX & message.arguments.keys())
    if taken:
        raise ValueError(f"arguments.{taken[0]} is an argument of optax: set the optimizer's own field of that name")
    arguments = {name: _argument_from_wire(name, value) for name, value in message.arguments.items()}
    return optim.Optax(message.name, **arguments)


def _argument_from_wire(name: str, message: optimizer_pb2.OptaxArgument) -> Any:
    kind = message.WhichOneof("kind")
    if kind is None:
        raise ValueError(f"arguments.{name} has no value, or one that this server does not know")
    if kind == "none":
        return None
    if kind == "tuple":
        return _tuple_from_wire(name, message.tuple)
    return getattr(message, kind)


def _tuple_from_wire(name: str, message: optimizer_pb2.OptaxTuple) -> tuple[Any, ...]:
    if any(element.HasField("tuple") for element in message.elements):
        raise ValueError(f"arguments.{name} has a tuple in a tuple: give one of one level")
    return tuple(_argument_from_wire(name, element) for element in message.elements)
