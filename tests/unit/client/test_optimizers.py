"""The fake server's optimizers against loops over Python floats, written from the papers' algorithms."""

import math

import numpy as np
import pytest

from kedge import optim
from kedge.testing.optimizers import Updater

WEIGHTS = [0.5, -2.0, 3.0]
GRADIENTS = [[0.25, -1.5, 0.0], [4.0, 0.125, -0.5], [-0.75, 2.0, 1.0], [0.1, 0.2, 0.3], [0.0, -3.0, 0.5]]


def run(optimizer, gradients=GRADIENTS, weights=WEIGHTS):
    updater = Updater(optimizer, np.array(weights, np.float32))
    for gradient in gradients:
        updater.apply(np.array(gradient))
    return updater


def by_hand(rule, gradients=GRADIENTS, weights=WEIGHTS):
    """Runs `rule(t, w, g, state) -> w` for each element by itself."""
    finals = []
    for index, initial in enumerate(weights):
        state = {"m": 0.0, "v": 0.0}
        weight = initial
        for t, gradient in enumerate(gradients, 1):
            weight = rule(t, weight, gradient[index], state)
        finals.append(weight)
    return finals


def test_sgd():
    np.testing.assert_allclose(run(optim.SGD(lr=0.1)).fast, by_hand(lambda t, w, g, s: w - 0.1 * g), rtol=1e-12)


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_with_momentum_and_decay(nesterov):
    def rule(t, w, g, s):
        g = g + 0.01 * w
        s["v"] = 0.9 * s["v"] + g
        return w - 0.1 * (g + 0.9 * s["v"] if nesterov else s["v"])

    optimizer = optim.SGD(lr=0.1, momentum=0.9, nesterov=nesterov, weight_decay=0.01)
    np.testing.assert_allclose(run(optimizer).fast, by_hand(rule), rtol=1e-12)


@pytest.mark.parametrize("decay", [0.0, 0.25])
def test_adam_couples_decay_and_adamw_does_not(decay):
    def adam(t, w, g, s):
        g = g + decay * w
        s["m"] = 0.8 * s["m"] + 0.2 * g
        s["v"] = 0.95 * s["v"] + 0.05 * g * g
        return w - 0.1 * (s["m"] / (1 - 0.8**t)) / (math.sqrt(s["v"] / (1 - 0.95**t)) + 1e-3)

    def adamw(t, w, g, s):
        s["m"] = 0.8 * s["m"] + 0.2 * g
        s["v"] = 0.95 * s["v"] + 0.05 * g * g
        return w - 0.1 * ((s["m"] / (1 - 0.8**t)) / (math.sqrt(s["v"] / (1 - 0.95**t)) + 1e-3) + decay * w)

    options = {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": decay}
    np.testing.assert_allclose(run(optim.Adam(**options)).fast, by_hand(adam), rtol=1e-12)
    np.testing.assert_allclose(run(optim.AdamW(**options)).fast, by_hand(adamw), rtol=1e-12)


@pytest.mark.parametrize("eps_root", [None, 0.0, 0.5])
def test_adabelief_takes_the_new_mean_and_eps_inside(eps_root):
    root = 1e-3 if eps_root is None else eps_root

    def rule(t, w, g, s):
        s["m"] = 0.8 * s["m"] + 0.2 * g
        s["v"] = 0.95 * s["v"] + 0.05 * (g - s["m"]) ** 2 + root
        return w - 0.1 * (s["m"] / (1 - 0.8**t)) / (math.sqrt(s["v"] / (1 - 0.95**t)) + 1e-3)

    optimizer = optim.AdaBelief(lr=0.1, betas=(0.8, 0.95), eps=1e-3, eps_root=eps_root)
    np.testing.assert_allclose(run(optimizer).fast, by_hand(rule), rtol=1e-12)


def test_adabelief_on_beale_passes_the_known_points():
    updater = Updater(optim.AdaBelief(lr=1e-3), np.array([-2.5, -2.5]))
    points = {2000: (-0.40362, -1.15996), 5000: (0.86699, -1.03216)}
    for step in range(1, 5001):
        x, y = updater.fast
        terms = [(1.5 - x + x * y**n, y**n - 1, n * x * y ** (n - 1)) for n in (1,)]
        terms += [(c - x + x * y**n, y**n - 1, n * x * y ** (n - 1)) for c, n in ((2.25, 2), (2.625, 3))]
        updater.apply(np.array([sum(2 * f * dx for f, dx, _ in terms), sum(2 * f * dy for f, _, dy in terms)]))
        if step in points:
            np.testing.assert_allclose(updater.fast, points[step], atol=5e-4)


def test_schedule_sees_the_steps_applied_before():
    updater = run(optim.SGD(lr=optim.ExponentialLR(base_lr=1.0, gamma=0.5)), [[1.0]] * 3, [0.0])

    assert updater.fast == [-(1 + 0.5 + 0.25)]
    assert updater.learning_rate == 0.125


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"grad_clip_norm": 5.0}, [3.0, 4.0]),
        ({"grad_clip_norm": 20.0}, [6.0, 8.0]),
        ({"grad_clip_value": 7.0}, [6.0, 7.0]),
        ({"grad_clip_norm": 5.0, "grad_clip_value": 3.5}, [3.0, 3.5]),
    ],
)
def test_clips(options, expected):
    np.testing.assert_allclose(-run(optim.SGD(lr=1.0, **options), [[6.0, 8.0]], [0.0, 0.0]).fast, expected, rtol=1e-12)


def test_zero_gradient_passes_the_norm_clip():
    assert run(optim.SGD(lr=1.0, grad_clip_norm=1.0), [[0.0]], [3.0]).fast == [3.0]


def test_lookahead_by_hand_keeps_the_moments():
    updater = Updater(optim.Lookahead(optim.SGD(lr=1.0, momentum=0.5), sync_period=2, alpha=0.5), np.array([0.0]))
    seen = []
    for _ in range(4):
        updater.apply(np.array([-1.0]))
        seen.append((updater.fast.item(), updater.slow.item()))

    # v: 1, 1.5, 1.75, 1.875; fast 1, then 2.5 and half of it; 1.25 + 1.75, then 4.875 and half the way from 1.25.
    assert seen == [(1, 0), (1.25, 1.25), (3, 1.25), (3.0625, 3.0625)]
    assert updater.lookahead_sync_count == 2


def test_lookahead_with_alpha_one_is_the_base_optimizer():
    base = optim.Adam(lr=0.1)
    ahead = run(optim.Lookahead(base, sync_period=2, alpha=1.0))

    np.testing.assert_array_equal(ahead.fast, run(base).fast)
    assert run(base).slow is None
