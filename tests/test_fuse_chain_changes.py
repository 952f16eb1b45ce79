# SPDX-License-Identifier: BSD-3-Clause
"""Chains of a fused model notice every change of it."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from chain_models import PoolFlatten
from randomize import randomized
from torch.nn.utils import parametrize, prune

import fusedsep


def fused_and_input():
    torch.manual_seed(0)
    model = randomized(PoolFlatten()).eval()
    return model, fusedsep.fuse(model), torch.randn(2, 3, 24, 24)


def in_place(model):
    with torch.no_grad():
        model.blocks[1][0][0].weight += 1


def data_in_place(model):
    model.blocks[1][1][1].weight.data.mul_(-2)


def data_of_the_first_convolution(model):
    model.stem[0].weight.data.mul_(-2)


def through_numpy(model):
    model.classifier.weight.detach().numpy()[2] = 5


def data_replaced(model):
    model.blocks[0][1][0].weight.data = model.blocks[0][1][0].weight.data.flip(0)


def data_with_other_strides(model):
    weight = model.classifier.weight
    weight.data = weight.data.as_strided(weight.shape, (1, weight.shape[0]))


def buffer_in_place(model):
    model.stem[1].running_var.mul_(4)


def buffer_replaced(model):
    model.blocks[2][1][1].running_mean = model.blocks[2][1][1].running_mean + 1


def eps(model):
    model.blocks[0][0][1].eps = 0.5


def eps_of_the_first(model):
    model.stem[1].eps = 0.5


def parameter_replaced(model):
    model.blocks[1][1][0].weight = nn.Parameter(model.blocks[1][1][0].weight.detach() * 2)


def affine_removed(model):
    model.blocks[1][0][1].weight = model.blocks[1][0][1].bias = None


def bias_added(model):
    model.blocks[1][0][0].bias = nn.Parameter(torch.ones(18, dtype=model.stem[0].weight.dtype))


def loaded(model):
    model.load_state_dict({key: value * 2 for key, value in model.state_dict().items()})


def assigned(model):
    model.load_state_dict({key: value * 2 for key, value in model.state_dict().items()}, assign=True)


def trained_one_step(model):
    torch.manual_seed(0)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.dropout.p = 0.0
    model(torch.ones(2, 3, 24, 24).double() * torch.arange(24)).square().mean().backward()
    optimizer.step()
    model.eval()


def pruned(model):
    prune.l1_unstructured(model.blocks[0][1][0], "weight", 0.5)


def pruned_to_the_end(model):
    pruned(model)
    prune.remove(model.blocks[0][1][0], "weight")


def parametrized(model):
    parametrize.register_parametrization(model.blocks[2][1][0], "weight", Doubled())


def parametrized_classifier(model):
    parametrize.register_parametrization(model.classifier, "weight", Doubled())


def stride(model):
    model.blocks[2][0][0].stride = (2, 2)


def padding_of_the_first(model):
    model.stem[0].padding = (0, 0)


def part_replaced(model):
    model.blocks[1][0][2] = nn.LeakyReLU(0.5)


def container_replaced(model):
    model.blocks[1] = randomized(copy.deepcopy(model.blocks[1]), 7).eval()


def classifier_replaced(model):
    torch.manual_seed(0)
    model.classifier = nn.Linear(40, 3).double()


def bounds_of_an_activation(model):
    model.blocks[1][0][2].max_val = 0.25


def class_changed(model):
    model.blocks[1][0][2].__class__ = Negated


def forward_put_on_an_activation(model):
    model.blocks[1][0][2].forward = lambda x: -x


def forward_put_on_a_convolution(model):
    model.blocks[1][0][0].forward = lambda x: -x


def step_put_on_a_convolution(model):
    model.stem[0]._conv_forward = lambda x, weight, bias: F.conv2d(x, weight, bias, 2, 1) * 2


def forward_put_on_a_container(model):
    blocks = model.blocks
    model.blocks.forward = lambda x: -type(blocks).forward(blocks, x)


def norm_in_training_mode(model):
    model.blocks[1][0][1].train()


def norm_of_the_first_in_training_mode(model):
    model.stem[1].train()


def hook_that_changes_a_map(model):
    model.blocks[0][1].register_forward_hook(lambda module, inputs, output: -output)


def hook_on_a_norm(model):
    model.blocks[0][1][1].register_forward_hook(lambda module, inputs, output: output + 1)


def hook_in_front_of_a_convolution(model):
    model.blocks[0][1][0].register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


class Negated(nn.ReLU6):
    def forward(self, x):
        return -x


NUMBERS = [
    in_place,
    data_in_place,
    data_of_the_first_convolution,
    through_numpy,
    data_replaced,
    data_with_other_strides,
    buffer_in_place,
    buffer_replaced,
    parameter_replaced,
    affine_removed,
    bias_added,
    loaded,
    assigned,
    pruned_to_the_end,
    trained_one_step,
]
OTHERS = [
    eps,
    eps_of_the_first,
    pruned,
    parametrized,
    parametrized_classifier,
    stride,
    padding_of_the_first,
    part_replaced,
    container_replaced,
    classifier_replaced,
    bounds_of_an_activation,
    class_changed,
    forward_put_on_an_activation,
    forward_put_on_a_convolution,
    step_put_on_a_convolution,
    forward_put_on_a_container,
    norm_in_training_mode,
    norm_of_the_first_in_training_mode,
    hook_that_changes_a_map,
    hook_on_a_norm,
    hook_in_front_of_a_convolution,
]


@pytest.mark.parametrize("change", NUMBERS + OTHERS, ids=lambda change: change.__name__)
def test_a_change_is_noticed(change, chain_calls):
    model, fused, x = fused_and_input()
    model, fused, x = model.double(), fused.double(), x.double()
    with torch.no_grad():
        before = fused(x)
    for net in (model, fused):
        change(net)
    chain_calls.clear()
    with torch.no_grad():
        after = fused(x)
        torch.testing.assert_close(after, model(x), rtol=1e-10, atol=1e-10)
    assert bool(chain_calls) == (change in NUMBERS)
    assert after.shape != before.shape or (after - before).abs().max() > 1e-8
    (program,) = fused.forward.programs.values()
    assert program.holds() is not program._has_changed()
