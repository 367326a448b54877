"""The rules of the base optimizers: from gradient, weights and state to new weights and state.

What surrounds a rule (clips, coupled decay, Lookahead) is `kedge_server.core.update`'s matter, when a rate changes is
`kedge.optim.controls`'.
"""

from collections.abc import Callable
from typing import Any

from kedge import optim
from kedge_server.core.rules import adaptive, layerwise, momentum
from kedge_server.core.rules.aliases import alias, check_alias
from kedge_server.core.rules.rule import Rule, Sees, State, StepScalars

__all__ = ["Rule", "Sees", "State", "StepScalars", "check_rule", "rule_of"]

_RULES: dict[type[optim.Rule], Callable[[Any], Rule]] = {
    optim.SGD: momentum.sgd,
    optim.Momentum: lambda base: momentum.with_momentum(base.momentum, nesterov=False),
    optim.MomentumNesterov: lambda base: momentum.with_momentum(base.momentum, nesterov=True),
    optim.Lion: momentum.lion,
    optim.Adam: adaptive.adam,
    optim.AdamW: adaptive.adamw,
    optim.AdaBelief: adaptive.adabelief,
    optim.Yogi: adaptive.yogi,
    optim.RAdam: adaptive.radam,
    optim.Nadam: adaptive.nadam,
    optim.Adamax: adaptive.adamax,
    optim.RMSprop: adaptive.rmsprop,
    optim.Adagrad: adaptive.adagrad,
    optim.Adadelta: adaptive.adadelta,
    optim.Lamb: layerwise.lamb,
    optim.Lars: layerwise.lars,
    optim.Adafactor: layerwise.adafactor,
    optim.Novograd: layerwise.novograd,
    optim.Optax: alias,
}


def rule_of(base: optim.Rule) -> Rule:
    """The rule of a base optimizer."""
    return _RULES[type(base)](base)


def check_rule(base: optim.Rule) -> None:
    """Refuses what only the server can judge: names and arguments of optax.

    Raises:
        ValueError: whose text begins with the field's name.
    """
    if isinstance(base, optim.Optax):
        check_alias(base)
