# SPDX-License-Identifier: BSD-3-Clause
"""A writer for the part of TensorFlow's GraphDef that ``fusedsep.pretrained.graphdef`` reads."""

from __future__ import annotations

import numpy as np
import torch

DT_FLOAT, DT_INT32 = 1, 3


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value)


def message(field: int, content: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(content)) + content


def tensor(shape: tuple[int, ...], content: bytes, dtype: int = DT_FLOAT) -> bytes:
    dims = b"".join(message(2, number(1, size)) for size in shape)
    return number(1, dtype) + message(2, dims) + content


def node(name: str, op: str, value: bytes | None = None) -> bytes:
    content = message(1, name.encode()) + message(2, op.encode())
    if value is not None:
        content += message(5, message(1, b"value") + message(2, message(8, value)))
    return message(1, content)


def constant(name: str, array: np.ndarray) -> bytes:
    content = message(4, np.ascontiguousarray(array, "<f4").tobytes())
    return node(name, "Const", tensor(array.shape, content))


def slim_graph(state: dict[str, torch.Tensor]) -> bytes:
    """A state_dict of ``MobileNetV1`` as TF-slim would have frozen it."""
    graph = node("input", "Placeholder")

    def layer(name: str, conv: str, bn: str, weights: str, axes: tuple[int, ...]) -> bytes:
        theirs = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}
        out = constant(f"{name}/{weights}", state[f"{conv}.weight"].numpy().transpose(axes))
        return out + b"".join(constant(f"{name}/BatchNorm/{a}", state[f"{bn}.{b}"].numpy()) for a, b in theirs.items())

    full, depthwise = (2, 3, 1, 0), (2, 3, 0, 1)
    graph += layer("MobilenetV1/Conv2d_0", "first_conv.0", "first_conv.1", "weights", full)
    for index in range(13):
        name, block = f"MobilenetV1/Conv2d_{index + 1}", f"stage_layers.{index}"
        graph += layer(f"{name}_depthwise", f"{block}.dw", f"{block}.bn1", "depthwise_weights", depthwise)
        graph += layer(f"{name}_pointwise", f"{block}.pw", f"{block}.bn2", "weights", full)
    logits = "MobilenetV1/Logits/Conv2d_1c_1x1"
    graph += constant(f"{logits}/weights", state["linear.weight"].numpy().T[None, None])
    return graph + constant(f"{logits}/biases", state["linear.bias"].numpy())
