"""Reading optax transformations. What is expected are the arguments that each was made with."""

import inspect
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kedge
import kedge.adapters.jax
from kedge import optim
from kedge.adapters.optax import from_optax

READ = {
    "sgd": (optax.sgd(0.3), optim.SGD(lr=0.3)),
    "sgd with momentum": (optax.sgd(0.3, momentum=0.8), optim.SGD(lr=0.3, momentum=0.8)),
    "sgd with nesterov": (
        optax.sgd(0.3, momentum=0.8, nesterov=True),
        optim.SGD(lr=0.3, momentum=0.8, nesterov=True),
    ),
    "adam": (
        optax.adam(0.02, b1=0.8, b2=0.95, eps=1e-5),
        optim.Adam(lr=0.02, betas=(0.8, 0.95), eps=1e-5),
    ),
    "amsgrad": (
        optax.amsgrad(0.02, b1=0.8, b2=0.95, eps=1e-5),
        optim.Adam(lr=0.02, betas=(0.8, 0.95), eps=1e-5, amsgrad=True),
    ),
    "adamw": (
        optax.adamw(0.02, b1=0.8, b2=0.95, eps=1e-5, weight_decay=0.1),
        optim.AdamW(lr=0.02, betas=(0.8, 0.95), eps=1e-5, weight_decay=0.1),
    ),
    "adabelief": (
        optax.adabelief(0.02, b1=0.8, b2=0.95, eps=1e-6, eps_root=1e-9),
        optim.AdaBelief(lr=0.02, betas=(0.8, 0.95), eps=1e-6, eps_root=1e-9),
    ),
    "adabelief by default": (optax.adabelief(0.02), optim.AdaBelief(lr=0.02)),
    "yogi": (
        optax.yogi(0.02, b1=0.8, b2=0.95, eps=1e-2),
        optim.Yogi(lr=0.02, betas=(0.8, 0.95), eps=1e-2),
    ),
    "radam": (
        optax.radam(0.02, b1=0.8, b2=0.95, eps=1e-5),
        optim.RAdam(lr=0.02, betas=(0.8, 0.95), eps=1e-5),
    ),
    "lion": (
        optax.lion(0.02, b1=0.8, b2=0.95, weight_decay=0.1),
        optim.Lion(lr=0.02, betas=(0.8, 0.95), weight_decay=0.1),
    ),
    "rmsprop": (optax.rmsprop(0.02, decay=0.8, eps=1e-5), optim.RMSprop(lr=0.02, alpha=0.8, eps=1e-5)),
    "rmsprop, centered and with momentum": (
        optax.rmsprop(0.02, decay=0.8, eps=1e-5, centered=True, momentum=0.7),
        optim.RMSprop(lr=0.02, alpha=0.8, eps=1e-5, centered=True, momentum=0.7),
    ),
    "adagrad": (
        optax.adagrad(0.02, initial_accumulator_value=0.3, eps=1e-5),
        optim.Adagrad(lr=0.02, initial_accumulator_value=0.3, eps=1e-5),
    ),
    "adadelta": (
        optax.adadelta(0.5, rho=0.8, eps=1e-4, weight_decay=0.1),
        optim.Adadelta(lr=0.5, rho=0.8, eps=1e-4, weight_decay=0.1),
    ),
    "adamax": (
        optax.adamax(0.02, b1=0.8, b2=0.95, eps=1e-5),
        optim.Adamax(lr=0.02, betas=(0.8, 0.95), eps=1e-5),
    ),
    "lamb": (
        optax.lamb(0.02, b1=0.8, b2=0.95, eps=1e-5, weight_decay=0.1),
        optim.Lamb(lr=0.02, betas=(0.8, 0.95), eps=1e-5, weight_decay=0.1),
    ),
    "lars": (
        optax.lars(0.5, weight_decay=0.1, trust_coefficient=0.01, eps=1e-5, momentum=0.8),
        optim.Lars(lr=0.5, weight_decay=0.1, trust_coefficient=0.01, eps=1e-5, momentum=0.8),
    ),
    "novograd": (
        optax.novograd(0.02, b1=0.8, b2=0.4, eps=1e-5, weight_decay=0.1),
        optim.Novograd(lr=0.02, betas=(0.8, 0.4), eps=1e-5, weight_decay=0.1),
    ),
    "an alias for want of a class": (optax.sign_sgd(0.02), optim.Optax("sign_sgd", lr=0.02)),
    "adamaxw": (
        optax.adamaxw(0.02, b1=0.8, b2=0.95, eps=1e-5, weight_decay=0.1),
        optim.Optax("adamaxw", lr=0.02, b1=0.8, b2=0.95, eps=1e-5, weight_decay=0.1),
    ),
    "adan": (
        optax.adan(0.02, b1=0.8, b2=0.7, b3=0.6, eps=1e-5, eps_root=1e-6, weight_decay=0.1),
        optim.Optax("adan", lr=0.02, b1=0.8, b2=0.7, b3=0.6, eps=1e-5, eps_root=1e-6, weight_decay=0.1),
    ),
    "nadam, whose momentum has no schedule in optax": (
        optax.nadam(0.02, b1=0.8),
        optim.Optax("adam", lr=0.02, b1=0.8, b2=0.999, eps=1e-8, eps_root=0.0, nesterov=True),
    ),
    "nadamw": (
        optax.nadamw(0.02, b1=0.8, weight_decay=0.1),
        optim.Optax("adamw", lr=0.02, b1=0.8, b2=0.999, eps=1e-8, eps_root=0.0, nesterov=True, weight_decay=0.1),
    ),
    "an alias for an argument that the class has not": (
        optax.radam(0.02, threshold=4.0),
        optim.Optax("radam", lr=0.02, b1=0.9, b2=0.999, eps=1e-8, eps_root=0.0, threshold=4.0, nesterov=False),
    ),
    "an alias for a value that the class refuses": (
        optax.lars(0.5),
        optim.Optax("lars", lr=0.5, trust_coefficient=0.001, eps=0.0, momentum=0.9, nesterov=False),
    ),
    "everything around it": (
        optax.chain(
            optax.clip_by_global_norm(2.0),
            optax.clip(0.5),
            optax.add_decayed_weights(0.1),
            optax.sgd(0.3, momentum=0.8),
        ),
        optim.SGD(lr=0.3, momentum=0.8, weight_decay=0.1, grad_clip_norm=2.0, grad_clip_value=0.5),
    ),
    "clips around an alias": (
        optax.chain(optax.clip_by_global_norm(2.0), optax.chain(optax.clip(0.5), optax.sign_sgd(0.3))),
        optim.Optax("sign_sgd", lr=0.3, grad_clip_norm=2.0, grad_clip_value=0.5),
    ),
    "a chain by hand": (
        optax.chain(optax.scale_by_adam(b1=0.8), optax.add_decayed_weights(0.1), optax.scale(-0.02)),
        optim.AdamW(lr=0.02, betas=(0.8, 0.999), weight_decay=0.1),
    ),
    "two scales": (optax.chain(optax.sgd(0.5), optax.scale(0.25)), optim.SGD(lr=0.125)),
    "a named chain": (
        optax.named_chain(("clip", optax.clip(0.5)), ("sgd", optax.sgd(0.3))),
        optim.SGD(lr=0.3, grad_clip_value=0.5),
    ),
    "injected hyperparameters": (
        optax.inject_hyperparams(optax.adamw)(0.02, b1=0.8, weight_decay=0.1),
        optim.AdamW(lr=0.02, betas=(0.8, 0.999), weight_decay=0.1),
    ),
    "JAX's numbers": (optax.sgd(jnp.float32(0.5), momentum=np.float64(0.25)), optim.SGD(lr=0.5, momentum=0.25)),
    "decoupled decay of zero": (optax.adamw(0.02, weight_decay=0.0), optim.AdamW(lr=0.02, weight_decay=0.0)),
}


