"""The noise predictor: Stable Diffusion's UNet with the exemplar as cross-attention context."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pbe.config import UNetConfig
from pbe.models.attention import PreparedCondition, SpatialTransformer, TransformerBlock, repeat_to
from pbe.models.layers import Downsample, ResBlock, Upsample, make_norm, timestep_embedding, zero_init

Time = Tensor | Mapping[nn.Module, Tensor]
"""Time embeddings ``(b, time_dim)``, or each residual block's projection of them."""
Context = Tensor | PreparedCondition
"""A condition ``(b, tokens, context_dim)``, or its keys and values for each cross-attention."""
LAST_PLACE = 999.0  # a guidance scale is embedded like a timestep: by its place in its range, from 0 to this


@dataclass(frozen=True)
class Prepared:
    """What is the same in all calls of an edit, computed once by :meth:`UNet.prepare`.

    Attributes:
        constant: ``(b, model_channels, h, w)``, what masked-image latents and mask add to the first
            convolution's output, its bias included.
        condition: of ``b`` samples, or of ``k b`` for k conditions of each sample.
        timesteps: ``(n,)`` distinct ones.
        table: ``(n, rows, c)`` all residual blocks' projections of each timestep, side by side. One row
            serves all samples, unless the condition enters the time embedding.
        blocks: the residual blocks, with their shares of c.
    """

    constant: Tensor
    condition: PreparedCondition
    timesteps: Tensor
    table: Tensor
    blocks: dict[nn.Module, int]

    def time(self, timesteps: Tensor) -> dict[nn.Module, Tensor]:
        """Look up each block's projection of timesteps ``(b,)`` that are all the same.

        A timestep that was not prepared gives NaN, since checking for it would make the host wait for the
        device. The caller checks once, at the end, that the result is finite.
        """
        place = (self.timesteps - timesteps[0]).abs().argmin().view(1)
        known = self.timesteps.index_select(0, place) == timesteps[0]
        row = torch.where(known, self.table.index_select(0, place)[0], torch.nan)
        parts = row.split(list(self.blocks.values()), dim=1)
        return dict(zip(self.blocks, parts, strict=True))


class DeepFeatures:
    """Output of the UNet's inner levels in one call, kept for the calls that follow it.

    It changes slowly between neighbouring noise levels (Ma et al. 2024, DeepCache), so calls that reuse it
    run only the outermost level. This is an approximation.

    Args:
        every: this many calls share the output of the first of them; 1 shares nothing.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self._calls = 0
        self._kept: Tensor | None = None

    def take(self, rows: int) -> Tensor | None:
        """Return the kept output for a batch of ``rows``, or None if this call must compute it."""
        due = self._calls % self.every == 0 or self._kept is None or len(self._kept) != rows
        self._calls = 1 if due else self._calls + 1
        return None if due else self._kept

    def keep(self, made: Tensor) -> None:
        """Keep the output of a call."""
        self._kept = made


class Level(nn.Module):
    """One resolution of the UNet: residual blocks, each with a transformer where the level has them."""

    def __init__(
        self, config: UNetConfig, in_channels: list[int], out_channels: int, *, attention: bool, time_dim: int
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            _block(config, channels, out_channels, time_dim) for channels in in_channels
        )
        self.attentions = nn.ModuleList(
            _transformer(config, out_channels) for _ in (in_channels if attention else [])
        )

    def step(self, index: int, x: Tensor, time: Time, context: Context) -> Tensor:
        """Run block ``index`` and, where there is one, its transformer."""
        x = self.blocks[index](x, time)
        return self.attentions[index](x, context) if len(self.attentions) else x


class DownLevel(Level):
    """A level of the encoder half, with a downsampling at its end unless it is the last."""

    downsample: Downsample | None

    def forward(self, x: Tensor, time: Time, context: Context) -> tuple[Tensor, list[Tensor]]:
        """Return the output and the skips for the decoder half."""
        skips = []
        for index in range(len(self.blocks)):
            x = self.step(index, x, time, context)
            skips.append(x)
        if self.downsample is not None:
            x = self.downsample(x)
            skips.append(x)
        return x, skips


class UpLevel(Level):
    """A level of the decoder half, with an upsampling at its end unless it is the highest resolution."""

    upsample: Upsample | None

    def forward(self, x: Tensor, skips: list[Tensor], time: Time, context: Context) -> Tensor:
        """Return the output; removes this level's skips from the end of ``skips``."""
        for index in range(len(self.blocks)):
            x = self.step(index, torch.cat([x, repeat_to(skips.pop(), len(x))], dim=1), time, context)
        if self.upsample is None:
            return x
        height, width = skips[-1].shape[-2:]  # odd sizes were rounded up on the way down
        return self.upsample(x, (height, width))


def _groups(config: UNetConfig) -> int:
    return config.norm_groups if config.norm == "group" else 0


