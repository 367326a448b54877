"""What the fake server's updater does around the rules, by hand; and some rules against loops over Python floats."""

import math

import numpy as np
import pytest

from kedge import KedgeError, optim
from kedge.optim.controls import Controls
from kedge.updates import Updater
from kedge.wire.manifest import Manifest

WEIGHTS = [0.5, -2.0, 3.0]
GRADIENTS = [[0.25, -1.5, 0.0], [4.0, 0.125, -0.5], [-0.75, 2.0, 1.0], [0.1, 0.2, 0.3], [0.0, -3.0, 0.5]]


def manifest(**sizes):
    return Manifest.from_specs((name, (size,), "float32") for name, size in sizes.items())


def begin(optimizer, weights, groups=(), sizes=None):
    weights = np.array(weights, np.float32)
    return Updater(optimizer, groups, manifest(**sizes or {"w": len(weights)}), weights)


def run(optimizer, gradients=GRADIENTS, weights=WEIGHTS, groups=(), sizes=None):
    updater = begin(optimizer, weights, groups, sizes)
    controls = Controls.begin(optimizer.spec(), groups)
    for gradient in gradients:
        updater.apply(np.array(gradient), controls.values())
        controls = controls.after_step(None, 1)
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
    optimizer = optim.AdaBelief(lr=1e-3)
    updater, values = begin(optimizer, [-2.5, -2.5]), Controls.begin(optimizer.spec(), ()).values()
    points = {2000: (-0.40362, -1.15996), 5000: (0.86699, -1.03216)}
    for step in range(1, 5001):
        x, y = updater.fast
        terms = [(c - x + x * y**n, y**n - 1, n * x * y ** (n - 1)) for c, n in ((1.5, 1), (2.25, 2), (2.625, 3))]
        slopes = [sum(2 * f * dx for f, dx, _ in terms), sum(2 * f * dy for f, _, dy in terms)]
        updater.apply(np.array(slopes), values)
        if step in points:
            np.testing.assert_allclose(updater.fast, points[step], atol=5e-4)


def test_centered_rmsprop_stands_a_gradient_that_never_changes():
    # The variance is 0, which in float64 comes out as -2e-15 of the square: far more than eps.
    final = run(optim.RMSprop(lr=1.0, centered=True), [[0.1 * 2**20]] * 4000, [0.0]).fast
    assert np.isfinite(final).all()


def test_schedule_sees_the_steps_applied_before():
    updater = run(optim.SGD(lr=optim.ExponentialLR(base_lr=1.0, gamma=0.5)), [[1.0]] * 3, [0.0])
    assert updater.fast == [-(1 + 0.5 + 0.25)]


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


def test_decay_comes_after_the_clips():
    assert run(optim.SGD(lr=1.0, weight_decay=2.0, grad_clip_value=1.0), [[9.0]], [4.0]).fast == [4.0 - (1.0 + 8.0)]


def test_group_has_its_own_rate_decay_and_clip_by_value():
    groups = (optim.Group("b", lr=0.5, weight_decay=0.25, grad_clip_value=1.0),)
    updater = run(optim.SGD(lr=1.0, weight_decay=2.0), [[3.0, 3.0]], [4.0, 4.0], groups, {"a": 1, "b": 1})
    assert list(updater.fast) == [4.0 - (3.0 + 8.0), 4.0 - 0.5 * (1.0 + 1.0)]


def test_group_of_a_rule_with_its_own_decay_has_that_kind():
    groups = (optim.Group("b", weight_decay=0.5),)
    updater = run(optim.Lion(lr=1.0, weight_decay=0.25), [[3.0, 3.0]], [4.0, 4.0], groups, {"a": 1, "b": 1})
    assert list(updater.fast) == [4.0 - (1.0 + 1.0), 4.0 - (1.0 + 2.0)]


def test_tensors_without_a_norm_clip_of_their_own_share_one_norm():
    # "a" and "c" have (3, 4) of norm 5, in spite of the rate of "c"; "b" has its own.
    groups = (optim.Group("b", grad_clip_norm=6.0), optim.Group("c", lr=2.0))
    updater = run(optim.SGD(lr=1.0, grad_clip_norm=2.5), [[3.0, 12.0, 4.0]], [0.0] * 3, groups, dict.fromkeys("abc", 1))
    np.testing.assert_allclose(-updater.fast, [1.5, 6.0, 4.0], rtol=1e-12)


