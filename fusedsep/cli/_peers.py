# SPDX-License-Identifier: BSD-3-Clause
"""Other engines to time a model in; each is optional, and whatever keeps one away is said."""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib
import importlib.metadata
import io
import logging
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn as nn

from ._arguments import describe

#: Runs the model on the input that it was made for.
Call = Callable[[], torch.Tensor]


class Unavailable(Exception):
    """Why an engine cannot run the model."""


def onnxruntime_call(module: nn.Module, x: torch.Tensor) -> Call:
    """ONNX Runtime on the exported model, with the threads of torch and sequential execution of its operators."""
    onnxruntime = _import("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(_exported(module, x), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.numpy()}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


def openvino_call(module: nn.Module, x: torch.Tensor) -> Call:
    """OpenVINO on the exported model in float32, with the threads of torch and one stream."""
    openvino = _import("openvino")
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": "f32",
    }
    core = openvino.Core()
    request = core.compile_model(
        core.read_model(io.BytesIO(_exported(module, x))), "CPU", settings
    ).create_infer_request()
    request.set_input_tensor(openvino.Tensor(x.numpy(), shared_memory=True))

    def call() -> torch.Tensor:
        request.infer()
        return torch.from_numpy(request.get_output_tensor().data)

    return call


def compile_call(module: nn.Module, x: torch.Tensor) -> Call:
    """``torch.compile`` with its option ``freezing``, in channels_last."""
    torch.compiler.reset()  # Dynamo gives up on code that was compiled more than a few times
    module = copy.deepcopy(module).to(memory_format=torch.channels_last)
    compiled = torch.compile(module, options={"freezing": True})
    x = x.to(memory_format=torch.channels_last)
    return lambda: compiled(x)


PEERS: dict[str, Callable[[nn.Module, torch.Tensor], Call]] = {
    "onnxruntime": onnxruntime_call,
    "openvino": openvino_call,
    "compile": compile_call,
}
#: ``compile`` takes seconds for every shape, so that it runs only where it is asked for.
_USUAL = ("onnxruntime", "openvino")
#: Nothing is refused for not being installed, so that the last two ask for the same.
_WORDS = ("none", "installed", "all")


def add_peers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--peers",
        type=_peers,
        default=_USUAL,
        metavar="LIST",
        help=f"other engines: 'none', 'installed' (all that are; the others are named) or any of {','.join(PEERS)} "
        f"(default: {','.join(_USUAL)})",
    )


def _peers(text: str) -> tuple[str, ...]:
    if text in _WORDS:
        return () if text == "none" else tuple(PEERS)
    names = tuple(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in PEERS:
            words = ", ".join(map(repr, _WORDS))
            raise argparse.ArgumentTypeError(f"must be {words} or some of {','.join(PEERS)}, got {text!r}")
    return names


def versions(peers: Iterable[str]) -> dict[str, str]:
    """Of those of ``peers`` that are packages of their own (``compile`` is torch's) and installed."""
    found = {}
    for peer in peers:
        if peer == "compile":
            continue
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[peer] = importlib.metadata.version(peer)
    return found


def make_call(peer: str, module: nn.Module, x: torch.Tensor) -> tuple[Call, torch.Tensor]:
    """A call of ``module`` in ``peer`` on ``x``, and what its first run gave. ``x`` is dense in NCHW.

    Raises:
        Unavailable: it is not installed, or does not take the model.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call = PEERS[peer](module, x)
            return call, call().clone()
    except Unavailable:
        raise
    except Exception as error:  # of many kinds, none of them ours
        raise Unavailable(describe(error)[:200]) from error


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Unavailable(f"{name} is not installed") from error


def _exported(module: nn.Module, x: torch.Tensor) -> bytes:
    _import("onnx")
    file = io.BytesIO()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    torch.onnx.export(module, (x,), file, dynamo=False)
    return file.getvalue()
