"""From the links of an optax chain to an optimizer of `kedge.optim`.

What surrounds the rule comes off first: clips and coupled decay at the beginning, and the learning rate. What is left
is looked up. An argument that the optimizer has no field for must be the one that optax takes by default; where it is
not, optax's own alias is asked for by its name, if that has the argument.
"""

import inspect
import math
from collections.abc import Iterable
from dataclasses import fields
from typing import Any, NamedTuple

import optax

from kedge import optim
from kedge.adapters._optax_links import Link, UnreadableError


class _Form(NamedTuple):
    """What a chain stands for."""

    rule: type[optim.Rule] | None
    """Of kedge.optim; None: it has none of this formula."""
    alias: str | None
    """The function of optax that makes this chain, where that is not the rule's formula for all arguments."""
    flag: str = ""
    """An argument that is True, where there is one of this name."""


_FORMS: dict[tuple[str, ...], _Form] = {
    (): _Form(optim.SGD, None),
    ("trace",): _Form(optim.SGD, "sgd"),
    ("scale_by_adadelta",): _Form(optim.Adadelta, "adadelta"),
    ("scale_by_adam",): _Form(optim.Adam, "adam"),
    ("scale_by_adam", "add_decayed_weights"): _Form(optim.AdamW, "adamw"),
    ("scale_by_adam", "add_decayed_weights", "scale_by_trust_ratio"): _Form(optim.Lamb, "lamb"),
    ("scale_by_adam", "scale_by_trust_ratio"): _Form(optim.Lamb, "lamb"),
    ("scale_by_adamax",): _Form(optim.Adamax, "adamax"),
    ("scale_by_adamax", "add_decayed_weights"): _Form(None, "adamaxw"),
    ("scale_by_adan", "add_decayed_weights"): _Form(None, "adan"),
    ("scale_by_amsgrad",): _Form(optim.Adam, "amsgrad", "amsgrad"),
    ("scale_by_belief",): _Form(optim.AdaBelief, "adabelief"),
    ("scale_by_lion",): _Form(optim.Lion, None),
    ("scale_by_lion", "add_decayed_weights"): _Form(optim.Lion, "lion"),
    ("scale_by_novograd",): _Form(optim.Novograd, "novograd"),
    ("scale_by_radam",): _Form(optim.RAdam, "radam"),
    ("scale_by_rms",): _Form(optim.RMSprop, "rmsprop"),
    ("scale_by_rms", "trace"): _Form(optim.RMSprop, "rmsprop"),
    ("scale_by_rss",): _Form(optim.Adagrad, "adagrad"),
    ("scale_by_sign",): _Form(None, "sign_sgd"),
    ("scale_by_stddev",): _Form(optim.RMSprop, "rmsprop", "centered"),
    ("scale_by_stddev", "trace"): _Form(optim.RMSprop, "rmsprop", "centered"),
    ("scale_by_trust_ratio", "trace"): _Form(optim.Lars, "lars"),
    ("scale_by_yogi",): _Form(optim.Yogi, "yogi"),
}
_DECAY_FIRST = frozenset({"adadelta", "lars"})
"""The aliases whose own weight decay is the coupled one."""

_RULE_FIELDS = {
    ("trace", "decay"): "momentum",
    ("scale_by_rms", "decay"): "alpha",
    ("scale_by_stddev", "decay"): "alpha",
}
_ALIAS_ARGUMENTS = {("trace", "decay"): "momentum"}


def rule_of(links: Iterable[Link]) -> optim.Rule:
    """The optimizer that does what the links do.

    Raises:
        UnreadableError: if there is none.
        ValueError: if an option around the rule is out of range.
    """
    core, around = _without_surroundings([link for link in links if link.maker != "identity"])
    form = _FORMS.get(tuple(link.maker for link in core))
    if form is None:
        raise _unknown(core, around)
    return _own(form, core, around) or _by_alias(form, core, around)


def _without_surroundings(links: list[Link]) -> tuple[list[Link], dict[str, Any]]:
    """The links that make the rule, and the options around it."""
    around: dict[str, Any] = {"lr": _rate([link for link in links if link.maker in ("scale", "scale_by_schedule")])}
    rest = [link for link in links if link.maker != "scale"]
    for maker, argument, option in (
        ("clip_by_global_norm", "max_norm", "grad_clip_norm"),
        ("clip", "max_delta", "grad_clip_value"),
        ("add_decayed_weights", "weight_decay", "weight_decay"),
    ):
        if rest and rest[0].maker == maker:
            around[option] = rest.pop(0).arguments[argument]
    if not around.get("weight_decay"):
        around.pop("weight_decay", None)
    return rest, around


def _rate(scales: list[Link]) -> float:
    if not scales:
        raise UnreadableError("it has no learning rate")
    rate: float = -math.prod(link.arguments["step_size"] for link in scales)
    if rate < 0:
        raise UnreadableError(f"it goes up the gradient: its learning rate is {rate}")
    return rate


def _own(form: _Form, core: list[Link], around: dict[str, Any]) -> optim.Rule | None:
    """The optimizer of kedge.optim; None if there is none for these arguments."""
    if form.rule is None:
        return None
    names = {field.name for field in fields(form.rule)}  # type: ignore[arg-type]  # every subclass is a dataclass
    taken = _assigned(core, names | {"b1", "b2"} if "betas" in names else names, _RULE_FIELDS)
    if taken is None or taken.keys() & around.keys():
        return None
    if "b1" in taken:
        taken["betas"] = (taken.pop("b1"), taken.pop("b2"))
    if "eps_root" in names and taken["eps_root"] == taken["eps"]:
        del taken["eps_root"]  # what it is without saying
    try:
        return form.rule(**taken, **around, **_flag(form, names))
    except ValueError:  # narrower than optax: an eps of 0, a momentum of 1
        return None


def _by_alias(form: _Form, core: list[Link], around: dict[str, Any]) -> optim.Rule:
    if form.alias is None or ("weight_decay" in around and form.alias not in _DECAY_FIRST):
        raise _unknown(core, around)
    names = set(inspect.signature(getattr(optax, form.alias)).parameters)
    taken = _assigned(core, names, _ALIAS_ARGUMENTS)
    if taken is None:
        raise _unknown(core, around)
    given = {name: value for name, value in (taken | around).items() if value is not None}
    return optim.Optax(form.alias, **given, **_flag(form, names))


def _unknown(core: list[Link], around: dict[str, Any]) -> UnreadableError:
    text = ", ".join(f"{link.maker}({_listed(link.arguments)})" for link in core)
    return UnreadableError(f"there is no optimizer like {text or 'it'} with {_listed(around)}")


def _listed(arguments: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in arguments.items())


def _flag(form: _Form, names: set[str]) -> dict[str, bool]:
    return {form.flag: True} if form.flag in names else {}


def _assigned(core: list[Link], names: set[str], renamed: dict[tuple[str, str], str]) -> dict[str, Any] | None:
    """The arguments of the links by the names that there are; None if one is neither among them nor optax's default."""
    taken: dict[str, Any] = {}
    for link in core:
        parameters = inspect.signature(getattr(optax, link.maker)).parameters
        for argument, value in link.arguments.items():
            name = renamed.get((link.maker, argument), argument)
            if name in names and name not in taken:
                taken[name] = value
            elif value != parameters[argument].default:
                return None
    return taken
