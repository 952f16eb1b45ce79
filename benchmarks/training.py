# SPDX-License-Identifier: BSD-3-Clause
"""The subjects in training: a forward and a backward of one block, a whole step of a network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from inverted_residuals import NETWORKS
from shapes import Shape
from subjects import ENGINES, Answer, Engines, Subject, Variant, block_and_input, compiled, network_and_input

from fusedsep.cli._training_memory import saved_bytes

_KINKS = (-3.0, 0.0, 3.0, 6.0)  # of ReLU, ReLU6 and Hardswish
_REACH = 0.05  # how far a BN's bias moves at most to keep away from them


#: How each engine is made from the unfused module in training mode.
TRAINING_ENGINES: Engines = {"eager": ENGINES["eager"], "compiled": compiled, "fused": ENGINES["fused"]}


class TrainingSubject(Subject):
    """A module in training mode; the answer has every gradient and the running statistics too.

    A rounding that moves a number across the kink of an activation flips its derivative, and one such number changes
    gradients more than all other roundings together. Therefore the BNs get biases that put the kinks into gaps between
    the numbers: then gradients can be judged as outputs are. Errors are root mean squares, since behind 27 layers the
    largest one of a gradient is a matter of luck.
    """

    engines = TRAINING_ENGINES
    inference = False
    gflop_per_mult_add = 3 * Subject.gflop_per_mult_add  # maps' and weights' gradients are as much as a forward each
    order = 2.0

    def saved_bytes(self, engine: str) -> int:
        """What autograd keeps from the forward for the backward, besides parameters and buffers."""
        module, *inputs = self._operands(Variant(engine, "NCHW"))
        return saved_bytes(self._work(module, *inputs), [*module.parameters(), *module.buffers()])

    def _prepare(self) -> None:
        hooks = [
            module.register_forward_hook(_leave_kinks)
            for module in self.module.modules()
            if isinstance(module, nn.BatchNorm2d)
        ]
        with torch.no_grad():
            self.module.train()(self.inputs[0])
        for hook in hooks:
            hook.remove()

    def _answer(self, work: Callable[[], torch.Tensor], module: nn.Module, *inputs: torch.Tensor) -> Answer:
        answer = {"output": work().detach()}
        leaves = [("the input", inputs[0]), *module.named_parameters()]
        answer |= {f"gradient of {name}": leaf.grad for name, leaf in leaves if leaf.grad is not None}
        return answer | {name: buffer for name, buffer in module.named_buffers() if buffer.is_floating_point()}


class TrainingBlock(TrainingSubject):
    """Forward and backward; ``inputs`` are the map and the gradient of the output."""

    def _operands(self, variant: Variant, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
        module, x, grad_output = super()._operands(variant, dtype)
        return module, x.detach().requires_grad_(), grad_output

    def _work(self, module: nn.Module, *inputs: torch.Tensor) -> Callable[[], torch.Tensor]:
        x, grad_output = inputs

        def step() -> torch.Tensor:
            x.grad = None
            module.zero_grad()
            output = module(x)
            output.backward(grad_output)
            return output

        return step


class TrainingNetwork(TrainingSubject):
    """Forward, cross entropy, backward, and a step of SGD with momentum; ``inputs`` are images and labels."""

    def _work(self, module: nn.Module, *inputs: torch.Tensor) -> Callable[[], torch.Tensor]:
        images, labels = inputs
        optimizer = torch.optim.SGD(module.parameters(), lr=0.001, momentum=0.9)

        def step() -> torch.Tensor:
            optimizer.zero_grad()
            output = module(images)
            F.cross_entropy(output, labels).backward()
            optimizer.step()
            return output

        return step


class OtherTrainingNetwork(TrainingNetwork):
    """A network with other depthwise convolutions than those of sites."""

    is_all_sites = False


def block(shape: Shape, batch: int) -> TrainingBlock:
    module, x = block_and_input(shape, batch)
    size = -(-shape.size // shape.stride)
    return TrainingBlock(shape.network, shape.name, module, x, torch.randn(batch, shape.out_channels, size, size))


def network(name: str, width: float, resolution: int, batch: int) -> TrainingNetwork:
    module, images = network_and_input(width, resolution, batch)
    kind = TrainingNetwork
    if name in NETWORKS:
        if width != 1.0:
            raise ValueError(f"{name} is there in width 1.0 alone, not {width}")
        module, kind = NETWORKS[name](), OtherTrainingNetwork
    labels = torch.randint(1000, (batch,))
    return kind(name, f"{width}-{resolution}, batch {batch}", module, images, labels)


def _leave_kinks(norm: nn.BatchNorm2d, _: Any, output: torch.Tensor) -> torch.Tensor:
    """A forward hook: add to each channel's bias what puts the kinks into the widest gap between values near them."""
    distances = torch.cat([(output - kink).transpose(0, 1).flatten(1) for kink in _KINKS], 1)
    near = distances.clamp(-_REACH, _REACH).sort(1).values
    gap, position = near.diff(dim=1).max(1, keepdim=True)
    shift = -(near.gather(1, position) + gap / 2).squeeze(1)
    norm.bias.add_(shift)
    return output + shift.view(-1, 1, 1)
