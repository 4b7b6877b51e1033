"""Convolutions that take fewer multiplications, or become one matrix product, where that is faster.

Winograd's minimal filtering (Winograd 1980; Lavin and Gray 2016) makes a tile of m x m outputs of a 3x3
convolution with ``(m + 2)^2`` products for each pair of channels instead of ``9 m^2``: 2.25 times fewer with
m = 2, four times fewer with m = 4. The result is the same up to rounding, of which m = 2 adds less than the
plain convolution does, and m = 4 about three times as much.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Lavin and Gray 2016, section 4: B^T of the inputs, G of the kernel, A^T of the outputs.
TRANSFORMS: dict[int, tuple[list[list[float]], ...]] = {
    2: (
        [[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]],
        [[1, 0, 0], [1 / 2, 1 / 2, 1 / 2], [1 / 2, -1 / 2, 1 / 2], [0, 0, 1]],
        [[1, 1, 1, 0], [0, 1, -1, -1]],
    ),
    4: (
        [
            [4, 0, -5, 0, 1, 0],
            [0, -4, -4, 1, 1, 0],
            [0, 4, -4, -1, 1, 0],
            [0, -2, -1, 2, 1, 0],
            [0, 2, -1, -2, 1, 0],
            [0, 4, 0, -5, 0, 1],
        ],
        [
            [1 / 4, 0, 0],
            [-1 / 6, -1 / 6, -1 / 6],
            [-1 / 6, 1 / 6, -1 / 6],
            [1 / 24, 1 / 12, 1 / 6],
            [1 / 24, -1 / 12, 1 / 6],
            [0, 0, 1],
        ],
        [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]],
    ),
}
ENOUGH_CHANNELS = 256
"""Channels in and out from which matrix products outweigh the transforms."""
ENOUGH_POSITIONS, MANY_POSITIONS = 16 * 16, 64 * 64
"""Positions of a map from which tiles of two and of four pay: each call transforms the kernel again."""
STRIP = 2**17
"""Tiles times channels that are transformed at once: one core's caches, in float32."""
KERNELS = 2**24
"""Numbers of transformed kernels that are held at once."""


class Convolution(nn.Conv2d):
    """A convolution with weights and numbers of ``nn.Conv2d``, in its fastest form for inference on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(b, c, h, w)`` to what ``nn.Conv2d`` maps it to, up to rounding."""
        if x.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return super().forward(x)
        if torch.is_autocast_enabled("cpu"):  # matrix products would become bfloat16
            return super().forward(x)
        if self.kernel_size == (1, 1):
            return self._as_product(x)
        if self.stride != (1, 1) or self.padding != (1, 1):
            return super().forward(x)
        if tile := fastest_tile(x, self.out_channels):
            return winograd(x, self.weight, self.bias, tile)
        if 9 * self.in_channels * self.out_channels < 2 * x.numel() or not is_channels_last(x):
            return super().forward(x)
        # of weights and map, which lie differently, torch would lay out the larger again: the weights
        return super().forward(x.contiguous()).contiguous(memory_format=torch.channels_last)

    def _as_product(self, x: Tensor) -> Tensor:
        if not is_channels_last(x):
            return super().forward(x)
        return F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


def is_channels_last(x: Tensor) -> bool:
    """Return whether the channels of ``(b, c, h, w)`` lie side by side in memory, and not its columns."""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def fastest_tile(x: Tensor, out_channels: int) -> int:
    """Return the side of the tiles that suit a map ``(b, c, h, w)``, 0 for the plain convolution.

    bfloat16 would lose accuracy: it rounds transformed inputs, kernels and outputs once more.
    """
    positions = x.shape[2] * x.shape[3]
    few = min(x.shape[1], out_channels) < ENOUGH_CHANNELS or positions < ENOUGH_POSITIONS
    if few or x.dtype not in (torch.float32, torch.float64):
        return 0
    return 4 if positions >= MANY_POSITIONS else 2


def winograd(x: Tensor, weight: Tensor, bias: Tensor | None, tile: int) -> Tensor:
    """Convolve ``(b, c, h, w)`` with ``(o, c, 3, 3)`` and one pixel of zeros around, by tiles of 2 or 4.

    Returns:
        ``(b, o, h, w)``, channels last in memory.
    """
    (batch, channels, height, width), count = x.shape, len(weight)
    rows, columns, side = -(-height // tile), -(-width // tile), tile + 2
    padded = x.new_zeros(batch, rows * tile + 2, columns * tile + 2, channels)
    padded[:, 1 : height + 1, 1 : width + 1] = x.permute(0, 2, 3, 1)
    output = x.new_empty(batch, rows, tile, columns, tile, count)
    shift = x.new_zeros(count) if bias is None else bias
    of_input, of_kernel, of_output = _transforms(tile, x)
    strip, share = max(STRIP // (columns * channels), 1), max(KERNELS // (side * side * channels), 1)
    line = padded.stride(1)
    for some in (slice(first, first + share) for first in range(0, count, share)):
        kernels = (of_kernel @ weight[some].reshape(-1, 9).T).view(side * side, -1, channels).transpose(1, 2)
        for sample in range(batch):
            for first in range(0, rows, strip):
                high = min(strip, rows - first)
                patches = padded[sample, first * tile :].as_strided(
                    (side, side, high, columns, channels), (line, channels, tile * line, tile * channels, 1)
                )  # with the positions inside a tile first; neighbours overlap by two pixels
                inputs = (of_input @ patches.reshape(side * side, -1)).view(side * side, -1, channels)
                products = torch.bmm(inputs, kernels).view(side * side, -1)
                made = (of_output @ products).view(tile, tile, high, columns, -1).permute(2, 0, 3, 1, 4)
                torch.add(made, shift[some], out=output[sample, first : first + high, ..., some])
    flat = output.view(batch, rows * tile, columns * tile, count)[:, :height, :width]
    return flat.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)


def _transforms(tile: int, like: Tensor) -> list[Tensor]:
    """Return the transforms of both dimensions at once, of the positions row by row."""
    return [torch.kron(one, one) for one in (like.new_tensor(each) for each in TRANSFORMS[tile])]
