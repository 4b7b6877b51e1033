"""The autoencoder on large images, in bands of rows, with the numbers of the undivided pass.

Group norms take mean and deviation of a whole map, so that an autoencoder which decodes tiles one by one
gives every tile a colour of its own, and blending only hides the seams. Here it is the layers that run one by
one, each over all bands of its map: norms merge the statistics of the bands, convolutions see the rows beyond
their band. What is saved are the full-size intermediate results within a layer. The middle, whose attention
needs every position, is small and runs whole. The result differs from the undivided one by rounding only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from pbe.models.codec import CodecLevel, Decoder, Encoder, KnownPixels
from pbe.models.layers import Downsample, ResBlock, Upsample

POSITIONS = 2**16
"""Positions of a map that one band has at most, unless it then had fewer than ``MIN_ROWS`` rows."""
MIN_ROWS = 8

Prepare = Callable[[Tensor], Tensor]


def encode_in_bands(encoder: Encoder, images: Tensor) -> Tensor:
    """Return ``encoder(images)`` for ``(b, 3, h, w)``; no gradient may be asked for."""
    return torch.cat([_encode(encoder, image) for image in images.split(1)])


def decode_in_bands(decoder: Decoder, latents: Tensor, known: Tensor | None = None) -> Tensor:
    """Return ``decoder(latents, known)`` for ``(b, z, h, w)``; no gradient may be asked for."""
    rows = [None] * len(latents) if known is None else known.split(1)
    return torch.cat([_decode(decoder, *pair) for pair in zip(latents.split(1), rows, strict=True)])


def _encode(encoder: Encoder, image: Tensor) -> Tensor:
    x = _convolve(encoder.conv_in, image)
    for layer in _layers(encoder.levels):
        x = _run(layer, x)
    x = encoder.mid(x)
    return _convolve(encoder.conv_out, x, _norm_silu(encoder.norm_out, x))


def _decode(decoder: Decoder, latent: Tensor, known: Tensor | None) -> Tensor:
    features = None if known is None or decoder.known is None else decoder.known(known)
    x = decoder.mid(decoder.conv_in(latent))
    for depth, level in zip(reversed(range(len(decoder.levels))), decoder.levels, strict=True):
        if decoder.known is not None and features is not None:
            _add_known(decoder.known, x, features[depth], depth)
        for layer in _layers([level]):
            x = _run(layer, x)
    return _convolve(decoder.conv_out, x, _norm_silu(decoder.norm_out, x))


def _add_known(branch: KnownPixels, x: Tensor, feature: Tensor, depth: int) -> None:
    """Add, in place, what is known to the decoder's map of a resolution."""
    for start, stop in _bands(*x.shape[2:]):
        x[:, :, start:stop] = branch.add(x[:, :, start:stop], feature[:, :, start:stop], depth)


