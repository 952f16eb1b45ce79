# SPDX-License-Identifier: BSD-3-Clause
"""What a block keeps of its input for the backward.

Where the input is the output of another block, that block's raw pointwise product stands for it: the other block keeps
it anyway, and BN and activation make the input of it again, bit by bit. ``normalization`` says how: ``[4, C]``, the
rows center, scale, shift and the code of the activation, as the training operator returns it.
"""

from __future__ import annotations

import weakref

import torch

from . import _compat, _ops

_ATTRIBUTE = "_fusedsep_product"


class Product:
    """The raw product that a map is made of. An attribute of the map, so that it lives no longer than that."""

    def __init__(self, y: torch.Tensor, p: torch.Tensor, normalization: torch.Tensor) -> None:
        self.p: torch.Tensor | None = p
        self.normalization = normalization
        self._version = y._version
        self._storage = y.untyped_storage()

    def makes(self, x: torch.Tensor) -> bool:
        """Whether ``x``, which carries this product, still is what was made of it.

        That someone writes to it behind the back of autograd (``x.data.mul_(2)``) is not seen.
        """
        return self.p is not None and x._version == self._version and _compat.lies_in(x, self._storage)

    def forget(self) -> None:
        """Free the product once the backward of its block has run, even if the map lives on."""
        self.p = None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(None), ()  # maps that are saved to a file are saved without


def remember(y: torch.Tensor, p: torch.Tensor, normalization: torch.Tensor) -> weakref.ref[Product]:
    """Attach to ``y`` what it is made of."""
    product = Product(y, p, normalization)
    setattr(y, _ATTRIBUTE, product)
    return weakref.ref(product)


def kept_for_backward(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What to keep in the place of ``x``, and the normalization that makes ``x`` of it; ``None`` where it is ``x``."""
    product = getattr(x, _ATTRIBUTE, None)
    if product is not None and product.makes(x):
        return product.p, product.normalization
    if _compat.has_saved_tensors_hooks():
        # torch.utils.checkpoint runs a part of the network again, where `x` may come without its attribute, and takes
        # the tensors that are kept then in the place of these, one by one: there have to be as many, of equal shapes.
        return x, x.new_full((4, x.shape[1]), -1.0, dtype=_ops.statistics_dtype(x))
    return x, None


def is_product(normalization: torch.Tensor | None) -> bool:
    """Whether what was kept is a product, and not the input itself."""
    return normalization is not None and normalization[3, 0].item() >= 0
