# SPDX-License-Identifier: BSD-3-Clause
"""DistributedDataParallel and FSDP2 train a fused network as they train the unfused one, through the kernels."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from models import InvertedResidual, MobileNetV2
from processes import Ranks
from randomize import randomized
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from twins import random

import fusedsep
from fusedsep import _ops

_STEPS = 2
_BLOCKS = (fusedsep.DepthwiseSeparableBlock, fusedsep.reference.DepthwiseSeparableBlock, InvertedResidual)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Those of fused and of unfused networks: a process that dies has run nothing of the other kind."""
    ranks = {kind: Ranks(tmp_path_factory.mktemp(kind)) for kind in ("fused", "unfused")}
    yield ranks
    for processes in ranks.values():
        processes.close()


def built_from_blocks():
    """MobileNetV1 from fused blocks, its unfused twin, and how many blocks they have."""
    torch.manual_seed(0)
    arguments = {"num_classes": 10, "width_multiplier": 0.1, "dtype": torch.double}
    fused = randomized(fusedsep.MobileNetV1(**arguments))
    unfused = fusedsep.reference.MobileNetV1(**arguments)
    unfused.load_state_dict(fused.state_dict())
    return fused, unfused, 13


def fused_by_surgery():
    torch.manual_seed(0)
    unfused = randomized(MobileNetV2()).double()
    unfused.classifier[0].p = 0.0  # the ranks draw from one generator, the two networks would from two
    return fusedsep.fuse(unfused), unfused, 3


NETWORKS = {"blocks": built_from_blocks, "fuse": fused_by_surgery}
WRAPPERS = {
    "DDP": DistributedDataParallel,
    "DDP, unused parameters": lambda model: DistributedDataParallel(model, find_unused_parameters=True),
    "DDP, static graph": lambda model: DistributedDataParallel(model, static_graph=True),
    "FSDP2": lambda model: fully_sharded(model),
}


def fully_sharded(model):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in model.modules():
        if isinstance(module, _BLOCKS):
            fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


class WithUnusedHead(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network
        self.unused = nn.BatchNorm1d(3, dtype=torch.double)

    def forward(self, x):
        return self.network(x)


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def train(rank, model, wrapper, accumulate):
    """Gradients of every step and the state at the end; how many calls of the kernels there were."""
    model = WRAPPERS[wrapper](model.train())
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-4)
    criterion = nn.CrossEntropyLoss()
    calls = []
    operator = _ops.separable_conv2d_training
    _ops.separable_conv2d_training = lambda *arguments: calls.append(1) or operator(*arguments)
    found = {}
    try:
        for step in range(_STEPS):
            optimizer.zero_grad()
            if accumulate:
                with model.no_sync():
                    criterion(model(random(3, 3, 64, 64, seed=50 + rank)), torch.arange(3)).backward()
            loss = criterion(model(random(4, 3, 64, 64, seed=10 * step + rank)), torch.arange(4))
            loss.backward()
            found[f"loss {step}"] = loss.detach()
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    found[f"grad {step} {name}"] = whole(parameter.grad)
            optimizer.step()
    finally:
        _ops.separable_conv2d_training = operator
    return found | {name: whole(value) for name, value in model.state_dict().items()}, len(calls)


def assert_near(actual, expected):
    """Each tensor up to 1e-7 of its largest number: small gradients are differences of large ones, or of equal ones."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name],
            value,
            rtol=0,
            atol=1e-7 * float(value.abs().max()) + 1e-12,
            msg=lambda message, name=name: f"{name}: {message}",
        )


def assert_trains_as_unfused(ranks, network, wrapper, accumulate=False, around=lambda model: model):
    fused, unfused, sites = NETWORKS[network]()
    actual = ranks["fused"].run(train, around(fused), wrapper, accumulate)
    expected = ranks["unfused"].run(train, around(unfused), wrapper, accumulate)
    for (found, calls), (wanted, _) in zip(actual, expected, strict=True):
        assert calls == sites * _STEPS * (1 + accumulate)
        assert_near(found, wanted)
    first, second = (found for found, _ in actual)
    for name in first:
        assert torch.equal(first[name], second[name]) or not name.startswith("grad"), name
    return first


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("network", NETWORKS)
def test_gradients_buffers_and_parameters(ranks, network, wrapper):
    assert_trains_as_unfused(ranks, network, wrapper)


def test_gradients_of_several_batches(ranks):
    assert_trains_as_unfused(ranks, "blocks", "DDP", accumulate=True)


def test_parameters_that_get_no_gradient(ranks):
    found = assert_trains_as_unfused(ranks, "blocks", "DDP, unused parameters", around=WithUnusedHead)
    assert not any("unused" in name for name in found if name.startswith("grad"))


def train_on_parts(rank, model, parts, wrapper, fuse):
    """Two steps on this rank's images, each of which counts as much as one of another rank."""
    convert = nn.SyncBatchNorm.convert_sync_batchnorm
    model.train()
    # DistributedDataParallel refuses to wrap a SyncBatchNorm on the CPU.
    model = convert(DistributedDataParallel(model)) if wrapper == "DDP" else fully_sharded(convert(model))
    if fuse:
        model = fusedsep.fuse(model, inplace=True)
    return train_on(model, parts[rank], dist.get_world_size() / sum(len(part) for part in parts))


def train_on(model, x, factor):
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for _ in range(_STEPS):
        optimizer.zero_grad()
        (model(x).square().sum() * factor).backward()  # both wrappers take the mean over the ranks
        optimizer.step()
    found = {f"grad {name}": parameter.grad for name, parameter in model.named_parameters()} | model.state_dict()
    return {name.replace("module.", ""): whole(tensor) for name, tensor in found.items()}


@pytest.mark.parametrize("wrapper", ["DDP", "FSDP2"])
@pytest.mark.parametrize("sizes", [(2, 2), (3, 1)], ids=str)
def test_synchronised_statistics_are_those_of_one_process_with_the_whole_batch(ranks, sizes, wrapper):
    fused, unfused, _ = built_from_blocks()
    x = random(sum(sizes), 3, 64, 64)
    expected = train_on(unfused.train(), x, 1 / len(x))
    for actual in ranks["fused"].run(train_on_parts, fused, x.split(sizes), wrapper, False):
        assert_near(actual, expected)


def make_chain():
    """A network whose every BN is in a site."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, 2)]
    for in_channels, out_channels in ((4, 8), (8, 6)):
        layers += [nn.Conv2d(in_channels, in_channels, 3, padding=1, groups=in_channels), nn.BatchNorm2d(in_channels)]
        layers += [nn.ReLU6(), nn.Conv2d(in_channels, out_channels, 1), nn.BatchNorm2d(out_channels), nn.ReLU6()]
    return randomized(nn.Sequential(*layers)).double()


@pytest.mark.parametrize("wrapper", ["DDP", "FSDP2"])
def test_synchronised_statistics_of_a_fused_network(ranks, wrapper):
    x = random(5, 3, 17, 17)
    expected = train_on(make_chain().train(), x, 1 / len(x))
    for actual in ranks["fused"].run(train_on_parts, make_chain(), x.split((3, 2)), wrapper, True):
        assert_near(actual, expected)
