"""Bytes that nobody meant: random ones, valid ones with something wrong, and messages whose fields are extreme."""

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

_BITS = (0, 1, 6, 7, 8, 10, 16, 30, 31, 32, 62, 63)
_BOUNDARIES = (0, *(1 << bits for bits in _BITS), *((1 << bits) - 1 for bits in (*_BITS[2:], 64)))
_NUMBERS = (0.0, -0.0, 1.0, -1.0, 0.5, 5e-324, -5e-324, 1e-30, 3.5e38, 1.8e308, math.inf, -math.inf, math.nan)
_TEXTS = ("", "a", "\x00", "é" * 40, "a" * 64, "x" * 600, "runs/", "../..", "%s{0}", "\n", "runs/a", "runs/a/workers/b")
_DEPTH = 5


class Mutator:
    """Makes inputs from valid ones, the same ones each time.

    Args:
        seed: what they follow from.
        corpus: valid inputs.
        message_type: what the inputs are, where they are messages.
    """

    def __init__(self, seed: int, corpus: Sequence[bytes], message_type: Callable[[], Message] | None = None) -> None:
        self.random = random.Random(seed)
        self._corpus = corpus
        self._message_type = message_type
        self._ways = (self._flip, self._insert, self._delete, self._double, self._cut, self._splice, self._boundary)

    def next(self) -> bytes:
        """Another input."""
        chance = self.random.random()
        if chance < 0.15:
            return self.garbage()
        if chance < 0.3 and self._message_type is not None:
            return extreme(self._message_type().DESCRIPTOR, self.random).SerializeToString()
        if chance < 0.6 and self._message_type is not None:
            return self.twisted(self._message_type())
        return self.mutated(self.random.choice(self._corpus))

    def garbage(self) -> bytes:
        """Random bytes."""
        return self.random.randbytes(int(2 ** self.random.uniform(0, 9)) - 1)

    def mutated(self, raw: bytes) -> bytes:
        """A valid input with one to four things wrong."""
        data = bytearray(raw)
        for _ in range(self.random.choice((1, 1, 1, 2, 4))):
            self.random.choice(self._ways)(data)
        return bytes(data)

    def twisted(self, message: Message) -> bytes:
        """A valid message with one field, of it or of a message in it, made extreme."""
        message.ParseFromString(self.random.choice(self._corpus))
        place: Any = message
        inner = _inner(place)
        while inner and self.random.random() < 0.7:
            place = self.random.choice(inner)
            inner = _inner(place)
        if place.DESCRIPTOR.fields:
            _set(place, self.random.choice(place.DESCRIPTOR.fields), self.random, 1)
        return message.SerializeToString()

    def _place(self, data: bytearray) -> int:
        return self.random.randrange(len(data) + 1)

    def _range(self, data: bytearray) -> slice:
        begin = self._place(data)
        return slice(begin, begin + self.random.randint(1, 16))

    def _flip(self, data: bytearray) -> None:
        if data:
            data[self.random.randrange(len(data))] ^= 1 << self.random.randrange(8)

    def _insert(self, data: bytearray) -> None:
        at = self._place(data)
        data[at:at] = self.random.randbytes(self.random.randint(1, 8))

    def _delete(self, data: bytearray) -> None:
        del data[self._range(data)]

    def _double(self, data: bytearray) -> None:
        piece = self._range(data)
        data[piece.start : piece.start] = data[piece] * self.random.choice((1, 1, 1, 2, 100))

    def _cut(self, data: bytearray) -> None:
        del data[self._place(data) :]

    def _splice(self, data: bytearray) -> None:
        data[self._place(data) :] = self.random.choice(self._corpus)[self.random.randrange(8) :]

    def _boundary(self, data: bytearray) -> None:
        at = self._place(data)
        data[at : at + 1] = varint(self.random.choice(_BOUNDARIES))


def varint(value: int) -> bytes:
    """An integer as protobuf writes it."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*out, value))


def extreme(descriptor: Descriptor, rng: random.Random, depth: int = _DEPTH) -> Message:
    """A message of this type, some of its fields at the ends of what they can hold."""
    message = GetMessageClass(descriptor)()
    for field in descriptor.fields:
        if rng.random() < 0.6:
            _set(message, field, rng, depth)
    return message


def _inner(message: Message) -> list[Any]:
    """The messages that it has, those of lists too."""
    held = [(field, value) for field, value in message.ListFields() if field.message_type is not None]
    lists = [value if field.is_repeated else [value] for field, value in held if not _is_map(field)]
    return [each for values in lists for each in values]


def _is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and field.message_type.GetOptions().map_entry


def _set(message: Any, field: FieldDescriptor, rng: random.Random, depth: int) -> None:
    if _is_map(field):
        _set_entry(getattr(message, field.name), field.message_type, rng, depth)
    elif field.message_type is not None:
        if depth:
            inner = getattr(message, field.name)
            inner = inner.add() if field.is_repeated else inner
            inner.MergeFrom(extreme(field.message_type, rng, depth - 1))
            inner.SetInParent()
    elif field.is_repeated:
        getattr(message, field.name).extend(_scalar(field, rng) for _ in range(rng.choice((0, 1, 2, 9))))
    else:
        setattr(message, field.name, _scalar(field, rng))


def _set_entry(entries: Any, entry: Descriptor, rng: random.Random, depth: int) -> None:
    key, value = _scalar(entry.fields_by_name["key"], rng), entry.fields_by_name["value"]
    if value.message_type is None:
        entries[key] = _scalar(value, rng)
    elif depth:
        entries[key].MergeFrom(extreme(value.message_type, rng, depth - 1))


def _scalar(field: FieldDescriptor, rng: random.Random) -> Any:
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_STRING:
            is_text = field.type == FieldDescriptor.TYPE_STRING
            return rng.choice(_TEXTS) if is_text else rng.randbytes(rng.choice((0, 1, 4, 32, 64)))
        case FieldDescriptor.CPPTYPE_DOUBLE:
            return rng.choice(_NUMBERS)
        case FieldDescriptor.CPPTYPE_FLOAT:
            return rng.choice([number for number in _NUMBERS if abs(number) != 1.8e308])
        case FieldDescriptor.CPPTYPE_BOOL:
            return rng.random() < 0.5
        case FieldDescriptor.CPPTYPE_ENUM:
            return rng.choice((*field.enum_type.values_by_number, 77, (1 << 31) - 1, -1))
    return rng.choice(_fitting(field.cpp_type))


def _fitting(cpp_type: int) -> list[int]:
    """The boundaries that an integer field of this type can hold."""
    is_long = cpp_type in (FieldDescriptor.CPPTYPE_INT64, FieldDescriptor.CPPTYPE_UINT64)
    is_signed = cpp_type in (FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_INT64)
    bits = 64 if is_long else 32
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if is_signed else (0, (1 << bits) - 1)
    return [value for sign in (1, -1) for value in (sign * each for each in _BOUNDARIES) if low <= value <= high]
