# SPDX-License-Identifier: BSD-3-Clause
"""``freeze`` gives an eval-only copy with the same outputs, less memory and nothing to train."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from chain_layers import rows_of
from copies import WAYS, copied
from models import MobileNetV2, WithDefaults, chain, depthwise, pointwise
from randomize import randomized
from zoo import FUSABLE, assert_as_close_to_float64, build, tensors_of

import fusedsep
from fusedsep._frozen import FrozenSeparable
from fusedsep._ops import DEPTHWISE

#: Entries of FUSABLE in which sites share a convolution: those stay fused without being folded.
SHARING = {"shared convolution": 0}


def frozen_sites(model):
    return [module for module in model.modules() if isinstance(module, FrozenSeparable)]


def sites_in(chain_calls):
    """How many sites ran in chains."""
    return sum(rows.count(DEPTHWISE) for rows in rows_of(chain_calls))


@pytest.mark.parametrize("name", FUSABLE)
def test_same_outputs(name, kernel_calls, chain_calls):
    model, x, sites = build(FUSABLE[name])
    with torch.no_grad():
        frozen = fusedsep.freeze(model)
        assert len(frozen_sites(frozen)) == SHARING.get(name, sites)
        frozen(x)
        assert len(kernel_calls) + sites_in(chain_calls) >= sites
        assert_as_close_to_float64(frozen, model, x)
        assert_as_close_to_float64(frozen, model, x.contiguous(memory_format=torch.channels_last))


def test_of_a_fused_model_and_one_in_training_mode():
    model = randomized(MobileNetV2())
    x = torch.randn(1, 3, 16, 16)
    expected = fusedsep.freeze(model)(x)
    assert model.training
    assert torch.equal(fusedsep.freeze(fusedsep.fuse(model))(x), expected)


def test_original_is_untouched():
    model = fusedsep.fuse(randomized(MobileNetV2()))
    keys = list(model.state_dict())
    frozen = fusedsep.freeze(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert list(model.state_dict()) == keys
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not frozen_sites(model)
    assert frozen(torch.randn(1, 3, 16, 16)).abs().max() > 0


def test_nothing_is_kept_twice():
    model = MobileNetV2()
    bytes_before = sum(tensor.nbytes for tensor in model.state_dict().values())
    frozen = fusedsep.freeze(model)
    assert sum(tensor.nbytes for tensor in frozen.state_dict().values()) < bytes_before
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    merged = [name for name in frozen.state_dict() if name.startswith("features.1.")]
    assert merged == [f"features.1.conv.0.0.{name}" for name in ("dw_weight", "dw_bias", "pw_weight", "pw_bias")]


def test_training_is_refused():
    frozen = fusedsep.freeze(nn.Sequential(MobileNetV2(), nn.Dropout()))
    for module in (frozen, frozen[0], frozen[0].features[1].conv, *frozen_sites(frozen)):
        for arguments in ((), (True,)):
            with pytest.raises(RuntimeError, match="keep the model that freeze was called on to train"):
                module.train(*arguments)
    assert not any(module.training for module in frozen.modules())
    assert frozen.eval() is frozen
    assert frozen.train(False) is frozen


def test_training_is_refused_without_any_site():
    with pytest.raises(RuntimeError, match="keep the model that freeze was called on"):
        fusedsep.freeze(nn.Sequential(nn.ReLU())).train()


@pytest.mark.parametrize("how", WAYS)
def test_copies(how):
    frozen = fusedsep.freeze(randomized(MobileNetV2()))
    x = torch.randn(1, 3, 16, 16)
    expected = frozen(x)
    twin = copied(frozen, how)
    assert torch.equal(twin(x), expected)
    with pytest.raises(RuntimeError, match="keep the model"):
        twin.train()
    for site in frozen_sites(twin):
        site.dw_weight.zero_()
    assert torch.equal(frozen(x), expected)


def test_state_dict_loads_into_another_frozen_copy():
    x = torch.randn(1, 3, 16, 16)
    source, target = (fusedsep.freeze(randomized(MobileNetV2(), seed)) for seed in (0, 1))
    assert not torch.equal(target(x), source(x))
    target.load_state_dict(source.state_dict())
    assert torch.equal(target(x), source(x))


def test_other_dtype():
    model = randomized(MobileNetV2()).eval()
    x = torch.randn(1, 3, 16, 16, dtype=torch.double)
    torch.testing.assert_close(fusedsep.freeze(model.double())(x), model(x))
    assert fusedsep.freeze(model.float()).double()(x).dtype == torch.double


def test_blocks_become_constants():
    block = randomized(fusedsep.DepthwiseSeparableBlock(4, 6, 2, padding="same", activation="hardswish")).eval()
    model = nn.Sequential(block, nn.ReLU())
    x = torch.randn(1, 4, 9, 8)
    with torch.no_grad():
        assert isinstance(fusedsep.freeze(block), FrozenSeparable)
        assert_as_close_to_float64(fusedsep.freeze(block), block, x)
        assert_as_close_to_float64(fusedsep.freeze(model), model, x)
        assert_as_close_to_float64(fusedsep.freeze(block), block, x[0])


def test_block_used_twice():
    block = randomized(fusedsep.DepthwiseSeparableBlock(4, 4)).eval()
    model = nn.Sequential(block, block)
    frozen = fusedsep.freeze(model)
    x = torch.randn(1, 4, 9, 8)
    assert frozen[0] is frozen[1]
    torch.testing.assert_close(frozen(x), model(x))


def test_module_that_something_else_uses_stays():
    class TwoUses(nn.Module):
        def __init__(self):
            super().__init__()
            self.dw, self.pw = depthwise(4), pointwise(4, 4)

        def forward(self, x):
            return self.pw(F.relu(self.dw(x))) + self.pw(x)

    model = TwoUses().eval()
    frozen = fusedsep.freeze(model)
    x = torch.randn(1, 4, 6, 6)
    assert isinstance(frozen.pw, nn.Conv2d)
    torch.testing.assert_close(frozen(x), model(x))


def test_weight_that_the_forward_reads_stays():
    class ReadsWeight(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = chain(nn.ReLU())

        def forward(self, x):
            return self.body(x) * self.body[3].weight.mean()

    model = ReadsWeight().eval()
    x = torch.randn(1, 4, 6, 6)
    torch.testing.assert_close(fusedsep.freeze(model)(x), model(x))


def test_hooks_keep_a_site_from_being_merged():
    model = chain(nn.ReLU()).eval()
    fired = []
    model[2].register_forward_hook(lambda *_: fired.append(1))
    frozen = fusedsep.freeze(model)
    frozen(torch.randn(1, 4, 6, 6))
    assert fired == [1]
    assert not frozen_sites(frozen)


def test_batch_statistics_stay(training_calls):
    model = nn.Sequential(depthwise(4), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU(), pointwise(4, 6)).eval()
    x = torch.randn(2, 4, 6, 6, dtype=torch.double)
    frozen = fusedsep.freeze(model.double())
    assert not frozen_sites(frozen)
    torch.testing.assert_close(frozen(x), model(x))
    assert len(training_calls) == 1


def test_another_call_than_the_frozen_one_is_refused():
    frozen = fusedsep.freeze(WithDefaults())
    x = torch.randn(1, 3, 8, 8)
    frozen(x, return_features=False)
    with pytest.raises(RuntimeError, match="call of the frozen WithDefaults is not the one that was frozen"):
        frozen(x, return_features=True)


def test_merged_module_called_on_its_own():
    frozen = fusedsep.freeze(chain(nn.ReLU()))
    with pytest.raises(RuntimeError, match="merged into a frozen site"):
        frozen[3](torch.randn(1, 4, 6, 6))


def test_report_and_defuse():
    frozen = fusedsep.freeze(MobileNetV2())
    report = fusedsep.fusion_report(frozen)
    assert [site.reason for site in report.fused] == ["frozen"] * 3
    x = torch.randn(1, 3, 16, 16)
    expected = frozen(x)
    assert torch.equal(fusedsep.defuse(fusedsep.fuse(frozen))(x), expected)
    assert torch.equal(fusedsep.freeze(frozen)(x), expected)


def test_no_gradients_through_constants_but_through_the_input():
    model = randomized(chain(nn.ReLU())).double().eval()
    frozen = fusedsep.freeze(model)
    gradients = []
    for network in (model, frozen):
        x = torch.randn(1, 4, 6, 6, dtype=torch.double, generator=torch.Generator().manual_seed(0)).requires_grad_()
        sum(part.square().sum() for part in tensors_of(network(x))).backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients)
