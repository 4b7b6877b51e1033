"""EfficientNet-Lite0, the image tower of the toy model, without the seconds that timm takes to import.

Tan and Le 2019, in the Lite form: no squeeze-and-excitation, ReLU6. Keys, padding and numbers are those of
timm's ``tf_efficientnet_lite0``, whose weights come from TensorFlow.
"""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional as F

NAME = "tf_efficientnet_lite0"
STEM, HEAD = 32, 1280
# Channels, blocks, kernel, stride and widening of each stage.
STAGES = (
    (16, 1, 3, 1, 1),
    (24, 2, 3, 2, 6),
    (40, 2, 5, 2, 6),
    (80, 3, 3, 2, 6),
    (112, 3, 5, 1, 6),
    (192, 4, 5, 2, 6),
    (320, 1, 3, 1, 6),
)
PYRAMID = (0, 1, 2, 4, 6)  # the last stages of each resolution
EPS = 1e-3  # of the batch norms, TensorFlow's


class SameConv(nn.Conv2d):
    """A convolution padded as TensorFlow pads: of an odd number of pixels, right and bottom get one more."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(channels, out, kernel, stride, groups=groups, bias=False)
        # He's variance; on the meta device a normal draw would import torch's compiler
        bound = math.sqrt(6.0 * groups / (kernel * kernel * out))
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(b, c, h, w)`` to ``(b, o, ceil(h / stride), ceil(w / stride))``."""
        kernel, stride = self.kernel_size[0], self.stride[0]
        high, wide = (max((-(-side // stride) - 1) * stride + kernel - side, 0) for side in x.shape[2:])
        return super().forward(F.pad(x, (wide // 2, wide - wide // 2, high // 2, high - high // 2)))


class Block(nn.Module):
    """Inverted residual: widen, filter each channel, narrow; the first stage does not widen."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int, widening: int) -> None:
        super().__init__()
        inner, self.widens = channels * widening, widening > 1
        self.adds = stride == 1 and channels == out
        self.conv_dw = SameConv(inner, inner, kernel, stride, groups=inner)
        if self.widens:
            self.conv_pw, self.conv_pwl = SameConv(channels, inner, 1), SameConv(inner, out, 1)
            self.bn3 = nn.BatchNorm2d(out, EPS)
        else:
            self.conv_pw = SameConv(inner, out, 1)
        self.bn1 = nn.BatchNorm2d(inner, EPS)
        self.bn2 = nn.BatchNorm2d(inner if self.widens else out, EPS)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(b, c, h, w)`` to ``(b, o, h / stride, w / stride)``."""
        if self.widens:
            hidden = F.relu6(self.bn1(self.conv_pw(x)))
            made = self.bn3(self.conv_pwl(F.relu6(self.bn2(self.conv_dw(hidden)))))
        else:
            made = self.bn2(self.conv_pw(F.relu6(self.bn1(self.conv_dw(x)))))
        return x + made if self.adds else made


class EfficientNetLite0(nn.Module):
    """The network without its classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.num_features = HEAD
        self.feature_info = [{"num_chs": STAGES[index][0]} for index in PYRAMID]
        self.conv_stem, self.bn1 = SameConv(3, STEM, 3, 2), nn.BatchNorm2d(STEM, EPS)
        stages, before = [], STEM
        for channels, count, kernel, stride, widening in STAGES:
            first = Block(before, channels, kernel, stride, widening)
            rest = [Block(channels, channels, kernel, 1, widening) for _ in range(count - 1)]
            stages.append(nn.Sequential(first, *rest))
            before = channels
        self.blocks = nn.Sequential(*stages)
        self.conv_head, self.bn2 = SameConv(before, HEAD, 1), nn.BatchNorm2d(HEAD, EPS)

    def forward_intermediates(self, pixels: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the last map ``(b, 1280, s / 32, s / 32)``, and those of the stages at s / 2 to s / 32."""
        x, maps = F.relu6(self.bn1(self.conv_stem(pixels))), []
        for index, stage in enumerate(self.blocks):
            x = stage(x)
            if index in PYRAMID:
                maps.append(x)
        return F.relu6(self.bn2(self.conv_head(x))), maps

    def forward_features(self, pixels: Tensor) -> Tensor:
        """Return the last map ``(b, 1280, s / 32, s / 32)``."""
        return self.forward_intermediates(pixels)[0]

    def forward_head(self, features: Tensor, pre_logits: bool = True) -> Tensor:
        """Return the average of the last map, ``(b, 1280)``; there is no classifier behind it."""
        return features.mean(dim=(2, 3))

    def forward(self, pixels: Tensor) -> Tensor:
        """Map ``(b, 3, s, s)`` to the pooled feature ``(b, 1280)``."""
        return self.forward_head(self.forward_features(pixels))
