# SPDX-License-Identifier: BSD-3-Clause
"""Consecutive layers of a frozen model run as one call, wherever nothing can be seen of it."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from article import MobileNet as ArticleMobileNet
from chain_layers import rows_of
from chain_models import HEADS, ConvolutionHead, Plain, PoolFlatten
from copies import WAYS, copied
from models import ConvBNAct, depthwise, pointwise
from randomize import randomized
from zoo import assert_as_close_to_float64

import fusedsep
from fusedsep import reference
from fusedsep._ops import DEPTHWISE, MEANS, PATCHES, PATCHES_OF_NCHW, PIXELS


def assert_same(frozen, model, x):
    """One call of ``frozen``, as close to float64 as ``model`` and in the same memory format."""
    y = frozen(x)
    assert_as_close_to_float64(lambda x: y, model, x)
    assert y.stride() == model(x).stride()


@pytest.mark.parametrize("model_class", HEADS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_whole_network_is_one_call(model_class, memory_format, chain_calls, kernel_calls):
    model = randomized(model_class()).eval()
    frozen = fusedsep.freeze(model)
    x = torch.randn(3, 3, 33, 30).contiguous(memory_format=memory_format)
    with torch.no_grad():
        assert_same(frozen, model, x)
    first = PATCHES if memory_format is torch.channels_last else PATCHES_OF_NCHW
    assert rows_of(chain_calls) == [[first, DEPTHWISE, DEPTHWISE, DEPTHWISE, MEANS] + (model.products - 1) * [PIXELS]]
    assert not kernel_calls


@pytest.mark.parametrize(
    "make",
    [
        lambda: fusedsep.MobileNetV1(7, 0.25),
        lambda: reference.MobileNetV1(7, 0.25, activation="hardswish"),
        lambda: fusedsep.MobileNetV1(7, 0.25, padding="same", activation="relu6"),
        lambda: nn.Sequential(fusedsep.MobileNetV1(7, 0.25), nn.Softmax(1)),
    ],
)
def test_mobilenets_are_one_call(make, chain_calls):
    model = randomized(make()).eval()
    frozen = fusedsep.freeze(fusedsep.fuse(model))
    with torch.no_grad():
        assert_same(frozen, model, torch.randn(2, 3, 47, 64))
    assert rows_of(chain_calls) == [[PATCHES_OF_NCHW] + 13 * [DEPTHWISE] + [MEANS]]


def test_article(chain_calls):
    """Its average pool is of seven pixels, and not of all: that one and the classifier stay torch's."""
    model = randomized(ArticleMobileNet()).eval()
    with torch.no_grad():
        assert_same(fusedsep.freeze(model), model, torch.randn(1, 3, 224, 224))
    assert rows_of(chain_calls) == [[PATCHES_OF_NCHW] + 13 * [DEPTHWISE]]


def frozen_and_input():
    model = randomized(PoolFlatten()).eval()
    return model, fusedsep.freeze(model), torch.randn(2, 3, 24, 24)


@pytest.mark.parametrize("name", ["stem.0", "stem.2", "blocks", "blocks.1", "pool", "dropout", "classifier"])
def test_a_hook_is_called(name, chain_calls):
    _, frozen, x = frozen_and_input()
    expected = frozen(x)
    shapes = []
    hook = frozen.get_submodule(name).register_forward_hook(lambda module, inputs, output: shapes.append(output.shape))
    torch.testing.assert_close(frozen(x), expected)
    assert len(shapes) == 1
    assert len(chain_calls) == 1
    hook.remove()
    assert torch.equal(frozen(x), expected)
    assert len(chain_calls) == 2


def test_a_hook_on_a_frozen_site_is_called():
    _, frozen, x = frozen_and_input()
    called = []
    frozen.blocks[1][0][0].register_forward_hook(lambda *arguments: called.append(1))
    frozen(x)
    assert called == [1]


def test_a_replaced_layer_is_run():
    _, frozen, x = frozen_and_input()
    frozen.classifier = nn.Identity()
    y = frozen(x)
    assert y.shape == (2, 40)
    frozen.stem[2] = nn.Identity()
    assert not torch.equal(frozen(x), y)


def layer_by_layer(frozen):
    """A hook ends a chain."""
    for layer in frozen.blocks:
        layer.register_forward_hook(lambda *arguments: None)
    return frozen


@pytest.mark.parametrize("name", ["stem.0.weight", "stem.0.bias", "classifier.weight", "classifier.bias"])
def test_changed_numbers_are_noticed(name):
    _, frozen, x = frozen_and_input()
    before = frozen(x)
    with torch.no_grad():
        frozen.get_parameter(name).add_(0.5)
        after = frozen(x)
        assert not torch.equal(after, before)
        torch.testing.assert_close(layer_by_layer(frozen)(x), after)


