"""Ready-made networks: ordinary modules that know nothing of rows.

The command-line applications, the examples and the benchmarks build their networks here, so that none of them needs
another library of models.
"""

from __future__ import annotations

from lrcnn_lightning.models.lean import LeanConv2d, LeanResNet, lean_resnet, leanify
from lrcnn_lightning.models.resnet import ResNet, resnet18, resnet34, resnet50, resnet101, resnet152
from lrcnn_lightning.models.unet import UNet, unet
from lrcnn_lightning.models.vgg import VGG, vgg16, vgg16_bn

__all__ = [
    "VGG",
    "LeanConv2d",
    "LeanResNet",
    "ResNet",
    "UNet",
    "lean_resnet",
    "leanify",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "unet",
    "vgg16",
    "vgg16_bn",
]
