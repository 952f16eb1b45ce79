# SPDX-License-Identifier: BSD-3-Clause
"""What is measured, as data: blocks of published networks, and whole ones."""

from __future__ import annotations

from typing import NamedTuple

from fusedsep.mobilenet import FIRST_CHANNELS, STAGES, scaled_channels


class Shape(NamedTuple):
    """One depthwise-separable block on a square map."""

    network: str
    in_channels: int
    out_channels: int
    size: int  # height and width of the input map
    stride: int = 1
    activation: str = "relu"
    pointwise_activation: str = "relu"
    depthwise_norm: bool = True  # a BN between the convolutions

    @property
    def name(self) -> str:
        return f"{self.in_channels} -> {self.out_channels}, {self.size}x{self.size}" + (" /2" * (self.stride == 2))

    @property
    def test_id(self) -> str:
        network = self.network.replace(" ", "-")
        return f"{network}-{self.in_channels}-{self.out_channels}-{self.size}x{self.size}-s{self.stride}"


def mobilenet_v1(width: float, resolution: int) -> list[Shape]:
    """The distinct ones among the 13 blocks of MobileNetV1: nine."""
    shapes: dict[Shape, None] = {}
    channels, size = scaled_channels(FIRST_CHANNELS, width), -(-resolution // 2)
    for base_channels, stride in STAGES:
        out_channels = scaled_channels(base_channels, width)
        shapes[Shape(f"MobileNetV1 {width}-{resolution}", channels, out_channels, size, stride)] = None
        channels, size = out_channels, -(-size // stride)
    return list(shapes)


#: Blocks with a 3x3 depthwise convolution, as the networks have them for images of 224 x 224 (Xception: 299 x 299).
OTHER_NETWORKS = [
    Shape("MobileNetV2", 144, 24, 56, 1, "relu6", "none"),
    Shape("MobileNetV2", 144, 32, 56, 2, "relu6", "none"),
    Shape("MobileNetV2", 192, 32, 28, 1, "relu6", "none"),
    Shape("MobileNetV2", 384, 64, 14, 1, "relu6", "none"),
    Shape("MobileNetV2", 576, 96, 14, 1, "relu6", "none"),
    Shape("MobileNetV2", 960, 160, 7, 1, "relu6", "none"),
    Shape("MobileNetV3-Large", 240, 80, 28, 2, "hardswish", "none"),
    Shape("MobileNetV3-Large", 200, 80, 14, 1, "hardswish", "none"),
    Shape("MobileNetV3-Large", 184, 80, 14, 1, "hardswish", "none"),
    Shape("EfficientNet-Lite0", 480, 80, 14, 1, "relu6", "none"),
    Shape("EfficientNet-Lite0", 1152, 320, 7, 1, "relu6", "none"),
    Shape("Xception", 728, 728, 19, 1, "none", "none", depthwise_norm=False),
    Shape("ShuffleNetV2 1.0", 58, 58, 28, 1, "none", "relu"),
    Shape("ShuffleNetV2 1.0", 116, 116, 14, 1, "none", "relu"),
    Shape("ShuffleNetV2 1.0", 232, 232, 7, 1, "none", "relu"),
    # Detectors for images of 400 x 400 on a MobileNetV1: no size of the map is a multiple of a vector.
    Shape("detector", 512, 512, 25, 1, "relu6", "relu6"),
]

#: The nine shapes that the README's table and picture show come first.
BLOCKS = [*mobilenet_v1(1.0, 224), *mobilenet_v1(0.25, 128), *OTHER_NETWORKS]

#: (width multiplier, resolution) of whole MobileNetV1s: the corners of the paper's tables 6 and 7, and some between.
NETWORKS = [(1.0, 224), (1.0, 160), (0.75, 192), (0.5, 160), (0.25, 224), (0.25, 128)]

#: Name in `subjects.OTHER_NETWORKS` and resolution of other whole networks.
OTHER_WHOLE_NETWORKS = [
    ("MobileNetV2", 224),
    ("MobileNetV3 large", 224),
    ("MnasNet", 224),
    ("EfficientNet-Lite0", 224),
    ("EfficientNet-B0", 224),
    ("EfficientNet-B0", 128),
    ("ShuffleNetV2", 224),
    ("GhostNet", 224),
    ("Xception", 224),
    ("MobileOne-S1", 224),
    ("ConvNeXt-Atto", 224),
    ("StarNet-S1", 224),
    ("FastViT-T8", 224),
]

#: The entries of `NETWORKS` and the batch, for the comparison with other engines: everything that the paper crosses,
#: and larger batches.
PEER_NETWORKS = [
    *((width, resolution, 1) for width in (1.0, 0.75, 0.5, 0.25) for resolution in (224, 160, 128)),
    *((width, 224, 8) for width in (1.0, 0.75, 0.5, 0.25)),
]

#: Network, width multiplier, resolution and batch of a training step.
TRAINING_NETWORKS = [
    ("MobileNetV1", 1.0, 224, 8),
    ("MobileNetV1", 0.5, 128, 16),
    ("MobileNetV1", 1.0, 32, 32),
    ("MobileNetV2", 1.0, 224, 8),
    ("MobileNetV2", 1.0, 96, 32),
    ("MobileNetV3 large", 1.0, 224, 8),
    ("MnasNet", 1.0, 224, 8),
    ("EfficientNet-Lite0", 1.0, 224, 8),
    ("EfficientNet-B0", 1.0, 224, 8),
]