def test_changed_settings_are_noticed():
    model, frozen, x = frozen_and_input()
    frozen(x)
    for net in (model, frozen):
        net.stem[0].stride = (1, 1)
        net.stem[2].inplace = False
    with torch.no_grad():
        assert_same(frozen, model, x)


def test_loaded_numbers_are_noticed():
    x = torch.randn(1, 3, 24, 24)
    source, target = (fusedsep.freeze(randomized(Plain(), seed)) for seed in (0, 1))
    assert not torch.equal(target(x), source(x))
    target.load_state_dict(source.state_dict())
    assert torch.equal(target(x), source(x))


@pytest.mark.parametrize("how", WAYS)
def test_copies_run_their_own_layers(how, chain_calls):
    _, frozen, x = frozen_and_input()
    expected = frozen(x)
    twin = copied(frozen, how)
    assert torch.equal(twin(x), expected)
    assert len(chain_calls) == 2
    with torch.no_grad():
        twin.classifier.bias.add_(1)
    torch.testing.assert_close(twin(x), expected + 1)
    assert torch.equal(frozen(x), expected)


def test_float64(chain_calls):
    model, frozen, x = frozen_and_input()
    y = frozen.double()(x.double())
    torch.testing.assert_close(y, model.double()(x.double()))
    assert len(chain_calls) == 1


def test_what_the_operator_does_not_cover_runs_layer_by_layer(chain_calls):
    model, frozen, x = frozen_and_input()
    x.requires_grad_()
    y, expected = frozen(x), model(x)
    (grad,), (grad_expected,) = torch.autograd.grad(y.sum(), x), torch.autograd.grad(expected.sum(), x)
    torch.testing.assert_close(grad, grad_expected)
    with torch.no_grad():
        half = copy.deepcopy(frozen).bfloat16()
        assert half(x.bfloat16()).dtype == torch.bfloat16
        with torch.autocast("cpu", torch.bfloat16):
            frozen(x)
    assert not chain_calls
    for wrong in (torch.randn(2, 4, 24, 24), torch.randn(2, 3, 24, 24, dtype=torch.double)):
        with pytest.raises((RuntimeError, TypeError, ValueError)):
            frozen(wrong)
    assert not chain_calls


def test_images_that_are_too_small_get_the_error_of_the_layers():
    model = randomized(Plain())
    model.blocks[0][0][0].padding = (0, 0)
    with pytest.raises(ValueError, match="too small"):
        fusedsep.freeze(model)(torch.randn(1, 3, 3, 3))


def test_compiled():
    _, frozen, x = frozen_and_input()
    expected = frozen(x)
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(frozen)(x), expected)


def test_parts_run_on_their_own():
    model, frozen, x = frozen_and_input()
    with torch.no_grad():
        torch.testing.assert_close(frozen.blocks(frozen.stem(x)), model.blocks(model.stem(x)))


class LoneSite(Plain):
    """One site by itself, in front of something that ends every chain."""

    def __init__(self):
        super().__init__()
        self.dw, self.act, self.pw = nn.Conv2d(3, 3, 3, 1, 1, groups=3), nn.ReLU(), nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return super().forward(torch.tanh(x + self.pw(self.act(self.dw(x)))))


def test_a_lone_site_does_not_keep_others_from_a_chain(chain_calls, kernel_calls):
    model = randomized(LoneSite()).eval()
    frozen, x = fusedsep.freeze(model), torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        assert_same(frozen, model, x)
        assert rows_of(chain_calls) == [[PATCHES_OF_NCHW, DEPTHWISE, DEPTHWISE, DEPTHWISE, MEANS]]
        assert len(kernel_calls) == 1
        called = []
        frozen.dw.register_forward_hook(lambda *arguments: called.append(1))
        assert_same(frozen, model, x)
    assert called == [1]


class TwoReaders(Plain):
    def forward(self, x):
        x = self.blocks[0](self.stem(x))
        y = self.blocks[2](self.blocks[1](x))
        return self.head(y) + x.mean()


def test_a_second_reader_ends_a_chain(chain_calls):
    model = randomized(TwoReaders()).eval()
    with torch.no_grad():
        assert_same(fusedsep.freeze(model), model, torch.randn(2, 3, 24, 24))
    assert rows_of(chain_calls) == [[PATCHES_OF_NCHW, DEPTHWISE], [DEPTHWISE, DEPTHWISE, MEANS]]


