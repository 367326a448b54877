"""Every optimizer against optax, composed in one process on the tree itself, with and without Lookahead.

The tree has scalars, vectors, matrices and a 4-D kernel; the code under test works on blocks that are cut through it.
"""

import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kedge import optim
from kedge.wire.manifest import Manifest
from kedge_server.core import update
from kedge_server.core.plan import plan
from kedge_server.core.rules import check_rule, rule_of
from kedge_server.core.rules.aliases import ELEMENTWISE, LAYERWISE

from . import harness

STEP_COUNT = 50
SHAPES: list[tuple[str, tuple[int, ...]]] = [
    ("scale", ()),
    ("bias", (7,)),
    ("kernel", (3, 3, 4, 5)),
    ("embedding", (130, 140)),  # as large as it must be for Adafactor to keep rows and columns
    ("w", (6, 9)),
    ("b", (1,)),
]
MANIFEST = Manifest.from_specs([(name, shape, "float32") for name, shape in SHAPES])
BLOCK = 5000
"""Cuts the embedding where the rule allows it."""
LR = 0.01

# Both sides round each weight once a step, and optax takes 1 - b2^t in float32, which is off by up to 2e-5 in the first
# hundred steps (test_optax.py), so that its steps are off by half of that.
TOLERANCE = STEP_COUNT * (2.0**-24 * 4 + LR * 1e-5)

Tree = dict[str, Any]
Transformation = optax.GradientTransformation


class Twin(NamedTuple):
    """An optimizer, and optax's rule for it: clips and coupled decay before it, `-lr` after it."""

    ours: optim.Rule
    theirs: Callable[[], Transformation]


def chain(*parts: Transformation) -> Callable[[], Transformation]:
    return lambda: optax.chain(*parts)


def adagrad_with_decay() -> Transformation:
    return optax.chain(optax.scale_by_rss(0.1, 1e-7), optax.scale_by_schedule(lambda count: 1 / (1 + 0.1 * count)))


def nadam() -> Transformation:
    """Dozat's scheduled momentum, for which optax has no transformation: its scale_by_adam takes a constant one."""

    def init(params: Tree) -> Any:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return zeros, zeros, jnp.zeros(()), jnp.ones(())

    def step(grads: Tree, state: Any, _params: Tree | None = None) -> Any:
        m, v, t, product = state
        t = t + 1
        mu, mu_next = (0.9 * (1 - 0.5 * 0.96 ** (at * 4e-3)) for at in (t, t + 1))
        m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, grads)
        v = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, v, grads)
        product = product * mu
        bars = jax.tree.map(lambda m, g: (1 - mu) * g / (1 - product) + mu_next * m / (1 - product * mu_next), m, grads)
        updates = jax.tree.map(lambda bar, v: bar / (jnp.sqrt(v / (1 - 0.999**t)) + 1e-8), bars, v)
        return updates, (m, v, t, product)

    return optax.GradientTransformation(init, step)


def decayed(decay: float) -> Transformation:
    return optax.add_decayed_weights(decay)


