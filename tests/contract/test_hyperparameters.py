"""Parameter groups, and hyperparameters that change while a run goes on."""

import math

import numpy as np
import pytest

import kedge
from kedge import optim
from kedge.optim.controls import Change, RecordedChange

ALONE = kedge.Synchronous(quorum=1)
SGD = optim.SGD(lr=1.0)
LAYERS = ("a.weight", "a.bias", "b.weight", "b.bias")


def layers(*values):
    return {name: np.float32(value) for name, value in zip(LAYERS, values, strict=True)}


def step(worker, *gradients, **options):
    """The four weights after a step."""
    weights = worker.step(layers(*gradients), **options)
    return [weights[name].item() for name in LAYERS]


@pytest.fixture
def joined(new_run):
    """Makes a run and a worker of it that has pulled."""
    workers = []

    def make(optimizer, groups=(), weights=(1, 1, 1, 1)):
        run = new_run(optimizer, ALONE, layers(*weights), groups)
        worker = run.join()
        workers.append(worker)
        worker.pull()
        return run, worker

    yield make
    for worker in workers:
        worker.close()


def test_groups_have_rates_and_decays_of_their_own(joined):
    groups = [optim.Group("*.bias", lr=0.5, weight_decay=0.0), optim.Group("b.*", lr=0.25)]
    _, worker = joined(optim.SGD(lr=1.0, weight_decay=0.5), groups)

    # w - lr (g + decay w): 1 - (1 + .5), 1 - .5 * 1, 1 - .25 (1 + .5), and "b.bias" is of the first group that fits
    assert step(worker, 1, 1, 1, 1) == [-0.5, 0.5, 0.625, 0.5]


def test_a_group_has_a_schedule_with_ticks_of_its_own(joined):
    run, worker = joined(SGD, [optim.Group("*.bias", lr=optim.StepLR(1.0, 2, 0.5))])
    walked = [step(worker, 0, 1, 0, 0)[1] for _ in range(5)]

    assert walked == [0, -1, -1.5, -2, -2.25]  # rates 1, 1, 1/2, 1/2, 1/4
    assert run.status().learning_rate == 1.0


def test_norm_clips_cover_the_tensors_that_share_them(joined):
    groups = [optim.Group("a.*", grad_clip_norm=1.0), optim.Group("b.bias", grad_clip_norm=math.inf)]
    _, worker = joined(optim.SGD(lr=1.0, grad_clip_norm=10.0), groups, (0, 0, 0, 0))

    # (3, 4) has the norm 5 and is brought to 1; 20 alone is brought to the run's 10; 30 is not clipped at all
    assert step(worker, 3, 4, 20, 30) == pytest.approx([-0.6, -0.8, -10, -30], rel=1e-6)


def test_value_clips_of_groups_take_the_runs_place(joined):
    groups = [optim.Group("a.weight", grad_clip_value=2.0), optim.Group("a.bias", grad_clip_value=math.inf)]
    _, worker = joined(optim.SGD(lr=1.0, grad_clip_value=1.0), groups, (0, 0, 0, 0))

    assert step(worker, 5, 5, 5, -0.5) == [-2, -5, -1, 0.5]


def test_frozen_tensors_never_move_and_are_not_in_the_norm(joined):
    optimizer = optim.Lookahead(optim.SGD(lr=1.0, grad_clip_norm=5.0), sync_period=2, alpha=0.5)
    run, worker = joined(optimizer, [optim.Group("b.*", frozen=True)], (0, 0, 7, 7))

    assert step(worker, 3, 4, 1000, 1000) == [-3, -4, 7, 7]
    assert step(worker, 3, 4, 1000, 1000) == [-3, -4, 7, 7]  # slow = half the way to (-6, -8)
    assert [run.pull("slow")[name].item() for name in LAYERS] == [-3, -4, 7, 7]


def test_a_group_without_a_tensor_is_refused_before_anything_is_created(client, new_run):
    with pytest.raises(ValueError, match=r"groups has '\*\.kernel', which no tensor is left for"):
        new_run(SGD, ALONE, layers(1, 1, 1, 1), [optim.Group("*.kernel", lr=0.1)])

    assert not any("kernel" in str(info.groups) for info in client.list_runs())


