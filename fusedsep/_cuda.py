# SPDX-License-Identifier: BSD-3-Clause
"""The CUDA kernels: whether this build has them, and which maps they take; see ``_kernel_path``."""

from __future__ import annotations

import importlib.util
import os

import torch

_reason = "no CUDA kernels in this build"
try:
    from . import _C_cuda as _kernels
except ImportError as error:
    _kernels = None
    if importlib.util.find_spec("fusedsep._C_cuda") is not None:
        _reason = f"the CUDA kernels of this build cannot be loaded ({error})"

_DTYPES = () if _kernels is None else tuple(getattr(torch, name) for name in _kernels.build_info["dtypes"])

#: The kernels of training, not always faster than cuDNN's (README.md), are in use where the user asks for them.
_TRAINING_VARIABLE = "FUSEDSEP_CUDA_TRAINING"
_trains = _kernels is not None and os.environ.get(_TRAINING_VARIABLE) == "1"


def trains() -> bool:
    """Whether the kernels take gradients and statistics of the batch of what they cover."""
    return _trains


def covers(x: torch.Tensor) -> bool:
    """Whether the kernels can read ``x``, a tensor on a GPU, and are the faster ones.

    NCHW maps of 16 bits are left to ATen: read element by element, they took 0.8 to 1.5 times its time on an H100.
    """
    return (
        x.dtype in _DTYPES
        and (x.dtype is torch.float32 or x.is_contiguous(memory_format=torch.channels_last))
        and not torch.is_autocast_enabled("cuda")
    )


@torch.compiler.assume_constant_result
def allows_tf32() -> bool:
    """Whether the user lets convolutions of float32 on a GPU multiply in TF32, as torch does unless told otherwise."""
    return torch.backends.cudnn.conv.fp32_precision == "tf32"


def packed_size(in_channels: int, out_channels: int, element_size: int) -> int:
    """Elements of packed weights on a GPU."""
    if _kernels is None:
        raise RuntimeError(f"fusedsep::pack cannot run on a GPU: {_reason}")
    return _kernels.packed_size(in_channels, out_channels, element_size)


def state() -> str:
    """What :func:`fusedsep.backend_info` says."""
    if _kernels is None:
        return _reason
    build = _kernels.build_info
    built = f"kernels for inference, {', '.join(build['dtypes'])}; {', '.join(build['targets'])}; nvcc {build['nvcc']}"
    training = "in use" if _trains else f"not in use without {_TRAINING_VARIABLE}=1"
    built = f"{built}; kernels for training {training}"
    if torch.version.cuda is None:
        return f"{built}; not in use: torch {torch.__version__} has no CUDA"
    if not torch.cuda.is_available():
        return f"{built}; not in use: torch finds no GPU"
    return f"{built}; in use on {', '.join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))}"
