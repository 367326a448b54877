"""Learning rates: numbers, schedules that the server ticks, schedulers that tick by hand, and changes on the way."""

from typing import Any

import brainstate
import braintools
import jax.numpy as jnp
import numpy as np
import pytest

import kedge
from kedge import optim
from kedge.adapters import brainstate as kb
from kedge.transport.values import RecordedChange


@pytest.fixture
def weights() -> dict[str, brainstate.ParamState]:
    return {"w": brainstate.ParamState(jnp.array([0.0]))}


ONE = {"w": jnp.array([1.0])}


def sgd(client: kedge.Client, lr: Any, **target: Any) -> kb.Lookahead:
    """Plain SGD, so that a gradient of one moves the weight by the rate."""
    return kb.Lookahead(optim.SGD(), alpha=1.0, lr=lr, client=client, **target)


def moves(optimizer: Any, weights: Any, count: int, *, scheduler: Any = None) -> list[float]:
    """By how much each update moved the weight; the scheduler ticks after each."""
    found = []
    for _ in range(count):
        before = float(weights["w"].value[0])
        optimizer.update(ONE)
        found.append(before - float(weights["w"].value[0]))
        if scheduler is not None:
            scheduler.step()
    return found


@pytest.mark.parametrize("home", [kb, braintools.optim], ids=["kedge", "braintools"])
def test_a_scheduler_that_ticks_by_hand_sets_the_rate_of_the_next_update(
    any_client: kedge.Client, weights: Any, home: Any
) -> None:
    scheduler = home.StepLR(base_lr=0.5, step_size=2, gamma=0.5)
    with sgd(any_client, scheduler).register_trainable_weights(weights) as optimizer:
        assert moves(optimizer, weights, 5, scheduler=scheduler) == [0.5, 0.5, 0.25, 0.25, 0.125]
        assert optimizer.lr is scheduler
        assert optimizer.base_lr == 0.5
        assert scheduler.get_last_lr() == [0.125]


def test_only_changes_of_the_rate_reach_the_run(client: kedge.Client, weights: Any) -> None:
    scheduler = kb.StepLR(base_lr=0.5, step_size=2, gamma=0.5)
    with sgd(client, scheduler).register_trainable_weights(weights) as optimizer:
        moves(optimizer, weights, 5, scheduler=scheduler)
        assert optimizer.run.info().changes == (
            RecordedChange(3, "", optim.controls.Change(lr=0.25)),
            RecordedChange(5, "", optim.controls.Change(lr=0.125)),
        )


def test_a_schedule_of_kedge_is_ticked_by_the_server(any_client: kedge.Client, weights: Any) -> None:
    schedule = optim.StepLR(base_lr=0.5, step_size=1, gamma=0.5, steps_per_epoch=2)
    with sgd(any_client, schedule) as optimizer:
        assert (optimizer.current_lr, optimizer.base_lr, optimizer.lr) == (0.5, 0.5, schedule)
        optimizer.register_trainable_weights(weights)
        assert moves(optimizer, weights, 5) == [0.5, 0.5, 0.25, 0.25, 0.125]
        assert optimizer.current_lr == 0.125
        assert optimizer.get_last_lr() == [0.125]
        assert optimizer.run.info().changes == ()


def test_a_schedule_of_kedge_can_tick_by_hand_for_all_workers(client: kedge.Client, weights: Any) -> None:
    schedule = optim.ExponentialLR(base_lr=0.5, gamma=0.5, tick="manual")
    with sgd(client, schedule).register_trainable_weights(weights) as optimizer:
        optimizer.run.tick_schedule(to=1)
        optimizer.run.tick_schedule(to=1)
        assert moves(optimizer, weights, 1) == [0.25]


def test_the_losses_reach_a_plateau_schedule(client: kedge.Client, weights: Any) -> None:
    schedule = optim.ReduceLROnPlateau(base_lr=0.5, factor=0.5, patience=0)
    with sgd(client, schedule).register_trainable_weights(weights) as optimizer:
        assert optimizer.current_lr == 0.5
        for _ in range(3):
            optimizer.update(ONE, loss=1.0)
        assert optimizer.current_lr == 0.125


def test_a_plateau_scheduler_cannot_tick_on_a_worker() -> None:
    with pytest.raises(TypeError, match=r"give kedge\.optim\.ReduceLROnPlateau as lr"):
        kb.ReduceLROnPlateau(base_lr=0.5)


def test_a_number_is_the_rate(client: kedge.Client, weights: Any) -> None:
    optimizer = sgd(client, 1)
    assert (optimizer.current_lr, optimizer.base_lr, optimizer.lr.get_last_lr()) == (1.0, 1.0, [1.0])
    with optimizer.register_trainable_weights(weights):
        assert moves(optimizer, weights, 2) == [1.0, 1.0]
        assert optimizer.get_last_lr() == [1.0]


