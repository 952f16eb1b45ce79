# SPDX-License-Identifier: BSD-3-Clause
"""Consecutive layers of a model in eval mode as one call."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn

from . import _C, _compat, _kernel_path, _ops
from ._chain_elements import Classifier, Convolution, Element, FrozenSite, Place, depthwise_of, tensors_at
from ._dictionaries import Snapshot
from ._ops import ChainLayer


class LayerChain:
    """Layers that each read what the one before gives, and additions of such maps; eval only.

    ``residuals`` has for each layer the number of the map that is added to its own, or -1: 0 is the input of the chain,
    i what layer i - 1 gives.

    Called with a batch of float maps on the CPU, several are one call of the operator; anything else goes through the
    layers one by one, with the same result up to rounding.

    Whoever calls it has seen to it that the modules, their classes, settings and modes are those that the chain was
    made for. It looks after their numbers itself: those of frozen sites have an identity, and what else a frozen model
    holds counts its changes; of modules that somebody may still train, every byte is looked at.

    Args:
        frozen: the model is.
    """

    def __init__(self, name: str, elements: list[Element], residuals: list[int], frozen: bool) -> None:
        self.__name__ = name
        self.elements, self.residuals, self.frozen = elements, residuals, frozen
        self.modules = [module for element in elements for module in element.modules]
        self._is_map = not isinstance(elements[-1], Classifier)
        self._has_images = isinstance(elements[0], Convolution) and elements[0].reads_images
        self._sites = [element.frozen for element in elements if isinstance(element, FrozenSite)]
        self._packed = _kernel_path.PackedCache()
        self._layers: dict[tuple[int, int, bool], list[int] | None] = {}
        self._places: list[Place] | None = None
        self._flat_places: tuple[Any, ...] = ()
        self._found: tuple[Snapshot, tuple[torch.Tensor | None, ...]] | None = None

    def numbers(self) -> list[nn.Module]:
        """Modules that look after their own hooks: none, as none of them is called."""
        return []

    def norms(self) -> list[nn.Module]:
        """BNs that may be in another mode than the owner: none."""
        return []

    def depthwise(self) -> list[nn.Conv2d]:
        """The depthwise convolutions that are layers by themselves, among others."""
        return depthwise_of(self.elements) if len(self.elements) > 1 else []

    def read(self) -> list[nn.Module]:
        """Modules that this depends on to be as they were found: all."""
        return self.modules

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        several = len(self.elements) > 1
        if several and x.is_cpu and _kernel_path.covers_map(x) and x.dim() == 4 and not torch.compiler.is_compiling():
            y = self._run(x)
            if y is not None:
                return y
        maps = {0: x}
        for number, (element, residual) in enumerate(zip(self.elements, self.residuals, strict=True), 1):
            x = element(x)
            if residual >= 0:
                x = maps[residual] + x
            if number in self.residuals:
                maps[number] = x
        return x

    def _run(self, x: torch.Tensor) -> torch.Tensor | None:
        if x.shape[1] != self.elements[0].in_channels or (
            torch.is_grad_enabled() and _kernel_path.wants_gradient(x, self._tensors())
        ):
            return None
        x, channels_last, _ = _kernel_path.dense(x)
        nchw = not channels_last and self._has_images
        layers = self._layers_for(x.shape[2], x.shape[3], nchw)
        packed = None if layers is None else self._packed_for(x.dtype, nchw)
        if packed is None:
            return None
        if not nchw:
            x = x.contiguous(memory_format=torch.channels_last)
        with _compat.below_autograd():
            y = _ops.chain(x, packed, layers)
        if self._is_map:
            return y if channels_last else y.contiguous()
        y = y.flatten(1)  # the operator gives a map where a product follows on that of the means
        return y[:, :, None, None] if self.elements[-1].as_map else y

    def _tensors(self) -> list[torch.Tensor | None]:
        return [tensor for element in self.elements for tensor in tensors_at(element.places())]

    def _layers_for(self, height: int, width: int, nchw: bool) -> list[int] | None:
        """The numbers of the operator; ``None`` for a map that does not fit: the layers know more to say about it."""
        key = height, width, nchw
        if key in (known := self._layers):
            return known[key]
        layers: list[ChainLayer] = []
        shapes = [(self.elements[0].in_channels, height, width)]
        maps = [0]  # what each element gives, as the operator numbers the maps
        numbers: list[int] | None = None
        try:
            for number, (element, residual) in enumerate(zip(self.elements, self.residuals, strict=True)):
                own, height, width = element.layers(height, width, nchw and number == 0)
                layers += [layer if layer.gated < 0 else layer._replace(gated=layer.gated + maps[-1]) for layer in own]
                maps.append(len(layers))
                shapes.append((layers[-1].out_channels, height, width))
                if residual >= 0:
                    if shapes[residual] != shapes[-1]:
                        raise ValueError("maps of two shapes are not added in a chain")
                    layers[-1] = layers[-1]._replace(residual=maps[residual])
            numbers = [number for layer in layers for number in layer]
        except ValueError:
            pass
        # A new dictionary in the place of a full one: other threads may be reading it.
        self._layers = {**(known if len(known) < _SIZES_KEPT else {}), key: numbers}
        return numbers

    def _packed_for(self, dtype: torch.dtype, nchw: bool) -> torch.Tensor | None:
        """All packed weights; ``None`` where the kernels cannot read the tensors."""
        state = self._state()
        if state is None:
            return None
        key = _C.active_isa(), dtype, nchw
        packed = self._packed.lookup(key, state)
        if packed is None:
            if not _kernel_path.are_readable(dtype, self._tensors()):
                return None
            with torch.no_grad():
                packed = torch.cat([element.pack(nchw and i == 0) for i, element in enumerate(self.elements)])
                tensors = tensors_at(self._places) if self.frozen else []  # whose addresses are in the state
                alive = [None if tensor is None else tensor.detach() for tensor in tensors]
            self._packed.store(key, state, packed, alive)
        return packed

    def _state(self) -> object:
        """What tells the numbers of all layers from any others; ``None`` where it cannot be told."""
        if self._places is None:  # not before a copy of the model is complete
            ends = [element for element in self.elements if not isinstance(element, FrozenSite)]
            self._places = [place for end in ends for place in end.places()]
            self._flat_places = tuple(part for place in self._places for part in place)
        if not self.frozen:
            return _C.fingerprint_of(self._flat_places, torch.Tensor, nn.Parameter)
        found = self._found
        if found is None or not found[0].is_current():
            kept = [each for attributes, kind, _ in self._places for each in (attributes, attributes[kind])]
            snapshot = Snapshot(tuple({id(each): each for each in kept}.values()))
            found = self._found = snapshot, _C.tensors_at(self._flat_places)
        versions = _C.versions_of(found[1], torch.Tensor, nn.Parameter)
        if versions is None:
            versions = [None if tensor is None else _version_of(tensor) for tensor in found[1]]
        return versions, [site.constants for site in self._sites]

    def __getstate__(self) -> dict[str, Any]:
        names = ("__name__", "elements", "residuals", "frozen")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(*state.values())


#: Sizes of images whose layers are remembered.
_SIZES_KEPT = 64


def _version_of(tensor: torch.Tensor) -> tuple[int, int]:
    """Its address and how often it has been changed; a hash of all bytes, as inference tensors do not count that."""
    if not tensor.is_inference():
        return tensor.data_ptr(), tensor._version
    dense = tensor.contiguous()
    return tensor.data_ptr(), _C.fingerprint([(dense.data_ptr(), dense.nbytes)])
