"""Learning rates in time: when they tick, what a plateau sees, and what groups have for themselves."""

import math
import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kedge import optim
from kedge.optim.controls import Change, Controls, RateState

HALVES = {"base_lr": 1.0, "step_size": 1, "gamma": 0.5}


def rates_by_step(state: RateState, count: int) -> list[float]:
    rates = []
    for _ in range(count):
        rates.append(state.rate)
        state = state.after_step(None, 1)
    return rates


def with_losses(state: RateState, losses: list[tuple[float | None, int]]) -> RateState:
    for loss, example_count in losses:
        state = state.after_step(loss, example_count)
    return state


def test_number_stays() -> None:
    assert rates_by_step(RateState.begin(0.25), 3) == [0.25] * 3


def test_schedule_ticks_once_a_step() -> None:
    assert rates_by_step(RateState.begin(optim.StepLR(**HALVES)), 4) == [1.0, 0.5, 0.25, 0.125]


def test_schedule_ticks_once_in_steps_per_epoch() -> None:
    rates = rates_by_step(RateState.begin(optim.StepLR(**HALVES, steps_per_epoch=3)), 7)
    assert rates == [1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.25]


def test_one_cycle_ticks_once_a_step_whatever_its_epochs() -> None:
    schedule = optim.OneCycleLR(1.0, epochs=2, steps_per_epoch=2, pct_start=0.5, anneal_strategy="linear", div_factor=2)
    # Up from 1/2 to 1 in two steps, down to 1/10000 in two more.
    assert rates_by_step(RateState.begin(schedule), 5) == pytest.approx([0.5, 0.75, 1.0, 0.50005, 1e-4])


def test_schedule_begins_at_last_epoch() -> None:
    assert rates_by_step(RateState.begin(optim.StepLR(**HALVES, last_epoch=3, steps_per_epoch=2)), 3) == [
        0.125,
        0.125,
        0.0625,
    ]


def test_manual_schedule_ticks_by_hand_alone() -> None:
    state = RateState.begin(optim.StepLR(**HALVES, tick="manual"))
    assert rates_by_step(state, 5) == [1.0] * 5
    assert state.after_tick().after_tick().rate == 0.25


def test_tick_by_hand_to_a_tick_that_was_before_changes_nothing() -> None:
    state = RateState.begin(optim.StepLR(**HALVES, tick="manual")).after_tick(to=3)
    assert (state.tick, state.rate) == (3, 0.125)
    assert state.after_tick(to=3) == state
    assert state.after_tick(to=1) == state


PLATEAU: dict[str, Any] = {"base_lr": 1.0, "factor": 0.5, "patience": 1, "threshold": 0.0}


def test_plateau_reduces_the_rate_after_more_bad_ticks_than_its_patience() -> None:
    state = RateState.begin(optim.ReduceLROnPlateau(**PLATEAU))
    rates = []
    for loss in (5.0, 4.0, 4.0, 4.0, 3.0, 4.0, 4.0):
        state = state.after_step(loss, 1)
        rates.append(state.rate)
    assert rates == [1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.25]


def test_plateau_sees_the_mean_loss_since_the_last_tick_weighted_by_examples() -> None:
    begin = RateState.begin(optim.ReduceLROnPlateau(**PLATEAU, steps_per_epoch=3))
    # (3 * 1 + 1 * 5 + 2 * 2) / 6 = 2; in the second tick (2 * 4 + 1 * 1) / 3 = 3.
    first = with_losses(begin, [(1.0, 3), (5.0, 1), (2.0, 2)])
    assert first.plateau is not None
    assert first.plateau.best == 2.0
    second = with_losses(first, [(4.0, 2), (1.0, 1), (None, 7)])
    assert second.plateau is not None
    assert (second.plateau.best, second.plateau.bad_tick_count) == (2.0, 1)


def test_losses_of_one_tick_are_not_seen_again_in_the_next() -> None:
    begin = RateState.begin(optim.ReduceLROnPlateau(**PLATEAU, tick="manual"))
    state = with_losses(begin, [(8.0, 1), (8.0, 1)]).after_tick()
    state = with_losses(state, [(1.0, 1)]).after_tick()
    assert state.plateau is not None
    assert state.plateau.best == 1.0


def test_tick_without_a_loss_is_not_a_bad_one() -> None:
    state = with_losses(RateState.begin(optim.ReduceLROnPlateau(**PLATEAU)), [(1.0, 1)] + [(None, 1)] * 50)
    assert state.rate == 1.0
    assert state.tick == 51