def _block(config: UNetConfig, in_channels: int, out_channels: int, time_dim: int) -> ResBlock:
    groups, modulation = _groups(config), config.modulation
    return ResBlock(in_channels, out_channels, groups=groups, time_dim=time_dim, modulation=modulation)


def _transformer(config: UNetConfig, channels: int) -> SpatialTransformer:
    return SpatialTransformer(
        channels, num_heads=config.num_heads, context_dim=config.context_dim, groups=_groups(config)
    )


class UNet(nn.Module):
    """UNet of latent diffusion (Rombach et al. 2022), its input widened by masked-image latents and mask.

    Args:
        config: widths and levels.
        latent_channels: channels ``z`` of the latents; the input has ``2 z + 1`` channels in the order
            noisy latents, masked-image latents, mask (1 = keep), the output ``z``.
    """

    def __init__(self, config: UNetConfig, latent_channels: int = 4) -> None:
        super().__init__()
        self.config = config
        base, time_dim = config.model_channels, config.model_channels * config.time_embed_mult
        self.time_embed = nn.Sequential(nn.Linear(base, time_dim), nn.SiLU(), nn.Linear(time_dim, time_dim))
        self.context_embed = nn.Linear(config.context_dim, time_dim) if config.modulation else None
        self.conv_in = nn.Conv2d(2 * latent_channels + 1, base, 3, padding=1)
        self.guidance_embed = self._guidance_layer(config.guidance_range)
        self.down, skips = self._build_down(time_dim)
        deepest = base * config.channel_mult[-1]
        self.mid1 = _block(config, deepest, deepest, time_dim)
        self.mid_attention = _transformer(config, deepest)
        self.mid2 = _block(config, deepest, deepest, time_dim)
        self.up = self._build_up(time_dim, skips)
        self.norm_out = make_norm(base, _groups(config))
        self.conv_out = zero_init(nn.Conv2d(base, latent_channels, 3, padding=1))

    def take_guidance(self, scales: list[float], steps: int) -> None:
        """Declare that one call applies guidance, which distillation then trains; outputs stay the same.

        Args:
            scales: lowest and highest guidance scale; if they differ, the scale becomes an input, whose layer
                starts at zero (Meng et al. 2023, section 3.1); empty: guidance takes two calls.
            steps: number of steps that it is distilled for; 0: any.
        """
        self.config = replace(self.config, guidance_range=list(scales), few_steps=steps)
        self.guidance_embed = self._guidance_layer(scales)

    def _guidance_layer(self, scales: list[float]) -> nn.Linear | None:
        if len(set(scales)) < 2:
            return None
        base, like = self.config.model_channels, self.conv_in.weight
        layer = nn.Linear(base, base * self.config.time_embed_mult, device=like.device, dtype=like.dtype)
        return zero_init(layer)

    def _build_down(self, time_dim: int) -> tuple[nn.ModuleList, list[int]]:
        config, levels = self.config, nn.ModuleList()
        channels = config.model_channels
        skips = [channels]
        for depth, mult in enumerate(config.channel_mult):
            out = config.model_channels * mult
            inputs = [channels] + [out] * (config.num_res_blocks - 1)
            attention = 2**depth in config.attention_factors
            level = DownLevel(config, inputs, out, attention=attention, time_dim=time_dim)
            last = depth == len(config.channel_mult) - 1
            level.downsample = None if last else Downsample(out)
            levels.append(level)
            skips += [out] * (config.num_res_blocks + (not last))
            channels = out
        return levels, skips

    def _build_up(self, time_dim: int, skips: list[int]) -> nn.ModuleList:
        config, levels, skips = self.config, nn.ModuleList(), list(skips)
        channels = config.model_channels * config.channel_mult[-1]
        for depth in reversed(range(len(config.channel_mult))):
            out = config.model_channels * config.channel_mult[depth]
            inputs = []
            for _ in range(config.num_res_blocks + 1):
                inputs.append(channels + skips.pop())
                channels = out
            attention = 2**depth in config.attention_factors
            level = UpLevel(config, inputs, out, attention=attention, time_dim=time_dim)
            level.upsample = Upsample(out) if depth else None
            levels.append(level)
        return levels

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor | Prepared,
        deep: DeepFeatures | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """Predict the noise (or v).

        Args:
            x: ``(b, 2z + 1, h, w)`` of any size; with a prepared context only the noisy latents
                ``(k b, z, h, w)``, the same k times.
            timesteps: ``(b,)`` in 0..999; with a prepared context all equal and among those prepared, or the
                output is NaN.
            context: ``(b, tokens, context_dim)`` the condition, or the result of :meth:`prepare` for k
                conditions of each sample.
            deep: with a prepared context, features shared by the calls of one edit.
            guidance: ``(b,)`` or ``(1,)`` guidance scales, if they are an input and nothing is prepared.

        Returns:
            ``(b, z, h, w)``, or ``(k b, z, h, w)``.
        """
        if isinstance(context, Prepared):
            x = self._first_convolution(x, context)
            if x.device.type == "cpu" and not torch.is_grad_enabled():
                # transformers and 1x1 convolutions then read positions as rows, without a copy
                x = x.contiguous(memory_format=torch.channels_last)
            return self.after_input(x, context.time(timesteps), context.condition, deep)
        time = self.embed_time(timesteps) + self._embed_guidance(guidance)
        if self.context_embed is not None:
            time = time + self.context_embed(context.mean(dim=1))
        return self.after_input(self.conv_in(x), time, context)

    def prepare(
        self,
        condition: Tensor,
        masked_latents: Tensor,
        keep_mask: Tensor,
        timesteps: Tensor,
        guidance: Tensor | None = None,
    ) -> Prepared:
        """Compute once what is the same in all calls of an edit; pass the result to the UNet as its context.

        Outputs are those of the plain call up to rounding. With k conditions of each sample, as for guidance,
        everything before the first cross-attention runs once for all of them.

        Args:
            condition: ``(k b, tokens, context_dim)``, all samples' first conditions first.
            masked_latents: ``(b, z, h, w)``.
            keep_mask: ``(b, 1, h, w)``, 1 = keep.
            timesteps: ``(n,)`` all that will be needed. Memory grows with them: at Stable Diffusion's sizes
                each takes 20160 numbers.
            guidance: ``(b,)`` or ``(1,)`` guidance scales, if they are an input.
        """
        fixed, conv = torch.cat([masked_latents, keep_mask], dim=1), self.conv_in
        constant = F.conv2d(fixed, conv.weight[:, -fixed.shape[1] :], conv.bias, padding=conv.padding)
        layers = [module.attn2 for module in self.modules() if isinstance(module, TransformerBlock)]
        known: dict[nn.Module, tuple[Tensor, ...]] = {layer: layer.prepare(condition) for layer in layers}
        timesteps = timesteps.unique()
        time = self.embed_time(timesteps)[:, None] + self._embed_guidance(guidance)
        if self.context_embed is not None:
            time = time + self.context_embed(condition.mean(dim=1))
        blocks = [module for module in self.modules() if isinstance(module, ResBlock)]
        embedded = [block.embed(time.flatten(0, 1)) for block in blocks]
        widths: dict[nn.Module, int] = {
            block: part.shape[1] for block, part in zip(blocks, embedded, strict=True)
        }
        table = torch.cat(embedded, dim=1).unflatten(0, time.shape[:2])
        return Prepared(constant, PreparedCondition(condition.shape, known), timesteps, table, widths)

    def _first_convolution(self, x_t: Tensor, prepared: Prepared) -> Tensor:
        conv, x_t = self.conv_in, x_t[: len(prepared.constant)]  # the rest is the same again
        x = F.conv2d(x_t, conv.weight[:, : x_t.shape[1]], padding=conv.padding) + prepared.constant
        if self.context_embed is None:
            return x
        return repeat_to(x, prepared.condition.shape[0])  # already the first block sees the condition

    def embed_time(self, timesteps: Tensor) -> Tensor:
        """Return time embeddings ``(n, time_dim)`` of timesteps ``(n,)``."""
        embedding = timestep_embedding(timesteps, self.config.model_channels)
        return self.time_embed(embedding.to(self.conv_in.weight.dtype))

    def _embed_guidance(self, guidance: Tensor | None) -> Tensor | float:
        """Return what guidance scales ``(n,)`` add to time embeddings, ``(n, time_dim)``, or nothing."""
        if self.guidance_embed is None:
            return 0.0
        if guidance is None:
            raise ValueError("this UNet takes the guidance scale as an input, and got none")
        low, high = self.config.guidance_range
        place = LAST_PLACE * (guidance.to(self.guidance_embed.weight.device) - low) / (high - low)
        embedding = timestep_embedding(place, self.config.model_channels)
        return self.guidance_embed(embedding.to(self.guidance_embed.weight.dtype))

    def after_input(
        self, x: Tensor, time: Time, context: Context, deep: DeepFeatures | None = None
    ) -> Tensor:
        """Run everything after the first convolution, whose output is ``x``."""
        skips = [x]
        x, produced = self.down[0](x, time, context)
        known = deep.take(context.shape[0]) if deep is not None and len(self.down) > 1 else None
        if known is not None:
            x, skips = known, skips + produced[: self.config.num_res_blocks]
        else:
            x = self._inner_levels(x, skips, produced, time, context)
            if deep is not None:
                deep.keep(x)
        x = self.up[-1](x, skips, time, context)
        return self.conv_out(F.silu(self.norm_out(x)))

    def _inner_levels(
        self, x: Tensor, skips: list[Tensor], produced: list[Tensor], time: Time, context: Context
    ) -> Tensor:
        """Run all but the outermost level; leaves that one's skips in ``skips``."""
        skips += produced
        for level in self.down[1:]:
            x, produced = level(x, time, context)
            skips += produced
        x = self.mid2(self.mid_attention(self.mid1(x, time), context), time)
        for level in self.up[:-1]:
            x = level(x, skips, time, context)
        return x
