"""The proof that an optimizer of `kedge.optim` does what an optax transformation does: both make the same few steps.

The transformation runs in float64 against the float64 model of the fake server, which is written from the papers. So a
transformation is also refused where the optax at hand computes by another formula than the server. `optim.Optax` is
compared with the alias that it names: there the formula is optax's in any case.
"""

from contextlib import AbstractContextManager
from importlib import import_module
from typing import Any

import jax
import numpy as np
import optax

from kedge import optim
from kedge.optim.controls import Controls
from kedge.updates import Updater
from kedge.wire.manifest import Manifest

_MANIFEST = Manifest.from_specs(
    (name, shape, "float32")
    for name, shape in {"scalar": (), "vector": (5,), "matrix": (3, 4), "kernel": (2, 1, 2, 3)}.items()
)
_SCALES = (1.0, 1e-3, 10.0, 0.1, 1e3)
_SEED = 0


def difference(tx: optax.GradientTransformation, rule: optim.Rule) -> str:
    """Where the two differ; empty if they do not."""
    weights, gradients = _trial(rule)
    given = _moves(tx, weights, gradients)
    ours = (
        _moves(_alias(rule), weights, gradients) if isinstance(rule, optim.Optax) else _model(rule, weights, gradients)
    )
    for step, (expected, got) in enumerate(zip(given, ours, strict=True), 1):
        size = max(np.max(np.abs(weights)), np.max(np.abs(expected)))
        is_close = np.isclose(got, expected, rtol=1e-7, atol=1e-14 * size, equal_nan=True)
        weights = weights + expected
        if not is_close.all():
            at = int(np.argmin(is_close))
            tensor = next(spec.name for spec in reversed(_MANIFEST.tensors) if spec.offset <= at)
            return f"an element of a {tensor} moves by {got[at]:.6g} at step {step} and not by {expected[at]:.6g}"
    return ""


def _trial(rule: optim.Rule) -> tuple[np.ndarray, list[np.ndarray]]:
    """Weights, and gradients in sizes that show every epsilon and both sides of every clip."""
    generator = np.random.default_rng(_SEED)
    weights = generator.normal(size=_MANIFEST.element_count)
    sizes = 10.0 ** generator.uniform(-10, 0, weights.shape)
    sizes[::7] = 0
    sizes[1::5] = 1
    limits = [rule.grad_clip_norm or 1.0, rule.grad_clip_value or 1.0, 1.0]
    return weights, [
        limit * scale * sizes * generator.normal(size=weights.shape) for scale in _SCALES for limit in limits
    ]


def _moves(tx: optax.GradientTransformation, weights: np.ndarray, gradients: list[np.ndarray]) -> list[np.ndarray]:
    """By how much the transformation moves the weights at each step."""
    moves = []
    with _float64():
        state, update = tx.init(_tensors(weights)), jax.jit(tx.update)
        for gradient in gradients:
            updates, state = update(_tensors(gradient), state, _tensors(weights))
            moves.append(np.concatenate([np.ravel(updates[spec.name]) for spec in _MANIFEST.tensors]))
            weights = weights + moves[-1]
    return moves


def _model(rule: optim.Rule, weights: np.ndarray, gradients: list[np.ndarray]) -> list[np.ndarray]:
    """By how much the optimizer moves them."""
    values = Controls.begin(rule.spec(), ()).values()
    updater = Updater(rule, (), _MANIFEST, weights)
    moves = []
    for gradient in gradients:
        before = updater.fast
        with np.errstate(all="ignore"):  # an infinity is compared like any other number
            updater.apply(gradient, values)
        moves.append(updater.fast - before)
    return moves


def _alias(rule: optim.Optax) -> optax.GradientTransformation:
    clips = [
        clip(limit)
        for clip, limit in ((optax.clip_by_global_norm, rule.grad_clip_norm), (optax.clip, rule.grad_clip_value))
        if limit is not None
    ]
    return optax.chain(*clips, getattr(optax, rule.name)(learning_rate=rule.lr, **dict(rule.arguments)))


def _float64() -> AbstractContextManager[Any]:
    """Lets JAX compute in float64."""
    switch: Any = getattr(jax, "enable_x64", None)
    if switch is None:  # before JAX 0.8
        switch = import_module("jax.experimental").enable_x64
    context: AbstractContextManager[Any] = switch(True)
    return context


def _tensors(flat: np.ndarray) -> dict[str, np.ndarray]:
    return {spec.name: flat[spec.offset : spec.offset + spec.size].reshape(spec.shape) for spec in _MANIFEST.tensors}