TWINS: dict[str, Twin] = {
    "sgd": Twin(optim.SGD(LR), optax.identity),
    "sgd_nesterov": Twin(optim.SGD(LR, 0.8, nesterov=True), chain(optax.trace(0.8, nesterov=True))),
    "momentum": Twin(optim.Momentum(LR), chain(optax.trace(0.9))),
    "momentum_nesterov": Twin(optim.MomentumNesterov(LR), chain(optax.trace(0.9, nesterov=True))),
    "adam": Twin(optim.Adam(LR), chain(optax.scale_by_adam())),
    "amsgrad": Twin(optim.Adam(LR, (0.8, 0.9), amsgrad=True), chain(optax.scale_by_amsgrad(0.8, 0.9))),
    "adamw": Twin(optim.AdamW(LR, weight_decay=0.1), chain(optax.scale_by_adam(), decayed(0.1))),
    "yogi": Twin(optim.Yogi(LR), chain(optax.scale_by_yogi())),
    "radam": Twin(optim.RAdam(LR), chain(optax.scale_by_radam())),
    "radam_soon": Twin(optim.RAdam(LR, (0.9, 0.5)), chain(optax.scale_by_radam(0.9, 0.5))),
    "nadam": Twin(optim.Nadam(LR), nadam),
    "lion": Twin(optim.Lion(LR, weight_decay=0.1), chain(optax.scale_by_lion(), decayed(0.1))),
    "rmsprop": Twin(optim.RMSprop(LR), chain(optax.scale_by_rms(0.99))),
    "rmsprop_centered": Twin(
        optim.RMSprop(LR, 0.9, 1e-4, momentum=0.5, centered=True),
        chain(optax.scale_by_stddev(0.9, 1e-4), optax.trace(0.5)),
    ),
    "adagrad": Twin(optim.Adagrad(LR, initial_accumulator_value=0.1), chain(optax.scale_by_rss(0.1, 1e-10))),
    "adagrad_decay": Twin(optim.Adagrad(LR, lr_decay=0.1, initial_accumulator_value=0.1, eps=1e-7), adagrad_with_decay),
    "adadelta": Twin(optim.Adadelta(1.0), chain(optax.scale_by_adadelta(), optax.scale(1 / LR))),
    "adamax": Twin(optim.Adamax(LR), chain(optax.scale_by_adamax())),
    "adabelief": Twin(optim.AdaBelief(LR), chain(optax.scale_by_belief(eps_root=1e-16))),
    "lamb": Twin(
        optim.Lamb(LR, weight_decay=0.1),
        chain(optax.scale_by_adam(eps=1e-6), decayed(0.1), optax.scale_by_trust_ratio()),
    ),
    "lars": Twin(
        optim.Lars(LR, trust_coefficient=0.5),
        chain(optax.scale_by_trust_ratio(trust_coefficient=0.5, eps=1e-8), optax.trace(0.9)),
    ),
    "adafactor": Twin(
        optim.Adafactor(LR, weight_decay=0.1),
        chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), decayed(0.1)),
    ),
    "adafactor_momentum": Twin(
        optim.Adafactor(LR, beta1=0.8, clip_threshold=0.5, decay_rate=0.7),
        chain(optax.scale_by_factored_rms(decay_rate=0.7), optax.clip_by_block_rms(0.5), optax.ema(0.8, debias=False)),
    ),
    "novograd": Twin(
        optim.Novograd(LR, (0.95, 0.98), weight_decay=0.1),
        chain(optax.scale_by_novograd(0.95, 0.98, 1e-8, weight_decay=0.1)),
    ),
}
each_twin = pytest.mark.parametrize("name", TWINS)


def start() -> np.ndarray:
    return np.random.default_rng(5).normal(size=MANIFEST.element_count).astype(np.float32)


def gradients() -> list[np.ndarray]:
    """Of each step: noise about a drift, of another size from step to step."""
    rng = np.random.default_rng(6)
    drift = rng.normal(size=MANIFEST.element_count)
    return [
        ((0.3 * drift + rng.normal(size=drift.size)) * 10.0 ** rng.uniform(-2, 0.5)).astype(np.float32)
        for _ in range(STEP_COUNT)
    ]


def tree_of(flat: np.ndarray) -> Tree:
    ends = np.cumsum([int(np.prod(shape)) for _, shape in SHAPES])[:-1]
    parts = zip(SHAPES, np.split(flat, ends), strict=True)
    return {name: jnp.asarray(part.reshape(shape)) for (name, shape), part in parts}


def flat_of(tree: Tree) -> np.ndarray:
    return np.concatenate([np.asarray(tree[name]).reshape(-1) for name, _ in SHAPES])


def optax_walk(transformation: Transformation, lookahead: optim.Lookahead | None = None) -> Iterator[harness.Weights]:
    """The weights after each step, on the whole tree."""
    fast = slow = tree_of(start())
    state = transformation.init(fast)

    @jax.jit
    def advance(fast: Tree, state: Any, grads: Tree) -> Any:
        updates, state = transformation.update(grads, state, fast)
        return optax.apply_updates(fast, updates), state

    for step, gradient in enumerate(gradients(), start=1):
        fast, state = advance(fast, state, tree_of(gradient))
        if lookahead and step % lookahead.sync_period == 0:
            slow = fast = optax.incremental_update(fast, slow, lookahead.alpha)
            state = transformation.init(fast) if lookahead.reset_state else state
        yield harness.Weights(flat_of(fast), flat_of(slow))


def our_walk(optimizer: optim.Optimizer, block_elements: int) -> Iterator[harness.Weights]:
    """The weights after each step, on blocks."""
    cut = plan(optimizer.spec(), MANIFEST, block_elements=block_elements)
    return harness.trajectory(optimizer, start(), harness.single(gradients()), plan=cut)


def distance(got: Iterator[harness.Weights], want: Iterator[harness.Weights]) -> float:
    """The greatest difference of any weight at any step, in the unit of the greatest weight of that step."""
    found = 0.0
    for ours, theirs in zip(got, want, strict=True):
        for left, right in ((ours.fast, theirs.fast), (ours.slow, theirs.slow)):
            if left is not None and right is not None:
                found = max(found, float(np.abs(left - right).max() / np.abs(right).max()))
    return found


