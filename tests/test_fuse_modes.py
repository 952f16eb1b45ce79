# SPDX-License-Identifier: BSD-3-Clause
"""A fused network does in training mode what its Python does there, which may be another thing than in eval mode."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from fused_pairs import assert_same, assert_trains_alike, pair, state_of
from models import (
    BatchNormAct2d,
    Flat,
    MobileNetV2,
    TimmBlock,
    WithDefaults,
    chain,
    depthwise,
    pointwise,
)
from twins import random

import fusedsep


def test_dropout_in_between_runs_the_modules_in_training(kernel_calls, training_calls):
    model, fused = pair(chain(nn.Dropout(0.5), nn.ReLU()))
    x = random(2, 4, 8, 7)
    assert_trains_alike(model, fused, x)
    assert not training_calls
    with torch.no_grad():
        fused.eval()(x)
    assert len(kernel_calls) == 1


def test_dropout_that_drops_nothing_is_no_obstacle_until_it_does(training_calls):
    model, fused = pair(chain(nn.Dropout(0.0), nn.ReLU()))
    x = random(2, 4, 8, 7)
    assert_trains_alike(model, fused, x)
    assert len(training_calls) == 3
    for network in (model, fused):
        network[2].p = 0.3
    assert_trains_alike(model, fused, x)
    assert len(training_calls) == 3


class DropsByFunction(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.body, self.p = chain(nn.ReLU()), p

    def forward(self, x):
        dw, bn1, act, pw, bn2 = self.body
        return bn2(pw(act(F.dropout(bn1(dw(x)), self.p, self.training))))


@pytest.mark.parametrize("p, sites", [(0.0, 1), (0.4, 0)])
def test_dropout_by_a_function(p, sites, training_calls):
    model, fused = pair(DropsByFunction(p))
    x = random(2, 4, 8, 7)
    assert_trains_alike(model, fused, x)
    assert len(training_calls) == 3 * sites
    for network in (model, fused):
        network.p = 0.2
    assert_trains_alike(model, fused, x)


class Auxiliary(nn.Module):
    """Has a second output in training, and another site for it."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = (chain(nn.ReLU(), channels=c) for c in (4, 6, 6))

    def forward(self, x, targets=None):
        features = self.first(x)
        if self.training:
            return self.second(features), self.head(features * 2)
        return self.second(features)


def test_python_that_asks_for_the_mode(site_calls, training_calls):
    model, fused = pair(nn.Sequential(nn.Conv2d(4, 4, 1), Auxiliary()))
    x = random(2, 4, 8, 7)
    for _ in range(2):
        assert_trains_alike(model, fused, x, steps=1)
        with torch.no_grad():
            assert_same([fused.eval()(x)], [model.eval()(x)])
        model.train(), fused.train()
    assert (len(training_calls), len(site_calls)) == (2 * 3, 2 * 2)


class NeedsTargets(WithDefaults):
    """Raises in training for the call that is traced."""

    def forward(self, x, targets=None):
        y = super().forward(x)
        if not self.training:
            return y
        if targets is None:
            raise ValueError("targets are needed in training")
        return (y - targets).square()


def test_python_that_cannot_be_traced_in_training(site_calls):
    model, fused = pair(NeedsTargets())
    x = random(2, 3, 8, 7)
    for network in (model, fused):
        with pytest.raises(ValueError, match="targets are needed"):
            network(x)
    assert_same([fused(x, torch.ones(()))], [model(x, torch.ones(()))])
    with torch.no_grad():
        assert_same([fused.eval()(x)], [model.eval()(x)])
    assert len(site_calls) == 1
    (site,) = fusedsep.fusion_report(fused).fused
    assert site.reason.endswith(
        "in eval mode only: the Python of the model (NeedsTargets) cannot be traced: targets are needed in training"
    )


def test_modes_of_parts(training_calls, kernel_calls):
    """Whatever is in training or in eval mode, at whatever depth."""
    model, fused = pair(nn.Sequential(MobileNetV2().features, TimmBlock(20, 20), chain(nn.Dropout(), channels=20)))
    x = random(2, 3, 16, 16)
    parts = [name for name, _ in model.named_modules()]
    for seed in range(25):
        mode = {name: bool(flag) for name, flag in zip(parts, random(len(parts), seed=seed) > 0, strict=True)}
        for network in (model, fused):
            for name, module in network.named_modules():
                module.training = mode[name]
        assert_trains_alike(model, fused, x, steps=1)
    assert training_calls


@pytest.mark.parametrize("block", [lambda: chain(nn.ReLU()), lambda: TimmBlock(4, 6)], ids=["plain", "BN with ReLU6"])
@pytest.mark.parametrize("frozen", [(0,), (1,), (0, 1)], ids=["first", "second", "both"])
def test_frozen_batch_norm(block, frozen, training_calls, backward_calls):
    model, fused = pair(block())
    for network in (model, fused):
        norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
        for index in frozen:
            norms[index].eval().requires_grad_(False)
            norms[index].bias.requires_grad_()
    x = random(2, 4, 8, 7)
    outputs = []
    for network in (model, fused):
        y = network(x)
        y.square().mean().backward()
        gradients = [parameter.grad for parameter in network.parameters()]
        outputs.append([y, *(grad for grad in gradients if grad is not None), *state_of(network)])
        assert gradients.count(None) == len(frozen)
    assert_same(*outputs)
    assert len(backward_calls) == 1