def test_other_first_convolutions_stay_torchs(chain_calls):
    for conv in (
        nn.Conv2d(3, 8, 5, 2, 2),
        nn.Conv2d(3, 8, 3, (2, 1), 1),
        nn.Conv2d(3, 8, 3, 2, 1, padding_mode="reflect"),
    ):
        model = Plain()
        model.stem[0] = conv
        model = randomized(model).eval()
        with torch.no_grad():
            assert_same(fusedsep.freeze(model), model, torch.randn(2, 3, 24, 24))
    assert rows_of(chain_calls) == 3 * [[DEPTHWISE, DEPTHWISE, DEPTHWISE, MEANS]]


@pytest.mark.parametrize("how", ["assignment", "to"])
def test_changed_constants_are_noticed(how):
    _, frozen, x = frozen_and_input()
    site = frozen.blocks[1][0][0]
    before = frozen(x)
    if how == "assignment":
        site.pw_bias = site.pw_bias + 1
    else:
        site.to(torch.double).pw_bias.add_(1)
        site.to(torch.float)
    after = frozen(x)
    assert not torch.equal(after, before)
    torch.testing.assert_close(layer_by_layer(frozen)(x), after)


def test_many_sizes():
    _, frozen, _ = frozen_and_input()
    for size in range(8, 90):
        x = torch.randn(1, 3, size, 8)
        y = frozen(x)
        assert torch.equal(frozen(x), y)
    (chain,) = frozen.forward.programs[False].sites.values()
    assert 0 < len(chain._layers) <= 65


@pytest.mark.parametrize("model_class", [Plain, PoolFlatten, ConvolutionHead])
def test_an_image_without_a_batch_fails_as_in_the_layers(model_class):
    model, x = randomized(model_class()).eval(), torch.randn(3, 24, 24)
    with torch.no_grad():
        for net in (model, fusedsep.fuse(model)):
            with pytest.raises(ValueError, match="expected 4D input"):
                net(x)
        frozen = fusedsep.freeze(model)  # without a BN, which asks for four dimensions
        if model_class is ConvolutionHead:
            torch.testing.assert_close(frozen(x).flatten(), frozen(x[None])[0])
        else:
            with pytest.raises(IndexError, match="Dimension out of range"):
                frozen(x)


class ListsOfNumbers(Plain):
    """Python that depends on what a list holds, in the whole and in a part that no chain needs."""

    def __init__(self):
        super().__init__()
        self.scales = [1.0]
        self.last = Scaled()

    def head(self, x):
        return self.last(super().head(x)) * self.scales[0]


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.options = Options()

    def forward(self, x):
        return x * self.options.scale


class Options:
    scale = 1.0


def test_changed_python_is_noticed(chain_calls):
    model = randomized(ListsOfNumbers()).eval()
    frozen, x = fusedsep.freeze(model), torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        for net in (model, frozen):
            net.last.options.scale = 3.0
        assert_same(frozen, model, x)
        assert chain_calls  # that part is called as it is
        chain_calls.clear()
        for net in (model, frozen):
            net.scales[0] = 5.0
        assert_same(frozen, model, x)
        assert not chain_calls


class DefaultObject(Plain):
    def forward(self, x, options=Options()):  # noqa: B008
        return super().forward(x) * options.scale


def test_a_default_that_cannot_be_compared_makes_no_chain(chain_calls):
    model = randomized(DefaultObject()).eval()
    frozen, x = fusedsep.freeze(model), torch.randn(2, 3, 24, 24)
    other = Options()
    other.scale = 3.0
    with torch.no_grad():
        assert_same(frozen, model, x)
        torch.testing.assert_close(frozen(x, other), model(x, other))
    assert not chain_calls


class ViewOfOneImage(Plain):
    def head(self, x):
        return self.classifier(F.adaptive_avg_pool2d(x, 1).view(-1))


def test_other_shapes_of_the_pooled_map_end_a_chain(chain_calls):
    model = randomized(ViewOfOneImage()).eval()
    with torch.no_grad():
        assert_as_close_to_float64(fusedsep.freeze(model), model, torch.randn(1, 3, 24, 24))
    assert rows_of(chain_calls) == [[PATCHES_OF_NCHW, DEPTHWISE, DEPTHWISE, DEPTHWISE]]


class TimesParameter(nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()), requires_grad=False)

    def forward(self, weight):
        return weight * self.factor


class DoubledLinear(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight * 2, self.bias)


class BiasedTwice(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight, self.bias) + self.bias


