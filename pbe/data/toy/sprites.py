"""Objects of the toy world: how one of them is posed, lit, recoloured and turned into a sprite.

A sprite is a small RGBA image with premultiplied colours (uint8, ``h w 4``): it can be resampled without
dark or bright fringes and pasted as ``colour + (1 - alpha) * background``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np

from pbe.data.samples.crops import resize_area

CHANNEL_ORDERS = ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))


@dataclass(frozen=True)
class ObjectPose:
    """How an object stands in a scene.

    Attributes:
        size: longest side of the upright object as a share of the scene's short side.
        flip: mirrored left to right.
        rotation: degrees, counter-clockwise.
        stretch: width over height relative to the object's own, 1 = unchanged.
        gain: brightness factor.
        gamma: exponent of the tone curve, > 1 is darker.
        cast: colour cast, one factor a channel (red, green, blue).
        shade_angle: direction the light comes from, degrees, counter-clockwise from the right.
        shade_strength: darkening on the far side, 0 (none) to 1 (black).
        shadow: darkness of the contact shadow, 0 to 1.
    """

    size: float
    flip: bool = False
    rotation: float = 0.0
    stretch: float = 1.0
    gain: float = 1.0
    gamma: float = 1.0
    cast: tuple[float, float, float] = (1.0, 1.0, 1.0)
    shade_angle: float = 90.0
    shade_strength: float = 0.0
    shadow: float = 0.35


@dataclass(frozen=True)
class Recolour:
    """Another paint for an object: channels reordered, hue turned, saturation and value scaled.

    Attributes:
        hue: degrees, 0 to 360.
        saturation: factor.
        value: factor.
        channels: order in which the red, green and blue channels are taken.
    """

    hue: float = 0.0
    saturation: float = 1.0
    value: float = 1.0
    channels: tuple[int, int, int] = (0, 1, 2)


def draw_pose(rng: np.random.Generator, size: tuple[float, float] = (0.35, 0.85)) -> ObjectPose:
    """Draw a pose: flip, rotation within 20 degrees, stretch within 0.85 to 1.18, light and shadow.

    Args:
        rng: generator that is advanced.
        size: range of the longest side, as a share of the scene's short side.
    """
    warmth = rng.uniform(-0.08, 0.08)
    return ObjectPose(
        size=float(rng.uniform(*size)),
        flip=bool(rng.random() < 0.5),
        rotation=float(rng.uniform(-20.0, 20.0)),
        stretch=float(math.exp(rng.uniform(math.log(0.85), math.log(1.18)))),
        gain=float(rng.uniform(0.8, 1.12)),
        gamma=float(math.exp(rng.uniform(-0.2, 0.2))),
        cast=(1.0 + warmth, 1.0 + float(rng.uniform(-0.03, 0.03)), 1.0 - warmth),
        shade_angle=float(rng.uniform(20.0, 160.0)),
        shade_strength=float(rng.uniform(0.0, 0.4)),
        shadow=float(rng.uniform(0.2, 0.5)),
    )


def draw_recolour(rng: np.random.Generator) -> Recolour:
    """Draw another paint: any hue, saturation and value jitter, channels swapped in one of three."""
    swap = rng.random() < 1 / 3
    return Recolour(
        hue=float(rng.uniform(0.0, 360.0)),
        saturation=float(rng.uniform(0.55, 1.35)),
        value=float(rng.uniform(0.7, 1.1)),
        channels=CHANNEL_ORDERS[int(rng.integers(1, 6))] if swap else (0, 1, 2),
    )


def tone_table(gain: float, gamma: float, cast: tuple[float, float, float]) -> np.ndarray:
    """Return the lookup table ``gain * cast * x ** gamma``, x in 0 to 1, as uint8 ``1 256 3``."""
    levels = (np.arange(256, dtype=np.float32) / 255.0) ** gamma
    table = np.rint(255.0 * gain * levels[:, None] * np.asarray(cast, np.float32))
    return np.clip(table, 0, 255).astype(np.uint8)[None]


def recolour(rgb: np.ndarray, paint: Recolour) -> np.ndarray:
    """Return ``rgb`` (uint8 ``h w 3``) in another paint."""
    swapped = np.ascontiguousarray(rgb[..., list(paint.channels)])
    hsv = cv2.cvtColor(swapped, cv2.COLOR_RGB2HSV)
    levels = np.arange(256, dtype=np.float32)
    # OpenCV keeps the hue of 8-bit images in half degrees, 0 to 179.
    table = np.stack(
        [(levels + round(paint.hue / 2)) % 180, levels * paint.saturation, levels * paint.value], axis=-1
    )
    turned = cv2.LUT(hsv, np.clip(np.rint(table), 0, 255).astype(np.uint8)[None])
    return cv2.cvtColor(turned, cv2.COLOR_HSV2RGB)


def _warp_matrix(
    width: int, height: int, pose: ObjectPose, scale: float
) -> tuple[np.ndarray, tuple[int, int]]:
    """Return the 2x3 matrix (flip, stretch, scale, rotation) and the size (w, h) that holds the result."""
    root = math.sqrt(pose.stretch)
    sx, sy = scale * root * (-1.0 if pose.flip else 1.0), scale / root
    cos, sin = math.cos(math.radians(pose.rotation)), math.sin(math.radians(pose.rotation))
    linear = np.array([[cos * sx, sin * sy], [-sin * sx, cos * sy]])  # y points down
    new_width, new_height = np.abs(linear) @ np.array([width, height])
    size = (math.ceil(new_width) + 2, math.ceil(new_height) + 2)
    # OpenCV counts from pixel centres: the middle of an image is at (width - 1) / 2.
    shift = (np.array(size) - 1) / 2 - linear @ ((np.array([width, height]) - 1) / 2)
    return np.column_stack([linear, shift]), size


def _shade(sprite: np.ndarray, pose: ObjectPose) -> np.ndarray:
    """Darken the side that is turned away from the light, linearly across the sprite."""
    height, width = sprite.shape[:2]
    angle = math.radians(pose.shade_angle)
    across = np.linspace(-0.5, 0.5, width, dtype=np.float32) * math.cos(angle)
    down = np.linspace(0.5, -0.5, height, dtype=np.float32) * math.sin(angle)
    light = 1.0 + pose.shade_strength * (across[None, :] + down[:, None] - 0.2)
    factor = np.clip(light, 0.0, 1.15)
    shaded = sprite[..., :3] * factor[..., None]
    # Premultiplied colours never exceed alpha, also where the light brightens.
    sprite[..., :3] = np.minimum(shaded + 0.5, sprite[..., 3:])
    return sprite


def render_sprite(
    rgba: np.ndarray, pose: ObjectPose, short_side: int, paint: Recolour | None = None
) -> np.ndarray:
    """Pose, light and resample an object.

    Args:
        rgba: the object, uint8 ``h w 4``, colours not premultiplied.
        pose: how it stands; ``pose.size`` is relative to ``short_side``.
        short_side: the scene's short side in pixels.
        paint: another paint, or None for the object's own.

    Returns:
        The sprite, uint8 ``h w 4`` premultiplied, trimmed to its visible pixels.
    """
    rgb = recolour(rgba[..., :3], paint) if paint else rgba[..., :3]
    rgb = cv2.LUT(rgb, tone_table(pose.gain, pose.gamma, pose.cast))
    premultiplied = cv2.multiply(rgb, cv2.merge([rgba[..., 3]] * 3), scale=1 / 255)
    layers = np.dstack([premultiplied, rgba[..., 3]])
    height, width = rgba.shape[:2]
    root = math.sqrt(pose.stretch)
    scale = pose.size * short_side / max(width * root, height / root)
    # Shrinking needs averaging, which a warp does not do: it turns at full size, then shrinks by area.
    matrix, size = _warp_matrix(width, height, pose, max(scale, 1.0))
    sprite = cv2.warpAffine(layers, matrix, size, flags=cv2.INTER_LINEAR)
    if scale < 1.0:
        small = (max(1, round(size[0] * scale)), max(1, round(size[1] * scale)))
        sprite = resize_area(sprite, *small)
    left, top, visible_width, visible_height = cv2.boundingRect(sprite[..., 3])
    return _shade(sprite[top : top + visible_height, left : left + visible_width].copy(), pose)