def test_frozen_backbone(kernel_calls, training_calls):
    model, fused = pair(nn.Sequential(MobileNetV2().features, chain(nn.ReLU(), channels=20)))
    for network in (model, fused):
        network[0].eval().requires_grad_(False)
    x = random(2, 3, 16, 16)
    outputs = []
    for network in (model, fused):
        y = network(x)
        y.square().mean().backward()
        outputs.append([y, *(p.grad for p in network[1].parameters()), *state_of(network)])
    assert_same(*outputs)
    assert (len(kernel_calls), len(training_calls)) == (3, 1)


class TwoMomenta(BatchNormAct2d):
    def forward(self, x):
        self.num_batches_tracked.add_(1)
        momentum = 0.3 if self.training else self.momentum
        args = (self.running_mean, self.running_var, self.weight, self.bias, self.training, momentum, self.eps)
        return self.act(F.batch_norm(x, *args)) if self.training else self.act(F.batch_norm(x, *args[:4], eps=self.eps))


class CountsByTwo(BatchNormAct2d):
    def forward(self, x):
        if self.training:
            self.num_batches_tracked.add_(1)
        return super().forward(x)


class CountsNothing(BatchNormAct2d):
    def forward(self, x):
        args = (self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps)
        return self.act(F.batch_norm(x, *args))


class ActsInTraining(BatchNormAct2d):
    def forward(self, x):
        x = super().forward(x)
        return F.relu(x) if self.training else x


class Renormalises(BatchNormAct2d):
    def forward(self, x):
        if self.training:
            self.running_mean.clamp_(-0.1, 0.1)
        return super().forward(x)


class Drops(BatchNormAct2d):
    def __init__(self, channels):
        super().__init__(channels)
        self.drop = nn.Dropout(0.3)


class Averages(BatchNormAct2d):
    """A cumulative average, which no symbolic trace shows."""

    def __init__(self, channels):
        super().__init__(channels)
        self.momentum = None

    def forward(self, x):
        return self.act(nn.BatchNorm2d.forward(self, x))


@pytest.mark.parametrize(
    "kind", [TwoMomenta, CountsByTwo, CountsNothing, ActsInTraining, Renormalises, Drops, Averages]
)
def test_batch_norms_that_train_in_their_own_way_run_themselves(kind, training_calls):
    model, fused = pair(nn.Sequential(depthwise(4), kind(4), pointwise(4, 6), nn.BatchNorm2d(6)))
    x = random(2, 4, 8, 7)
    assert_trains_alike(model, fused, x)
    assert not training_calls
    assert_same([fused.eval()(x)], [model.eval()(x)])


def test_settings_of_batch_norms_are_watched():
    model, fused = pair(TimmBlock(4, 6))
    x = random(2, 4, 8, 7)
    for change in (
        lambda bn: setattr(bn, "momentum", 0.3),
        lambda bn: setattr(bn, "eps", 0.1),
        lambda bn: setattr(bn, "drop", nn.Dropout(0.5)),
    ):
        change(model.bn1), change(fused.bn1)
        assert_trains_alike(model, fused, x, steps=1)


def test_a_batch_norm_in_training_mode_in_an_eval_network():
    model, fused = pair(TimmBlock(4, 6))
    x = random(2, 4, 8, 7)
    for network in (model.eval(), fused.eval()):
        network.bn1.train()
    assert_trains_alike(model, fused, x)


class TrainsOtherwise(nn.Conv2d):
    """Pads by itself, and does something else in training."""

    def __init__(self):
        super().__init__(4, 4, 3, groups=4)

    def forward(self, x):
        y = super().forward(F.pad(x, (1, 1, 1, 1)))
        return 3 * y if self.training else y


def test_a_convolution_that_trains_otherwise(kernel_calls, training_calls):
    model, fused = pair(nn.Sequential(TrainsOtherwise(), nn.ReLU(), pointwise(4, 6)))
    x = random(2, 4, 8, 7)
    assert_trains_alike(model, fused, x)
    assert not training_calls
    with torch.no_grad():
        assert_same([fused.eval()(x)], [model.eval()(x)])
    assert len(kernel_calls) == 1


def test_the_report_tells_the_modes_apart():
    def reason(model):
        (site,) = fusedsep.fusion_report(model).fused
        return site.reason

    text = "depthwise + BN, relu, pointwise + BN, none"
    assert reason(chain(nn.ReLU())) == text
    assert reason(chain(nn.Dropout(), nn.ReLU())) == (
        f"{text}; in eval mode only: Dropout (2) between depthwise and pointwise"
    )
    assert reason(nn.Sequential(*chain(nn.ReLU()), nn.Dropout(), nn.ReLU6())) == (
        "depthwise + BN, relu, pointwise + BN, relu6; in training mode depthwise + BN, relu, pointwise + BN, none"
    )

    class OneStepInEval(Flat):
        def forward(self, x):
            return super().forward(x) if self.training else self.dw(x)

    assert reason(OneStepInEval(depthwise(4), nn.ReLU(), pointwise(4, 6))) == (
        "depthwise, relu, pointwise, none; in training mode only: "
        "no pointwise convolution follows, but its map is returned"
    )
