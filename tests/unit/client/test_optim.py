"""Optimizers as values: what is refused when they are constructed, their defaults, and how they lie flat."""

import inspect
import math
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from fractions import Fraction
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from kedge import optim
from kedge.optim.groups import check_groups

NAN, INF = math.nan, math.inf

RULES: list[type[Any]] = [
    optim.SGD,
    optim.Momentum,
    optim.MomentumNesterov,
    optim.Adam,
    optim.AdamW,
    optim.Yogi,
    optim.RAdam,
    optim.Nadam,
    optim.Lion,
    optim.RMSprop,
    optim.Adagrad,
    optim.Adadelta,
    optim.Adamax,
    optim.AdaBelief,
    optim.Lamb,
    optim.Lars,
    optim.Adafactor,
    optim.Novograd,
]
NOT_NEGATIVE = [-1e-3, NAN, INF, 1e39, 10**400]
FRACTION = [1.0, -0.1, NAN, 2]
# float32 has nothing between 1e-46 and 0, and ends at 3.4e38.
EPS = [0, -1e-8, 1e-46, NAN, INF, 1e300, 10**400]
CLIP = [0, -1, 1e-46, NAN, INF, 1e300, 10**400]
OUT_OF_RANGE: dict[str, list[object]] = {
    "lr": NOT_NEGATIVE,
    "weight_decay": NOT_NEGATIVE,
    "grad_clip_norm": CLIP,
    "grad_clip_value": CLIP,
    "momentum": FRACTION,
    "betas": [(0.9, 1.0), (10**400, 0.9), (-0.1, 0.9), (0.9, NAN), (0.9,), (0.9, 0.9, 0.9), (), 0.9, None],
    "eps": EPS,
    "eps_root": NOT_NEGATIVE,
    "max_direction": CLIP,
    "momentum_decay": NOT_NEGATIVE,
    "alpha": FRACTION,
    "lr_decay": NOT_NEGATIVE,
    "initial_accumulator_value": NOT_NEGATIVE,
    "rho": FRACTION,
    "trust_coefficient": EPS,
    "clip_threshold": EPS,
    "decay_rate": EPS,
    "beta1": FRACTION,
}
ADAFACTORS_EPS = [(0, 1e-3), (1e-46, 1e-3), (1e-30, -1), (1e-30,), (1e-30, INF), 1e-30, (1e-30, 1e-3, 0)]
FLAGS = ("nesterov", "amsgrad", "centered", "factored")


def out_of_range() -> list[tuple[type[Any], str, object]]:
    cases = []
    for rule in RULES:
        for field in (field.name for field in fields(rule) if field.name not in FLAGS):
            values = ADAFACTORS_EPS if (rule, field) == (optim.Adafactor, "eps") else OUT_OF_RANGE[field]
            cases += [(rule, field, value) for value in values]
    return cases


