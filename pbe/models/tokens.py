"""What an image tower says of each position of the exemplar: the tokens that the bottleneck leaves out."""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from pbe.errors import UserError


def trunk_tokens(trunk: nn.Module, pixels: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Return the pooled feature of a timm trunk ``(b, c)`` and the feature of every position ``(b, n, c)``.

    Args:
        trunk: convolutional or a transformer.
        pixels: ``(b, 3, s, s)`` normalised.
        name: of the tower, for errors.
    """
    features = trunk.forward_features(pixels)  # type: ignore[operator]
    pooled = trunk.forward_head(features, pre_logits=True)  # type: ignore[operator]
    if features.ndim == 4:
        channels_last = getattr(trunk, "output_fmt", "NCHW") == "NHWC"
        tokens = rearrange(features, "b h w c -> b (h w) c" if channels_last else "b c h w -> b (h w) c")
    else:
        tokens = features[:, getattr(trunk, "num_prefix_tokens", 0) :]
    if tokens.shape[-1] != pooled.shape[-1]:
        raise UserError(
            f"tower '{name}': pooled feature and tokens differ in width; use exemplar_encoder.tokens=class"
        )
    return pooled, tokens


def to_grid(tokens: Tensor, grid: int, name: str) -> Tensor:
    """Average the positions of a square picture, ``(b, n, c)``, to ``(b, grid * grid, c)``; 0 keeps them."""
    if grid == 0:
        return tokens
    side = math.isqrt(tokens.shape[1])
    if side * side != tokens.shape[1]:
        raise UserError(
            f"tower '{name}' gives {tokens.shape[1]} tokens, not a square; set exemplar_encoder.token_grid=0"
        )
    return _pooled(rearrange(tokens, "b (h w) c -> b c h w", h=side), grid)


def stage_tokens(trunk: nn.Module, pixels: Tensor, grid: int, name: str) -> Tensor:
    """Return what all stages of a convolutional timm trunk say of each position, ``(b, n, width)``.

    The order of the channels is that of the pooled stages, so that both go through the same layers: the
    last layer, then the stages from the first one up. Finer maps are averaged, coarser ones repeated.

    Args:
        trunk: the tower.
        pixels: ``(b, 3, s, s)`` normalised.
        grid: positions along a side; 0 takes those of the last layer.
        name: of the tower, for errors.
    """
    last, stages = trunk.forward_intermediates(pixels)  # type: ignore[operator]
    if last.ndim != 4 or trunk.forward_head(last, pre_logits=True).shape[1] != last.shape[1]:  # type: ignore[operator]
        raise UserError(
            f"tower '{name}' has no maps to take all tokens of its stages from; "
            "use exemplar_encoder.tokens=class or pooled_stages=false"
        )
    side = grid or int(last.shape[-1])
    return torch.cat([_pooled(values, side) for values in (last, *stages)], dim=2)


def _pooled(values: Tensor, side: int) -> Tensor:
    return rearrange(F.adaptive_avg_pool2d(values, side), "b c h w -> b (h w) c")


def position_code(tokens: Tensor) -> Tensor:
    """Return sines and cosines of row and column for ``(b, n, width)`` tokens of a square, same shape.

    A quarter of the width each (Vaswani et al. 2017, section 3.5, for two axes); what is left over is zero.
    Waves are counted along the side, from half a wave to one position, so that neighbours differ and all
    positions do; the code is as loud (root mean square) as the tokens of its sample, which it would be
    lost in otherwise. Convolutional towers do not say where a token stands, and their mapper has no other
    way to know.
    """
    count, width = tokens.shape[1], tokens.shape[2]
    side, waves = math.isqrt(count), width // 4
    halves = side ** (torch.arange(waves, device=tokens.device) / max(waves - 1, 1))  # 1 ... side
    angles = (torch.arange(side, device=tokens.device)[:, None] + 0.5) / side * math.pi * halves
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # side 2*waves
    code = torch.cat([axis.repeat_interleave(side, dim=0), axis.repeat(side, 1)], dim=1)
    code = F.pad(code, (0, width - code.shape[1]))
    loud = tokens.detach().float().pow(2).mean(dim=(1, 2), keepdim=True).sqrt()
    return (code * loud * math.sqrt(2.0)).to(tokens.dtype)
