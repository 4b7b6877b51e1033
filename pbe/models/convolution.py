"""Convolutions that take fewer multiplications, or become one matrix product, where that is faster on a CPU.

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
FEW_ROWS = 256
"""Positions of all maps up to which a convolution whose weights lie channels last is one matrix product."""
ENOUGH_DOUBLED = 512
"""Positions of all maps from which a doubled map is worth summing up the kernel for."""
STRIP = 2**17
"""Tiles times channels that are transformed at once: one core's caches, in float32."""
KERNELS = 2**24
"""Numbers of transformed kernels that are held at once."""


class Convolution(nn.Conv2d):
    """A convolution with weights and numbers of ``nn.Conv2d``, in its fastest form on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(b, c, h, w)`` to what ``nn.Conv2d`` maps it to, up to rounding."""
        if x.device.type != "cpu":
            return super().forward(x)
        if self.kernel_size == (1, 1):
            return self._as_product(x)
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return super().forward(x)
        if torch.is_autocast_enabled("cpu"):  # matrix products would become bfloat16
            return super().forward(x)
        weight = self._laid_out(x)
        if self.stride != (1, 1) or self.padding != (1, 1):
            return self._conv_forward(x, weight, self.bias)
        if tile := fastest_tile(x.dtype, x.shape[2] * x.shape[3], x.shape[1], self.out_channels):
            return winograd(x, weight, self.bias, tile)
        lie_alike = is_channels_last(x) and is_channels_last(weight)
        if lie_alike and x.numel() <= FEW_ROWS * x.shape[1]:
            return convolve_rows(x, weight, self.bias)
        if lie_alike or not is_channels_last(x) or weight.numel() < 2 * x.numel():
            return self._conv_forward(x, weight, self.bias)
        # of weights and map, which lie differently, torch would lay out the larger again: the weights
        made = self._conv_forward(x.contiguous(), weight, self.bias)
        return made.contiguous(memory_format=torch.channels_last)

    def _laid_out(self, x: Tensor) -> Tensor:
        """Return the weights; frozen ones in bfloat16 lie as the map does from its first call on."""
        own = self._parameters.get("weight")
        if own is not None and own.dtype == torch.bfloat16 and not own.requires_grad and is_channels_last(x):
            with torch.inference_mode(mode=False):  # weights outlive it
                own.data = own.data.contiguous(memory_format=torch.channels_last)
        return self.weight

    def of_doubled(self, x: Tensor) -> Tensor:
        """Map ``(b, c, h, w)`` to ``(b, o, 2h, 2w)``: what its nearest-neighbour doubling is mapped to.

        Hooks see the doubled map.
        """
        if not self.goes_undoubled(x):
            return self(double(x))
        as_it_is = torch.is_grad_enabled() or torch.compiler.is_compiling()
        return convolve_doubled(x, self.weight if as_it_is else self._laid_out(x), self.bias)

    def goes_undoubled(self, x: Tensor) -> bool:
        """Return whether :meth:`of_doubled` makes no doubled map: where that pays and nobody asks for it."""
        if x.device.type != "cpu" or not is_channels_last(x) or self._forward_hooks:
            return False
        if torch.is_grad_enabled() and "weight" not in self._parameters:  # made anew, and not to be kept
            return False
        doubled = 4 * x.shape[2] * x.shape[3]
        plain = torch.is_grad_enabled() or fastest_tile(x.dtype, doubled, x.shape[1], self.out_channels) < 4
        return plain and x.numel() >= ENOUGH_DOUBLED * x.shape[1]

    def _as_product(self, x: Tensor) -> Tensor:
        if not is_channels_last(x):
            return super().forward(x)
        return F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


def double(x: Tensor) -> Tensor:
    """Return ``(b, c, h, w)`` with every pixel four times, ``(b, c, 2h, 2w)``."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def is_channels_last(x: Tensor) -> bool:
    """Return whether the channels of ``(b, c, h, w)`` lie side by side in memory, and not its columns."""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def fastest_tile(dtype: torch.dtype, positions: int, channels: int, out_channels: int) -> int:
    """Return the side of the tiles that suit maps of so many positions, 0 for the plain convolution.

    bfloat16 would lose accuracy: it rounds transformed inputs, kernels and outputs once more.
    """
    few = min(channels, out_channels) < ENOUGH_CHANNELS or positions < ENOUGH_POSITIONS
    if few or dtype not in (torch.float32, torch.float64):
        return 0
    return 4 if positions >= MANY_POSITIONS else 2


def convolve_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve ``(b, c, h, w)`` with ``(o, c, 3, 3)`` and one pixel of zeros around, as one matrix product.

    Both lie channels last in memory, as the result does. It pays where the weights are larger than the
    nine copies of the map.
    """
    batch, channels, height, width = x.shape
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
    image, line, pixel, _ = padded.stride()
    patches = padded.as_strided(
        (batch, height, width, 3, 3, channels), (image, line, pixel, line, pixel, 1)
    ).reshape(batch, height, width, 9 * channels)
    return F.linear(patches, weight.permute(0, 2, 3, 1).flatten(1), bias).permute(0, 3, 1, 2)


def convolve_doubled(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve the nearest-neighbour doubling of ``(b, c, h, w)`` with ``(o, c, 3, 3)``, without making it.

    Three neighbouring rows of the doubled map hold two different ones only, so that each quarter of the
    outputs, those of even or odd rows and columns, is a 2x2 convolution of the small map, with sums of the
    kernel's rows and columns: 16 products for four outputs instead of 36.

    Returns:
        ``(b, o, 2h, 2w)``, channels last in memory.
    """
    rows = _folded(weight, 2)
    made = [
        [_quarter(x, _folded(rows[down], 3)[right], bias, down, right) for right in (0, 1)] for down in (0, 1)
    ]
    lines = torch.stack([torch.stack(each, dim=3) for each in made], dim=2)  # b h 2 w 2 o
    return lines.flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)


def _folded(kernel: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Return what a kernel's three rows, or columns, make of the two that even and odd outputs see."""
    first, middle, last = kernel.unbind(dim)
    return torch.stack([first, middle + last], dim), torch.stack([first + middle, last], dim)


def _quarter(x: Tensor, kernel: Tensor, bias: Tensor | None, down: int, right: int) -> Tensor:
    """Return the outputs ``(b, h, w, o)`` of even or odd (1) rows and columns."""
    seen = F.pad(x, (1 - right, right, 1 - down, down))
    return F.conv2d(seen, kernel.contiguous(memory_format=torch.channels_last), bias).permute(0, 2, 3, 1)


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