@pytest.mark.parametrize(("tx", "expected"), READ.values(), ids=READ)
def test_what_optax_makes_is_read(tx, expected):
    assert from_optax(tx) == expected


@settings(max_examples=15, deadline=None)
@given(
    lr=st.floats(1e-4, 1.0),
    b1=st.floats(0.0, 0.99),
    b2=st.floats(0.0, 0.9999),
    eps=st.floats(1e-10, 1e-1),
    decay=st.floats(1e-6, 1.0),
)
def test_adamw_is_read_with_any_arguments(lr, b1, b2, eps, decay):
    tx = optax.adamw(lr, b1=b1, b2=b2, eps=eps, weight_decay=decay)

    assert from_optax(tx) == optim.AdamW(lr=lr, betas=(b1, b2), eps=eps, weight_decay=decay)


def own_transformation():
    return optax.GradientTransformation(lambda params: (), lambda grads, state, params=None: (grads, state))


decay_rate = optax.linear_schedule(1.0, 0.0, 10)
UNREADABLE = {
    "a function of one's own": (own_transformation, "own_transformation is not known"),
    "one within a chain": (lambda: optax.chain(own_transformation(), optax.sgd(0.1)), "not known"),
    "a schedule": (lambda: optax.sgd(decay_rate), "is a schedule.*kedge.optim"),
    "an injected schedule": (lambda: optax.inject_hyperparams(optax.sgd)(decay_rate), "learning_rate is a schedule"),
    "a schedule of the decay": (lambda: optax.adamw(0.1, weight_decay=decay_rate), "weight_decay is a schedule"),
    "a mask": (lambda: optax.masked(optax.sgd(0.1), {"w": True}), "masked.*Group"),
    "a mask of the decay": (lambda: optax.adamw(0.1, mask=lambda params: params), "masked.*Group"),
    "no learning rate": (optax.scale_by_adam, "no learning rate"),
    "a step uphill": (lambda: optax.sgd(-0.1), "up the gradient"),
    "other state than float32": (lambda: optax.adam(0.1, mu_dtype=jnp.bfloat16), "mu_dtype is bfloat16"),
    "state in float32": (lambda: optax.adam(0.1, mu_dtype=jnp.float32), "mu_dtype is float32: leave it out"),
    "a momentum in float32": (
        lambda: optax.sgd(0.1, momentum=0.9, accumulator_dtype="float32"),
        "accumulator_dtype is float32: leave it out",
    ),
    "clips in another order": (
        lambda: optax.chain(optax.clip(1.0), optax.clip_by_global_norm(1.0), optax.sgd(0.1)),
        "no optimizer like clip_by_global_norm",
    ),
    "decay that is neither": (
        lambda: optax.chain(optax.trace(0.9), optax.add_decayed_weights(0.1), optax.scale(-0.1)),
        "no optimizer like trace",
    ),
    "decay after the rate": (
        lambda: optax.chain(optax.scale_by_adam(), optax.scale(-0.1), optax.add_decayed_weights(-0.01)),
        "",
    ),
    "a rate before the rule": (lambda: optax.chain(optax.scale(-0.1), optax.scale_by_adam()), "but in a trial"),
    "coupled decay around an alias": (
        lambda: optax.chain(optax.add_decayed_weights(0.1), optax.nadam(0.1)),
        "no optimizer like scale_by_adam",
    ),
    "a clip of nothing": (lambda: optax.chain(optax.clip(0.0), optax.sgd(0.1)), "no optimizer like"),
    "a wrapper": (lambda: optax.apply_if_finite(optax.sgd(0.1), 3), "apply_if_finite is not known"),
    "lookahead": (lambda: optax.lookahead(optax.sgd(0.1), 5, 0.5), "lookahead is not known"),
    "adafactor": (lambda: optax.adafactor(0.1), "scale_by_factored_rms is not known"),
    "halves of two": (
        lambda: optax.GradientTransformation(optax.scale_by_yogi().init, optax.adam(0.1).update),
        "",
    ),
}


