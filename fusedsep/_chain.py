# SPDX-License-Identifier: BSD-3-Clause
"""Several layers of a model in eval mode as one call."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn as nn

from . import _C, _compat, _kernel_path, _ops
from ._activations import LAYER_ACTIVATION_CODES, apply_activation
from ._chain_convolutions import Convolution, FrozenSite, Site
from ._chain_elements import Element, depthwise_of
from ._chain_layers import Place, tensors_at
from ._chain_products import Classifier
from ._combinations import Combination
from ._dictionaries import Snapshot
from ._ops import ChainLayer

#: The number of the map that a chain reads; map i is that of element i - 1.
INPUT = 0


class Part(NamedTuple):
    """Channels [begin, begin + channels) of a map."""

    map: int
    begin: int
    channels: int


class Link(NamedTuple):
    """What an element of a chain reads and writes.

    Attributes:
        input: what it is called with.
        output: where its map lies: in a map of its own, or of an element in front of it.
        residual: what is added to its map, or combined with it; ``None`` if there is no such.
        activation: name of what is applied to the sum, or to its map where nothing is added.
        multiplies: it is not added, but multiplied.
    """

    input: Part
    output: Part
    residual: Part | None = None
    activation: str = "none"
    multiplies: bool = False


class LayerChain:
    """Layers that read what those in front of them give, and what becomes of their maps; eval only.

    Called with a batch of float maps on the CPU, they are one call of the operator; anything else, and a single site,
    goes through the layers one by one, with the same result up to rounding.

    Whoever calls it has seen to it that the modules, their classes, settings and modes are those that the chain was
    made for. It looks after their numbers itself: those of frozen sites have an identity, and what else a frozen model
    holds counts its changes; of modules that somebody may still train, every byte is looked at.

    Args:
        links: of each element, in the order in which they run; the last one writes the output.
        frozen: the model is.
    """

    def __init__(self, name: str, elements: list[Element], links: list[Link], frozen: bool) -> None:
        self.__name__ = name
        self.elements, self.links, self.frozen = elements, links, frozen
        self.modules = [module for element in elements for module in element.modules]
        self._is_site = len(elements) == 1 and isinstance(elements[0], (Site, FrozenSite))
        self._is_map = not isinstance(elements[-1], Classifier)
        self._has_images = isinstance(elements[0], Convolution) and elements[0].reads_images
        self._sites = [element.frozen for element in elements if isinstance(element, FrozenSite)]
        self._packed = _kernel_path.PackedCache()
        self._layers: dict[tuple[int, int, bool], str | None] = {}
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
        """The depthwise convolutions that are layers by themselves."""
        return depthwise_of(self.elements)

    def read(self) -> list[nn.Module]:
        """Modules that this depends on to be as they were found: all."""
        return self.modules

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if (
            not self._is_site
            and x.is_cpu
            and _kernel_path.covers_map(x)
            and x.dim() == 4
            and not torch.compiler.is_compiling()
        ):
            y = self._run(x)
            if y is not None:
                return y
        return self._run_one_by_one(x)

    def _run_one_by_one(self, x: torch.Tensor) -> torch.Tensor:
        maps = {INPUT: [(self.links[0].input, x)]}  # what elements have written

        def read(wanted: Part) -> torch.Tensor:
            pieces = []
            for part, piece in sorted(maps[wanted.map], key=lambda entry: entry[0]):
                first = max(wanted.begin - part.begin, 0)
                channels = min(wanted.begin + wanted.channels - part.begin, part.channels) - first
                if channels > 0:
                    pieces.append(piece if channels == part.channels else piece.narrow(-3, first, channels))
            return pieces[0] if len(pieces) == 1 else torch.cat(pieces, -3)

        last_use = {part.map: index for index, link in enumerate(self.links) for part in link[:3] if part is not None}
        for index, (element, link) in enumerate(zip(self.elements, self.links, strict=True)):
            y = element(read(link.input) if index > 0 else x)
            if link.residual is not None:
                other = read(link.residual)
                if isinstance(element, Combination) and element.interleaved:
                    y = element.interleave(y, other)
                else:
                    y = other * y if link.multiplies else other + y
            y = apply_activation(link.activation, y)
            maps.setdefault(link.output.map, []).append((link.output, y))
            maps = {number: pieces for number, pieces in maps.items() if last_use[number] > index}
        return y

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
        with _compat.below_autograd():
            y = _ops.chain(x, packed, layers, channels_last)
        if self._is_map:
            return y
        y = y.flatten(1)  # the operator gives a map where a product follows on that of the means
        return y[:, :, None, None] if self.elements[-1].as_map else y

    def _tensors(self) -> list[torch.Tensor | None]:
        return [tensor for element in self.elements for tensor in tensors_at(element.places())]

    def _layers_for(self, height: int, width: int, nchw: bool) -> str | None:
        """What the operator runs; ``None`` for a map that does not fit: the layers know more to say about it."""
        key = height, width, nchw
        if key in (known := self._layers):
            return known[key]
        try:
            text = _ops.text_of(self._linked_layers(height, width, nchw))
        except ValueError:
            text = None
        # A new dictionary in the place of a full one: other threads may be reading it.
        self._layers = {**(known if len(known) < _SIZES_KEPT else {}), key: text}
        return text

    def _linked_layers(self, height: int, width: int, nchw: bool) -> list[ChainLayer]:
        """Raises ``ValueError`` where the maps do not fit each other, or the kernels."""
        layers: list[ChainLayer] = []
        sizes = {INPUT: (height, width)}  # of each map
        numbers = [INPUT]  # what each element gives, as the operator numbers the maps
        for index, (element, link) in enumerate(zip(self.elements, self.links, strict=True)):
            read, written, residual, activation, multiplies = link
            own, *size = element.layers(*sizes[read.map], nchw and index == 0)
            span = {"input_begin": read.begin, "in_channels": read.channels}
            if read.map != INPUT or index > 0:
                own[0] = own[0]._replace(input=numbers[read.map], **span)
            layers += [each if each.gated < 0 else each._replace(gated=numbers[read.map], **span) for each in own]
            numbers.append(len(layers))
            if sizes.setdefault(written.map, tuple(size)) != tuple(size):
                raise ValueError("maps of two sizes do not lie side by side")
            last = layers[-1]._replace(output_begin=written.begin, joined_activation=LAYER_ACTIVATION_CODES[activation])
            if written.map != index + 1:
                last = last._replace(output=numbers[written.map])
            if residual is not None:
                if sizes[residual.map] != tuple(size):
                    raise ValueError("maps of two sizes are not added in a chain")
                last = last._replace(
                    residual=numbers[residual.map], residual_begin=residual.begin, multiplies=int(multiplies)
                )
            layers[-1] = last
        return layers

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
                parts = [element.pack(nchw and i == 0) for i, element in enumerate(self.elements)]
                packed = torch.cat([part for part in parts if part is not None])
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
            found = self._found = snapshot, tensors_at(self._places)
        versions = _C.versions_of(found[1], torch.Tensor, nn.Parameter)
        if versions is None:
            versions = [None if tensor is None else _version_of(tensor) for tensor in found[1]]
        return versions, [site.constants for site in self._sites]

    def __getstate__(self) -> dict[str, Any]:
        names = ("__name__", "elements", "links", "frozen")
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