def test_the_current_rate_can_be_set(any_client: kedge.Client, weights: Any) -> None:
    with sgd(any_client, 0.5).register_trainable_weights(weights) as optimizer:
        optimizer.current_lr = 0.25
        assert optimizer.run.status().learning_rate == 0.25
        assert (optimizer.current_lr, optimizer.base_lr, optimizer.lr.get_last_lr()) == (0.25, 0.5, [0.25])
        assert optimizer.param_groups[0]["lr"].value == 0.25
        assert moves(optimizer, weights, 1) == [0.25]
        optimizer.current_lr = jnp.float32(0.125)
        assert moves(optimizer, weights, 1) == [0.125]


def test_a_rate_that_is_set_before_registration_holds_from_the_first_step(client: kedge.Client, weights: Any) -> None:
    optimizer = sgd(client, 0.5)
    optimizer.current_lr = 0.25
    assert optimizer.current_lr == 0.25
    with optimizer.register_trainable_weights(weights):
        assert moves(optimizer, weights, 1) == [0.25]


def test_setting_the_rate_takes_the_place_of_a_schedule_of_kedge(client: kedge.Client, weights: Any) -> None:
    with sgd(client, optim.ExponentialLR(0.5, 0.5)).register_trainable_weights(weights) as optimizer:
        moves(optimizer, weights, 1)
        optimizer.lr_apply(lambda rate: rate / 2)
        assert moves(optimizer, weights, 2) == [0.125, 0.125]


@pytest.mark.parametrize("home", [kb, braintools.optim], ids=["kedge", "braintools"])
def test_the_scheduler_takes_the_rate_back_when_it_ticks(client: kedge.Client, weights: Any, home: Any) -> None:
    scheduler = home.ExponentialLR(base_lr=0.5, gamma=0.5)
    with sgd(client, scheduler).register_trainable_weights(weights) as optimizer:
        optimizer.current_lr = 2.0
        assert moves(optimizer, weights, 1) == [2.0]
        scheduler.step()
        assert moves(optimizer, weights, 1) == [0.25]


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_a_rate_that_can_be_none_is_refused_and_changes_nothing(
    client: kedge.Client, weights: Any, value: float
) -> None:
    with sgd(client, 0.5).register_trainable_weights(weights) as optimizer:
        with pytest.raises(ValueError, match="lr is "):
            optimizer.current_lr = value
        assert (optimizer.current_lr, optimizer.lr.get_last_lr()) == (0.5, [0.5])


def test_a_run_that_exists_shows_its_rate_and_keeps_it(client: kedge.Client, weights: Any) -> None:
    with sgd(client, 0.5, run="shared").register_trainable_weights(weights) as first:
        first.current_lr = 0.125
    with sgd(client, 0.5, run="shared").register_trainable_weights(weights) as optimizer:
        assert optimizer.param_groups[0]["lr"].value == 0.125
        assert moves(optimizer, weights, 1) == [0.125]
        optimizer.param_groups[0]["lr"].value = 0.5
        assert moves(optimizer, weights, 1) == [0.5]


def test_a_rate_that_is_set_before_registration_wins_over_that_of_the_run(client: kedge.Client, weights: Any) -> None:
    with sgd(client, 0.5, run="shared").register_trainable_weights(weights) as first:
        first.current_lr = 0.125
    optimizer = sgd(client, 0.5, run="shared")
    optimizer.param_groups[0]["lr"].value = 0.25
    with optimizer.register_trainable_weights(weights):
        assert moves(optimizer, weights, 1) == [0.25]


def test_setting_the_rate_wins_over_one_that_another_worker_set(client: kedge.Client, weights: Any) -> None:
    with sgd(client, 0.5, run="shared").register_trainable_weights(weights) as optimizer:
        client.get_run("shared").set_hyperparameters(lr=0.25)
        assert optimizer.current_lr == 0.25
        assert moves(optimizer, weights, 1) == [0.25]
        optimizer.current_lr = 0.5
        assert moves(optimizer, weights, 1) == [0.5]


def test_a_rate_that_was_passed_on_is_not_passed_on_again(client: kedge.Client, weights: Any) -> None:
    scheduler = kb.ExponentialLR(2.0, 0.5)
    with sgd(client, scheduler, run="shared").register_trainable_weights(weights) as optimizer:
        other = client.get_run("shared")
        scheduler.step()
        assert moves(optimizer, weights, 1) == [1.0]
        other.set_hyperparameters(lr=0.25)
        assert moves(optimizer, weights, 1) == [0.25]
        optimizer.current_lr = 0.5
        other.set_hyperparameters(lr=0.125)
        assert moves(optimizer, weights, 1) == [0.125]


def test_the_rate_of_the_first_group_is_the_one_that_was_set_last(client: kedge.Client, weights: Any) -> None:
    with sgd(client, 0.5).register_trainable_weights(weights) as optimizer:
        optimizer.current_lr = 0.25
        optimizer.param_groups[0]["lr"].value = 0.125
        assert moves(optimizer, weights, 1) == [0.125]