def test_group_without_a_norm_clip_is_left_whole():
    groups = (optim.Group("b", grad_clip_norm=math.inf),)
    updater = run(optim.SGD(lr=1.0, grad_clip_norm=1.0), [[5.0, 12.0]], [0.0] * 2, groups, {"a": 1, "b": 1})
    np.testing.assert_allclose(-updater.fast, [1.0, 12.0], rtol=1e-12)


def test_frozen_tensor_never_moves_and_is_no_part_of_the_norm():
    groups = (optim.Group("b", frozen=True),)
    optimizer = optim.Lookahead(optim.SGD(lr=1.0, weight_decay=0.5, grad_clip_norm=3.0), sync_period=2)
    updater = run(optimizer, [[3.0, 4.0]] * 2, [0.0, 7.0], groups, {"a": 1, "b": 1})

    # "a": -3, then -3 - (3 - 1.5) and half the way from 0.
    assert list(updater.fast) == list(updater.slow) == [-2.25, 7.0]


def test_values_may_change_from_step_to_step():
    optimizer = optim.SGD(lr=1.0)
    updater, (values,) = begin(optimizer, [0.0]), Controls.begin(optimizer.spec(), ()).values()
    updater.apply(np.array([1.0]), [values])
    updater.apply(np.array([1.0]), [values._replace(lr=0.25)])
    assert updater.fast == [-1.25]


def test_tensor_without_elements_takes_part_in_nothing():
    updater = run(optim.Adafactor(lr=1.0), [[2.0]], [1.0], sizes={"empty": 0, "w": 1})
    assert updater.fast == [0.0]


def test_lookahead_by_hand_keeps_the_moments():
    optimizer = optim.Lookahead(optim.SGD(lr=1.0, momentum=0.5), sync_period=2, alpha=0.5)
    # v: 1, 1.5, 1.75, 1.875; fast 1, then 2.5 and half of it; 1.25 + 1.75, then 4.875 and half the way from 1.25.
    assert seen(optimizer) == [(1, 0), (1.25, 1.25), (3, 1.25), (3.0625, 3.0625)]


def test_lookahead_with_reset_state_begins_the_rule_anew():
    optimizer = optim.Lookahead(optim.SGD(lr=1.0, momentum=0.5), sync_period=2, alpha=0.5, reset_state=True)
    # v: 1, 1.5, and again 1, 1.5.
    assert seen(optimizer) == [(1, 0), (1.25, 1.25), (2.25, 1.25), (2.5, 2.5)]


def seen(optimizer):
    """Fast and slow of one weight after each of four steps."""
    updater, values = begin(optimizer, [0.0]), Controls.begin(optimizer.spec(), ()).values()
    states = []
    for _ in range(4):
        updater.apply(np.array([-1.0]), values)
        states.append((updater.fast.item(), updater.slow.item()))
    assert (updater.step, updater.lookahead_sync_count) == (4, 2)
    return states


def test_lookahead_with_reset_state_takes_bias_for_that_of_a_first_step():
    ahead = optim.Lookahead(optim.Adam(lr=1.0), sync_period=1, alpha=1.0, reset_state=True)
    # Each step is a first one: the direction is the gradient's sign, but for eps.
    np.testing.assert_allclose(run(ahead, [[3.0], [0.25], [-7.0]], [0.0]).fast, [-1.0], rtol=1e-6)


def test_lookahead_with_alpha_one_is_the_base_optimizer():
    base = optim.Adam(lr=0.1)
    ahead = run(optim.Lookahead(base, sync_period=2, alpha=1.0))

    np.testing.assert_array_equal(ahead.fast, run(base).fast)
    assert run(base).slow is None


def test_optax_is_refused_by_the_fake_server():
    with pytest.raises(KedgeError, match="has no optax: use a real server") as caught:
        begin(optim.Lookahead(optim.Optax("adan")), [0.0])
    assert (caught.value.reason, caught.value.metadata["field"]) == ("INVALID_CONFIGURATION", "optimizer.rule")


def test_group_that_gets_no_tensor_is_refused():
    with pytest.raises(ValueError, match="no tensor is left"):
        begin(optim.SGD(), [0.0], (optim.Group("*.bias"),))
