# SPDX-License-Identifier: BSD-3-Clause
"""Automatic differentiation of the operators.

Importing this module installs the operators' kernels for autograd: whoever calls ``torch.ops.fusedsep.*``, in Python,
in a compiled graph or in C++, gets right gradients or an error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from . import _compat, _kept_input, _ops
from ._activations import ACTIVATION_NAMES, apply_activation
from ._ops import (
    BATCH_STATISTICS,
    FIXED_STATISTICS,
    NO_NORM,
    ConvolutionOperands,
    ConvolutionSettings,
    DepthwiseSettings,
    Operands,
    PointwiseSettings,
    Settings,
)

#: The tensors, and the rest of the arguments, of any training operator.
AnyOperands = Operands | ConvolutionOperands
AnySettings = Settings | PointwiseSettings | DepthwiseSettings | ConvolutionSettings


# ----------------------------------------------------------------------------------------------------------- composite


class _Maps(NamedTuple):
    """What an operator computes on the way: ``normalized`` has the input of each BN, biases added."""

    y: torch.Tensor
    product: torch.Tensor
    normalized: tuple[torch.Tensor, ...]


def composite(x: torch.Tensor, operands: AnyOperands, settings: AnySettings) -> torch.Tensor:
    """``y`` of a training operator through ATen, which knows every derivative of it."""
    return _OPERATORS[type(settings)].maps(x, operands, settings).y


def _separable_maps(x: torch.Tensor, operands: Operands, settings: Settings) -> _Maps:
    t, s = operands, settings
    padded = F.pad(x, (s.pad_left, s.pad_right, s.pad_top, s.pad_bottom))
    depthwise = F.conv2d(padded, t.dw_weight, t.dw_bias, s.stride, 0, s.dilation, groups=t.dw_weight.shape[0])
    h = _composite_norm(depthwise, s.bn1_mode, t.bn1_mean, t.bn1_var, t.bn1_weight, t.bn1_bias, s.bn1_eps)
    h = apply_activation(ACTIVATION_NAMES[s.activation], h)
    maps = _pointwise_maps(h, operands.pointwise(), settings.pointwise())
    return maps._replace(normalized=(depthwise, *maps.normalized))


def _pointwise_maps(x: torch.Tensor, operands: ConvolutionOperands, settings: PointwiseSettings) -> _Maps:
    t, s = operands, settings
    return _normalized_maps(F.conv2d(x, t.weight), t, s)


def _convolution_maps(x: torch.Tensor, operands: ConvolutionOperands, settings: ConvolutionSettings) -> _Maps:
    """Of a whole convolution, or of one in groups."""
    t, s = operands, settings
    padded = F.pad(x, (s.pad_left, s.pad_right, s.pad_top, s.pad_bottom))
    groups = x.shape[1] // t.weight.shape[1]
    return _normalized_maps(F.conv2d(padded, t.weight, None, s.stride, 0, s.dilation, groups), t, s)


def _normalized_maps(
    product: torch.Tensor, operands: ConvolutionOperands, settings: PointwiseSettings | ConvolutionSettings
) -> _Maps:
    t, s = operands, settings
    biased = product if t.bias is None else product + t.bias.view(-1, 1, 1)
    y = _composite_norm(biased, s.bn_mode, t.bn_mean, t.bn_var, t.bn_weight, t.bn_bias, s.bn_eps)
    return _Maps(apply_activation(ACTIVATION_NAMES[s.activation], y), product, (biased,))


def _composite_norm(
    x: torch.Tensor,
    mode: int,
    mean: torch.Tensor | None,
    var: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    if mode == NO_NORM:
        return x
    if mode == FIXED_STATISTICS:
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)
    return F.batch_norm(x, None, None, weight, bias, True, 0.0, eps)


def _composite_outputs(x: torch.Tensor, operands: AnyOperands, settings: AnySettings) -> tuple[torch.Tensor, ...]:
    """All that a training operator returns; ``y`` alone has derivatives."""
    operator = _OPERATORS[type(settings)]
    y, product, normalized = operator.maps(x, operands, settings)
    outputs = [y, product.detach().clone()]  # a clone, since without BN and activation the product is y
    dtype = _ops.statistics_dtype(x)
    for bn, value in zip(operator.norms, normalized, strict=True):
        if getattr(settings, f"{bn}_mode") == BATCH_STATISTICS:
            var, mean = torch.var_mean(value.detach().to(dtype), (0, 2, 3), correction=0)
            outputs += [mean, var]
        else:
            outputs += [x.new_empty(0, dtype=dtype), x.new_empty(0, dtype=dtype)]
    if isinstance(operands, Operands):
        operands, settings = operands.pointwise(), settings.pointwise()
    return *outputs, _composite_normalization(product.detach(), *outputs[-2:], operands, settings)


def _composite_normalization(
    p: torch.Tensor,
    mean: torch.Tensor,
    var: torch.Tensor,
    operands: ConvolutionOperands,
    settings: PointwiseSettings | ConvolutionSettings,
) -> torch.Tensor:
    """What makes ``y`` of ``p``, as :mod:`fusedsep._kept_input` says it."""
    t = operands
    if settings.bn_mode == FIXED_STATISTICS:
        mean, var = t.bn_mean, t.bn_var
    zeros = p.new_zeros(p.shape[1])
    center, scale, shift = zeros, zeros + 1, zeros
    if settings.bn_mode != NO_NORM:
        center, scale = mean, torch.rsqrt(var.double() + settings.bn_eps).to(p.dtype)
        scale = scale if t.bn_weight is None else scale * t.bn_weight
        shift = zeros if t.bn_bias is None else t.bn_bias
    if t.bias is not None:
        center = center - t.bias
    rows = torch.stack([center, scale, shift, zeros + settings.activation])
    return rows.to(_ops.statistics_dtype(p)).detach()


# ----------------------------------------------------------------------------------------------------------- operators


class _Operator:
    """A training operator: ``(x, *operands, *settings) -> (y, p, mean and variance of each BN, normalization)``.

    Args:
        name: in :mod:`fusedsep._ops`; its backward operator is called ``{name}_backward``.
        operands, settings: the types of its arguments.
        norms: the names of its BNs there.
        maps: the same through ATen.
        reads_maps: its input may be the output of another block, and has a gradient; otherwise it is an image.
    """

    def __init__(
        self,
        name: str,
        operands: type[AnyOperands],
        settings: type[AnySettings],
        norms: tuple[str, ...],
        maps: Callable[[torch.Tensor, Any, Any], _Maps],
        reads_maps: bool = True,
    ) -> None:
        self.name, self.operands, self.settings = name, operands, settings
        self.norms, self.maps, self.reads_maps = norms, maps, reads_maps
        self.forward: Callable[..., tuple[torch.Tensor, ...]] = getattr(_ops, name)
        self.function = _autograd_function(self)
        #: How many arguments are the map or an operand.
        self.tensors = 1 + len(operands._fields)
        #: Which of them the gradients of the backward operator belong to, in the order of its results.
        self.differentiable = [
            *([0] if reads_maps else []),
            *(1 + i for i, field in enumerate(operands._fields) if not field.endswith(("_mean", "_var"))),
        ]

    def split(self, arguments: Sequence[Any]) -> tuple[torch.Tensor, Any, Any]:
        """The map, operands and settings of a call."""
        return arguments[0], self.operands(*arguments[1 : self.tensors]), self.settings(*arguments[self.tensors :])


def _autograd_function(operator: _Operator) -> type[torch.autograd.Function]:
    """``operator`` and its derivative.

    Keeps the raw product ``p``, what :mod:`fusedsep._kept_input` keeps for ``x`` (an image as it is), and the small
    tensors.
    """

    def forward(ctx: Any, *arguments: Any) -> tuple[torch.Tensor, ...]:
        return _forward(ctx, operator, arguments)

    def backward(ctx: Any, grad_y: torch.Tensor | None, *_: None) -> tuple[torch.Tensor | None, ...]:
        return _backward(ctx, grad_y)

    name = f"{operator.name.title().replace('_', '')}Function"  # as profiles and graphs show it
    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward), "__module__": __name__}
    return type(name, (torch.autograd.Function,), methods)


#: By the type of the settings.
_OPERATORS: dict[type, _Operator] = {
    Settings: _Operator("separable_conv2d_training", Operands, Settings, ("bn1", "bn2"), _separable_maps),
    PointwiseSettings: _Operator(
        "pointwise_conv2d_training",
        ConvolutionOperands,
        PointwiseSettings,
        ("bn",),
        _pointwise_maps,
    ),
    DepthwiseSettings: _Operator(
        "depthwise_conv2d_training",
        ConvolutionOperands,
        DepthwiseSettings,
        ("bn",),
        _convolution_maps,
    ),
    ConvolutionSettings: _Operator(
        "conv2d_training",
        ConvolutionOperands,
        ConvolutionSettings,
        ("bn",),
        _convolution_maps,
        reads_maps=False,
    ),
}


# ----------------------------------------------------------------------------------------------------------- gradients


def _forward(ctx: Any, operator: _Operator, arguments: Sequence[Any]) -> tuple[torch.Tensor, ...]:
    with _compat.below_autograd():
        y, p, *statistics, normalization = operator.forward(*arguments)
    x, operands, settings = operator.split(arguments)
    for i, bn in enumerate(operator.norms):
        # Running statistics are not kept where those of the batch take their place: the step changes them.
        if getattr(settings, f"{bn}_mode") == BATCH_STATISTICS:
            mean, var = statistics[2 * i : 2 * i + 2]
            operands = operands._replace(**{f"{bn}_mean": mean, f"{bn}_var": var})
    ctx.settings = settings
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(p, *statistics, normalization)
    kept, x_normalization = _kept_input.kept_for_backward(x) if operator.reads_maps else (x, None)
    ctx.origin = None if kept is x else x.grad_fn  # the block that made the product
    ctx.save_for_backward(kept, x_normalization, p, *operands)
    ctx.product = _kept_input.remember(y, p, normalization)
    ctx.unpacked = None
    return y, p, *statistics, normalization


def _backward(ctx: Any, grad_y: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    operator = _OPERATORS[type(ctx.settings)]
    without = (None,) * len(ctx.settings)  # one for each argument that is no tensor
    if grad_y is None:
        return (None,) * operator.tensors + without
    if torch.is_grad_enabled():  # a gradient of the gradient will be asked for
        _, _, p, *operands = _saved_once(ctx)
        x, x_normalization = _differentiable_input(ctx), None
        ctx.unpacked = None
    else:
        x, x_normalization, p, *operands = ctx.saved_tensors
    product = ctx.product()
    if product is not None:
        product.forget()
    operands = operator.operands(*operands)
    return *gradients(grad_y, x, p, operands, ctx.settings, ctx.needs_input_grad, x_normalization), *without


def _differentiable_input(node: Any) -> torch.Tensor:
    """The input of a block, with its history; of ``node``, the block's own in the graph of autograd."""
    kept, normalization, *_ = _saved_once(node)
    if not _kept_input.is_product(normalization):
        return kept
    if node.origin is None:  # the history was cut off
        center, scale, shift, code = normalization.view(4, -1, 1, 1)
        x = ((kept - center) * scale + shift).to(kept.dtype)
        return apply_activation(ACTIVATION_NAMES[int(code[0].item())], x)
    _, _, _, *operands = _saved_once(node.origin)
    operator = _OPERATORS[type(node.origin.settings)]
    return composite(_differentiable_input(node.origin), operator.operands(*operands), node.origin.settings)


