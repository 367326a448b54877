"""Commits and images as bytes, and back: JSON, and exact.

A number, text, true, false and null are themselves, in Python's dialect: a float always has a point or an exponent, and
Infinity, -Infinity and NaN are words. An array is a tuple. An object has one key, which says what it is:

    {"list": [...]}  {"dict": {...}}  {"items": [[key, value], ...]}  {"bytes": "00ff"}  {"PushResult": {"step": 3}}

`dict` has keys that are text, `items` any others; the rest are values of the classes below, by their fields. Nothing
else can be read: no name leads to code. Whoever adds a field to one of them gives it a default, which it takes where an
older server did not write it; whoever renames one adds a way to read the old name.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, NamedTuple

from kedge import optim, policies
from kedge.optim import controls
from kedge.optim.schedules import PlateauState
from kedge.wire.manifest import Manifest, TensorSpec
from kedge_server.core import commits, image, values
from kedge_server.storage.errors import StorageError

_CLASSES: tuple[type[Any], ...] = (
    *(commits.Created, commits.Joined, commits.Ended, commits.Held, commits.Rejected, commits.Stepped),
    *(commits.Updated, commits.Ticked, commits.Restored),
    *(commits.RunConfig, commits.ArraySpec, commits.Progress, commits.Judgement),
    *(image.ImageState, image.LeaseState, image.EntryState),
    *(values.PushResult, values.ContributionHeader),
    *(Manifest, TensorSpec),
    *(policies.Synchronous, policies.Asynchronous, policies.BoundedStaleness, policies.Buffered),
    *(policies.Admission, policies.Checkpoints),
    *(controls.Controls, controls._Own, controls.RateState, controls.Change, controls.RecordedChange),
    *(controls.StepValues, optim.Settings, PlateauState),
    *(optim.Lookahead, optim.Group, optim.Optax),
    *(optim.SGD, optim.Momentum, optim.MomentumNesterov, optim.Lion),
    *(optim.Adam, optim.AdamW, optim.Nadam, optim.RAdam, optim.Adamax, optim.Yogi, optim.AdaBelief),
    *(optim.RMSprop, optim.Adagrad, optim.Adadelta, optim.Lamb, optim.Lars, optim.Adafactor, optim.Novograd),
    *(optim.ConstantLR, optim.StepLR, optim.ExponentialLR, optim.MultiStepLR, optim.ExponentialDecayLR),
    *(optim.CosineAnnealingLR, optim.CosineAnnealingWarmRestarts, optim.PolynomialLR, optim.LinearLR),
    *(optim.CyclicLR, optim.OneCycleLR, optim.WarmupScheduler, optim.WarmupCosineSchedule),
    *(optim.PiecewiseConstantSchedule, optim.ChainedScheduler, optim.SequentialLR, optim.ReduceLROnPlateau),
)
"""Everything that may be stored."""


def encode(value: object) -> bytes:
    """The bytes of a value.

    Raises:
        TypeError: for a value of a class that is not stored.
    """
    return _dumps(_plain(value)).encode()


def decode(raw: bytes) -> Any:
    """The value of bytes that `encode` made.

    Raises:
        StorageError: for anything else, as what a newer server may have written.
    """
    try:
        return _value(json.loads(raw))
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise StorageError(f"what is stored cannot be read: {error}; {_ADVICE}") from error


_ADVICE = "use the server that wrote it, or a newer one"
_dumps = json.JSONEncoder(separators=(",", ":")).encode


class _Shape(NamedTuple):
    """How the values of a class are built."""

    tag: str
    names: tuple[str, ...]
    required: frozenset[str]
    build: Callable[..., Any]


def _shape(kind: type[Any]) -> _Shape:
    tag = kind.__name__.lstrip("_")
    if not is_dataclass(kind):
        return _Shape(tag, kind._fields, frozenset(kind._fields) - frozenset(kind._field_defaults), kind)
    given = [field for field in fields(kind) if field.init]
    required = (field.name for field in given if field.default is MISSING and field.default_factory is MISSING)
    build = _optax if kind is optim.Optax else kind
    return _Shape(tag, tuple(field.name for field in given), frozenset(required), build)


def _optax(*, name: str, arguments: Iterable[tuple[str, Any]], **options: Any) -> optim.Optax:
    return optim.Optax(name, **options, **dict(arguments))


# To plain values


def _plain(value: Any) -> Any:
    if type(value) in _ATOMS:
        return value
    plain = _PLAIN.get(type(value))
    if plain is not None:
        return plain(value)
    for atom in (float, int, str):
        if isinstance(value, atom):  # as NumPy's float64
            return atom(value)
    raise TypeError(f"{value!r} cannot be stored: {type(value).__name__} is none of the classes that are")


def _plain_dict(value: dict[Any, Any]) -> dict[str, Any]:
    if all(type(key) is str for key in value):
        return {"dict": {key: _plain(each) for key, each in value.items()}}
    return {"items": [[_plain(key), _plain(each)] for key, each in value.items()]}


def _plain_tuple_of(shape: _Shape) -> Callable[[Any], Any]:
    """For a NamedTuple. It comes with every step, so it does not stop for what is plain already."""
    tag, names = shape.tag, shape.names
    return lambda value: {
        tag: {name: each if type(each) in _ATOMS else _plain(each) for name, each in zip(names, value, strict=True)}
    }


def _plain_fields_of(shape: _Shape) -> Callable[[Any], Any]:
    return lambda value: {shape.tag: {name: _plain(getattr(value, name)) for name in shape.names}}


_ATOMS = frozenset({type(None), bool, int, float, str})
_SHAPES = {kind: _shape(kind) for kind in _CLASSES}
_BY_TAG = {shape.tag: shape for shape in _SHAPES.values()}
assert len(_BY_TAG) == len(_CLASSES), "two classes have one name"
_PLAIN: dict[type[Any], Callable[[Any], Any]] = {
    tuple: lambda value: [_plain(each) for each in value],
    list: lambda value: {"list": [_plain(each) for each in value]},
    dict: _plain_dict,
    bytes: lambda value: {"bytes": value.hex()},
    **{
        kind: _plain_tuple_of(shape) if issubclass(kind, tuple) else _plain_fields_of(shape)
        for kind, shape in _SHAPES.items()
    },
}


# From plain values


def _value(plain: Any) -> Any:
    if isinstance(plain, list):
        return tuple(map(_value, plain))
    if not isinstance(plain, dict):
        return plain
    if len(plain) != 1:
        raise StorageError(f"an object that is stored has the keys {sorted(plain)}, and must have one; {_ADVICE}")
    ((tag, content),) = plain.items()
    read = _READ.get(tag)
    return _built(tag, content) if read is None else read(content)


def _built(tag: str, content: dict[str, Any]) -> Any:
    shape = _BY_TAG.get(tag)
    if shape is None:
        raise StorageError(f"what is stored has a {tag!r}, which is not known here; {_ADVICE}")
    if unknown := content.keys() - set(shape.names):
        raise StorageError(f"a {tag} that is stored has {sorted(unknown)}, which is not known here; {_ADVICE}")
    if missing := shape.required - content.keys():
        raise StorageError(f"a {tag} that is stored lacks {sorted(missing)}: it is damaged, or of another program")
    return shape.build(**{name: _value(each) for name, each in content.items()})


_READ: dict[str, Callable[[Any], Any]] = {
    "list": lambda content: list(map(_value, content)),
    "dict": lambda content: {key: _value(each) for key, each in content.items()},
    "items": lambda content: {_value(key): _value(each) for key, each in content},
    "bytes": bytes.fromhex,
}