@pytest.mark.parametrize(("make", "why"), UNREADABLE.values(), ids=UNREADABLE)
def test_what_cannot_be_read_is_refused_with_the_reason_and_a_way_out(make, why):
    with pytest.raises(
        ValueError, match=rf"(?s)this optax transformation cannot be read: .*{why}.*optim\.Adam\(lr=1e-3\)"
    ):
        from_optax(make())


@pytest.mark.parametrize("given", [None, optim.Adam(), "adam", optax.adam])
def test_what_is_no_transformation_is_refused(given):
    with pytest.raises(TypeError, match=r"tx is .*: give an optax transformation"):
        from_optax(given)


# Formulas that are not what their names say. The closures are read as ever; the trial finds the difference.


class Moments(NamedTuple):
    count: jax.Array
    mu: optax.Updates
    nu: optax.Updates


def moments_of(params):
    zeros = jax.tree.map(jnp.zeros_like, params)
    return Moments(jnp.zeros([], jnp.int32), zeros, zeros)


def belief_of_the_old_moment(b1=0.9, b2=0.999, eps=1e-16, eps_root=1e-16, *, nesterov=False):
    """AdaBelief as optax had it up to 0.2.3: the deviation is from the moment of the step before."""

    def update_fn(updates, state, params=None):
        count = state.count + 1
        nu = jax.tree.map(lambda s, g, m: b2 * s + (1 - b2) * (g - m) ** 2 + eps_root, state.nu, updates, state.mu)
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, updates)
        updates = jax.tree.map(lambda m, s: m / (1 - b1**count) / (jnp.sqrt(s / (1 - b2**count)) + eps), mu, nu)
        return updates, Moments(count, mu, nu)

    return optax.GradientTransformation(moments_of, update_fn)


