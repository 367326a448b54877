"""The records of compressed gradients, read as proto/kedge/v1/tensor.proto says, in Python's own fractions.

It shares no code with the SDK: an oracle of what records mean, and exact.
"""

import struct
from fractions import Fraction

RECORD = 1024


def read(data: bytes, dtype: str, element_count: int) -> list[Fraction]:
    """The elements of finite records, to the last bit: also where float32 would have to round."""
    return {"int8": _read_int8, "sign": _read_sign, "top_k": _read_top_k}[dtype](data, element_count)


def _read_int8(data: bytes, element_count: int) -> list[Fraction]:
    values: list[Fraction] = []
    while data:
        count = min(RECORD, element_count - len(values))
        (scale,) = struct.unpack("<f", data[:4])
        values += [Fraction(scale) * byte for byte in struct.unpack(f"<{count}b", data[4 : 4 + count])]
        data = data[4 + count :]
    assert len(values) == element_count
    return values


def _read_sign(data: bytes, element_count: int) -> list[Fraction]:
    values: list[Fraction] = []
    while data:
        count = min(RECORD, element_count - len(values))
        (scale,) = struct.unpack("<f", data[:4])
        values += [Fraction(-scale if data[4 + i // 8] >> i % 8 & 1 else scale) for i in range(count)]
        data = data[4 + (count + 7) // 8 :]
    assert len(values) == element_count
    return values


def _read_top_k(data: bytes, element_count: int) -> list[Fraction]:
    values = [Fraction(0)] * element_count
    for at in range(0, len(data), 8):
        index, value = struct.unpack("<If", data[at : at + 8])
        values[index] = Fraction(value)
    return values