@pytest.mark.parametrize("home", [kb, braintools.optim], ids=["kedge", "braintools"])
def test_lr_apply_goes_by_the_rate_of_the_schedule(client: kedge.Client, weights: Any, home: Any) -> None:
    theirs = braintools.optim.Adam(braintools.optim.StepLR(0.5))
    with sgd(client, home.StepLR(0.5)).register_trainable_weights(weights) as optimizer:
        for factor in (0.5, 0.25):
            theirs.lr_apply(lambda rate, factor=factor: rate * factor)
            optimizer.lr_apply(lambda rate, factor=factor: rate * factor)
            assert optimizer.current_lr == theirs.current_lr
        assert moves(optimizer, weights, 1) == [0.125]


def test_a_scheduler_that_was_added_is_told_of_and_does_not_give_the_rate(client: kedge.Client, weights: Any) -> None:
    theirs = braintools.optim.Adam(0.5)
    with sgd(client, 0.5).register_trainable_weights(weights) as optimizer:
        for one in (theirs, optimizer):
            one.add_scheduler(kb.StepLR(0.125))
            assert one.get_last_lr() == [0.125]
            assert len(one.schedulers) == 1
        assert moves(optimizer, weights, 1) == [0.5]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("StepLR", {"base_lr": 0.5, "step_size": 3, "gamma": 0.5}),
        ("ExponentialLR", {"base_lr": 0.5, "gamma": 0.9}),
        ("MultiStepLR", {"base_lr": 0.5, "milestones": [2, 5], "gamma": 0.5}),
        ("CosineAnnealingLR", {"base_lr": 0.5, "T_max": 8}),
        ("ConstantLR", {"base_lr": 0.5, "factor": 0.5, "total_iters": 4}),
        ("OneCycleLR", {"max_lr": 0.5, "total_steps": 12}),
    ],
)
def test_a_scheduler_goes_as_that_of_braintools_of_the_same_name(name: str, arguments: dict[str, Any]) -> None:
    ours, theirs = getattr(kb, name)(**arguments), getattr(braintools.optim, name)(**arguments)
    for _ in range(11):
        np.testing.assert_allclose(ours.get_last_lr(), theirs.get_last_lr(), rtol=1e-5, atol=1e-8)
        ours.step()
        theirs.step()
    ours.step(4)
    theirs.step(4)
    np.testing.assert_allclose(ours.get_last_lr(), theirs.get_last_lr(), rtol=1e-5, atol=1e-8)


def test_schedulers_are_made_of_schedulers() -> None:
    chained = kb.ChainedScheduler([kb.StepLR(0.5, step_size=2, gamma=0.5), optim.ExponentialLR(1.0, gamma=0.5)])
    assert [chained.step() or chained.get_last_lr()[0] for _ in range(3)] == [0.25, 0.0625, 0.03125]


def test_a_scheduler_goes_on_from_its_state_dict(client: kedge.Client, weights: Any) -> None:
    first = kb.ExponentialLR(0.5, 0.5)
    first.step()
    first.apply(lambda rate: rate * 4)
    second = kb.ExponentialLR(0.5, 0.5)
    second.load_state_dict(first.state_dict())
    assert second.get_last_lr() == [1.0]
    with sgd(client, second).register_trainable_weights(weights) as optimizer:
        assert moves(optimizer, weights, 1) == [1.0]
    second.step_epoch()
    assert second.get_last_lr() == [0.125]


def test_a_worker_whose_scheduler_stands_elsewhere_opens_the_same_run(client: kedge.Client, weights: Any) -> None:
    with sgd(client, kb.ExponentialLR(0.5, 0.5), run="shared").register_trainable_weights(weights):
        resumed = kb.ExponentialLR(0.5, 0.5)
        resumed.step(3)
        with sgd(client, resumed, run="shared").register_trainable_weights(weights) as optimizer:
            assert optimizer.current_lr == 0.0625


@pytest.mark.parametrize(
    ("arguments", "named"), [({"tick": "manual"}, "tick"), ({"steps_per_epoch": 2}, "steps_per_epoch")]
)
def test_what_is_for_the_server_to_tick_is_refused_of_a_scheduler(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=rf"^{named} is for schedules that the server ticks: .* kedge\.optim\.StepLR"):
        kb.StepLR(0.5, **arguments)


def test_a_scheduler_refuses_a_tick_before_the_first() -> None:
    scheduler = kb.StepLR(0.5)
    with pytest.raises(ValueError, match="epoch is -1"):
        scheduler.step(-1)
    assert scheduler.last_epoch == 0


@pytest.mark.parametrize("kind", [kb.AdaBelief, lambda lr, client: kb.Lookahead(optim.SGD(), lr=lr, client=client)])
@pytest.mark.parametrize(
    ("lr", "error", "message"),
    [
        (-1.0, ValueError, "lr is -1.0"),
        (True, TypeError, "lr is True"),
        ("fast", TypeError, "lr is 'fast'"),
        (lambda step: 0.1, TypeError, "only the schedules of kedge.optim can travel"),
        (kb.StepLR, TypeError, "lr is "),
    ],
    ids=["negative", "bool", "text", "function", "constructor"],
)
def test_what_is_no_rate_is_refused(
    client: kedge.Client, kind: Any, lr: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        kind(lr=lr, client=client)
    assert client.list_runs() == []


def test_a_name_that_is_no_schedule_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Adam'"):
        kb.Adam  # noqa: B018