def adam_of_uncorrected_moments(b1=0.9, b2=0.999, eps=1e-8, eps_root=0.0, mu_dtype=None, *, nesterov=False):
    def update_fn(updates, state, params=None):
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, updates)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g**2, state.nu, updates)
        updates = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mu, nu)
        return updates, Moments(state.count + 1, mu, nu)

    return optax.GradientTransformation(moments_of, update_fn)


def clip_by_the_largest(max_norm):
    def update_fn(updates, state, params=None):
        largest = jnp.stack([jnp.max(jnp.abs(g)) for g in jax.tree.leaves(updates)]).max()
        return jax.tree.map(lambda g: g * jnp.minimum(1.0, max_norm / largest), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update_fn)


def trace_that_forgets(decay, nesterov=False, accumulator_dtype=None):
    def update_fn(updates, state, params=None):
        moved = jax.tree.map(lambda g, t: g + decay * t, updates, state)
        return moved, updates  # decay is read, and holds for one step

    return optax.GradientTransformation(lambda params: jax.tree.map(jnp.zeros_like, params), update_fn)


def trace_that_rounds(decay, nesterov=False, accumulator_dtype=None):
    def update_fn(updates, state, params=None):
        moved = jax.tree.map(lambda g, t: g + decay * (1 - 1e-5) * t, updates, state)
        return moved, moved

    return optax.GradientTransformation(lambda params: jax.tree.map(jnp.zeros_like, params), update_fn)


@pytest.mark.parametrize(
    ("name", "liar", "arguments"),
    [
        ("scale_by_belief", belief_of_the_old_moment, {}),
        ("scale_by_adam", adam_of_uncorrected_moments, {}),
        ("clip_by_global_norm", clip_by_the_largest, {"max_norm": 1.0}),
        ("trace", trace_that_forgets, {"decay": 0.9}),
        ("trace", trace_that_rounds, {"decay": 0.9}),
    ],
)
def test_transformation_that_does_something_else_than_it_looks_like_is_refused(monkeypatch, name, liar, arguments):
    assert inspect.signature(liar).parameters.keys() == inspect.signature(getattr(optax, name)).parameters.keys()
    honest = optax.chain(getattr(optax, name)(**arguments), optax.scale(-0.1))
    assert isinstance(from_optax(honest), optim.Rule)

    monkeypatch.setattr(optax, name, liar)
    with pytest.raises(ValueError, match=r"it looks like \w+\(.*\), but in a trial an element of a \w+ moves by"):
        from_optax(optax.chain(liar(**arguments), optax.scale(-0.1)))


def test_reading_leaves_the_precision_of_jax_as_it_was():
    from_optax(optax.adam(0.1))

    assert jnp.zeros(1).dtype == jnp.float32
    assert jnp.asarray(np.zeros(1)).dtype == jnp.float32


# What was read, on a server


@pytest.mark.parametrize("name", ["adam", "lamb", "nadam", "adan", "lars"])
def test_a_real_server_goes_where_the_transformation_goes(server, run_name, name):
    tx = getattr(optax, name)(0.02)
    generator = np.random.default_rng(6)
    shapes = {"w": (4, 3), "b": (3,), "scale": ()}
    new = lambda: {key: jnp.asarray(generator.normal(size=shape), jnp.float32) for key, shape in shapes.items()}  # noqa: E731
    params = new()
    state = tx.init(params)
    with kedge.connect(server.address) as client:
        run = kedge.adapters.jax.create_run(
            client, run_name, params=params, optimizer=from_optax(tx), aggregation=kedge.Synchronous(1)
        )
        with run.join() as worker:
            worker.pull()
            for _ in range(20):
                grads = new()
                updates, state = tx.update(grads, state, params)
                params = optax.apply_updates(params, updates)
                got = worker.step(grads)

    # Optax computes 1 - b2**t in float32: 6e-5 off at the first step, for b2 = 0.999.
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-6), got, params)