def test_a_run_says_its_groups(client, run_name, new_run):
    groups = (optim.Group("*.bias", lr=optim.ExponentialLR(), grad_clip_norm=math.inf, name="biases"),)
    run = new_run(SGD, ALONE, layers(1, 1, 1, 1), groups)

    assert run.groups == client.get_run(run_name).groups == run.info().groups == groups
    same = client.get_or_create_run(
        run_name, params=layers(1, 1, 1, 1), optimizer=SGD, aggregation=ALONE, groups=list(groups)
    )
    assert same.name == run.name
    with pytest.raises(kedge.KedgeError, match="another groups") as caught:
        client.get_or_create_run(run_name, params=layers(1, 1, 1, 1), optimizer=SGD, aggregation=ALONE)
    assert caught.value.metadata["field"] == "groups"


def test_a_change_holds_from_the_step_that_it_names(joined):
    run, worker = joined(SGD)
    assert step(worker, 1, 0, 0, 0)[0] == 0

    assert run.set_hyperparameters(lr=0.5, weight_decay=1.0) == 2
    assert step(worker, 1, 0, 0, 0) == [-0.5, 0.5, 0.5, 0.5]
    assert run.status().learning_rate == 0.5
    assert run.info().changes == (RecordedChange(2, "", Change(0.5, 1.0)),)


def test_clips_can_be_set_and_taken_away(joined):
    run, worker = joined(SGD, weights=(0, 0, 0, 0))
    run.set_hyperparameters(grad_clip_value=2.0, grad_clip_norm=1.0)
    assert step(worker, 3, 4, 0, 0) == pytest.approx([-0.6, -0.8, 0, 0], rel=1e-6)

    run.set_hyperparameters(grad_clip_norm=math.inf)
    assert step(worker, 3, 4, 0, 0) == pytest.approx([-2.6, -2.8, 0, 0], rel=1e-6)
    run.set_hyperparameters(grad_clip_value=math.inf)
    assert step(worker, 3, 4, 0, 0) == pytest.approx([-5.6, -6.8, 0, 0], rel=1e-6)


def test_the_decay_that_changes_is_of_the_optimizers_own_kind(joined):
    # The first step of Adam is lr * sign(g); decoupled decay adds lr * decay * w to it.
    run, worker = joined(optim.AdamW(lr=0.5, weight_decay=0.0), weights=(4, 4, 4, 4))
    run.set_hyperparameters(weight_decay=0.25)

    assert step(worker, 1, 1, -1, -1) == pytest.approx([3, 3, 4, 4], rel=1e-5)


def test_moments_stay_when_the_rate_changes(joined):
    run, worker = joined(optim.Momentum(lr=1.0, momentum=0.5), weights=(0, 0, 0, 0))
    step(worker, 1, 0, 0, 0)
    run.set_hyperparameters(lr=0.1)

    assert step(worker, 1, 0, 0, 0)[0] == pytest.approx(-1.15, rel=1e-6)  # the velocity is 1.5


def test_a_groups_change_is_its_own_and_the_runs_change_is_for_all_without_their_own(joined):
    run, worker = joined(SGD, [optim.Group("a.*", name="a"), optim.Group("b.bias", name="bb", lr=0.5)], (0, 0, 0, 0))
    run.set_hyperparameters(group="a", lr=0.25)
    assert step(worker, 1, 1, 1, 1) == [-0.25, -0.25, -1, -0.5]

    run.set_hyperparameters(lr=2.0)
    assert step(worker, 1, 1, 1, 1) == [-0.5, -0.5, -3, -1]
    assert [made.group for made in run.info().changes] == ["a", ""]


def test_a_change_that_changes_nothing_is_not_recorded(joined):
    run, worker = joined(optim.SGD(lr=optim.StepLR(1.0, 1, 0.5)))
    step(worker, 1, 1, 1, 1)
    run.set_hyperparameters(lr=optim.StepLR(1.0, 1, 0.5), weight_decay=0)  # its ticks go on
    run.set_hyperparameters()

    assert run.info().changes == ()
    assert run.status().learning_rate == 0.5


def test_a_new_schedule_begins_at_its_first_tick(joined):
    run, worker = joined(SGD, weights=(0, 0, 0, 0))
    step(worker, 0, 0, 0, 0)
    run.set_hyperparameters(lr=optim.ExponentialLR(1.0, 0.5))

    assert [step(worker, 1, 0, 0, 0)[0] for _ in range(3)] == [-1, -1.5, -1.75]


def test_of_many_changes_the_last_32_are_told(joined):
    run, _ = joined(SGD)
    for i in range(40):
        run.set_hyperparameters(lr=1 + i)

    assert [made.change.lr for made in run.info().changes] == [1.0 + i for i in range(8, 40)]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"lr": -1.0}, "lr"),
        ({"lr": math.nan}, "lr"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"grad_clip_norm": 0.0}, "grad_clip_norm"),
        ({"grad_clip_value": -1}, "grad_clip_value"),
    ],
)
def test_what_can_be_no_hyperparameter_is_refused_and_changes_nothing(joined, change, field):
    run, _ = joined(SGD)
    with pytest.raises(ValueError, match=f"^{field} is"):
        run.set_hyperparameters(**change)

    assert run.info().changes == ()