class OfAnotherWeight(nn.Linear):
    def __init__(self, *args):
        super().__init__(*args)
        self.other = nn.Parameter(torch.randn_like(self.weight))

    def forward(self, x):
        return F.linear(x, self.other, self.bias)


@pytest.mark.parametrize("linear", [DoubledLinear, BiasedTwice, OfAnotherWeight])
def test_linear_layers_that_do_something_else_stay_torchs(linear, chain_calls):
    model = Plain()
    model.classifier = linear(40, 5)
    model = randomized(model).eval()
    with torch.no_grad():
        assert_same(fusedsep.freeze(model), model, torch.randn(2, 3, 24, 24))
    assert MEANS not in rows_of(chain_calls)[0]


def test_a_parametrized_weight_is_computed_for_each_call():
    model, frozen, x = frozen_and_input()
    for net in (model, frozen):
        nn.utils.parametrize.register_parametrization(net.classifier, "weight", TimesParameter())
    with torch.no_grad():
        for factor in (1.0, 2.0, 3.0, 4.0):
            for net in (model, frozen):
                net.classifier.parametrizations.weight[0].factor.fill_(factor)
            assert_same(frozen, model, x)


def test_an_address_that_is_used_again_is_no_old_weight():
    model, frozen, x = frozen_and_input()
    with torch.no_grad():
        for _ in range(20):
            frozen(x)
            for _ in range(3):  # the allocator gives back what the first of them left
                weight = torch.randn(5, 40)
                frozen.classifier.weight.data, model.classifier.weight.data = weight.clone(), weight
            assert_same(frozen, model, x)


def test_changes_of_inference_tensors_are_noticed():
    model, _, x = frozen_and_input()
    with torch.inference_mode():
        frozen = fusedsep.freeze(model)
        frozen(x)
        for net in (model, frozen):
            net.classifier.weight.add_(1.0)
        assert_same(frozen, model, x)


def test_tensors_of_a_frozen_model_count_their_changes():
    """Those made in inference mode do not, and every byte of them would be looked at at each call."""
    model, _, x = frozen_and_input()
    with torch.inference_mode():
        inferred = copy.deepcopy(model)
        for made in (fusedsep.freeze(model), fusedsep.freeze(inferred), fusedsep.freeze(fusedsep.fuse(inferred))):
            assert not any(tensor.is_inference() for tensor in (*made.parameters(), *made.buffers()))
            assert_same(made, model, x)


def test_freezing_twice_and_fusing_what_is_frozen():
    _, frozen, x = frozen_and_input()
    expected = frozen(x)
    for twice in (fusedsep.freeze(frozen), fusedsep.fuse(frozen), fusedsep.defuse(copy.deepcopy(frozen))):
        assert torch.equal(twice(x), expected)


class SlicedShortcut(nn.Module):
    """ReXNet's block: SiLU before the site, and a shortcut to some of the channels, which ends a chain in front."""

    def __init__(self, in_channels, out_channels, shortcut=True):
        super().__init__()
        self.shortcut = shortcut
        self.expand = ConvBNAct(in_channels, 12, 1, activation=nn.SiLU)
        self.dw, self.act = ConvBNAct(12, 12, groups=12, activation=None), nn.ReLU6()
        self.pw = ConvBNAct(12, out_channels, 1, activation=None)

    def forward(self, x):
        y = self.pw(self.act(self.dw(self.expand(x))))
        if not self.shortcut:
            return y
        return torch.cat([y[:, :4] + x[:, :4], y[:, 4:]], 1)


class SiteInTheRoot(nn.Module):
    """A chain inside a part, and a site whose convolutions the root calls through modules with Python of their own."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(ConvBNAct(3, 8, 1), depthwise(8, kernel=5), nn.SiLU())
        self.dw, self.pw = ConvBNAct(8, 8, groups=8), ConvBNAct(8, 6, 1, activation=nn.SiLU)

    def forward(self, x):
        return self.pw(self.dw(self.body(x)))


@pytest.mark.parametrize(
    ("make", "sites"),
    [
        (lambda: nn.Sequential(depthwise(3), pointwise(3, 4), SlicedShortcut(4, 6, False), SlicedShortcut(6, 8)), 3),
        (SiteInTheRoot, 1),
    ],
)
def test_a_site_alone_beside_a_chain(make, sites, site_calls):
    """Where a chain has the Python around a single site written out, the site is, too."""
    model = randomized(make()).eval()
    x = torch.randn(2, 3, 9, 10)
    for net in (fusedsep.fuse(model), fusedsep.freeze(model)):
        site_calls.clear()
        with torch.no_grad():
            assert_as_close_to_float64(net, model, x)
        assert len(site_calls) == sites
