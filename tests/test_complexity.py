# SPDX-License-Identifier: BSD-3-Clause
"""``complexity`` reproduces the figures of the MobileNet paper and leaves the model alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
from article import MobileNet

from fusedsep import DepthwiseSeparableBlock, MobileNetV1, complexity, fuse, reference

KINDS = pytest.mark.parametrize("kind", [MobileNetV1, reference.MobileNetV1], ids=["fused", "reference"])


@KINDS
@pytest.mark.parametrize(
    ("width_multiplier", "mult_adds", "parameters"),
    [(1.0, 569, 4.2), (0.75, 325, 2.6), (0.5, 149, 1.3), (0.25, 41, 0.5)],
)
def test_the_four_widths(kind, width_multiplier, mult_adds, parameters):
    result = complexity(kind(width_multiplier=width_multiplier), 224)
    assert round(result.mult_adds / 1e6) == mult_adds
    assert round(result.parameters / 1e6, 1) == parameters


def test_fusing_changes_no_count():
    model = reference.MobileNetV1(width_multiplier=0.25, padding="same")
    assert complexity(fuse(model), 64) == complexity(model, 64)


@pytest.mark.parametrize(("resolution", "mult_adds"), [(224, 569), (192, 418), (160, 290), (128, 186)])
def test_the_four_resolutions(resolution, mult_adds):
    # The paper cuts 290.68 to 290.
    assert complexity(MobileNetV1(), resolution).mult_adds / 1e6 == pytest.approx(mult_adds, abs=0.7)


@pytest.mark.parametrize("model", [MobileNetV1, reference.MobileNetV1, MobileNet])
def test_the_share_of_each_kind(model):
    shares = {
        kind.kind: (kind.layers, round(100 * kind.mult_adds_share, 2), round(100 * kind.parameters_share, 2))
        for kind in complexity(model(), (3, 224, 224)).kinds
    }
    # The paper prints 1.19 % for the Mult-Adds of the first convolution; its own formula gives 1.91 %.
    assert shares == {
        "conv 1x1": (13, 94.86, 74.59),
        "conv dw 3x3": (13, 3.06, 1.06),
        "conv 3x3": (1, 1.91, 0.02),
        "fully connected": (1, 0.18, 24.33),
    }


def test_all_parameters_are_counted_once():
    model = MobileNetV1(width_multiplier=0.25)
    result = complexity(model, 32)
    assert result.parameters + result.other_parameters == sum(parameter.numel() for parameter in model.parameters())


def test_separable_pairs_save_one_over_n_plus_one_ninth():
    result = complexity(MobileNetV1(width_multiplier=0.25), 64)
    assert len(result.separable) == 13
    for pair, block in zip(result.separable, MobileNetV1(width_multiplier=0.25).stage_layers, strict=True):
        saving = 1 / block.pw.out_channels + 1 / 9
        assert pair.reduction == pytest.approx(saving, rel=1e-12)
        assert pair.parameters / pair.standard_parameters == pytest.approx(saving, rel=1e-12)
    assert (result.separable[2].depthwise, result.separable[2].pointwise) == ("stage_layers.2.dw", "stage_layers.2.pw")


def test_standard_and_grouped_convolution_by_hand():
    standard = complexity(nn.Conv2d(8, 12, 3, stride=2, padding=1), (8, 10, 14))
    grouped = complexity(nn.Conv2d(8, 12, 3, stride=2, padding=1, groups=4), (8, 10, 14))
    assert standard.mult_adds == 3 * 3 * 8 * 12 * 5 * 7
    assert (standard.layers[0].kind, grouped.layers[0].kind) == ("conv 3x3", "conv grouped 3x3")
    assert 4 * grouped.mult_adds == standard.mult_adds == grouped.standard_mult_adds
    assert 4 * grouped.parameters == standard.parameters == grouped.layers[0].standard_parameters


def test_a_separable_block_beside_its_standard_convolution():
    block = complexity(DepthwiseSeparableBlock(8, 12, 2), (8, 10, 14))
    standard = complexity(nn.Conv2d(8, 12, 3, stride=2, padding=1), (8, 10, 14))
    assert block.standard_mult_adds == standard.mult_adds
    assert block.separable[0].standard_parameters == standard.parameters


def test_a_depthwise_and_a_pointwise_convolution_on_other_maps_are_no_pair():
    depthwise, pointwise = nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1)
    assert len(complexity(nn.Sequential(depthwise, nn.ReLU(), pointwise), (8, 9, 9)).separable) == 1
    assert complexity(nn.Sequential(depthwise, nn.MaxPool2d(2), pointwise), (8, 9, 9)).separable == ()


@pytest.mark.parametrize(
    ("layer", "input_size", "kind", "mult_adds"),
    [
        (nn.Conv2d(6, 12, (5, 3), groups=6), (6, 8, 8), "conv dw 5x3", 12 * 15 * 4 * 6),
        (nn.Conv2d(1, 4, 3), (1, 5, 5), "conv 3x3", 4 * 9 * 9),
        (nn.Conv1d(4, 6, 3), (4, 10), "conv 3", 6 * 4 * 3 * 8),
        (nn.Conv3d(2, 3, 2), (1, 2, 3, 3, 3), "conv 2x2x2", 3 * 2 * 8 * 8),
        (nn.ConvTranspose2d(4, 6, 2, stride=2), (4, 5, 5), "conv transposed 2x2", 4 * 6 * 4 * 25),
        (nn.Linear(5, 7), (2, 5), "fully connected", 2 * 5 * 7),
    ],
)
def test_other_layers_by_hand(layer, input_size, kind, mult_adds):
    result = complexity(layer, input_size)
    assert [(own.kind, own.mult_adds) for own in result.layers] == [(kind, mult_adds)]


def test_a_batch_costs_as_many_times():
    model = MobileNetV1(width_multiplier=0.25)
    assert complexity(model, (4, 3, 64, 64)).mult_adds == 4 * complexity(model, 64).mult_adds


def test_a_module_called_twice_costs_twice_and_has_its_parameters_once():
    conv = nn.Conv2d(4, 4, 1)
    once, twice = complexity(conv, (4, 5, 5)), complexity(nn.Sequential(conv, conv), (4, 5, 5))
    assert (twice.mult_adds, twice.parameters) == (2 * once.mult_adds, once.parameters)


def test_weights_shared_by_two_modules_are_counted_once():
    first, second = nn.Linear(5, 5), nn.Linear(5, 5)
    second.weight = first.weight
    result = complexity(nn.Sequential(first, second), (1, 5))
    assert (result.mult_adds, result.parameters, result.other_parameters) == (50, 25, 10)


class _NeedsValues(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 1)
        self.plain_tensor = torch.tensor([2.0, 3.0, 4.0]).view(3, 1, 1)

    def forward(self, x):
        return self.conv(x * self.plain_tensor) if float(x.sum()) == 0 else x


def test_a_model_that_needs_values_is_counted_and_comes_back_unchanged():
    model = _NeedsValues()
    assert complexity(model, 4).mult_adds == 3 * 5 * 16
    assert model.training
    assert not model.conv._forward_hooks


@KINDS
def test_the_model_comes_back_unchanged(kind):
    model = kind(width_multiplier=0.25).train()
    model.stage_layers[3].eval()
    model.stage_layers[4].dw.weight.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    state_dict = {key: value.clone() for key, value in model.state_dict().items()}
    complexity(model, 32)
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks for module in model.modules())
    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == [
        "stage_layers.4.dw.weight"
    ]
    for key, value in model.state_dict().items():
        assert torch.equal(value, state_dict[key])


def test_works_on_a_model_without_values():
    assert complexity(MobileNetV1(device="meta"), 224).mult_adds == 568_740_352


def test_the_table():
    lines = str(complexity(MobileNetV1(), 224)).splitlines()
    assert lines[0].split() == ["layer", "kind", "layers", "Mult-Adds", "share", "parameters", "share"]
    assert lines[2].split() == ["conv", "1x1", "13", "539,492,352", "94.86%", "3,139,584", "74.59%"]
    assert lines[7].split() == ["total", "28", "568,740,352", "4,209,088"]
    assert "22,888 parameters" in lines[8]
    assert "8.6 times" in lines[9]


def test_a_model_without_layers_to_count():
    result = complexity(nn.ReLU(), (3, 4, 4))
    assert (result.mult_adds, result.parameters, result.kinds) == (0, 0, ())
    assert "total" in str(result)


@pytest.mark.parametrize(
    ("model", "input_size", "error", "message"),
    [
        ("MobileNetV1", 224, TypeError, r"model must be an nn\.Module, got str"),
        (nn.Conv2d(3, 4, 1), "224", TypeError, "input_size must be an int, .* got '224'"),
        (nn.Conv2d(3, 4, 1), None, TypeError, "input_size must be an int, .* got None"),
        (nn.Conv2d(3, 4, 1), 0, ValueError, "input_size must be at least 1, got 0"),
        (nn.Conv2d(3, 4, 1), (3, 4.0, 4), TypeError, r"input_size\[1\] must be an int, got 4\.0"),
        (nn.Conv2d(3, 4, 1), (3, 4, -4), ValueError, r"input_size\[2\] must be at least 1, got -4"),
        (nn.Linear(3, 4), 5, ValueError, r"input_size must be a full shape for a model without nn\.Conv2d, got 5"),
        (nn.Conv2d(3, 4, 1), (5, 4, 4), RuntimeError, "to have 3 channels, but got 5 channels"),
    ],
)
def test_names_what_does_not_fit(model, input_size, error, message):
    with pytest.raises(error, match=message):
        complexity(model, input_size)
