# SPDX-License-Identifier: BSD-3-Clause
"""The constants of a frozen TensorFlow 1 ``GraphDef``, read without TensorFlow and without protobuf.

A protobuf message is a sequence of fields: a varint ``key = number << 3 | wire_type``, then a varint (wire type 0),
8 bytes (1), a length and that many bytes (2), or 4 bytes (5). Of the schema only this much is needed::

    GraphDef     1: NodeDef node, repeated
    NodeDef      1: string name    2: string op    5: map<string, AttrValue> attr
    map entry    1: key            2: value
    AttrValue    8: TensorProto tensor
    TensorProto  1: DataType dtype    2: TensorShapeProto shape    4: bytes tensor_content
                 5: float float_val, repeated
    TensorShapeProto  2: Dim dim, repeated
    Dim          1: int64 size

Source: https://protobuf.dev/programming-guides/encoding, tensorflow/core/framework/{graph,node_def,tensor}.proto.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from ._errors import PretrainedError

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_DT_FLOAT = 1
_LARGEST_TENSOR = 1 << 29  # protobuf messages end at 2 GiB, so larger shapes are nonsense
_LITTLE_ENDIAN_FLOAT = np.dtype("<f4")


class GraphDefError(PretrainedError):
    """The bytes are not a whole, frozen ``GraphDef``."""


def read_constants(data: bytes | memoryview) -> dict[str, np.ndarray]:
    """All float32 ``Const`` nodes of a serialized ``GraphDef``, by node name.

    Returns:
        Read-only arrays in the node's own shape; constants of other types are left out.

    Raises:
        GraphDefError: the bytes end inside a field, are no protobuf message, or hold no float constant.
    """
    constants = {}
    for number, node in _fields(memoryview(data)):
        if number == 1:
            name, op, value = _node(_message(node, "node"))
            if op == "Const" and value is not None:
                array = _tensor(value, name)
                if array is not None:
                    constants[name] = array
    if not constants:
        raise GraphDefError("the GraphDef holds no float constant: weights are constants only in a frozen graph")
    return constants


def _node(node: memoryview) -> tuple[str, str, memoryview | None]:
    name = op = ""
    value = None
    for number, field in _fields(node):
        if number == 1:
            name = _text(field)
        elif number == 2:
            op = _text(field)
        elif number == 5:
            entry = dict(_fields(_message(field, "attr")))
            if 1 in entry and 2 in entry and _text(entry[1]) == "value":
                value = dict(_fields(_message(entry[2], "attr value"))).get(8)
    return name, op, None if value is None else _message(value, "tensor")


def _tensor(tensor: memoryview, name: str) -> np.ndarray | None:
    dtype: int | memoryview = 0
    shape: list[int] = []
    content: bytes | memoryview = b""
    values = bytearray()
    for number, field in _fields(tensor):
        if number == 1:
            dtype = field
        elif number == 2:
            dims = [dim for key, dim in _fields(_message(field, "shape")) if key == 2]
            shape = [_size(dict(_fields(_message(dim, "dim"))).get(1, 0), name) for dim in dims]
        elif number == 4:
            content = _message(field, "tensor_content")
        elif number == 5:
            values += _message(field, "float_val")
    if dtype != _DT_FLOAT:
        return None
    count = math.prod(shape)
    if count > _LARGEST_TENSOR:
        raise GraphDefError(f"constant {name!r} of shape {tuple(shape)} is larger than {_LARGEST_TENSOR} values")
    if len(values) == _LITTLE_ENDIAN_FLOAT.itemsize and not content:
        return np.broadcast_to(np.frombuffer(values, _LITTLE_ENDIAN_FLOAT)[0], shape)  # one value fills the tensor
    raw = content if len(content) else bytes(values)
    if len(raw) != count * _LITTLE_ENDIAN_FLOAT.itemsize:
        raise GraphDefError(f"constant {name!r} of shape {tuple(shape)} needs {4 * count} bytes, has {len(raw)}")
    return np.frombuffer(raw, _LITTLE_ENDIAN_FLOAT).reshape(shape)


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        number, wire_type = key >> 3, key & 7
        if number == 0:
            raise GraphDefError("not a GraphDef: protobuf fields are numbered from 1")
        if wire_type == _VARINT:
            value, position = _varint(message, position)
            yield number, value
            continue
        if wire_type == _BYTES:
            length, position = _varint(message, position)
        elif wire_type in (_FIXED64, _FIXED32):
            length = 8 if wire_type == _FIXED64 else 4
        else:
            raise GraphDefError(f"not a GraphDef: protobuf has no wire type {wire_type}")
        if length > len(message) - position:
            raise GraphDefError(f"truncated: a field wants {length} bytes, but {len(message) - position} are left")
        yield number, message[position : position + length]
        position += length


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):  # at most ten bytes of seven bits
        if position == len(message):
            raise GraphDefError("truncated: the bytes end inside a varint")
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise GraphDefError("not a GraphDef: a varint longer than ten bytes")


def _message(field: int | memoryview, what: str) -> memoryview:
    if isinstance(field, int):
        raise GraphDefError(f"not a GraphDef: {what} is a number, not bytes")
    return field


def _text(field: int | memoryview) -> str:
    try:
        return bytes(_message(field, "text")).decode()
    except UnicodeDecodeError:
        raise GraphDefError("not a GraphDef: a name is not UTF-8") from None


def _size(field: int | memoryview, name: str) -> int:
    if not isinstance(field, int) or field >= 1 << 63:
        raise GraphDefError(f"constant {name!r} has a dimension of unknown size")
    return field
