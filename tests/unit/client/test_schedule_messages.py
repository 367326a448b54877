"""Learning rates over the wire and back, at any tick, and what a server refuses."""

import math
from typing import Any

import pytest
from google.protobuf import json_format
from hypothesis import given, settings
from hypothesis import strategies as st

from kedge import optim
from kedge.optim.schedules import Composite
from kedge.v1 import schedule_pb2
from kedge.wire.errors import KedgeError
from kedge.wire.schedules import rate_from_wire, rate_to_wire

FLOAT32_MAX = 3.4028234663852886e38
LAST_EPOCH = 2**63 - 1

rates = st.one_of(st.floats(0, 1), st.floats(0, FLOAT32_MAX))
fractions = st.floats(0, 1)
positive = st.one_of(st.floats(0.5, 2), st.floats(0, exclude_min=True, allow_infinity=False))
counts = st.one_of(st.integers(0, 300), st.integers(0, LAST_EPOCH))
lengths = st.one_of(st.integers(1, 300), st.integers(1, LAST_EPOCH))
epochs = st.one_of(st.integers(0, 1000), st.integers(0, 2**64))
ticks = st.fixed_dictionaries({"steps_per_epoch": lengths, "tick": st.sampled_from(["step", "manual"])})
ascending = st.lists(counts, max_size=5, unique=True).map(sorted)


