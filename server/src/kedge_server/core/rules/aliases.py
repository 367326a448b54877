"""Optimizers by their name in optax, with optax's own arguments.

Optax's formula is used as it is, learning rate included. Left out are aliases that need more than a gradient (lbfgs,
polyak_sgd), noisy_sgd, whose noise would repeat itself from block to block, sm3, which cannot take scalars, and
optimistic_adam, which optax itself gives up for optimistic_adam_v2.
"""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kedge import optim
from kedge_server.core.rules.rule import Rule, Scalar, Sees, State, StepScalars, no_scalars

ELEMENTWISE = frozenset(
    {
        "adabelief",
        "adadelta",
        "adagrad",
        "adam",
        "adamax",
        "adamaxw",
        "adamw",
        "adan",
        "amsgrad",
        "lion",
        "nadam",
        "nadamw",
        "optimistic_adam_v2",
        "optimistic_gradient_descent",
        "radam",
        "rmsprop",
        "rprop",
        "sgd",
        "sign_sgd",
        "signum",
        "yogi",
    }
)
"""Those whose elements move by themselves."""
LAYERWISE = frozenset({"adafactor", "fromage", "lamb", "lars", "novograd"})
"""Those that look at whole tensors. They get them as they are, also where norms alone would do: with an epsilon of 0
the zeros that a padded block ends in would become NaN, and the norm with them."""
_SEES: dict[str, Sees] = {**dict.fromkeys(ELEMENTWISE, "elements"), **dict.fromkeys(LAYERWISE, "shapes")}

DTYPES = ("float32", "bfloat16", "float16")
"""What optax may keep a state in."""


def alias(base: optim.Optax) -> Rule:
    """The rule of an alias that `check_alias` has let pass."""

    def init(weights: jax.Array, lr: Scalar) -> State:
        # Copied, so that no state is the weights' own array, which would be donated with it.
        return jax.tree.map(jnp.copy, _make(base, lr).init(weights))

    def update(g: jax.Array, w: jax.Array, state: State, step: StepScalars) -> tuple[jax.Array, State]:
        moved, state = _make(base, step.lr).update(g, state, w)
        return optax.apply_updates(w, moved), state

    return Rule(_SEES[base.name], init, no_scalars, update)


def check_alias(base: optim.Optax) -> None:
    """Refuses what optax would, before anything is created.

    Raises:
        ValueError: for a name that is not on the list, or arguments that optax does not take. The text begins with the
            field's name.
    """
    known = sorted(name for name in _SEES if hasattr(optax, name))
    if base.name not in known:
        raise ValueError(f"name is {base.name!r}: it must be one of {', '.join(known)}")
    parameters = inspect.signature(getattr(optax, base.name)).parameters
    allowed = [name for name in parameters if name != "learning_rate" and "mask" not in name]
    for argument, _value in base.arguments:
        if "mask" in argument and argument in parameters:
            raise ValueError(f"arguments.{argument} cannot travel: use groups, as in optim.Group('*.bias', ...)")
        if argument not in allowed:
            raise ValueError(
                f"arguments.{argument} is not of optax.{base.name}, whose arguments are {', '.join(allowed) or 'none'}"
            )
    for name in allowed:
        if parameters[name].default is inspect.Parameter.empty and name not in dict(base.arguments):
            raise ValueError(f"arguments.{name} is missing: optax.{base.name} demands it")
    for argument, value in base.arguments:
        _check_text(argument, value)
    _check_steps(base)


def _check_text(argument: str, value: object) -> None:
    """Refuses text but where optax has a dtype, and all dtypes but floats: in their names NumPy reads sizes too."""
    if "dtype" in argument and not (value is None or value in DTYPES):
        raise ValueError(f"arguments.{argument} is {value!r}: it must be None or one of {', '.join(DTYPES)}")
    if "dtype" not in argument and isinstance(value, str):
        raise ValueError(f"arguments.{argument} is {value!r}: it must be a number, True, False or None")


def _check_steps(base: optim.Optax) -> None:
    """Refuses arguments of the right names that optax cannot compute with, by two steps of small tensors."""
    rule = alias(base)
    scalars = StepScalars(jnp.float32(1e-3), jnp.float32(0), ())
    random = np.random.default_rng(0)

    @jax.jit
    def stepped(w: jax.Array, gradients: jax.Array) -> jax.Array:
        state = rule.init(w, scalars.lr)
        for g in gradients:
            w, state = rule.update(g, w, state, scalars)
        return w

    given = ", ".join(f"{name}={value!r}" for name, value in base.arguments)[:400]
    for shape in ((), (3,), (2, 2)):
        w, *gradients = jnp.asarray(random.normal(size=(3, *shape)), jnp.float32)
        try:
            after = stepped(w, gradients)
        except Exception as error:  # whatever optax makes of wrong values
            reason = str(error).partition("\n")[0][:200]
            raise ValueError(f"arguments are {given}: optax.{base.name} cannot take them ({reason})") from error
        if not np.isfinite(after).all():
            raise ValueError(f"arguments are {given}: optax.{base.name} makes NaN or infinite weights of them")


def _make(base: optim.Optax, lr: Scalar) -> optax.GradientTransformation:
    return getattr(optax, base.name)(learning_rate=lr, **dict(base.arguments))
