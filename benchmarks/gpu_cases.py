"""The convolutions that the GPU benchmark measures: layers of known networks, filters, sound, video.

A `ConvCase` is one convolution by its sizes; it says how many operations and bytes it takes. `FAMILIES` lists
them by network, each distinct layer once, with the batches that a family is measured at.

    ResNet-50     He et al., "Deep Residual Learning", CVPR 2016, with the stride on the 3x3 (version 1.5)
    VGG-16        Simonyan and Zisserman, ICLR 2015, configuration D
    MobileNet     Howard et al., arXiv:1704.04861, table 1: the depthwise layers
    ResNeXt-50    Xie et al., CVPR 2017, 32x4d: the grouped layers
    C3D           Tran et al., ICCV 2015
    wav2vec 2.0   Baevski et al., NeurIPS 2020: the first layers, on one second of sound at 16 kHz
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class ConvCase:
    """One convolution, geometry the same along all axes.

    Attributes:
        name: as the table has it.
        family: the network it is from.
        x: (N, channels, *spatial).
        weight: (out_channels, channels / groups, *kernel).
        stride: along each axis.
        padding: zeros before and after each axis.
        dilation: along each axis.
        groups: of channels.
    """

    name: str
    family: str
    x: tuple[int, ...]
    weight: tuple[int, ...]
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    groups: int = 1

    @property
    def batch(self) -> int:
        """Samples."""
        return self.x[0]

    @property
    def y(self) -> tuple[int, ...]:
        """(N, out_channels, *spatial) of the feature map."""
        sizes = (
            (size + 2 * self.padding - (kernel - 1) * self.dilation - 1) // self.stride + 1
            for size, kernel in zip(self.x[2:], self.weight[2:], strict=True)
        )
        return (self.x[0], self.weight[0], *sizes)

    @property
    def products(self) -> int:
        """K, products in a sum, those with padding included."""
        return math.prod(self.weight[1:])

    @property
    def operations(self) -> int:
        """Two for each product: what every algorithm's rate is counted by, whatever it really does."""
        return 2 * math.prod(self.y) * self.products

    def moved(self, itemsize: int) -> int:
        """Bytes of input, filters and feature map, each once."""
        return itemsize * (math.prod(self.x) + math.prod(self.weight) + math.prod(self.y))

    @property
    def geometry(self) -> dict[str, int]:
        """As PyTorch spells it, and `convservice.Conv`."""
        return {
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "groups": self.groups,
        }

    def at_batch(self, batch: int) -> ConvCase:
        """The same layer with so many samples."""
        return replace(self, x=(batch, *self.x[1:]))


@dataclass(frozen=True)
class Family:
    """Layers of one kind.

    Attributes:
        name: as tables and plots have it.
        cases: each distinct layer, at a batch of 1.
        batches: what they are measured at.
    """

    name: str
    cases: tuple[ConvCase, ...]
    batches: tuple[int, ...]