@each_twin
def test_agrees_with_optax(name: str) -> None:
    ours, theirs = TWINS[name]
    whole = optax.chain(theirs(), optax.scale(-LR))
    assert distance(our_walk(ours, BLOCK), optax_walk(whole)) < TOLERANCE


# Lion's step is a sign, which a rounding of the norm may turn.
@pytest.mark.parametrize("name", [name for name in TWINS if name != "lion"])
def test_agrees_with_optax_clipped_and_decayed(name: str) -> None:
    ours, theirs = TWINS[name]
    options: dict[str, Any] = {"grad_clip_norm": 20.0, "grad_clip_value": 0.5}
    before = [optax.clip_by_global_norm(20.0), optax.clip(0.5)]
    if not ours.decouples_decay:
        options["weight_decay"] = 0.05
        before.append(decayed(0.05))
    settings = ours.spec().settings._replace(**options)
    whole = optax.chain(*before, theirs(), optax.scale(-LR))
    assert distance(our_walk(ours.with_settings(settings), BLOCK), optax_walk(whole)) < TOLERANCE


@each_twin
@pytest.mark.parametrize("reset_state", [False, True], ids=["kept", "reset"])
def test_agrees_with_optax_in_lookahead(name: str, reset_state: bool) -> None:
    ours, theirs = TWINS[name]
    lookahead = optim.Lookahead(ours, sync_period=6, alpha=0.4, reset_state=reset_state)
    whole = optax.chain(theirs(), optax.scale(-LR))
    assert distance(our_walk(lookahead, BLOCK), optax_walk(whole, lookahead)) < TOLERANCE


@each_twin
def test_blocks_and_whole_tree_agree(name: str) -> None:
    ours = optim.Lookahead(TWINS[name].ours, sync_period=6, alpha=0.4)
    for want, got in zip(our_walk(ours, MANIFEST.element_count), our_walk(ours, BLOCK), strict=True):
        if rule_of(ours.spec().rule).sees == "elements":
            assert harness.same_bits(want.fast, got.fast)
            assert harness.same_bits(want.slow, got.slow)
        else:  # how the sums in norms are nested is the compiler's choice
            assert np.abs(want.fast - got.fast).max() <= 2.0**-20 * np.abs(want.fast).max()


def alias(name: str, lr: float | optim.Schedule = LR) -> optim.Optax:
    return optim.Optax(name, lr=lr)


ALIASES = sorted(name for name in ELEMENTWISE | LAYERWISE if hasattr(optax, name))


@pytest.mark.parametrize("name", ALIASES)
def test_an_alias_is_optax_itself_in_blocks(name: str) -> None:
    ours = alias(name)
    check_rule(ours.spec().rule)
    theirs = getattr(optax, name)(learning_rate=LR, **dict(ours.arguments))
    assert distance(our_walk(ours, BLOCK), optax_walk(theirs)) < TOLERANCE


def test_an_alias_without_epsilon_is_optax_itself_in_blocks() -> None:
    # Where a gradient is zero this Lamb makes NaN, and so would zeros that a block is padded with.
    ours = optim.Optax("lamb", lr=LR, eps=0.0)
    assert distance(our_walk(ours, BLOCK), optax_walk(optax.lamb(LR, eps=0.0))) < TOLERANCE


@pytest.mark.parametrize("name", ALIASES)
def test_an_alias_follows_a_schedule_as_optax_with_injected_hyperparameters(name: str) -> None:
    def rate(count: Any) -> Any:
        return LR * 0.9**count

    def injected() -> Transformation:
        make = getattr(optax, name)
        constants = [argument for argument in inspect.signature(make).parameters if argument != "learning_rate"]
        return optax.inject_hyperparams(make, static_args=constants)(learning_rate=rate)

    ours = alias(name, optim.ExponentialLR(LR, 0.9))
    assert distance(our_walk(ours, BLOCK), optax_walk(injected())) < TOLERANCE


@pytest.mark.parametrize("name", [*TWINS, *ALIASES])
def test_no_state_shares_memory_with_the_weights_or_with_itself(name: str) -> None:
    # It is donated, so whatever shared its memory would be gone.
    optimizer = TWINS[name].ours if name in TWINS else alias(name)
    program = update.Program(plan(optimizer.spec(), MANIFEST, block_elements=10**6))
    values = harness.values_at(optimizer, 1)
    blocks = program.init(start(), values)
    for step in (1, 2):
        pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(blocks) if leaf.size]
        assert len(set(pointers)) == len(pointers)
        blocks = program.apply(blocks, [gradients()[0]], factors=[1.0], step=step, values=values)