def test_a_group_that_there_is_not_is_refused(joined):
    run, _ = joined(SGD, [optim.Group("*.bias", name="biases")])
    with pytest.raises(kedge.KedgeError, match="'biase' is not of this run, which has 'biases'") as caught:
        run.set_hyperparameters(group="biase", lr=0.1)

    assert (caught.value.reason, run.info().changes) == ("INVALID_CONFIGURATION", ())


def test_schedules_that_go_by_hand_tick_when_they_are_told(joined):
    run, worker = joined(optim.SGD(lr=optim.ExponentialLR(1.0, 0.5, tick="manual")), weights=(0, 0, 0, 0))
    assert [step(worker, 1, 0, 0, 0)[0] for _ in range(2)] == [-1, -2]

    assert run.tick_schedule() == 1
    assert step(worker, 1, 0, 0, 0)[0] == -2.5
    assert [run.tick_schedule(to=3), run.tick_schedule(to=3), run.tick_schedule(to=2)] == [3, 3, 3]
    assert step(worker, 1, 0, 0, 0)[0] == -2.625


def test_a_groups_schedule_ticks_by_hand_too(joined):
    group = optim.Group("a.*", name="a", lr=optim.ExponentialLR(1.0, 0.5, tick="manual"))
    run, worker = joined(SGD, [group], (0, 0, 0, 0))
    run.tick_schedule(group="a")

    assert step(worker, 1, 1, 1, 1) == [-0.5, -0.5, -1, -1]


@pytest.mark.parametrize("lr", [1.0, optim.StepLR(1.0)])
def test_what_does_not_go_by_hand_cannot_be_ticked(joined, lr):
    run, _ = joined(optim.SGD(lr=lr))
    with pytest.raises(kedge.KedgeError, match="tick='manual'") as caught:
        run.tick_schedule()

    assert caught.value.reason == "INVALID_CONFIGURATION"


def test_schedules_tick_once_in_so_many_steps(joined):
    run, worker = joined(optim.SGD(lr=optim.ExponentialLR(1.0, 0.5, steps_per_epoch=2)), weights=(0, 0, 0, 0))

    assert [step(worker, 1, 0, 0, 0)[0] for _ in range(5)] == [-1, -2, -2.5, -3, -3.25]
    assert run.status().learning_rate == 0.25


def test_the_rate_falls_when_the_workers_loss_stops_falling(new_run, in_background):
    schedule = optim.ReduceLROnPlateau(1.0, factor=0.5, patience=1, threshold=0.0, steps_per_epoch=2)
    run = new_run(optim.SGD(lr=schedule), kedge.Synchronous(quorum=2))
    gradient = {"w": np.ones(1, np.float32)}
    rates = []
    with run.join("a") as a, run.join("b") as b:
        a.pull()
        b.pull()
        # A tick is two steps of two workers with 3 and 1 examples: the means are 2, 1, 1, 1.5, so that the third and
        # the fourth are one more than the patience.
        for mean in (2, 1, 1, 1.5):
            for _ in range(2):
                other = in_background(a.step, gradient, loss=mean - 1, example_count=3)
                b.step(gradient, loss=mean + 3, example_count=1)
                other.result()
                rates.append(run.status().learning_rate)

    assert rates == [1, 1, 1, 1, 1, 1, 1, 0.5]


def test_a_round_without_losses_leaves_a_plateau_as_it_is(joined):
    schedule = optim.ReduceLROnPlateau(1.0, factor=0.5, patience=0)
    run, worker = joined(optim.SGD(lr=schedule))
    for loss in (1.0, None, math.nan, None):
        step(worker, 1, 1, 1, 1, loss=loss)
    assert run.status().learning_rate == 1.0

    step(worker, 1, 1, 1, 1, loss=1.0)
    assert run.status().learning_rate == 0.5


def test_lookahead_may_reset_the_state_of_its_base(joined):
    base = optim.Momentum(lr=1.0, momentum=0.5)
    ahead = optim.Lookahead(base, sync_period=2, alpha=1.0, reset_state=True)
    run, worker = joined(ahead, weights=(0, 0, 0, 0))

    # velocities 1, 1.5, and after the sync 1 again; kept they would have been 1.75
    assert [step(worker, 1, 0, 0, 0)[0] for _ in range(3)] == [-1, -2.5, -3.5]
    assert run.optimizer == ahead
