"""Reading an optax transformation: from its closures to the links of a chain, each with optax's name and arguments.

A transformation is two closures and nothing else. A closure is known by its code, which is the one that the function of
optax compiles to; its arguments are the variables that it closes over. Whether what was read is right is not decided
here: `kedge.adapters._optax_proof` runs both.
"""

import inspect
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

_MAKERS = (
    "add_decayed_weights",
    "chain",
    "clip",
    "clip_by_global_norm",
    "identity",
    "inject_hyperparams",
    "masked",
    "named_chain",
    "scale",
    "scale_by_adadelta",
    "scale_by_adam",
    "scale_by_adamax",
    "scale_by_adan",
    "scale_by_amsgrad",
    "scale_by_belief",
    "scale_by_lion",
    "scale_by_novograd",
    "scale_by_radam",
    "scale_by_rms",
    "scale_by_rss",
    "scale_by_schedule",
    "scale_by_sign",
    "scale_by_stddev",
    "scale_by_trust_ratio",
    "scale_by_yogi",
    "trace",
    "with_extra_args_support",
)
"""The functions of optax whose transformations can be read."""


class UnreadableError(Exception):
    """Why a transformation cannot be read."""


class Link(NamedTuple):
    """One link of a chain."""

    maker: str
    """The function of optax that made it."""
    arguments: dict[str, Any]
    """What it was given: numbers, flags, text and None."""


def links_of(tx: optax.GradientTransformation) -> list[Link]:
    """The links of a transformation in the order in which gradients pass them, chains within chains laid flat.

    Raises:
        UnreadableError: for what no function of optax that is known here made, and for schedules and masks.
    """
    try:
        return list(_links(tx, _codes()))
    except KeyError as error:
        raise UnreadableError(f"optax {optax.__version__} builds it in another way: it has no {error}") from error


def _links(tx: optax.GradientTransformation, codes: dict[CodeType, str]) -> Iterator[Link]:
    maker = codes.get(getattr(tx.update, "__code__", None))  # type: ignore[arg-type]
    if maker is None:
        raise UnreadableError(f"{_name_of(tx.update)} is not known")
    inner = _INNER.get(maker)
    if inner is None:
        yield Link(maker, _arguments(tx, maker, codes))
        return
    for part in inner(tx):
        yield from _links(part, codes)


def _codes() -> dict[CodeType, str]:
    """The functions within the functions of optax, by their code: whose they are.

    Made anew each time, so that it is that of optax as it is.
    """
    codes: dict[CodeType, str] = {}
    for maker in _MAKERS:
        function = inspect.unwrap(getattr(optax, maker, _nothing))
        if inspect.isfunction(function):
            codes |= dict.fromkeys(_nested(function.__code__), maker)
    return codes


def _nothing() -> None:
    """Stands for a function that this version of optax does not have."""


def _nested(code: CodeType) -> Iterator[CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from _nested(constant)


def _cells(function: Callable[..., Any]) -> dict[str, Any]:
    """What a function closes over, by name."""
    cells = getattr(function, "__closure__", None) or ()
    return dict(zip(function.__code__.co_freevars, (cell.cell_contents for cell in cells), strict=True))


def _arguments(tx: optax.GradientTransformation, maker: str, codes: dict[CodeType, str]) -> dict[str, Any]:
    held = _held(tx.init, maker, codes) | _held(tx.update, maker, codes)
    parameters = inspect.signature(getattr(optax, maker)).parameters
    return {name: _plain(f"{maker}'s {name}", held[name]) for name in parameters if name in held}


def _held(function: Callable[..., Any], maker: str, codes: dict[CodeType, str]) -> dict[str, Any]:
    """What a function and its helpers within the same maker close over."""
    held: dict[str, Any] = {}
    for name, value in _cells(function).items():
        if inspect.isfunction(value) and codes.get(value.__code__) == maker:
            held |= _held(value, maker, codes)
        else:
            held[name] = value
    return held


def _plain(what: str, value: Any) -> Any:
    """An argument as a value of Python."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if callable(value) and not isinstance(value, type):
        raise UnreadableError(
            f"{what} is a schedule: make it with a number, and give the optimizer a schedule of kedge.optim as its lr"
        )
    if isinstance(value, jax.core.Tracer):
        raise UnreadableError(f"{what} is traced: read it outside of jax.jit")
    if isinstance(value, np.dtype | type):
        raise UnreadableError(f"{what} is {np.dtype(value)}: leave it out, float32 is what the server has")
    if np.ndim(value) == 0:
        return np.asarray(value).item()
    raise UnreadableError(f"{what} has the shape {np.shape(value)}: it must be one number")


def _chained(tx: optax.GradientTransformation) -> list[optax.GradientTransformation]:
    inits, updates = _cells(tx.init)["init_fns"], _cells(tx.update)["update_fns"]
    return [optax.GradientTransformation(*pair) for pair in zip(inits, updates, strict=True)]


def _named(tx: optax.GradientTransformation) -> list[optax.GradientTransformation]:
    return [part for _, part in _cells(tx.update)["transforms"]]


def _wrapped(tx: optax.GradientTransformation) -> list[optax.GradientTransformation]:
    return [_cells(tx.update)["tx"]]


def _unmasked(tx: optax.GradientTransformation) -> list[optax.GradientTransformation]:
    cells = _cells(tx.update)
    if cells["mask"] is not True:
        raise UnreadableError("a part of it is masked: use groups, as in optim.Group('*.bias', weight_decay=0)")
    return [cells["inner"]]


def _injected(tx: optax.GradientTransformation) -> list[optax.GradientTransformation]:
    cells = _cells(tx.init)
    if cells["sched_hps"]:
        _plain(*next(iter(cells["sched_hps"].items())))
    return [cells["inner_factory"](**cells["other_hps"], **cells["numeric_hps"])]


def _name_of(function: Any) -> str:
    return getattr(function, "__qualname__", repr(function)).partition(".<locals>")[0]


_INNER: dict[str, Callable[[optax.GradientTransformation], list[optax.GradientTransformation]]] = {
    "chain": _chained,
    "named_chain": _named,
    "with_extra_args_support": _wrapped,
    "masked": _unmasked,
    "inject_hyperparams": _injected,
}
"""The makers whose transformations hold others."""