def _saved_once(node: Any) -> Sequence[torch.Tensor | None]:
    """What ``node`` has saved, asked for once in a backward, since ``torch.utils.checkpoint`` hands it out once.

    The blocks that read another block's output want it before that block itself does.
    """
    backward = _compat.current_backward()
    if node.unpacked is None or node.unpacked[0] != backward:
        node.unpacked = backward, node.saved_tensors
    return node.unpacked[1]


def gradients(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    p: torch.Tensor | None,
    operands: AnyOperands,
    settings: AnySettings,
    needed: Sequence[bool],
    x_normalization: torch.Tensor | None = None,
) -> list[torch.Tensor | None]:
    """Gradients of ``x`` and of each operand, for the ``backward`` of an ``autograd.Function``.

    Args:
        grad_y: gradient of ``y``, with any strides.
        x: dense in the memory format that ``settings`` tells.
        p: the raw pointwise product, or ``None`` to compute it again; the latter for fixed statistics alone.
        operands: contiguous, with the statistics that ``y`` was normalized with.
        settings: their type tells which operator it is about.
        needed: for ``x`` and each operand, whether its gradient is wanted; ``None`` is returned for the others.
        x_normalization: what makes the input of ``x``, where that is a product (:mod:`fusedsep._kept_input`).
    """
    operator = _OPERATORS[type(settings)]
    result: list[torch.Tensor | None] = [None] * operator.tensors
    wanted = [i for i in operator.differentiable if needed[i]]
    if not wanted:
        return result
    if torch.is_grad_enabled():  # a gradient of the gradient will be asked for
        # One may be computed from another (or be the same): as views, none is in the history of another.
        views = [None if tensor is None else tensor.view_as(tensor) for tensor in (x, *operands)]
        y = composite(views[0], operator.operands(*views[1:]), settings)
        grads = torch.autograd.grad(y, [views[i] for i in wanted], grad_y, create_graph=True)
        for i, grad in zip(wanted, grads, strict=True):
            result[i] = grad
        return result
    if p is None:
        p = getattr(_ops, operator.name)(x, *operands, *settings)[1]
    bits = sum(1 << bit for bit, i in enumerate(operator.differentiable) if needed[i])
    backward = getattr(_ops, f"{operator.name}_backward")
    inputs = (x, x_normalization) if operator.reads_maps else (x,)
    grads = backward(grad_y, *inputs, p, *operands, *settings, bits)
    for bit, i in enumerate(operator.differentiable):
        if needed[i]:
            result[i] = grads[bit]
    return result