@pytest.mark.parametrize(("rule", "field", "value"), out_of_range())
def test_field_out_of_range_is_refused_by_its_name(rule: type[Any], field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{field} is "):
        rule(**{field: value})


def of_another_type(field: Any) -> list[object]:
    if field.name in FLAGS:
        return [1, 0, None, "yes"]
    return [("a", "b"), (True, False)] if field.type == tuple[float, float] else ["0.5", True, (0.5,)]


@pytest.mark.parametrize("rule", RULES)
def test_field_of_another_type_is_refused_by_its_name(rule: type[Any]) -> None:
    for field in fields(rule):
        for value in of_another_type(field):
            with pytest.raises(TypeError, match=f"^{field.name} is "):
                rule(**{field.name: value})


@pytest.mark.parametrize(
    ("construct", "field"),
    [
        (lambda: optim.SGD(nesterov=True), "nesterov"),
        (lambda: optim.Lookahead(optim.SGD(), sync_period=0), "sync_period"),
        (lambda: optim.Lookahead(optim.SGD(), alpha=1.5), "alpha"),
        (lambda: optim.Lookahead(optim.SGD(), alpha=-0.1), "alpha"),
        (lambda: optim.Lookahead(optim.SGD(), lr=-1), "lr"),
        (lambda: optim.Lookahead(optim.SGD(weight_decay=1e-4), weight_decay=1e-4), "weight_decay"),
        (lambda: optim.Lookahead(optim.SGD(grad_clip_norm=1), grad_clip_norm=2), "grad_clip_norm"),
        (lambda: optim.Lookahead(optim.SGD(), alpha=NAN), "alpha"),
        (lambda: optim.Lookahead(optim.SGD(), sync_period=2**32), "sync_period"),
        (lambda: optim.Group("a" * 257), "patterns"),
        (lambda: optim.Group("*", name="a" * 257), "name"),
        (lambda: optim.Group("*", weight_decay=10**400), "weight_decay"),
    ],
)
def test_options_that_do_not_go_together_are_refused(construct: Callable[[], object], field: str) -> None:
    with pytest.raises(ValueError, match=f"^{field} (is|has) "):
        construct()


@pytest.mark.parametrize("rule", [optim.AdamW, optim.Lion, optim.Lamb, optim.Adafactor, optim.Novograd])
def test_lookahead_takes_no_decay_around_an_optimizer_whose_own_is_decoupled(rule: type[Any]) -> None:
    # Two decays of two kinds would be left, and a group or a change of a live run speaks of one.
    with pytest.raises(ValueError, match=rf"^weight_decay is 0\.5: .* set it on {rule.__name__}$"):
        optim.Lookahead(rule(weight_decay=0), weight_decay=0.5)
    assert optim.Lookahead(rule(weight_decay=0.5)).spec().settings.decoupled_weight_decay == 0.5


@pytest.mark.parametrize(
    ("construct", "field"),
    [
        (lambda: optim.SGD(lr=lambda step: 0.1), "lr"),
        (lambda: optim.SGD(lr=np.bool_(True)), "lr"),
        (lambda: optim.SGD(lr=jnp.array([0.1])), "lr"),
        (lambda: optim.SGD(lr=np.complex64(1)), "lr"),
        (lambda: optim.StepLR(step_size=np.float32(3)), "step_size"),
        (lambda: optim.Lookahead(optim.SGD(), alpha="0.5"), "alpha"),
        (lambda: optim.Lookahead(optim.SGD(), alpha=None), "alpha"),
        (lambda: optim.Lookahead(optim.SGD(), alpha=True), "alpha"),
        (lambda: optim.Lookahead(optim.SGD(), reset_state="no"), "reset_state"),
        (lambda: optim.Group("*", frozen="no"), "frozen"),
        (lambda: optim.Group("*", name=5), "name"),
        (lambda: optim.Group("*", name=None), "name"),
        (lambda: optim.Group("*", grad_clip_value="1"), "grad_clip_value"),
        (lambda: optim.Group(5), "patterns"),
        (lambda: check_groups(None), "groups"),
        (lambda: check_groups(5), "groups"),
        (lambda: check_groups(optim.Group("*")), "groups"),
        (lambda: optim.Lookahead(optim.Lookahead(optim.SGD())), "base_optimizer"),
        (lambda: optim.Lookahead("sgd"), "base_optimizer"),
        (lambda: optim.Lookahead(optim.SGD(), sync_period=1.5), "sync_period"),
    ],
)
def test_other_things_of_another_type_are_refused(construct: Callable[[], object], field: str) -> None:
    with pytest.raises(TypeError, match=f"^{field} is "):
        construct()


@pytest.mark.filterwarnings("ignore")  # of what braintools imports
@pytest.mark.parametrize("rule", RULES)
def test_names_order_and_defaults_are_those_of_braintools(rule: type[Any]) -> None:
    theirs = inspect.signature(getattr(pytest.importorskip("braintools").optim, rule.__name__).__init__).parameters
    ours = inspect.signature(rule).parameters
    left_out = {"self", "beta1", "beta2"} if rule is optim.Adam else {"self"}
    positions = [name for name in theirs if name not in left_out]

    assert list(ours)[: len(positions)] == positions
    assert set(ours) - set(positions) == ({"eps_root", "max_direction"} if rule is optim.AdaBelief else set())
    assert {name: ours[name].default for name in positions} == {name: theirs[name].default for name in positions}


def test_adams_options_after_the_betas_are_given_by_keyword_as_braintools_has_others_in_between() -> None:
    with pytest.raises(TypeError):
        optim.Adam(1e-3, (0.9, 0.999), 0.9)


def test_defaults_of_the_seed_documents() -> None:
    # AdaBelief(lr=0.001, betas=(0.9, 0.999), eps=1e-16, weight_decay=0.0, grad_clip_norm=None, grad_clip_value=None)
    # and Lookahead(base_optimizer, sync_period=5, alpha=0.5, ...).
    assert optim.AdaBelief() == optim.AdaBelief(0.001, (0.9, 0.999), 1e-16, 0.0, None, None)
    lookahead = optim.Lookahead(optim.AdaBelief())
    assert (lookahead.sync_period, lookahead.alpha, lookahead.weight_decay) == (5, 0.5, 0.0)
    assert not lookahead.reset_state


def test_adafactor_without_a_rate_has_that_of_braintools() -> None:
    assert optim.Adafactor() == optim.Adafactor(lr=1e-3)


@pytest.mark.parametrize("rule", RULES)
def test_rules_written_with_whole_numbers_and_lists_are_those_written_with_floats_and_pairs(rule: type[Any]) -> None:
    whole: dict[str, Any] = {"lr": 1, "weight_decay": 2, "grad_clip_norm": 3, "grad_clip_value": 4}
    pair = "betas" in {field.name for field in fields(rule)}
    left = rule(**whole, **({"betas": [0, 0.5]} if pair else {}))
    right = rule(**{name: float(value) for name, value in whole.items()}, **({"betas": (0.0, 0.5)} if pair else {}))

    assert (left, hash(left), repr(left)) == (right, hash(right), repr(right))


def kinds(value: float) -> list[Any]:
    """A number that every dtype holds, as what libraries have for it."""
    floats = [np.float32(value), np.float64(value), np.longdouble(value), np.array(value), jnp.float32(value)]
    return [*floats, ml_dtypes.bfloat16(value), jnp.bfloat16(value), Fraction(value)]


WHOLE = [np.int64(3), np.uint8(3), np.array(3), jnp.int32(3)]


@pytest.mark.parametrize("number", kinds(0.5) + kinds(0.0) + WHOLE, ids=lambda number: type(number).__name__)
def test_numbers_of_other_libraries_become_pythons_own_everywhere(number: Any) -> None:
    one, half = float(number), min(float(number), 0.5)
    few = type(number)(half) if type(number) is Fraction else number if one <= 0.5 else np.float32(half)
    pairs: list[tuple[object, object]] = [
        (optim.SGD(number, few), optim.SGD(one, half)),
        (optim.Adam(betas=(few, few), weight_decay=number), optim.Adam(betas=(half, half), weight_decay=one)),
        (optim.Lookahead(optim.SGD(), alpha=few, lr=number), optim.Lookahead(optim.SGD(), alpha=half, lr=one)),
        (optim.Group("*", lr=number, weight_decay=number), optim.Group("*", lr=one, weight_decay=one)),
        (optim.StepLR(number), optim.StepLR(one)),
        (optim.PiecewiseConstantSchedule(values=[number] * 3), optim.PiecewiseConstantSchedule(values=[one] * 3)),
        (optim.OneCycleLR(number, 10), optim.OneCycleLR(one, 10)),
    ]
    for given, want in pairs:
        assert (given, hash(given), repr(given)) == (want, hash(want), repr(want))


@pytest.mark.parametrize("number", WHOLE, ids=lambda number: type(number).__name__)
def test_whole_numbers_of_other_libraries_are_taken_for_counts(number: Any) -> None:
    pairs: list[tuple[object, object]] = [
        (optim.Lookahead(optim.SGD(), number), optim.Lookahead(optim.SGD(), 3)),
        (optim.StepLR(0.1, number, steps_per_epoch=number), optim.StepLR(0.1, 3, steps_per_epoch=3)),
        (optim.Optax("adafactor", decay_offset=number), optim.Optax("adafactor", decay_offset=3)),
    ]
    for given, want in pairs:
        assert (given, hash(given), repr(given)) == (want, hash(want), repr(want))


def test_arrays_are_taken_for_what_has_several_numbers() -> None:
    assert optim.Adam(betas=np.array([0.5, 0.25], np.float32)) == optim.Adam(betas=(0.5, 0.25))
    assert optim.MultiStepLR(0.1, np.array([1, 2])) == optim.MultiStepLR(0.1, (1, 2))
    schedule = optim.PiecewiseConstantSchedule(0.1, jnp.array([3]), np.array([0.5, 0.25]))
    assert repr(schedule) == repr(optim.PiecewiseConstantSchedule(0.1, (3,), (0.5, 0.25)))


def test_arguments_of_optax_may_be_numbers_of_other_libraries() -> None:
    rule = optim.Optax("x", a=np.float32(0.5), b=jnp.int32(2), c=np.bool_(True), d=(np.float64(0.25), np.int8(1)))
    assert repr(rule) == "Optax('x', lr=0.001, a=0.5, b=2, c=True, d=(0.25, 1))"


def test_the_values_need_neither_numpy_nor_jax() -> None:
    code = "import sys, kedge.optim; print(sorted({'numpy', 'jax', 'google.protobuf'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout.strip() == b"[]"


def test_lookahead_keeps_the_rate_of_its_base_unless_it_has_one() -> None:
    assert optim.Lookahead(optim.SGD(lr=0.3)).spec().settings.lr == 0.3
    assert optim.Lookahead(optim.SGD(lr=0.3), lr=0.1).spec().settings.lr == 0.1


def test_options_of_lookahead_take_the_place_of_the_bases() -> None:
    settings = optim.Lookahead(optim.SGD(grad_clip_value=2.0), weight_decay=0.1, grad_clip_norm=1).spec().settings
    assert (settings.weight_decay, settings.grad_clip_norm, settings.grad_clip_value) == (0.1, 1, 2.0)


@pytest.mark.parametrize("rule", RULES)
def test_decay_is_decoupled_where_the_rule_has_it_and_coupled_elsewhere(rule: type[Any]) -> None:
    settings = rule(weight_decay=0.25).spec().settings
    own = rule in (optim.AdamW, optim.Lion, optim.Lamb, optim.Adafactor, optim.Novograd)
    assert (settings.weight_decay, settings.decoupled_weight_decay) == ((0, 0.25) if own else (0.25, 0))


@pytest.mark.parametrize("rule", RULES)
def test_rules_that_differ_in_settings_alone_are_one_rule(rule: type[Any]) -> None:
    one = rule(lr=0.5, weight_decay=0.25, grad_clip_norm=1.0, grad_clip_value=2.0)
    assert one.spec().rule == rule().spec().rule
    assert optim.from_spec(one.spec()) == one


@pytest.mark.parametrize(
    "optimizer",
    [
        optim.SGD(0.1, 0.9, 1e-4, nesterov=True, grad_clip_norm=1.0),
        optim.AdamW(optim.StepLR(0.1, 5, 0.5)),
        optim.Lookahead(optim.AdaBelief(eps_root=0.0), 7, 0.3, optim.ExponentialLR(), grad_clip_value=0.5),
        optim.Lookahead(optim.AdamW(weight_decay=0.1), reset_state=True),
        optim.Lookahead(optim.Adam(), weight_decay=0.1),
        optim.Lookahead(optim.Optax("adamw", weight_decay=0.2), weight_decay=0.1),
    ],
)
def test_laying_flat_and_standing_up_again_changes_nothing_that_matters(optimizer: optim.Optimizer) -> None:
    again = optim.from_spec(optimizer.spec())
    assert again.spec() == optimizer.spec()
    assert optim.from_spec(again.spec()) == again


@pytest.mark.parametrize("rule", [optim.AdamW(), optim.Optax("sgd")])
def test_coupled_decay_needs_a_rule_or_a_lookahead_that_holds_it(rule: optim.Rule) -> None:
    spec = rule.spec()
    with pytest.raises(ValueError, match=r"^weight_decay is "):
        optim.from_spec(spec._replace(settings=spec.settings._replace(weight_decay=0.1)))


def test_coupled_decay_of_a_rule_with_its_own_is_refused_in_lookahead_too() -> None:
    spec = optim.Lookahead(optim.AdamW()).spec()
    with pytest.raises(ValueError, match=r"^weight_decay is "):
        optim.from_spec(spec._replace(settings=spec.settings._replace(weight_decay=0.1)))


@pytest.mark.parametrize("decay", [0.1, -0.1, NAN])
def test_decoupled_decay_needs_a_rule_that_has_it(decay: float) -> None:
    spec = optim.Adam().spec()
    with pytest.raises(ValueError, match=r"^decoupled_weight_decay is "):
        optim.from_spec(spec._replace(settings=spec.settings._replace(decoupled_weight_decay=decay)))


def test_optax_holds_its_name_and_its_arguments_sorted() -> None:
    rule = optim.Optax("adan", lr=1, nesterov=True, b1=0.5, shape=[1, 2.0, None], mode="fast")

    assert (rule.name, rule.lr) == ("adan", 1.0)
    assert rule.arguments == (("b1", 0.5), ("mode", "fast"), ("nesterov", True), ("shape", (1, 2.0, None)))


@pytest.mark.parametrize(
    "text",
    [
        "Optax('adam', lr=0.001)",
        "Optax('adam', lr=0.001, b1=0.8)",
        "Optax('adam', lr=0.5, grad_clip_norm=1.0, grad_clip_value=2.0, b1=1, b2=1.0, nesterov=True, x=(None, 'a'))",
        "Optax('sgd', lr=ConstantLR(base_lr=0.1), momentum=0.9)",
    ],
)
def test_optax_reads_back_as_it_is_written(text: str) -> None:
    rule = eval(text, vars(optim))
    assert eval(repr(rule), vars(optim)) == rule
    assert "ConstantLR" in text or repr(rule) == text


def test_optax_with_arguments_of_other_kinds_is_another_one() -> None:
    one, whole, flag = (optim.Optax("adam", b1=value) for value in (1.0, 1, True))
    assert len({one, whole, flag, optim.Optax("adam", b1=1.0)}) == 3
    assert one != "Optax('adam', lr=0.001, b1=1.0)"


def test_weight_decay_of_optax_is_an_argument() -> None:
    spec = optim.Optax("adamw", lr=0.1, weight_decay=0.5).spec()
    assert (spec.settings.weight_decay, spec.settings.decoupled_weight_decay) == (0, 0)
    assert spec.rule == optim.Optax("adamw", lr=0.0, weight_decay=0.5)


@pytest.mark.parametrize(
    ("construct", "field"),
    [
        (lambda: optim.Optax("not a name"), "name"),
        (lambda: optim.Optax(""), "name"),
        (lambda: optim.Optax("a" * 65), "name"),
        (lambda: optim.Optax("adam", learning_rate=0.1), "arguments.learning_rate"),
        (lambda: optim.Optax("adam", lr=-1), "lr"),
        (lambda: optim.Optax("adam", grad_clip_norm=0), "grad_clip_norm"),
        (lambda: optim.Optax("adam", grad_clip_value=NAN), "grad_clip_value"),
        (lambda: optim.Optax("adam", b1=NAN), "arguments.b1"),
        (lambda: optim.Optax("adam", b1=(0.5, INF)), "arguments.b1"),
        (lambda: optim.Optax("adam", steps=2**63), "arguments.steps"),
        (lambda: optim.Optax("adam", eps=1e300), "arguments.eps"),
        (lambda: optim.Optax("adam", mode="a" * 257), "arguments.mode"),
        (lambda: optim.Optax("adam", b1=[0.5] * 65), "arguments.b1"),
        (lambda: optim.Optax("adam", **{"b 1": 0.5}), "arguments"),
        (lambda: optim.Optax("adam", **{"b" * 65: 0.5}), "arguments"),
        (lambda: optim.Optax("adam", **{f"b{i}": 0.5 for i in range(65)}), "arguments"),
    ],
)
def test_optax_refuses_what_cannot_be_by_its_name(construct: Callable[[], object], field: str) -> None:
    with pytest.raises(ValueError, match=rf"^{re.escape(field)} (is|are|has) "):
        construct()


@pytest.mark.parametrize(
    ("construct", "field"),
    [
        (lambda: optim.Optax(3), "name"),
        (lambda: optim.Optax("adam", lr="fast"), "lr"),
        (lambda: optim.Optax("adam", b1={"a": 1}), "arguments.b1"),
        (lambda: optim.Optax("adam", b1=lambda step: 0.9), "arguments.b1"),
        (lambda: optim.Optax("adam", b1=((0.5, 0.5), 0.5)), "arguments.b1"),
        (lambda: optim.Optax("adam", b1=1j), "arguments.b1"),
    ],
)
def test_optax_refuses_what_is_of_another_type_by_its_name(construct: Callable[[], object], field: str) -> None:
    with pytest.raises(TypeError, match=f"^{field} is "):
        construct()
