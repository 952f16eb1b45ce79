# SPDX-License-Identifier: BSD-3-Clause
"""What a chain consists of: each element is one or more layers of the operator, and can run by itself."""

from __future__ import annotations

import torch.nn as nn

from ._chain_convolutions import Convolution, FrozenSite, Site
from ._chain_linear import ChannelLinear
from ._chain_products import Classifier, Gate
from ._combinations import Combination, MaxPool, Upsample

#: ``layers`` gives those of the operator and the size of the map behind them. A layer that has a ``gated`` map has the
#: number that it would have if the element began the chain.
Element = Convolution | Site | FrozenSite | ChannelLinear | Gate | Classifier | Combination | MaxPool | Upsample


def depthwise_of(elements: list[Element]) -> list[nn.Conv2d]:
    """Their convolutions that are depthwise by themselves."""
    alone = [element for element in elements if isinstance(element, Convolution) and element.is_depthwise]
    return [conv for element in alone for conv in element.convolutions]