# ---------------------------------------------------------------------------------------------- kernels for autograd


def _training_kernel(operator: _Operator) -> Callable[..., tuple[torch.Tensor, ...]]:
    """A training operator where autograd looks on."""

    def kernel(*arguments: Any) -> tuple[torch.Tensor, ...]:
        if (
            _compat.functorch_is_active()
            or _compat.forward_ad_is_active()
            or (not operator.reads_maps and _wants_gradient(arguments[:1]))
        ):
            return _composite_outputs(*operator.split(arguments))
        if _wants_gradient(arguments):
            return operator.function.apply(*arguments)
        with _compat.below_autograd():
            return operator.forward(*arguments)

    return kernel


def _refusing_kernel(operator: Callable[..., Any], advice: str) -> Callable[..., Any]:
    """``operator`` where autograd looks on, if it cannot be differentiated."""

    def kernel(*arguments: Any) -> Any:
        if _wants_gradient(arguments) or _has_tangent(arguments):
            raise RuntimeError(
                f"{operator} has no derivative, but got a tensor that requires grad or has a tangent: {advice}"
            )
        with _compat.below_autograd():
            return operator(*arguments)

    return kernel


def _wants_gradient(arguments: Sequence[Any]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in arguments)


def _has_tangent(arguments: Sequence[Any]) -> bool:
    return _compat.forward_ad_is_active() and any(
        isinstance(a, torch.Tensor) and forward_ad.unpack_dual(a).tangent is not None for a in arguments
    )


_library = torch.library.Library("fusedsep", "IMPL")  # the kernels live as long as it does
for _operator in _OPERATORS.values():
    _library.impl(_operator.forward, _training_kernel(_operator), "Autograd")
for _overload in (_ops.pack, _ops.pack_depthwise, _ops.separable_conv2d):
    _advice = "call it under torch.no_grad(), or fusedsep.depthwise_separable_conv2d for gradients"
    _library.impl(_overload, _refusing_kernel(_overload, _advice), "Autograd")
for _overload in (
    _ops.separable_conv2d_training_backward,
    _ops.pointwise_conv2d_training_backward,
    _ops.depthwise_conv2d_training_backward,
    _ops.conv2d_training_backward,
    _ops.depthwise_statistics,
    _ops.separable_products,
    _ops.normalize,
    _ops.normalize_backward_reduce,
    _ops.pointwise_backward,
    _ops.depthwise_backward,
):
    _library.impl(_overload, _refusing_kernel(_overload, "call it under torch.no_grad()"), "Autograd")
