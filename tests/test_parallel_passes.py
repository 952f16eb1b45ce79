# SPDX-License-Identifier: BSD-3-Clause
"""The training operator pass by pass, in one process: what it gives is what the modules give."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from twins import assert_close, random

from fusedsep import _kernel_path, _sync
from fusedsep._activations import ACTIVATION_CODES, apply_activation
from fusedsep._ops import Operands, Settings

GEOMETRIES = {
    "plain": (1, 1, (1, 1, 1, 1)),
    "stride 2, TensorFlow's pads": (2, 1, (0, 1, 0, 1)),
    "dilated, four pads": (1, 2, (3, 2, 1, 2)),
}
MODES = {"no BN": 0, "frozen": 1, "training": 2}


def make_norm(mode, channels, seed):
    """A BN in the state that ``mode`` tells, or ``None``."""
    if mode == 0:
        return None
    bn = nn.BatchNorm2d(channels, dtype=torch.double).train(mode == 2)
    with torch.no_grad():
        bn.weight.copy_(random(channels, seed=seed))
        bn.bias.copy_(random(channels, seed=seed + 1))
        bn.running_mean.copy_(random(channels, seed=seed + 2))
        bn.running_var.copy_(random(channels, seed=seed + 3).square() + 0.5)
    return bn


class Case:
    """Modules with every parameter random, and the input of a call."""

    def __init__(self, mode1=2, mode2=2, geometry="plain", activation="relu", bias=True, x=None):
        self.stride, self.dilation, self.pads = GEOMETRIES[geometry]
        self.activation = activation
        self.x = random(3, 5, 7, 6) if x is None else x
        self.dw = nn.Conv2d(5, 5, 3, self.stride, 0, self.dilation, groups=5, bias=bias, dtype=torch.double)
        self.pw = nn.Conv2d(5, 7, 1, bias=bias, dtype=torch.double)
        with torch.no_grad():
            for seed, parameter in enumerate([*self.dw.parameters(), *self.pw.parameters()]):
                parameter.copy_(random(*parameter.shape, seed=seed))
        self.bn1, self.bn2 = make_norm(mode1, 5, 10), make_norm(mode2, 7, 20)

    def modules(self):
        return nn.ModuleList(module for module in (self.dw, self.bn1, self.pw, self.bn2) if module is not None)

    def composite(self, x):
        h = self.dw(F.pad(x, self.pads))
        h = apply_activation(self.activation, h if self.bn1 is None else self.bn1(h))
        y = self.pw(h)
        return apply_activation(self.activation, y if self.bn2 is None else self.bn2(y))

    def passes(self, x):
        x, channels_last, _ = _kernel_path.dense(x)
        operands, settings, followers = [], [], []
        for conv, bn in ((self.dw, self.bn1), (self.pw, self.bn2)):
            tensors = (None,) * 4 if bn is None else (bn.weight, bn.bias, bn.running_mean, bn.running_var)
            operands += [conv.weight, conv.bias, *tensors]
            settings += [0, 0.0] if bn is None else [1 + bn.training, bn.eps]
            followers.append(bn if bn is not None and bn.training else None)
        code = ACTIVATION_CODES[self.activation]
        settings += [self.stride, self.dilation, *self.pads, code, code, channels_last]
        return _sync.run(x, Operands(*operands), Settings(*settings), (None, None), *followers)


def results(case, run):
    """Everything that one call and its backward leave, by name; the modules' state is put back."""
    modules = case.modules()
    state = {name: value.clone() for name, value in modules.state_dict().items()}
    x = case.x.clone().requires_grad_()
    y = run(x)
    y.backward(random(*y.shape, seed=99).to(y.dtype))
    found = {"y": y.detach(), "grad x": x.grad}
    found |= {f"grad {name}": parameter.grad for name, parameter in modules.named_parameters()}
    found |= {name: buffer.clone() for name, buffer in modules.named_buffers()}
    modules.zero_grad()
    modules.load_state_dict(state)
    return found


