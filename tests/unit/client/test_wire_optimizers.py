"""Optimizers on the wire: what comes back is what went, and what cannot be is refused with the field's path."""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kedge import KedgeError, optim
from kedge.v1 import optimizer_pb2
from kedge.wire.convert import optimizer_from_wire, optimizer_to_wire
from kedge.wire.reflection import Refusing

rates = st.floats(0, 3e38)
positive = st.floats(1.2e-38, 3e38)
fractions = st.floats(0, 1, exclude_max=True)
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "lr": rates | st.builds(optim.StepLR, rates, st.integers(1, 10)),
    "weight_decay": rates,
    "grad_clip_norm": st.none() | positive,
    "grad_clip_value": st.none() | positive,
    "momentum": fractions,
    "nesterov": st.booleans(),
    "betas": st.tuples(fractions, fractions),
    "eps": positive,
    "amsgrad": st.booleans(),
    "eps_root": st.none() | rates,
    "max_direction": st.none() | positive,
    "momentum_decay": rates,
    "alpha": fractions,
    "centered": st.booleans(),
    "lr_decay": rates,
    "initial_accumulator_value": rates,
    "rho": fractions,
    "trust_coefficient": positive,
    "clip_threshold": positive,
    "decay_rate": positive,
    "beta1": st.none() | fractions,
    "factored": st.booleans(),
}
CLASSES: list[type[Any]] = [
    *(optim.SGD, optim.Momentum, optim.MomentumNesterov, optim.Lion, optim.Adam, optim.AdamW, optim.Nadam, optim.RAdam),
    *(optim.Adamax, optim.Yogi, optim.AdaBelief, optim.RMSprop, optim.Adagrad, optim.Adadelta, optim.Lamb, optim.Lars),
    *(optim.Adafactor, optim.Novograd),
]
scalars = st.none() | st.booleans() | st.integers(-(2**63) + 1, 2**63 - 1) | st.floats(-3.4e38, 3.4e38)
arguments = st.dictionaries(
    st.from_regex(r"[a-z_][a-z0-9_]{0,20}", fullmatch=True).filter(
        lambda name: name not in ("lr", "learning_rate", "grad_clip_norm", "grad_clip_value", "self")
    ),
    scalars | st.text(max_size=20) | st.lists(scalars | st.text(max_size=5), max_size=4).map(tuple),
    max_size=5,
)


def built(rule: type[Any]) -> st.SearchStrategy[optim.Rule]:
    options = {field.name: FIELDS[field.name] for field in fields(rule)}
    if rule is optim.Adafactor:
        options["eps"] = st.tuples(positive, rates)
    if rule is optim.SGD:
        return st.builds(optim.SGD, **options | {"momentum": st.floats(0.01, 0.99)})
    return st.builds(rule, **options)


rules = st.one_of(*map(built, CLASSES)) | st.builds(
    lambda name, options, given: optim.Optax(name, **options, **given),
    st.from_regex(r"[a-z_][a-z0-9_]{0,63}", fullmatch=True),
    st.fixed_dictionaries({field: FIELDS[field] for field in ("lr", "grad_clip_norm", "grad_clip_value")}),
    arguments,
)
lookaheads = st.builds(
    optim.Lookahead,
    rules,
    sync_period=st.integers(1, 2**32 - 1),
    alpha=st.floats(0, 1),
    lr=st.none() | FIELDS["lr"],
    reset_state=st.booleans(),
)


def sent(optimizer: optim.Optimizer) -> optim.Optimizer:
    data = optimizer_to_wire(optimizer).SerializeToString()
    return optimizer_from_wire(optimizer_pb2.Optimizer.FromString(data))


@given(rules)
def test_base_optimizer_comes_back_as_it_went(rule: optim.Rule) -> None:
    assert sent(rule) == rule


@given(lookaheads)
def test_lookahead_comes_back_laid_flat_as_it_went(optimizer: optim.Lookahead) -> None:
    assert sent(optimizer) == optim.from_spec(optimizer.spec())


def test_coupled_decay_around_that_of_optax_comes_back() -> None:
    optimizer = optim.Lookahead(optim.Optax("adamw", weight_decay=0.2), weight_decay=0.1)
    assert sent(optimizer) == optimizer


def test_every_rule_of_the_message_is_an_optimizer() -> None:
    kinds = {field.message_type.name for field in optimizer_pb2.Optimizer.DESCRIPTOR.oneofs_by_name["rule"].fields}
    assert kinds == {rule.__name__ for rule in CLASSES if rule is not optim.SGD} | {"Sgd", "Optax"}


def spoilt(optimizer: optim.Optimizer, spoil: Callable[[Any], object]) -> optimizer_pb2.Optimizer:
    spoilt = optimizer_to_wire(optimizer)
    spoil(spoilt)
    return spoilt