def _layers(levels: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """Yield blocks and resamplings one by one, so that a caller holds no map but the last."""
    for level in cast("Iterable[CodecLevel]", levels):
        yield from level.blocks
        if level.resample is not None:
            yield level.resample


def _run(layer: nn.Module, x: Tensor) -> Tensor:
    if isinstance(layer, ResBlock):
        return _residual(layer, x)
    return _halve(layer, x) if isinstance(layer, Downsample) else _double(cast(Upsample, layer), x)


def _bands(height: int, width: int) -> Iterator[tuple[int, int]]:
    """Yield first row and end of each band of a map."""
    rows = max(POSITIONS // width, MIN_ROWS)
    for start in range(0, height, rows):
        yield start, min(start + rows, height)


def _residual(block: ResBlock, x: Tensor) -> Tensor:
    """Run a residual block without time embedding, with no map but ``x`` and its result in memory."""
    # the autoencoder's norms are group norms: those over channels alone are the UNet's
    first, second = cast(nn.GroupNorm, block.norm1), cast(nn.GroupNorm, block.norm2)
    h = _convolve(block.conv1, x, _norm_silu(first, x))
    prepare, above = _norm_silu(second, h), None
    for start, stop in _bands(*h.shape[2:]):
        # the result takes the place of its input, of which the next band still needs the last row
        last = h[:, :, stop - 1 : stop].clone()
        body = h[:, :, start : stop + 1]
        part = prepare(body if above is None else torch.cat([above, body], dim=2))
        out = _convolve_band(block.conv2, part, first=above is None, last=stop == h.shape[2])
        shortcut = x[:, :, start:stop]
        h[:, :, start:stop] = out + (shortcut if block.skip is None else block.skip(shortcut))
        above = last
    return h


def _norm_silu(norm: nn.GroupNorm, x: Tensor) -> Prepare:
    """Return the norm with the statistics of all of ``x``, followed by SiLU, as a function of a band."""
    scale, shift = _scale_shift(norm, x)

    def prepare(part: Tensor) -> Tensor:
        return F.silu(torch.addcmul(shift, part.to(scale.dtype), scale).to(part.dtype))

    return prepare


def _scale_shift(norm: nn.GroupNorm, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the norm as ``scale * x + shift``, both ``(b, c, 1, 1)`` in float32 or better.

    Means and variances of the bands are merged as Chan, Golub and LeVeque (1979) do, without cancellation.
    """
    count = 0
    precise = torch.promote_types(x.dtype, torch.float32)
    mean = square = x.new_zeros(x.shape[0], norm.num_groups, dtype=precise)
    for start, stop in _bands(*x.shape[2:]):
        part = rearrange(x[:, :, start:stop], "b (g c) h w -> b g (c h w)", g=norm.num_groups).to(precise)
        variance, centre = torch.var_mean(part, dim=-1, correction=0)
        new = part.shape[-1]
        delta, total = centre - mean, count + new
        mean = mean + delta * (new / total)
        square = square + variance * new + delta**2 * (count * new / total)
        count = total
    deviation = torch.sqrt(square / count + norm.eps)
    repeat = x.shape[1] // norm.num_groups
    mean, deviation = (value.repeat_interleave(repeat, dim=1) for value in (mean, deviation))
    scale = norm.weight / deviation
    shift = norm.bias - mean * scale
    return scale[..., None, None], shift[..., None, None]


def _convolve(conv: nn.Conv2d, x: Tensor, prepare: Prepare | None = None) -> Tensor:
    """Return the 3x3 convolution, padded by one, of ``prepare(x)``."""
    height = x.shape[2]
    out = x.new_empty(x.shape[0], conv.out_channels, *x.shape[2:])
    for start, stop in _bands(*x.shape[2:]):
        part = x[:, :, max(start - 1, 0) : stop + 1]
        part = part if prepare is None else prepare(part)
        out[:, :, start:stop] = _convolve_band(conv, part, first=start == 0, last=stop == height)
    return out


def _convolve_band(conv: nn.Conv2d, part: Tensor, *, first: bool, last: bool) -> Tensor:
    """Convolve a band that brings its neighbouring rows along, except where the map ends."""
    return F.conv2d(F.pad(part, (1, 1, int(first), int(last))), conv.weight, conv.bias)


def _halve(layer: Downsample, x: Tensor) -> Tensor:
    """Run the autoencoder's downsampling, which pads right and bottom only."""
    height, width = x.shape[2] // 2, x.shape[3] // 2
    out = x.new_empty(x.shape[0], layer.conv.out_channels, height, width)
    for start, stop in _bands(height, width):
        part = x[:, :, 2 * start : 2 * stop + 1]
        part = F.pad(part, (0, 1, 0, int(stop == height)))
        out[:, :, start:stop] = F.conv2d(part, layer.conv.weight, layer.conv.bias, stride=2)
    return out


def _double(layer: Upsample, x: Tensor) -> Tensor:
    """Run the upsampling."""
    height, width = x.shape[2], x.shape[3]
    out = x.new_empty(x.shape[0], layer.conv.out_channels, 2 * height, 2 * width)
    for start, stop in _bands(2 * height, 2 * width):
        first, last = start == 0, stop == 2 * height
        top = (start - 1) // 2 if start else 0
        part = F.interpolate(x[:, :, top : stop // 2 + 1], scale_factor=2.0, mode="nearest")
        part = part[:, :, start - (not first) - 2 * top : stop + (not last) - 2 * top]
        out[:, :, start:stop] = _convolve_band(layer.conv, part, first=first, last=last)
    return out