def simple(own_ticks: st.SearchStrategy[dict[str, Any]], last: st.SearchStrategy[int]) -> st.SearchStrategy[Any]:
    """All schedules that are not made of others, and have a rate of a tick."""

    def build(kind: type[Any], **fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        arguments = st.fixed_dictionaries({"base_lr": rates, "last_epoch": last, **fields})
        return st.builds(lambda arguments, ticks: kind(**arguments, **ticks), arguments, own_ticks)

    def piecewise(boundaries: list[int], values: list[float], last_epoch: int, ticks: dict[str, Any]) -> Any:
        arguments = {"boundaries": boundaries, "values": values[: len(boundaries) + 1], "last_epoch": last_epoch}
        return optim.PiecewiseConstantSchedule(**arguments, **ticks)

    def warm_up(first: int, more: int, fields: dict[str, Any], ticks: dict[str, Any]) -> Any:
        total = min(first + more, LAST_EPOCH)
        return optim.WarmupCosineSchedule(warmup_steps=first, total_steps=total, **fields, **ticks)

    def one_cycle(fields: dict[str, Any], ticks: dict[str, Any]) -> Any:
        return optim.OneCycleLR(**fields, tick=ticks.get("tick", "step"))

    return st.one_of(
        build(optim.ConstantLR, factor=fractions, total_iters=counts),
        build(optim.StepLR, step_size=lengths, gamma=positive),
        build(optim.MultiStepLR, milestones=st.lists(counts, max_size=5), gamma=positive),
        build(optim.ExponentialLR, gamma=positive),
        build(
            optim.ExponentialDecayLR,
            decay_steps=lengths,
            decay_rate=positive,
            transition_begin=counts,
            staircase=st.booleans(),
            end_value=st.none() | rates,
        ),
        build(optim.CosineAnnealingLR, T_max=lengths, eta_min=rates),
        build(optim.CosineAnnealingWarmRestarts, T_0=lengths, T_mult=lengths, eta_min=rates),
        build(optim.PolynomialLR, total_iters=lengths, power=st.just(0.0) | positive),
        build(optim.LinearLR, start_factor=fractions, end_factor=fractions, total_iters=counts),
        build(
            optim.CyclicLR,
            max_lr=rates,
            step_size_up=lengths,
            step_size_down=st.none() | lengths,
            mode=st.sampled_from(["triangular", "triangular2", "exp_range"]),
            gamma=st.floats(0, 1, exclude_min=True),
        ),
        build(optim.CyclicLR, base_lr=st.just(0.0), max_lr=rates, mode=st.just("exp_range"), gamma=st.floats(1, 1e300)),
        build(optim.WarmupScheduler, warmup_epochs=counts, warmup_start_lr=rates),
        st.builds(
            warm_up,
            counts,
            lengths,
            st.fixed_dictionaries({"base_lr": rates, "warmup_start_lr": rates, "eta_min": rates, "last_epoch": last}),
            own_ticks,
        ),
        st.builds(
            one_cycle,
            st.fixed_dictionaries(
                {
                    "max_lr": rates,
                    "total_steps": lengths,
                    "pct_start": st.floats(0, 1, exclude_min=True, exclude_max=True),
                    "anneal_strategy": st.sampled_from(["cos", "linear"]),
                    "div_factor": positive,
                    "final_div_factor": positive,
                    "last_epoch": last,
                }
            ),
            own_ticks,
        ),
        st.builds(piecewise, ascending, st.lists(rates, min_size=6, max_size=6), last, own_ticks),
    )


def composed(inner: st.SearchStrategy[Any], own_ticks: Any, last: st.SearchStrategy[int]) -> st.SearchStrategy[Any]:
    """Schedules of schedules."""

    def sequence(parts: list[Any], borders: list[int], last_epoch: int, ticks: dict[str, Any]) -> Any:
        borders = borders[: len(parts) - 1]
        return optim.SequentialLR(parts[: len(borders) + 1], borders, last_epoch, **ticks)

    chains = st.builds(
        lambda parts, last_epoch, ticks: optim.ChainedScheduler(parts, last_epoch, **ticks),
        st.lists(inner, min_size=1, max_size=3),
        last,
        own_ticks,
    )
    return chains | st.builds(sequence, st.lists(inner, min_size=1, max_size=3), ascending, last, own_ticks)


nothing, zero = st.just({}), st.just(0)
parts = st.recursive(simple(nothing, zero), lambda inner: composed(inner, nothing, zero), max_leaves=5)
schedules = simple(ticks, counts) | composed(parts, ticks, counts)
plateaus = st.builds(
    lambda fields, ticks: optim.ReduceLROnPlateau(**fields, **ticks),
    st.fixed_dictionaries(
        {
            "base_lr": rates,
            "mode": st.sampled_from(["min", "max"]),
            "factor": st.floats(0, 1, exclude_max=True),
            "patience": counts,
            "threshold": st.floats(0, 1, exclude_max=True),
            "threshold_mode": st.sampled_from(["rel", "abs"]),
            "cooldown": counts,
            "min_lr": rates,
            "eps": rates,
            "last_epoch": counts,
        }
    ),
    ticks,
)


@settings(deadline=None)
@given(rate=rates | schedules | plateaus)
def test_what_comes_over_the_wire_is_equal_to_what_was_sent(rate: float | optim.Schedule) -> None:
    sent = rate_to_wire(rate).SerializeToString()
    assert rate_from_wire(schedule_pb2.LearningRate.FromString(sent), "lr") == rate


@settings(deadline=None, max_examples=300)
@given(schedule=schedules, tick=epochs)
def test_rate_is_within_float32_and_not_negative_at_any_tick(schedule: optim.Schedule, tick: int) -> None:
    assert 0 <= schedule.rate(tick) <= FLOAT32_MAX


@settings(deadline=None)
@given(schedule=plateaus, losses=st.lists(st.floats(), max_size=30))
def test_rate_of_a_plateau_never_rises_or_is_negative(schedule: optim.ReduceLROnPlateau, losses: list[float]) -> None:
    state = schedule.begin()
    for loss in losses:
        before, state = state, schedule.observe(state, loss)
        assert 0 <= state.rate <= before.rate
        assert not math.isnan(state.best)


def message(text: str) -> schedule_pb2.LearningRate:
    return json_format.Parse(text, schedule_pb2.LearningRate())


STEP_LR = '{"baseLr": 0.1, "stepSize": 5, "gamma": 0.5}'
NESTED = '"schedulers": [{"stepLr": %s}, {"chainedScheduler": {"schedulers": [{"stepLr": %s}]}}]'


def test_what_a_message_leaves_out_besides_numbers_has_its_default() -> None:
    assert rate_from_wire(message(f'{{"stepLr": {STEP_LR}}}'), "lr") == optim.StepLR(0.1, 5, 0.5)
    cyclic = message('{"cyclicLr": {"maxLr": 0.1, "stepSizeUp": 5, "gamma": 1}}')
    assert rate_from_wire(cyclic, "lr") == optim.CyclicLR(0, 0.1, 5)


def test_whole_number_may_be_given_for_a_rate() -> None:
    assert rate_from_wire(rate_to_wire(1), "lr") == 1.0


@pytest.mark.parametrize(
    ("text", "field", "says"),
    [
        ("{}", "lr", "no learning rate is set"),
        ('{"value": -0.1}', "lr", "at least 0"),
        ('{"value": "NaN"}', "lr", "at least 0"),
        ('{"value": 0.1, "lastEpoch": 3}', "lr.last_epoch", "has no ticks"),
        ('{"value": 0.1, "tick": "TICK_STEP"}', "lr.tick", "has no ticks"),
        ('{"stepLr": {"baseLr": 0.1, "stepSize": 5}}', "lr.step_lr.gamma", "greater than 0"),
        ('{"stepLr": {"baseLr": 0.1, "gamma": 1}}', "lr.step_lr.step_size", "at least 1"),
        (f'{{"stepLr": {STEP_LR}, "tick": 7}}', "lr.tick", "one of TICK_STEP, TICK_MANUAL"),
        (f'{{"stepLr": {STEP_LR}, "lastEpoch": {2**63}}}', "lr.last_epoch", "at most"),
        (f'{{"stepLr": {STEP_LR}, "stepsPerEpoch": {2**63}}}', "lr.steps_per_epoch", "at most"),
        (
            '{"multiStepLr": {"gamma": 1, "milestones": [3, 18446744073709551615]}}',
            "lr.multi_step_lr.milestones[1]",
            "",
        ),
        ('{"cosineAnnealingLr": {}}', "lr.cosine_annealing_lr.t_max", "at least 1"),
        ('{"cyclicLr": {"mode": 9, "stepSizeUp": 5, "gamma": 1}}', "lr.cyclic_lr.mode", "one of MODE_TRIANGULAR, "),
        ('{"oneCycleLr": {"maxLr": 1}}', "lr.one_cycle_lr.total_steps", "at least 1"),
        ('{"oneCycleLr": {"totalSteps": 5}, "stepsPerEpoch": 2}', "lr.steps_per_epoch", "OneCycleLR"),
        ('{"reduceLrOnPlateau": {"factor": 1}}', "lr.reduce_lr_on_plateau.factor", "[0, 1)"),
        ('{"sequentialLr": {}}', "lr.sequential_lr.schedulers", "at least one"),
        ('{"sequentialLr": {"schedulers": [{}]}}', "lr.sequential_lr.schedulers[0]", "no learning rate is set"),
        ('{"sequentialLr": {"schedulers": [{"value": 1}]}}', "lr.sequential_lr.schedulers[0]", "must be a schedule"),
        (f'{{"sequentialLr": {{{NESTED % (STEP_LR, STEP_LR)}}}}}', "lr.sequential_lr.milestones", "one fewer"),
        (
            f'{{"sequentialLr": {{{NESTED % (STEP_LR, "{}")}}}}}',
            "lr.sequential_lr.schedulers[1].chained_scheduler.schedulers[0].step_lr.step_size",
            "at least 1",
        ),
        (
            f'{{"chainedScheduler": {{"schedulers": [{{"stepLr": {STEP_LR}, "tick": "TICK_MANUAL"}}]}}}}',
            "lr.chained_scheduler.schedulers[0]",
            "set it on the ChainedScheduler",
        ),
        (
            '{"chainedScheduler": {"schedulers": [{"reduceLrOnPlateau": {}}]}}',
            "lr.chained_scheduler.schedulers[0]",
            "ReduceLROnPlateau",
        ),
    ],
)
def test_message_that_cannot_be_is_refused_with_the_path_of_its_field(text: str, field: str, says: str) -> None:
    with pytest.raises(KedgeError) as caught:
        rate_from_wire(message(text), "lr")
    assert (caught.value.reason, caught.value.metadata["field"]) == ("INVALID_CONFIGURATION", field)
    assert says in str(caught.value)


def wide(count: int) -> schedule_pb2.LearningRate:
    outer = schedule_pb2.LearningRate()
    for _ in range(count):
        outer.chained_scheduler.schedulers.add().step_lr.SetInParent()
    return outer


def deep(levels: int) -> schedule_pb2.LearningRate:
    outer = schedule_pb2.LearningRate(step_lr=schedule_pb2.StepLR(base_lr=1, step_size=1, gamma=1))
    for _ in range(levels):
        outer = schedule_pb2.LearningRate(sequential_lr=schedule_pb2.SequentialLR(schedulers=[outer]))
    return outer


def test_message_of_too_many_schedules_is_refused_before_any_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(optim.StepLR, "_check", made.append)
    monkeypatch.setattr(Composite, "_check", made.append)
    of_wide = schedule_pb2.LearningRate()
    of_wide.chained_scheduler.schedulers.extend([wide(30), wide(30), wide(30)])
    for hostile in (wide(64), wide(100_000), of_wide, deep(17), deep(40)):
        with pytest.raises(KedgeError) as caught:
            rate_from_wire(hostile, "groups[2].lr")
        assert caught.value.metadata["field"] == "groups[2].lr"
        assert "64 schedules and 16 levels" in str(caught.value)
    assert not made


def test_message_of_too_many_bytes_is_refused() -> None:
    long = optim.PiecewiseConstantSchedule(boundaries=range(2**60, 2**60 + 999), values=[0.5] * 1000)
    assert rate_from_wire(rate_to_wire(long), "lr") == long
    with pytest.raises(KedgeError, match="it must be at most 32768") as caught:
        rate_from_wire(rate_to_wire(optim.SequentialLR([long, long], [5])), "lr")
    assert caught.value.metadata["field"] == "lr"


def test_message_of_as_many_levels_as_are_allowed_is_taken() -> None:
    schedule = rate_from_wire(deep(16), "lr")
    assert isinstance(schedule, optim.SequentialLR)
    assert schedule.rate(5) == 1


def test_schedule_of_a_type_of_the_users_own_cannot_travel() -> None:
    class Own(optim.StepLR):
        pass

    with pytest.raises(TypeError, match=r"only those of kedge\.optim can travel"):
        rate_to_wire(Own())