def test_repeated_tick_by_hand_does_not_let_a_plateau_see_more() -> None:
    begin = RateState.begin(optim.ReduceLROnPlateau(**PLATEAU, tick="manual"))
    state = with_losses(with_losses(begin, [(2.0, 1)]).after_tick(to=1), [(1.0, 1)])
    assert state.after_tick(to=1) == state


def test_reduction_by_no_more_than_eps_is_not_made() -> None:
    for eps, rate in ((0.5, 1.0), (0.499, 0.5)):
        state = RateState.begin(optim.ReduceLROnPlateau(**PLATEAU, eps=eps))
        assert with_losses(state, [(1.0, 1)] * 3).rate == rate


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_loss_that_is_not_finite_is_not_seen(loss: float) -> None:
    begin = RateState.begin(optim.ReduceLROnPlateau(**PLATEAU, steps_per_epoch=2))
    state = with_losses(begin, [(3.0, 4), (loss, 4)])
    assert state.plateau is not None
    assert state.plateau.best == 3.0


@pytest.fixture(scope="module")
def torch() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("torch")


losses = st.lists(st.one_of(st.sampled_from([1.0, 1.00005, 2.0, 0.5, -1.0]), st.floats(-1e3, 1e3)), max_size=200)


@settings(deadline=None)
@given(
    losses=losses,
    options=st.fixed_dictionaries(
        {
            "mode": st.sampled_from(["min", "max"]),
            "factor": st.sampled_from([0.1, 0.5, 0.9]),
            "patience": st.integers(0, 4),
            "threshold": st.sampled_from([0.0, 1e-4, 0.1]),
            "threshold_mode": st.sampled_from(["rel", "abs"]),
            "cooldown": st.integers(0, 4),
            "min_lr": st.sampled_from([0.0, 1e-3, 0.5]),
            "eps": st.sampled_from([0.0, 1e-8, 0.02]),
        }
    ),
)
def test_plateau_is_that_of_pytorch_to_the_last_bit(torch: Any, losses: list[float], options: dict[str, Any]) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    reference = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, **options)
    state = RateState.begin(optim.ReduceLROnPlateau(0.1, **options))
    for loss in losses:
        reference.step(loss)
        state = state.after_step(loss, 1)
        assert state.plateau is not None
        assert state.rate == optimizer.param_groups[0]["lr"]
        assert state.plateau[1:] == (reference.best, reference.num_bad_epochs, reference.cooldown_counter)


def controls(lr: float | optim.Schedule, *groups: optim.Group) -> Controls:
    return Controls.begin(optim.SGD(lr=lr).spec(), groups)


def lrs(state: Controls) -> list[float]:
    return [values.lr for values in state.values()]


def test_group_ticks_by_its_own_schedule_or_with_the_run() -> None:
    state = controls(
        optim.StepLR(**HALVES),
        optim.Group("own", lr=optim.StepLR(8.0, 1, 0.5, steps_per_epoch=2)),
        optim.Group("fixed", lr=3.0),
        optim.Group("the run's"),
    )
    seen = [lrs(state)]
    for _ in range(2):
        state = state.after_step(None, 1)
        seen.append(lrs(state))
    assert seen == [[1.0, 8.0, 3.0, 1.0], [0.5, 8.0, 3.0, 0.5], [0.25, 4.0, 3.0, 0.25]]
    assert state.learning_rate == 0.25


def test_groups_plateau_sees_the_losses_of_the_run() -> None:
    state = controls(1.0, optim.Group("own", lr=optim.ReduceLROnPlateau(**PLATEAU)))
    for _ in range(3):
        state = state.after_step(1.0, 4)
    assert lrs(state) == [1.0, 0.5]


def test_new_schedule_begins_at_its_first_tick_and_leaves_the_others_alone() -> None:
    state = controls(optim.StepLR(**HALVES), optim.Group("own", lr=optim.StepLR(8.0, 1, 0.5)))
    state = state.after_step(None, 1).changed("own", Change(lr=optim.StepLR(100.0, 1, 0.1)), step=2)
    assert lrs(state) == [0.5, 100.0]
    state = state.after_step(None, 1).changed("", Change(lr=2.0), step=3)
    assert lrs(state) == [2.0, pytest.approx(10.0)]
    assert [(change.step, change.group) for change in state.changes] == [(2, "own"), (3, "")]


