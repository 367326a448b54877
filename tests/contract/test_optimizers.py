import ml_dtypes
import numpy as np
import pytest

import kedge
from kedge import optim

SGD = optim.SGD(lr=1.0)
ALONE = kedge.Synchronous(quorum=1)


def grad(*values):
    return {"w": np.array(values, np.float32)}


def trajectory(run, gradients):
    with run.join() as worker:
        worker.pull()
        return [worker.step(grad(*g))["w"].tolist() for g in gradients]


def test_lookahead_hauls_the_slow_weights_after_the_fast(new_run):
    run = new_run(optim.Lookahead(SGD, sync_period=2, alpha=0.5), ALONE)
    fast, slow = [], []
    with run.join() as worker:
        worker.pull()
        for _ in range(4):
            fast.append(worker.step(grad(1))["w"].item())
            slow.append(worker.pull("slow")["w"].item())

    assert fast == [2, 2, 1, 1]  # 3 -> 2 -> (1, then 3 + (1 - 3) / 2) = 2 -> 1 -> (0, then 2 + (0 - 2) / 2) = 1
    assert slow == [3, 2, 2, 1]
    assert run.status().lookahead_sync_count == 2


@pytest.mark.parametrize(("alpha", "expected"), [(0.0, [3.0, 3.0]), (1.0, [1.0, 1.0])])
def test_lookahead_at_the_ends_of_alpha(new_run, alpha, expected):
    run = new_run(optim.Lookahead(SGD, sync_period=2, alpha=alpha), ALONE)
    trajectory(run, [[1], [1]])
    snapshot = run.snapshot()

    assert (snapshot.step, [snapshot.fast["w"].item(), snapshot.slow["w"].item()]) == (2, expected)


def test_pulling_slow_weights_leaves_the_step_number_alone(new_run):
    run = new_run(optim.Lookahead(SGD), kedge.Asynchronous())
    with run.join() as worker, run.join() as other:
        worker.pull()
        other.push(grad(1), base_step=0)
        worker.pull("slow")

        assert worker.step_number == 0


def test_schedule_ticks_once_a_step(new_run):
    schedule = optim.StepLR(base_lr=1.0, step_size=2, gamma=0.5)
    run = new_run(optim.SGD(lr=schedule), ALONE)

    assert trajectory(run, [[1]] * 5) == [[2], [1], [0.5], [0], [-0.25]]
    assert run.status().learning_rate == 0.25


def test_clip_decay_and_momentum_come_in_their_order(new_run):
    run = new_run(
        optim.SGD(lr=0.5, momentum=0.5, weight_decay=0.25, grad_clip_norm=5.0, grad_clip_value=3.5),
        ALONE,
        {"w": np.array([4.0, 8.0], np.float32)},
    )
    # (6, 8) has norm 10: (3, 4), then (3, 3.5); plus 0.25 w: (4, 5.5), the momentum; w - 0.5 of it: (2, 5.25).
    # (0, 0) plus 0.25 w: (0.5, 1.3125), plus half the momentum: (2.5, 4.0625); w - 0.5 of it: (0.75, 3.21875).
    assert trajectory(run, [[6, 8], [0, 0]]) == [[2, 5.25], [0.75, 3.21875]]


def test_nesterov_looks_ahead(new_run):
    run = new_run(optim.SGD(lr=1.0, momentum=0.5, nesterov=True), ALONE)
    # v = 1, step 1 + 0.5 * 1; v = 1.5, step 1 + 0.5 * 1.5.
    assert trajectory(run, [[1], [1]]) == [[1.5], [-0.25]]


def test_adabelief_under_a_constant_gradient_follows_the_closed_form(new_run):
    run = new_run(optim.AdaBelief(lr=1.0), ALONE, {"w": np.zeros(1, np.float32)})
    path = np.array(trajectory(run, [[1.0]] * 10))[:, 0]

    steps = -np.diff(path, prepend=0.0)
    np.testing.assert_allclose(steps[[0, 1, 9]], [1.1111, 1.1680, 1.6354], atol=5e-4)


def test_adabelief_goes_no_farther_than_its_greatest_direction(new_run):
    run = new_run(optim.AdaBelief(lr=1.0, max_direction=1.25), ALONE, {"w": np.zeros(1, np.float32)})
    path = np.array(trajectory(run, [[1.0]] * 4))[:, 0]

    # By the closed form 1.1111, 1.1680, 1.2253 and 1.2829.
    np.testing.assert_allclose(-np.diff(path, prepend=0.0), [1.1111, 1.1680, 1.2253, 1.25], atol=5e-4)


@pytest.mark.parametrize("optimizer", [optim.Adam(lr=0.5), optim.AdamW(lr=0.5, weight_decay=0.0)])
def test_adam_under_a_constant_gradient_steps_by_its_rate(new_run, optimizer):
    run = new_run(optimizer, ALONE, {"w": np.array([3.0, 3.0], np.float32)})

    np.testing.assert_allclose(trajectory(run, [[4.0, -0.01]] * 2), [[2.5, 3.5], [2, 4]], rtol=1e-4)


def test_adamw_decays_the_weights_and_not_the_gradient(new_run):
    run = new_run(optim.AdamW(lr=0.5, weight_decay=0.25), ALONE, {"w": np.array([8.0], np.float32)})

    np.testing.assert_allclose(trajectory(run, [[0.0], [0.0]]), [[7.0], [6.125]], rtol=1e-6)


def test_sixteen_bit_weights_are_held_in_float32(new_run):
    params = {"w": np.ones(1, ml_dtypes.bfloat16)}
    run = new_run(SGD, ALONE, params)
    small = {"w": np.array([2**-10], ml_dtypes.bfloat16)}  # an eighth of what bfloat16 can take from 1
    with run.join() as worker:
        worker.pull()
        for _ in range(8):
            weights = worker.step(small)

    assert weights["w"].dtype == ml_dtypes.bfloat16
    assert weights["w"].astype(np.float32) == [1 - 2**-7]
