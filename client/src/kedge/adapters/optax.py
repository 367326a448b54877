"""From an optax transformation to an optimizer of `kedge.optim`: what a program holds as `optax.adam(1e-3)`.

An optax transformation is code, and code does not travel to a server. It is recognised instead, and what was recognised
is proved: the transformation and the optimizer made of it run side by side, and where they differ the transformation is
refused.

Example:
    >>> import optax
    >>> from kedge.adapters.optax import from_optax
    >>> from_optax(optax.sgd(0.1, momentum=0.9))
    SGD(lr=0.1, momentum=0.9, weight_decay=0.0, nesterov=False, grad_clip_norm=None, grad_clip_value=None)
"""

try:
    import optax
except ImportError as error:
    raise ImportError("kedge.adapters.optax needs optax: pip install kedge[jax]") from error

from kedge import optim
from kedge.adapters._optax_links import UnreadableError, links_of
from kedge.adapters._optax_proof import difference
from kedge.adapters._optax_rules import rule_of

__all__ = ["from_optax"]


def from_optax(tx: optax.GradientTransformation) -> optim.Rule:
    """The optimizer of `kedge.optim` that does what an optax transformation does.

    Read are optax's own optimizers made with numbers, alone or after `clip_by_global_norm`, `clip` and
    `add_decayed_weights` in this order, in any nesting of `chain`, and under `inject_hyperparams`. It computes a few
    steps on small arrays, which takes some tenths of a second.

    Args:
        tx: as optax's functions make it.

    Returns:
        An optimizer of `kedge.optim` where one has the same formula, else `optim.Optax` with the name of optax's.

    Raises:
        TypeError: if `tx` is no transformation.
        ValueError: if it cannot be read, because it holds a schedule, a mask or something of the program's own, or if
            what was read does something else.
    """
    if not isinstance(tx, optax.GradientTransformation):
        raise TypeError(f"tx is {tx!r}: give an optax transformation, as in optax.adam(1e-3)")
    try:
        rule = rule_of(links_of(tx))
    except UnreadableError as error:
        raise _refusal(str(error)) from None
    except ValueError as error:
        raise _refusal(f"it has an argument out of range: {error}") from error
    try:
        found = difference(tx, rule)
    except Exception as error:  # whatever code that is not ours makes of the trial
        raise _refusal(f"it looks like {rule}, but fails in a trial: {error}") from error
    if found:
        raise _refusal(f"it looks like {rule}, but in a trial {found}")
    return rule


def _refusal(why: str) -> ValueError:
    return ValueError(
        f"this optax transformation cannot be read: {why}. Give an optimizer of kedge.optim instead, as in "
        f"optim.Adam(lr=1e-3) or optim.Optax('adam', lr=1e-3)"
    )