def test_schedule_that_is_in_force_goes_on_when_it_is_set_again() -> None:
    state = controls(optim.StepLR(**HALVES)).after_step(None, 1)
    again = state.changed("", Change(lr=optim.StepLR(**HALVES)), step=2)
    assert again is state
    assert again.learning_rate == 0.5


def test_tick_by_hand_is_of_one_schedule() -> None:
    manual = optim.StepLR(**HALVES, tick="manual")
    state = controls(manual, optim.Group("own", lr=manual))
    assert lrs(state.ticked("")) == [0.5, 1.0]
    assert lrs(state.ticked("own", 3)) == [1.0, 0.125]
    assert lrs(state.ticked("own", 3).ticked("own", 2)) == [1.0, 0.125]


@pytest.mark.parametrize(
    ("lr", "group", "says"),
    [
        (0.1, "", r"^lr is 0.1: it does not tick by hand"),
        (optim.StepLR(), "", r"^lr is StepLR.*tick='manual'"),
        (optim.StepLR(tick="manual"), "own", r"^lr is 0.3: it does not tick by hand"),
        (optim.StepLR(tick="manual"), "shared", r"^group 'shared' has the run's rate"),
        (optim.StepLR(tick="manual"), "none", r"^group 'none' is not of this run"),
    ],
)
def test_tick_by_hand_of_what_has_none_is_refused(lr: float | optim.Schedule, group: str, says: str) -> None:
    state = controls(lr, optim.Group("own", lr=0.3), optim.Group("shared", weight_decay=0.1))
    with pytest.raises(ValueError, match=says):
        state.ticked(group)


@pytest.mark.parametrize("to", [-1, 2**63, 2**64 - 1, 2**70])
def test_tick_out_of_range_is_refused(to: int) -> None:
    state = controls(optim.StepLR(tick="manual"))
    with pytest.raises(ValueError, match=f"^to is {to}: it must be at "):
        state.ticked("", to)


@pytest.mark.parametrize("to", [1.5, "x", True, 3.0])
def test_tick_that_is_no_whole_number_is_refused(to: Any) -> None:
    state = controls(optim.StepLR(tick="manual"))
    with pytest.raises(TypeError, match=f"^to is {to!r}: it must be a whole number"):
        state.ticked("", to)


@pytest.mark.parametrize("group", [None, 0, optim.Group("own")])
def test_group_that_is_no_name_is_refused(group: Any) -> None:
    state = controls(optim.StepLR(tick="manual"), optim.Group("own"))
    with pytest.raises(TypeError, match=r"^group is "):
        state.changed(group, Change(lr=0.5), step=1)
    with pytest.raises(TypeError, match=r"^group is "):
        state.ticked(group)


def test_there_is_a_last_tick() -> None:
    state = controls(optim.StepLR(**HALVES, tick="manual")).ticked("", 2**63 - 2).ticked("")
    assert state.rate_state("").tick == 2**63 - 1
    assert state.ticked("", np.int64(2**63 - 1)) == state
    with pytest.raises(ValueError, match=r"^tick is 9223372036854775807: "):
        state.ticked("")


def test_clip_that_is_off_already_is_not_switched_off_again() -> None:
    off = Change(grad_clip_norm=math.inf, grad_clip_value=math.inf)
    state = controls(0.1)
    assert state.changed("", off, step=1) is state
    clipped = state.changed("", Change(grad_clip_norm=2.0), step=1)
    free = clipped.changed("", off, step=2)
    assert (clipped.values()[0].grad_clip_norm, free.values()[0].grad_clip_norm) == (2.0, None)
    assert free.changed("", off, step=3) is free
    assert [record.step for record in free.changes] == [1, 2]


def test_group_without_a_clip_keeps_none_when_the_run_gets_one() -> None:
    state = controls(0.1, optim.Group("own")).changed("own", Change(grad_clip_norm=math.inf), step=1)
    state = state.changed("", Change(grad_clip_norm=2.0), step=2)
    assert [values.grad_clip_norm for values in state.values()] == [2.0, None]
    assert state.changed("own", Change(grad_clip_norm=math.inf), step=3) is state


@pytest.mark.parametrize("group", ["", "own"])
def test_change_is_the_same_whatever_library_its_numbers_are_of(group: str) -> None:
    begin = controls(0.1, optim.Group("own"))
    want = begin.changed(group, Change(0.5, 2.0, 4.0, 8.0), step=1)
    given = Change(np.float32(0.5), np.int64(2), np.array(4), np.longdouble(8))
    got = begin.changed(group, given, step=1)
    assert (got, repr(got)) == (want, repr(want))
    assert want.changed(group, given, step=2) is want
