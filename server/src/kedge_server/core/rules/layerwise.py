"""Rules that look at whole tensors: composed of optax's transformations, each on one tensor."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from kedge import optim
from kedge_server.core.rules.rule import Rule, Scalar, Sees, State, StepScalars, no_scalars


def lamb(base: optim.Lamb) -> Rule:
    """Adam's direction with decoupled decay, scaled by the ratio of the weights' norm to its own."""
    return _composed(
        "norms",
        lambda decay: optax.chain(
            optax.scale_by_adam(b1=base.betas[0], b2=base.betas[1], eps=base.eps),
            optax.add_decayed_weights(decay),
            optax.scale_by_trust_ratio(),
        ),
    )


def lars(base: optim.Lars) -> Rule:
    """The gradient scaled by the ratio of the weights' norm to its own, with momentum."""
    return _composed(
        "norms",
        lambda _decay: optax.chain(
            optax.scale_by_trust_ratio(trust_coefficient=base.trust_coefficient, eps=base.eps),
            optax.trace(decay=base.momentum),
        ),
    )


def adafactor(base: optim.Adafactor) -> Rule:
    """The gradient over the root of a mean square that is kept by rows and columns."""
    momentum = [] if base.beta1 is None else [optax.ema(base.beta1, debias=False)]
    return _composed(
        "shapes",
        lambda decay: optax.chain(
            optax.scale_by_factored_rms(factored=base.factored, decay_rate=base.decay_rate, epsilon=base.eps[0]),
            optax.clip_by_block_rms(base.clip_threshold),
            *momentum,
            optax.add_decayed_weights(decay),
        ),
    )


def novograd(base: optim.Novograd) -> Rule:
    """Momentum of gradients that are each divided by the norm of their tensor."""
    return _composed(
        "norms",
        lambda decay: optax.scale_by_novograd(b1=base.betas[0], b2=base.betas[1], eps=base.eps, weight_decay=decay),
    )


def _composed(sees: Sees, make: Callable[[Scalar], optax.GradientTransformation]) -> Rule:
    """The rule of a transformation, which is made anew in each trace with the decay as it then is."""

    def init(weights: jax.Array, _lr: Scalar) -> State:
        return make(jnp.zeros(())).init(weights)

    def update(g: jax.Array, w: jax.Array, state: State, step: StepScalars) -> tuple[jax.Array, State]:
        direction, state = make(step.decoupled_weight_decay).update(g, state, w)
        return w - step.lr * direction, state

    return Rule(sees, init, no_scalars, update)