OPTAX = optim.Optax("adam", b1=0.5)
AHEAD = optim.Lookahead(optim.AdamW())


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (optimizer_pb2.Optimizer(), "optimizer.rule"),
        (spoilt(optim.SGD(), lambda m: m.ClearField("lr")), "optimizer.lr"),
        (spoilt(optim.SGD(), lambda m: m.lr.Clear()), "optimizer.lr"),
        (spoilt(optim.Adam(), lambda m: m.adam.betas.append(0.5)), "optimizer.adam.betas"),
        (spoilt(optim.Adam(), lambda m: m.adam.betas.__setitem__(1, 1.0)), "optimizer.adam.betas"),
        (spoilt(optim.Adam(), lambda m: m.adam.ClearField("eps")), "optimizer.adam.eps"),
        (spoilt(optim.SGD(), lambda m: setattr(m.sgd, "momentum", float("nan"))), "optimizer.sgd.momentum"),
        (spoilt(optim.Adafactor(), lambda m: setattr(m.adafactor, "beta1", 1)), "optimizer.adafactor.beta1"),
        (spoilt(optim.SGD(), lambda m: setattr(m, "weight_decay", -1)), "optimizer.weight_decay"),
        (spoilt(optim.SGD(), lambda m: setattr(m, "grad_clip_norm", 0)), "optimizer.grad_clip_norm"),
        (spoilt(optim.AdamW(), lambda m: setattr(m, "weight_decay", 0.1)), "optimizer.weight_decay"),
        (spoilt(OPTAX, lambda m: setattr(m, "weight_decay", 0.1)), "optimizer.weight_decay"),
        (spoilt(optim.SGD(), lambda m: setattr(m, "decoupled_weight_decay", 0.1)), "optimizer.decoupled_weight_decay"),
        (spoilt(optim.Lion(), lambda m: setattr(m, "decoupled_weight_decay", -1)), "optimizer.decoupled_weight_decay"),
        (spoilt(optim.SGD(), lambda m: setattr(m.lookahead, "alpha", 0.5)), "optimizer.lookahead.sync_period"),
        (spoilt(AHEAD, lambda m: setattr(m.lookahead, "alpha", 1.5)), "optimizer.lookahead.alpha"),
        (spoilt(AHEAD, lambda m: setattr(m, "weight_decay", 0.1)), "optimizer.weight_decay"),
        (spoilt(optim.Adam(), lambda m: setattr(m.adam, "eps", 1e300)), "optimizer.adam.eps"),
        (spoilt(OPTAX, lambda m: setattr(m.optax, "name", "a b")), "optimizer.optax.name"),
        (spoilt(OPTAX, lambda m: setattr(m.optax.arguments["lr"], "number", 0.5)), "optimizer.optax.arguments.lr"),
        (spoilt(OPTAX, lambda m: setattr(m.optax.arguments["b 1"], "number", 0.5)), "optimizer.optax.arguments"),
        (spoilt(OPTAX, lambda m: m.optax.arguments["b 2"].SetInParent()), "optimizer.optax.arguments"),
        (
            spoilt(OPTAX, lambda m: m.optax.arguments["learning_rate"].SetInParent()),
            "optimizer.optax.arguments.learning_rate",
        ),
        (spoilt(OPTAX, lambda m: m.optax.arguments["b2"].SetInParent()), "optimizer.optax.arguments.b2"),
        (spoilt(OPTAX, lambda m: m.optax.arguments["b2"].tuple.elements.add()), "optimizer.optax.arguments.b2"),
        (
            spoilt(OPTAX, lambda m: m.optax.arguments["b2"].tuple.elements.add().tuple.SetInParent()),
            "optimizer.optax.arguments.b2",
        ),
        (
            spoilt(OPTAX, lambda m: setattr(m.optax.arguments["b1"], "number", float("inf"))),
            "optimizer.optax.arguments.b1",
        ),
        (
            spoilt(OPTAX, lambda m: setattr(m.optax.arguments["b1"], "integer", -(2**63))),
            "optimizer.optax.arguments.b1",
        ),
        (
            spoilt(OPTAX, lambda m: setattr(m.optax.arguments["self"], "text", "a" * 257)),
            "optimizer.optax.arguments.self",
        ),
    ],
)
def test_message_that_cannot_be_is_refused_with_the_fields_path(message: optimizer_pb2.Optimizer, field: str) -> None:
    with pytest.raises(KedgeError) as caught:
        optimizer_from_wire(message)
    assert (caught.value.reason, caught.value.metadata["field"]) == ("INVALID_CONFIGURATION", field)


def refuse(kind: type[Exception], text: str) -> None:
    with Refusing("optimizer"):
        raise kind(text)


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("T_max is 0: it must be at least 1", "optimizer.t_max"),
        ("arguments.B1 has no value", "optimizer.arguments.B1"),
        ("values[3] is -1: it must be at least 0", "optimizer.values[3]"),
        ("group 'it is \n mine' is not of this run, which has none", "optimizer.group"),
        ("groups holds 5: give kedge.optim.Group", "optimizer.groups"),
        ("arguments.mask cannot travel: use groups", "optimizer.arguments.mask"),
    ],
)
def test_refusal_is_an_invalid_configuration_of_the_field_that_it_begins_with(text: str, field: str) -> None:
    for kind in (ValueError, TypeError):
        with pytest.raises(KedgeError) as caught:
            refuse(kind, text)
        assert (caught.value.reason, caught.value.metadata["field"]) == ("INVALID_CONFIGURATION", field)


@pytest.mark.parametrize(
    "mistake",
    [
        lambda: 1 + "1",
        lambda: len(5),
        lambda: int("x"),
        lambda: optim.SGD(no_such_field=1),
        lambda: next(5),
        lambda: dict([1]),
    ],
)
def test_mistake_of_our_own_is_no_invalid_configuration(mistake: Callable[[], Any]) -> None:
    with pytest.raises((TypeError, ValueError)) as caught, Refusing("optimizer"):
        mistake()
    assert not isinstance(caught.value, KedgeError)