def assert_same_results(actual, expected):
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            actual[name], expected[name], rtol=1e-9, atol=1e-11, msg=lambda message, name=name: f"{name}: {message}"
        )


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("modes", list(itertools.product(MODES, MODES)), ids=", ".join)
def test_every_pair_of_norms(modes, geometry):
    case = Case(*(MODES[mode] for mode in modes), geometry=geometry)
    assert_same_results(results(case, case.passes), results(case, case.composite))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ACTIVATION_CODES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_activations_biases_and_memory_formats(channels_last, activation, bias):
    x = random(3, 5, 7, 6) * 3
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    case = Case(activation=activation, bias=bias, x=x)
    actual = results(case, case.passes)
    assert_same_results(actual, results(case, case.composite))
    for name in ("y", "grad x"):
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        assert actual[name].is_contiguous(memory_format=memory_format), name


def test_single_precision_is_as_exact_as_torch_for_a_large_mean():
    case = Case(x=random(4, 5, 8, 8) + 1e3)
    expected = results(case, case.composite)
    case.modules().float()
    case.x = case.x.float()
    ours, torchs = results(case, case.passes), results(case, case.composite)
    for name, value in expected.items():
        if name.endswith("0.bias") or name.endswith("2.bias"):
            continue  # zero but for rounding, as the BN behind takes it away again
        error, of_torch = ((found[name].double() - value).abs().max() for found in (ours, torchs))
        assert error <= 2 * of_torch + 1e-6 * value.abs().max(), name


@pytest.mark.parametrize(
    "wanted", [["x"], ["0.weight"], ["1.weight"], ["2.weight"], ["3.bias"], ["0.bias", "2.bias"], ["x", "3.weight"]]
)
def test_only_what_is_wanted_gets_a_gradient(wanted):
    case = Case(1, 2)
    expected = results(case, case.composite)
    modules = case.modules()
    for name, parameter in modules.named_parameters():
        parameter.requires_grad_(name in wanted)
    x = case.x.clone().requires_grad_("x" in wanted)
    y = case.passes(x)
    y.backward(random(*y.shape, seed=99))
    grads = {"x": x.grad} | {name: parameter.grad for name, parameter in modules.named_parameters()}
    for name, grad in grads.items():
        assert (grad is not None) == (name in wanted)
        if grad is not None:
            assert_close(grad, expected[f"grad {name}"])


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("kind", ["stride 0", "other memory format"])
def test_any_strides_of_the_incoming_gradient(kind, channels_last):
    x = random(3, 5, 7, 6).contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    case = Case(x=x)
    grads = []
    for run in (case.passes, case.composite):
        x = case.x.clone().requires_grad_()
        y = run(x)
        if kind == "stride 0":
            y.sum().backward()
        else:
            other = torch.contiguous_format if channels_last else torch.channels_last
            y.backward(random(*y.shape, seed=99).contiguous(memory_format=other))
        grads.append(x.grad)
    assert_close(*grads)


def test_saves_the_input_the_raw_product_and_small_tensors():
    case = Case(x=random(4, 5, 16, 16))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        y = case.passes(case.x.clone().requires_grad_())
    maps = sorted(tensor.shape[1] for tensor in saved if tensor.dim() == 4 and tensor.shape[0] == 4)
    assert maps == [case.x.shape[1], y.shape[1]]
    small = sum(tensor.numel() for tensor in saved) - case.x.numel() - y.numel()
    assert small < 50 * y.shape[1]


def test_double_backward_is_refused():
    case = Case()
    x = case.x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(case.passes(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


def test_one_value_per_channel():
    case = Case(x=random(1, 5, 3, 3), geometry="stride 2, TensorFlow's pads")
    before = {name: buffer.clone() for name, buffer in case.modules().named_buffers()}
    with pytest.raises(ValueError, match=r"more than 1 value per channel when training.*got one over this process"):
        case.passes(case.x)
    assert all(torch.equal(buffer, before[name]) for name, buffer in case.modules().named_buffers())


def test_gradients_do_not_depend_on_the_number_of_threads():
    case = Case(x=random(5, 5, 33, 31))
    torch.set_num_threads(1)
    expected = results(case, case.passes)
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        actual = results(case, case.passes)
        assert all(torch.equal(actual[name], expected[name]) for name in expected)
