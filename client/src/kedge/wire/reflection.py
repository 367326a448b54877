"""Between the plain values of `kedge.optim` and messages that have the same fields: by the fields' names.

A message's field is named as the value's, in lower case (`t_max` for `T_max`); an enum's value as the text with the
enum's prefix (`MODE_EXP_RANGE` for "exp_range"). Fields that hold messages are left alone.
"""

import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from google.protobuf.message import Message

from kedge.wire.errors import KedgeError

_REFUSAL = re.compile(
    r"([a-z_]\w*(?:\[\d+\]|\.\w+)*) (?:['\"].*['\"] )?(?:is|are|has|holds|cannot) ", re.IGNORECASE | re.DOTALL
)
"""How a refusal of a plain value begins: with the field's name. A mistake of our own does not read like this."""


class Refusing:
    """Turns a constructor's refusal into INVALID_CONFIGURATION, whose field is `what` and the constructor's.

    Every other error stays what it is.
    """

    def __init__(self, what: str = "") -> None:
        self._what = what

    def __enter__(self) -> None:
        pass

    def __exit__(self, _type: object, error: BaseException | None, _trace: object) -> None:
        if not isinstance(error, ValueError | TypeError) or isinstance(error, KedgeError):
            return
        if refusal := _REFUSAL.match(str(error)):
            field, dot, inside = refusal[1].partition(".")
            raise invalid(f"{self._what}.{field.lower()}{dot}{inside}".lstrip("."), str(error)) from error


def invalid(field: str, message: str) -> KedgeError:
    """INVALID_CONFIGURATION for a field."""
    return KedgeError("INVALID_CONFIGURATION", message, field=field)


def kind_of(value: object, kinds: Mapping[str, type[Any]]) -> str:
    """The name that the value's type has among `kinds`.

    Raises:
        TypeError: if it is none of them: a type of the user's own.
    """
    for kind, of in kinds.items():
        if type(value) is of:
            return kind
    raise TypeError(f"{value!r} is of a type of its own: only those of kedge.optim can travel to the server")


def fill(message: Message, value: Any) -> None:
    """Sets each field of the message from the attribute of the same name."""
    names = {field.name.lower(): field.name for field in fields(value)}
    for descriptor in message.DESCRIPTOR.fields:
        if descriptor.message_type is not None:
            continue
        assert descriptor.name in names, f"{type(value).__name__} lacks the field {descriptor.name} of its message"
        attribute = getattr(value, names[descriptor.name])
        if isinstance(attribute, tuple):
            getattr(message, descriptor.name).extend(attribute)
        elif descriptor.enum_type is not None:
            setattr(message, descriptor.name, _prefix(descriptor.enum_type) + attribute.upper())
        elif attribute is not None:
            setattr(message, descriptor.name, attribute)


def values(message: Message) -> dict[str, Any]:
    """The message's fields by name, as constructor arguments.

    Optional ones that are not set are None, and an enum that is not set is left out.

    Raises:
        ValueError: for an enum's value that is none of those known here; the text begins with the field's name.
    """
    arguments: dict[str, Any] = {}
    for descriptor in message.DESCRIPTOR.fields:
        value = getattr(message, descriptor.name)
        if descriptor.message_type is not None:
            continue
        if descriptor.enum_type is not None:
            if value:
                arguments[descriptor.name] = _text_of(descriptor.name, descriptor.enum_type, value)
        elif descriptor.has_presence and not message.HasField(descriptor.name):
            arguments[descriptor.name] = None
        else:
            arguments[descriptor.name] = value if isinstance(value, int | float | str | bytes) else tuple(value)
    return arguments


def _text_of(field: str, enum: Any, number: int) -> str:
    known = enum.values_by_number
    if number not in known:
        names = ", ".join(known[i].name for i in sorted(known) if i)
        raise ValueError(f"{field} is number {number}: it must be one of {names}")
    return str(known[number].name).removeprefix(_prefix(enum)).lower()


def _prefix(enum: Any) -> str:
    # Any: the descriptors of protobuf's two implementations have no type in common.
    return str(enum.values_by_number[0].name).removesuffix("UNSPECIFIED")
