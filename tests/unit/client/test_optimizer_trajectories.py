"""The fake server's optimizers over 50 steps, against optax composed here by hand, and against torch where it agrees.

Both oracles compute in float64. The loss pulls the weights to 0 and adds noise, so an error would feed back.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import numpy as np
import optax
import pytest

from kedge import optim
from kedge.optim.controls import Controls
from kedge.updates import Updater
from kedge.wire.manifest import Manifest

STEPS = 50
RATE, DECAY = 0.05, 0.1
# Adafactor factors what has two axes of 128 and more: two of these, one of them with equal axes.
SHAPES = {"scalar": (), "vector": (5,), "matrix": (6, 4), "square": (128, 128), "kernel": (2, 1, 129, 128)}
MANIFEST = Manifest.from_specs((name, shape, "float32") for name, shape in SHAPES.items())


def tree(flat: np.ndarray) -> dict[str, np.ndarray]:
    return {t.name: flat[t.offset : t.offset + t.size].reshape(t.shape) for t in MANIFEST.tensors}


def flat(weights: dict[str, Any]) -> np.ndarray:
    return np.concatenate([np.asarray(weights[t.name], np.float64).reshape(-1) for t in MANIFEST.tensors])


INITIAL = np.random.default_rng(1).normal(size=MANIFEST.element_count)
NOISE = np.random.default_rng(2).normal(size=(STEPS, MANIFEST.element_count))


def ours(optimizer: optim.Optimizer) -> np.ndarray:
    values = Controls.begin(optimizer.spec(), ()).values()
    updater = Updater(optimizer, (), MANIFEST, INITIAL)
    for noise in NOISE:
        updater.apply(0.3 * updater.fast + noise, values)
    return updater.fast


def coupled(*rule: optax.GradientTransformation, decay: float = DECAY) -> optax.GradientTransformation:
    return optax.chain(optax.add_decayed_weights(decay), *rule, optax.scale(-RATE))


def decoupled(*rule: optax.GradientTransformation, decay: float = DECAY) -> optax.GradientTransformation:
    return optax.chain(*rule, optax.add_decayed_weights(decay), optax.scale(-RATE))


def inverse_time(rate: float) -> optax.GradientTransformation:
    return optax.scale_by_schedule(lambda count: 1 / (1 + rate * count))


BETAS = {"b1": 0.8, "b2": 0.95}
RULES: dict[str, tuple[optim.Rule, Callable[[], optax.GradientTransformation]]] = {
    "sgd": (optim.SGD(RATE, weight_decay=DECAY), coupled),
    "sgd with momentum": (optim.SGD(RATE, 0.8, DECAY), lambda: coupled(optax.trace(0.8))),
    "sgd with nesterov": (optim.SGD(RATE, 0.8, DECAY, True), lambda: coupled(optax.trace(0.8, nesterov=True))),
    "momentum": (optim.Momentum(RATE, weight_decay=DECAY), lambda: coupled(optax.trace(0.9))),
    "nesterov": (optim.MomentumNesterov(RATE, 0.7, DECAY), lambda: coupled(optax.trace(0.7, nesterov=True))),
    "lion": (optim.Lion(RATE, (0.8, 0.95), DECAY), lambda: decoupled(optax.scale_by_lion(**BETAS))),
    "adam": (
        optim.Adam(RATE, (0.8, 0.95), eps=1e-3, weight_decay=DECAY),
        lambda: coupled(optax.scale_by_adam(**BETAS, eps=1e-3)),
    ),
    "amsgrad": (
        optim.Adam(RATE, (0.8, 0.95), eps=1e-3, weight_decay=DECAY, amsgrad=True),
        lambda: coupled(optax.scale_by_amsgrad(**BETAS, eps=1e-3)),
    ),
    "adamw": (
        optim.AdamW(RATE, (0.8, 0.95), 1e-3, DECAY),
        lambda: decoupled(optax.scale_by_adam(**BETAS, eps=1e-3)),
    ),
    "radam": (
        # With b2 = 0.95 rho passes 5 at the seventh step: both halves of the rule are seen.
        optim.RAdam(RATE, (0.8, 0.95), 1e-3, DECAY),
        lambda: coupled(optax.scale_by_radam(**BETAS, eps=1e-3)),
    ),
    "radam that never rectifies": (
        optim.RAdam(RATE, (0.8, 0.5), 1e-3, DECAY),
        lambda: coupled(optax.scale_by_radam(b1=0.8, b2=0.5, eps=1e-3)),
    ),
    "adamax": (
        optim.Adamax(RATE, (0.8, 0.95), 1e-3, DECAY),
        lambda: coupled(optax.scale_by_adamax(**BETAS, eps=1e-3)),
    ),
    "yogi": (optim.Yogi(RATE, (0.8, 0.95), 1e-2, DECAY), lambda: coupled(optax.scale_by_yogi(**BETAS, eps=1e-2))),
    "adabelief": (
        optim.AdaBelief(RATE, (0.8, 0.95), 1e-3, DECAY),
        lambda: coupled(optax.scale_by_belief(**BETAS, eps=1e-3, eps_root=1e-3)),
    ),
    "adabelief with eps_root": (
        optim.AdaBelief(RATE, (0.8, 0.95), 1e-3, DECAY, eps_root=0.0),
        lambda: coupled(optax.scale_by_belief(**BETAS, eps=1e-3, eps_root=0.0)),
    ),
    "adabelief with the greatest direction": (
        optim.AdaBelief(RATE, (0.8, 0.95), 1e-3, DECAY, max_direction=0.5),
        lambda: coupled(optax.scale_by_belief(**BETAS, eps=1e-3, eps_root=1e-3), optax.clip(0.5)),
    ),
    "rmsprop": (optim.RMSprop(RATE, 0.9, 1e-2, DECAY), lambda: coupled(optax.scale_by_rms(0.9, 1e-2))),
    "rmsprop centered, with momentum": (
        optim.RMSprop(RATE, 0.9, 1e-2, DECAY, momentum=0.5, centered=True),
        lambda: coupled(optax.scale_by_stddev(0.9, 1e-2), optax.trace(0.5)),
    ),
    "adagrad": (
        optim.Adagrad(RATE, weight_decay=DECAY),
        lambda: coupled(optax.scale_by_rss(initial_accumulator_value=0.0, eps=1e-10)),
    ),
    "adagrad whose rate falls": (
        optim.Adagrad(RATE, 0.2, DECAY, 0.5, 1e-2),
        lambda: coupled(optax.scale_by_rss(0.5, eps=1e-2), inverse_time(0.2)),
    ),
    "adadelta": (optim.Adadelta(RATE, 0.8, 1e-2, DECAY), lambda: coupled(optax.scale_by_adadelta(0.8, 1e-2))),
    "lamb": (
        optim.Lamb(RATE, (0.8, 0.95), 1e-3, DECAY),
        lambda: optax.chain(decoupled_adam(), optax.scale_by_trust_ratio(), optax.scale(-RATE)),
    ),
    "lars": (
        optim.Lars(RATE, 0.8, DECAY, trust_coefficient=0.5, eps=1e-2),
        lambda: coupled(optax.scale_by_trust_ratio(trust_coefficient=0.5, eps=1e-2), optax.trace(0.8)),
    ),
    "adafactor": (
        optim.Adafactor(RATE, weight_decay=DECAY),
        lambda: decoupled(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)),
    ),
    "adafactor with momentum": (
        optim.Adafactor(RATE, (1e-2, 1.0), 0.7, 0.6, 0.8, DECAY),
        lambda: decoupled(
            optax.scale_by_factored_rms(decay_rate=0.6, epsilon=1e-2),
            optax.clip_by_block_rms(0.7),
            optax.ema(0.8, debias=False),
        ),
    ),
    "adafactor, not factored": (
        optim.Adafactor(RATE, factored=False, weight_decay=DECAY),
        lambda: decoupled(optax.scale_by_factored_rms(factored=False), optax.clip_by_block_rms(1.0)),
    ),
    "novograd": (
        optim.Novograd(RATE, (0.8, 0.95), 1e-3, DECAY),
        lambda: coupled(optax.scale_by_novograd(**BETAS, eps=1e-3, weight_decay=DECAY), decay=0.0),
    ),
}


def decoupled_adam() -> optax.GradientTransformation:
    return optax.chain(optax.scale_by_adam(**BETAS, eps=1e-3), optax.add_decayed_weights(DECAY))


def with_clips(rule: optim.Rule) -> optim.Rule:
    return rule.with_settings(rule.spec().settings._replace(grad_clip_norm=150.0, grad_clip_value=1.5))


@cache  # compiling takes most of the time
def compiled(name: str, *, clips: bool = False) -> optax.GradientTransformation:
    tx = RULES[name][1]()
    if clips:
        tx = optax.chain(optax.clip_by_global_norm(150.0), optax.clip(1.5), tx)
    return optax.GradientTransformation(tx.init, jax.jit(tx.update))


def by_optax(tx: optax.GradientTransformation, *, sync_period: int = 0, alpha: float = 0.0, reset: bool = False) -> Any:
    """The weights after all steps, with Lookahead around it if sync_period is set."""
    with jax.enable_x64(True):
        weights, state = tree(INITIAL), tx.init(tree(INITIAL))
        slow = weights
        for step, noise in enumerate(NOISE, 1):
            gradient = {name: 0.3 * weights[name] + value for name, value in tree(noise).items()}
            updates, state = tx.update(gradient, state, weights)
            weights = {name: weights[name] + np.asarray(updates[name]) for name in weights}
            if sync_period and step % sync_period == 0:
                weights = slow = {name: slow[name] + alpha * (weights[name] - slow[name]) for name in weights}
                state = tx.init(weights) if reset else state
        return flat(weights)


def assert_close(actual: np.ndarray, expected: np.ndarray, *, name: str = "", atol: float = 1e-12) -> None:
    # Optax computes Adafactor's decay rate in float32, whatever the weights are.
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6 if name.startswith("adafactor") else atol)


@pytest.mark.parametrize("name", RULES)
def test_rule_agrees_with_optax(name: str) -> None:
    assert_close(ours(RULES[name][0]), by_optax(compiled(name)), name=name)


@pytest.mark.parametrize("name", RULES)
def test_rule_behind_both_clips_that_lookahead_begins_anew_agrees_with_optax(name: str) -> None:
    ahead = optim.Lookahead(with_clips(RULES[name][0]), sync_period=4, alpha=0.4, reset_state=True)
    expected = by_optax(compiled(name, clips=True), sync_period=4, alpha=0.4, reset=True)
    assert_close(ours(ahead), expected, name=name)


@pytest.mark.parametrize("name", RULES)
def test_rule_keeps_its_state_at_a_lookahead_sync_as_optax_does(name: str) -> None:
    ahead = optim.Lookahead(RULES[name][0], sync_period=4, alpha=0.4)
    assert_close(ours(ahead), by_optax(compiled(name), sync_period=4, alpha=0.4), name=name)


TORCH_RULES = {
    "sgd": (optim.SGD(RATE, 0.8, DECAY), "SGD", {"momentum": 0.8}),
    "sgd with nesterov": (optim.SGD(RATE, 0.8, DECAY, True), "SGD", {"momentum": 0.8, "nesterov": True}),
    "momentum": (optim.Momentum(RATE, 0.8, DECAY), "SGD", {"momentum": 0.8}),
    "nesterov": (optim.MomentumNesterov(RATE, 0.8, DECAY), "SGD", {"momentum": 0.8, "nesterov": True}),
    "adam": (optim.Adam(RATE, (0.8, 0.95), weight_decay=DECAY), "Adam", {"betas": (0.8, 0.95)}),
    "adamw": (optim.AdamW(RATE, (0.8, 0.95), weight_decay=DECAY), "AdamW", {"betas": (0.8, 0.95)}),
    "nadam": (optim.Nadam(RATE, (0.8, 0.95), weight_decay=DECAY), "NAdam", {"betas": (0.8, 0.95)}),
    "nadam with its momentum's decay": (
        optim.Nadam(RATE, (0.8, 0.95), 1e-3, DECAY, momentum_decay=0.5),
        "NAdam",
        {"betas": (0.8, 0.95), "eps": 1e-3, "momentum_decay": 0.5},
    ),
    "radam": (optim.RAdam(RATE, (0.8, 0.95), weight_decay=DECAY), "RAdam", {"betas": (0.8, 0.95)}),
    "adamax": (optim.Adamax(RATE, (0.8, 0.95), weight_decay=DECAY), "Adamax", {"betas": (0.8, 0.95)}),
    "adagrad": (optim.Adagrad(RATE, 0.2, DECAY, 0.5), "Adagrad", {"lr_decay": 0.2, "initial_accumulator_value": 0.5}),
    "adadelta": (optim.Adadelta(RATE, 0.8, 1e-3, DECAY), "Adadelta", {"rho": 0.8, "eps": 1e-3}),
}


@pytest.mark.parametrize("name", TORCH_RULES)
def test_rule_agrees_with_torch(name: str) -> None:
    torch = pytest.importorskip("torch")
    optimizer, kind, options = TORCH_RULES[name]
    weights = torch.from_numpy(INITIAL.copy()).requires_grad_()
    theirs = getattr(torch.optim, kind)([weights], lr=RATE, weight_decay=DECAY, **options)
    for noise in NOISE:
        weights.grad = (0.3 * weights + torch.from_numpy(noise)).detach()
        theirs.step()

    # Torch keeps NAdam's product in float32, and adds eps at another place of RAdam and Adagrad.
    assert_close(ours(optimizer), weights.detach().numpy(), atol=1e-6)
