# SPDX-License-Identifier: BSD-3-Clause
"""``fusion_report`` names every depthwise convolution, fused or not, and says why."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from models import Branching, ExtremeInception, Flat, MobileNetV2, PaddedBlock, chain, depthwise, pointwise
from zoo import FUSABLE, LOOK_ALIKES, build

import fusedsep


def names(sites):
    return [site.name for site in sites]


@pytest.mark.parametrize("name", FUSABLE)
def test_says_the_same_before_and_after_fusing(name):
    model, _, sites = build(FUSABLE[name])
    before = fusedsep.fusion_report(model)
    assert len(before.fused) == sites
    assert fusedsep.fusion_report(fusedsep.fuse(model)) == before
    assert fusedsep.fusion_report(model.train()) == before


@pytest.mark.parametrize("name", LOOK_ALIKES)
def test_reasons_of_look_alikes(name):
    model, _, reason = build(LOOK_ALIKES[name])
    report = fusedsep.fusion_report(model)
    assert not report.fused
    (skipped,) = report.skipped + report.chained
    assert isinstance(model.get_submodule(skipped.name), nn.Conv2d)
    assert re.search(reason, skipped.reason)


def test_names_and_chains():
    report = fusedsep.fusion_report(MobileNetV2())
    assert names(report.fused) == ["features.1.conv.0.0", "features.2.conv.1.0", "features.3.conv.1.0"]
    assert {site.reason for site in report.fused} == {"depthwise + BN, relu6, pointwise + BN, none"}
    (site,) = fusedsep.fusion_report(PaddedBlock(4, None)).fused
    assert site.reason == "pad + depthwise + BN, relu6, pointwise + BN, relu6"


def test_table():
    model = nn.Sequential(chain(nn.ReLU()), pointwise(6, 4), chain(nn.SiLU()))
    assert str(fusedsep.fusion_report(model)) == (
        "1 of 2 depthwise convolutions fused, 1 more in chains in eval mode\n"
        "  fused    0.0  depthwise + BN, relu, pointwise + BN, none\n"
        "  chained  2.0  SiLU (2.2) between depthwise and pointwise; one operation with its BN in training mode"
    )
    model[2][0].padding_mode = "reflect"
    assert str(fusedsep.fusion_report(model)) == (
        "1 of 2 depthwise convolutions fused\n"
        "  fused    0.0  depthwise + BN, relu, pointwise + BN, none\n"
        "  skipped  2.0  padding mode 'reflect'"
    )
    assert str(fusedsep.fusion_report(nn.ReLU())) == "0 of 0 depthwise convolutions fused"


def test_all_blocks_of_our_own_network():
    assert str(fusedsep.fusion_report(fusedsep.MobileNetV1())).startswith("13 of 13 depthwise convolutions fused")


def test_order_of_the_extreme_inception():
    report = fusedsep.fusion_report(ExtremeInception())
    assert names(report.fused) == ["first.2"]
    (last,) = report.chained
    assert last.name == "second.2"
    assert 'pointwise -> depthwise, the order of the "extreme Inception"' in last.reason


def test_hooks_are_reported_for_as_long_as_they_are_there():
    model = fusedsep.fuse(chain(nn.ReLU()).eval())
    handle = model[2].register_forward_hook(lambda *_: None)
    (skipped,) = fusedsep.fusion_report(model).skipped
    assert skipped.name == "0"
    assert "hooks on 2" in skipped.reason
    handle.remove()
    assert names(fusedsep.fusion_report(model).fused) == ["0"]


def test_python_that_cannot_be_traced_is_named():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.dw, self.pw = depthwise(4), pointwise(4, 4)

        def forward(self, x):
            return self.pw(F.relu(self.dw(x))) if x.sum() > 0 else x

    (skipped,) = fusedsep.fusion_report(nn.Sequential(nn.ReLU(), Branches())).skipped
    assert skipped.name == "1.dw"
    assert re.search(r"Python of 1 \(Branches\) cannot be traced: .*control flow", skipped.reason)


def test_a_convolution_that_nobody_calls():
    model = nn.Sequential(nn.ReLU())
    model.unused = nn.ModuleList([depthwise(4)])
    model.forward = lambda x: x
    (skipped,) = fusedsep.fusion_report(model).skipped
    assert (skipped.name, skipped.reason) == ("unused.0", "no traceable forward calls it")


def test_ordinary_and_grouped_convolutions_are_not_listed():
    report = fusedsep.fusion_report(Flat(nn.Conv2d(4, 4, 3), F.relu, nn.Conv2d(4, 6, 3, groups=2)))
    assert report.fused == report.skipped == []


def test_changes_nothing():
    model = Branching(chain(nn.ReLU())).train()
    model.body[1].eval()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    attributes = [dict(vars(module)) for module in model.modules()]
    fusedsep.fusion_report(model)
    assert [dict(vars(module)) for module in model.modules()] == attributes
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_works_without_real_memory():
    with torch.device("meta"):
        model = MobileNetV2()
    assert len(fusedsep.fusion_report(model).fused) == 3