def _layer(
    family: str, channels: tuple[int, int], size: int, kernel: int, *, stride: int = 1, groups: int = 1
) -> ConvCase:
    """A 2-D layer of a network: square, padded so that stride 1 keeps the size."""
    given, filters = channels
    grouped = f" in {groups} groups" if groups > 1 else ""
    strided = f" stride {stride}" if stride > 1 else ""
    name = f"{given} to {filters}, {size}x{size}, {kernel}x{kernel}{strided}{grouped}"
    weight = (filters, given // groups, kernel, kernel)
    return ConvCase(name, family, (1, given, size, size), weight, stride, kernel // 2, 1, groups)


def _resnet50() -> tuple[ConvCase, ...]:
    name = "ResNet-50"
    cases = [
        _layer(name, (3, 64), 224, 7, stride=2),
        _layer(name, (64, 64), 56, 1),
        _layer(name, (64, 64), 56, 3),
    ]
    cases += [_layer(name, (64, 256), 56, 1), _layer(name, (256, 64), 56, 1)]
    for width, size in ((128, 56), (256, 28), (512, 14)):
        half = size // 2
        cases += [
            _layer(name, (2 * width, width), size, 1),
            _layer(name, (width, width), size, 3, stride=2),
            _layer(name, (width, 4 * width), half, 1),
            _layer(name, (2 * width, 4 * width), size, 1, stride=2),
            _layer(name, (4 * width, width), half, 1),
            _layer(name, (width, width), half, 3),
        ]
    return tuple(cases)


def _vgg16() -> tuple[ConvCase, ...]:
    sizes = [
        (3, 64, 224),
        (64, 64, 224),
        (64, 128, 112),
        (128, 128, 112),
        (128, 256, 56),
        (256, 256, 56),
        (256, 512, 28),
        (512, 512, 28),
        (512, 512, 14),
    ]
    return tuple(_layer("VGG-16", (given, filters), size, 3) for given, filters, size in sizes)


def _mobilenet() -> tuple[ConvCase, ...]:
    sizes = [
        (32, 112, 1),
        (64, 112, 2),
        (128, 56, 1),
        (128, 56, 2),
        (256, 28, 1),
        (256, 28, 2),
        (512, 14, 1),
        (512, 14, 2),
        (1024, 7, 1),
    ]
    return tuple(
        _layer("MobileNet depthwise", (width, width), size, 3, stride=stride, groups=width)
        for width, size, stride in sizes
    )


def _resnext50() -> tuple[ConvCase, ...]:
    sizes = [
        (128, 56, 1),
        (256, 56, 2),
        (256, 28, 1),
        (512, 28, 2),
        (512, 14, 1),
        (1024, 14, 2),
        (1024, 7, 1),
    ]
    return tuple(
        _layer("ResNeXt-50 groups", (width, width), size, 3, stride=stride, groups=32)
        for width, size, stride in sizes
    )


def _filters() -> tuple[ConvCase, ...]:
    family, found = "1080p filter", list[ConvCase]()
    for channels, colour in ((1, "grey"), (3, "colour")):
        for kernel in (3, 5, 7, 31):
            name = f"{colour}, {kernel}x{kernel}"
            x, weight = (1, channels, 1080, 1920), (channels, 1, kernel, kernel)
            found.append(ConvCase(name, family, x, weight, padding=kernel // 2, groups=channels))
    found.append(ConvCase("colour to 64, 3x3", family, (1, 3, 1080, 1920), (64, 3, 3, 3), padding=1))
    return tuple(found)


def _sound() -> tuple[ConvCase, ...]:
    family = "conv1d"
    return (
        ConvCase("1 to 512, 16000, 10 stride 5", family, (1, 1, 16000), (512, 1, 10), stride=5),
        ConvCase("512 to 512, 3199, 3 stride 2", family, (1, 512, 3199), (512, 512, 3), stride=2),
        ConvCase("64 to 64, 16000, 9", family, (1, 64, 16000), (64, 64, 9), padding=4),
        ConvCase("64 to 64, 16000, 2 dilation 128", family, (1, 64, 16000), (64, 64, 2), dilation=128),
    )


def _video() -> tuple[ConvCase, ...]:
    family, found = "conv3d (C3D)", list[ConvCase]()
    sizes = [
        (3, 64, 16, 112),
        (64, 128, 16, 56),
        (128, 256, 8, 28),
        (256, 256, 8, 28),
        (256, 512, 4, 14),
        (512, 512, 4, 14),
        (512, 512, 2, 7),
    ]
    for given, filters, frames, size in sizes:
        name = f"{given} to {filters}, {frames}x{size}x{size}, 3x3x3"
        found.append(
            ConvCase(name, family, (1, given, frames, size, size), (filters, given, 3, 3, 3), padding=1)
        )
    return tuple(found)


FAMILIES = (
    Family("ResNet-50", _resnet50(), (1, 32, 128)),
    Family("VGG-16", _vgg16(), (1, 32)),
    Family("MobileNet depthwise", _mobilenet(), (1, 32, 128)),
    Family("ResNeXt-50 groups", _resnext50(), (1, 32, 128)),
    Family("1080p filter", _filters(), (1,)),
    Family("conv1d", _sound(), (1, 32)),
    Family("conv3d (C3D)", _video(), (1, 8)),
)

TINY = Family(
    "tiny",
    (
        ConvCase("3 to 8, 9x11, 3x3", "tiny", (1, 3, 9, 11), (8, 3, 3, 3), padding=1),
        ConvCase("16 to 24, 6x7, 1x1", "tiny", (1, 16, 6, 7), (24, 16, 1, 1)),
        ConvCase("16 to 16, 8x9, 3x3", "tiny", (1, 16, 8, 9), (16, 16, 3, 3), padding=1),
        ConvCase("4 to 4, 9x8, 3x3 stride 2 in 4 groups", "tiny", (1, 4, 9, 8), (4, 1, 3, 3), 2, 1, 1, 4),
        ConvCase("2 to 3, 21, 5 dilation 2", "tiny", (1, 2, 21), (3, 2, 5), padding=4, dilation=2),
        ConvCase("2 to 4, 4x5x6, 3x3x3", "tiny", (1, 2, 4, 5, 6), (4, 2, 3, 3, 3), padding=1),
    ),
    (1, 7),
)
"""Small enough for a device that is emulated."""
