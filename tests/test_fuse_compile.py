# SPDX-License-Identifier: BSD-3-Clause
"""``torch.compile`` sees the sites of a fused network as operators, and notices whatever the network notices."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from models import FunctionalBlock, MobileNetV2, TimmBlock, WithDefaults, chain
from randomize import randomized
from subprocesses import run_code
from twins import random

import fusedsep


class Graphs(list):
    """A backend that keeps the graphs."""

    def __call__(self, graph, inputs):
        self.append(graph)
        return graph.forward

    def operators(self):
        return [str(node.target).split(".")[1] for node in self[-1].graph.nodes if "fusedsep" in str(node.target)]


@pytest.fixture
def compiled():
    """What a fused network compiles to in one graph, and the graphs so far."""
    torch.compiler.reset()
    graphs = Graphs()
    yield lambda fused: (torch.compile(fused, backend=graphs, fullgraph=True), graphs)
    torch.compiler.reset()


def pair(model, training=True):
    model = randomized(model).double().train(training)
    return model, fusedsep.fuse(model)


def assert_same_step(compiled, model, x, **kwargs):
    results = []
    for network in (compiled, model):
        network.zero_grad()
        torch.manual_seed(0)
        y = network(x, **kwargs)
        y.square().sum().backward()
        results.append([y, *(p.grad.clone() for p in network.parameters()), *(b.clone() for b in network.buffers())])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("make, channels, sites", [(MobileNetV2, 3, 3), (lambda: TimmBlock(4, 6), 4, 1)])
def test_one_graph_for_each_mode(make, channels, sites, compiled):
    model, fused = pair(make())
    network, graphs = compiled(fused)
    x = random(2, channels, 16, 17)
    for training, count in [(True, 1), (False, 2), (True, 2), (False, 2)]:
        model.train(training), fused.train(training)
        assert_same_step(network, model, x)
        assert len(graphs) == count
        assert graphs.operators() == ["separable_conv2d_training"] * sites
    with torch.no_grad():
        torch.testing.assert_close(network(x), model(x))
    assert graphs.operators() == ["pack", "separable_conv2d"] * sites


@pytest.mark.parametrize("kwargs, sites", [({}, 1), ({"mask": None}, 1), ({"mask": torch.ones(1, dtype=float)}, 0)])
def test_arguments(kwargs, sites, compiled):
    model, fused = pair(WithDefaults())
    network, graphs = compiled(fused)
    assert_same_step(network, model, random(2, 3, 8, 7), **kwargs)
    assert len(graphs.operators()) == sites


def test_dropout_in_between(compiled):
    model, fused = pair(chain(nn.Dropout(), nn.ReLU()))
    network, graphs = compiled(fused)
    x = random(2, 4, 8, 7)
    assert_same_step(network, model, x)
    assert graphs.operators() == []
    model.eval(), fused.eval()
    assert_same_step(network, model, x)
    assert graphs.operators() == ["separable_conv2d_training"]


class Switch(FunctionalBlock):
    def __init__(self):
        super().__init__(F.relu)
        self.scale = 1.0

    def forward(self, x):
        return super().forward(x) * self.scale


CHANGES = {
    "a setting": (Switch, 5, lambda model: setattr(model, "scale", 3.0)),
    "a module": (lambda: chain(nn.ReLU()), 4, lambda model: model.__setitem__(2, nn.LeakyReLU(0.3))),
    "a list": (lambda: chain(nn.Dropout(0.0), nn.ReLU()), 4, lambda model: setattr(model[2], "p", 0.5)),
    "the mode of a BN": (lambda: TimmBlock(4, 6), 4, lambda model: model.bn1.eval()),
    "the mode of what a BN carries": (lambda: TimmBlock(4, 6), 4, lambda model: model.bn1.act.eval()),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_changes_are_noticed(name, training, compiled):
    make, channels, change = CHANGES[name]
    model, fused = pair(make(), training)
    network, _ = compiled(fused)
    x = random(2, channels, 8, 7)
    assert_same_step(network, model, x)
    change(model), change(fused)
    assert_same_step(network, model, x)


def test_compiling_after_a_copy(compiled):
    model, fused = pair(MobileNetV2())
    network, graphs = compiled(fusedsep.fuse(fused))
    x = random(2, 3, 16, 16)
    for _ in range(3):
        assert_same_step(network, model, x)
    assert len(graphs) == 1


def test_frozen_model_with_other_calls(compiled):
    class TwoMaps(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(*chain(nn.ReLU()))

        def forward(self, x, y, scale=2):
            dw, bn1, act, pw, bn2 = self.body
            return bn2(pw(act(bn1(dw(x + y))))) * scale

    model = randomized(TwoMaps()).double().eval()
    network, graphs = compiled(fusedsep.freeze(model))
    x, y = random(2, 4, 8, 7), random(2, 4, 8, 7, seed=1)
    torch.testing.assert_close(network(x, y=y), model(x, y))
    assert graphs.operators() == ["pack", "separable_conv2d"]


def test_fusing_leaves_dynamo_as_it_is():
    """``torch.utils.checkpoint`` loads Dynamo, here while a forward is traced."""
    finished = run_code(
        """
        import torch, torch.nn as nn
        from torch.utils.checkpoint import checkpoint
        import fusedsep

        class Checkpointed(nn.Module):
            def __init__(self):
                super().__init__()
                self.dw = nn.Conv2d(4, 4, 3, groups=4)

            def forward(self, x):
                return checkpoint(self.dw, x, use_reentrant=False)

        fusedsep.fuse(Checkpointed())
        function = torch.compile(lambda x: x + 1 if isinstance(x, torch.Tensor) else x, backend="eager", fullgraph=True)
        assert function(torch.zeros(1)) == 1
        """
    )
    assert finished.returncode == 0, finished.stderr
