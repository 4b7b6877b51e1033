"""The toy world: rendered scenes of one to three objects in front of photographed panoramas.

``data/toy/toy_world.zip`` holds objects with alpha and equirectangular panoramas. Training and test scenes
share neither objects nor panoramas. A scene is a pure function of the generator that it is given.
"""

from __future__ import annotations

import csv
import functools
import io
import math
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np

from pbe.data.toy.sprites import (
    draw_pose,
    draw_recolour,
    render_sprite,
    tone_table,
)
from pbe.errors import UserError
from pbe.resources import packaged

SPLITS = ("train", "test")
TEST_PANORAMAS = ("forest", "lobby", "park", "venice")
DEFAULT_WORLD = packaged("data/toy/toy_world.zip")
OPAQUE = 128  # alpha above one half, of 255


@dataclass(frozen=True)
class ToyObject:
    """An object of the toy world: file stem, English name, and its split (``train`` or ``test``)."""

    key: str
    name: str
    split: str


@dataclass(frozen=True)
class SceneConfig:
    """What scenes look like.

    Attributes:
        short_side: pixels of the shorter side.
        max_long_side: the longer side is drawn from ``short_side`` to this, pixels.
        max_objects: one to this many objects.
        sizes: range of an object's longest side, a share of the short side, for scenes of 1, 2, 3 objects.
        recolour: share of objects in another paint; used for the training split only.
        max_hidden: share of an object that the image's edge and later objects may hide together.
        max_iou: largest overlap (intersection over union) of two boxes.
    """

    short_side: int = 96
    max_long_side: int = 144
    max_objects: int = 3
    sizes: tuple[tuple[float, float], ...] = ((0.35, 0.85), (0.3, 0.6), (0.25, 0.48))
    recolour: float = 0.6
    max_hidden: float = 0.3
    max_iou: float = 0.2


@dataclass
class Scene:
    """An image and what stands in it.

    Attributes:
        image: uint8 ``h w 3``, RGB.
        boxes: ``(x1, y1, x2, y2)`` in pixels, x2 and y2 exclusive: the tight bounds of the pixels whose
            topmost opaque object (alpha > 0.5) this is.
        labels: the objects' names, in the order of ``boxes``.
        owner: uint8 ``h w``: 0 for background, i + 1 where object i is the topmost opaque one.
        areas: opaque pixels of each object before anything hid them.
    """

    image: np.ndarray
    boxes: list[tuple[float, float, float, float]] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    owner: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.uint8))
    areas: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Start with an empty owner map."""
        if self.owner.size == 0:
            self.owner = np.zeros(self.image.shape[:2], np.uint8)

    @property
    def short_side(self) -> int:
        """Pixels of the shorter side."""
        return min(self.image.shape[:2])


class ToyWorld:
    """The archive of objects and panoramas; images are decoded when first asked for, and kept.

    Args:
        path: the archive.
    """

    def __init__(self, path: str | Path = DEFAULT_WORLD) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f"no toy world at '{self.path}'; the project's own is data/toy/toy_world.zip")
        try:
            self._archive = zipfile.ZipFile(io.BytesIO(self.path.read_bytes()))
            table = self._archive.read("objects.csv").decode()
        except (zipfile.BadZipFile, KeyError) as error:
            raise UserError(f"'{self.path}' is not a toy world archive: {error}") from error
        rows = csv.DictReader(io.StringIO(table))
        self._objects = [ToyObject(Path(row["file"]).stem, row["name"], row["split"]) for row in rows]
        names = (Path(name) for name in self._archive.namelist())
        self._panoramas = sorted(name.stem for name in names if name.suffix == ".jpg")
        self._images: dict[str, np.ndarray] = {}

    def objects(self, split: str) -> list[ToyObject]:
        """Return the objects of a split, in the archive's order."""
        _check_split(split)
        return [toy for toy in self._objects if toy.split == split]

    def panoramas(self, split: str) -> list[str]:
        """Return the names of a split's panoramas, sorted."""
        _check_split(split)
        return [name for name in self._panoramas if (name in TEST_PANORAMAS) == (split == "test")]

    def object_rgba(self, toy: ToyObject) -> np.ndarray:
        """Return an object, uint8 ``h w 4``, trimmed to its visible pixels."""
        name = f"objects/{toy.key}.webp"
        if name not in self._images:
            rgba = cv2.cvtColor(self._decode(name, cv2.IMREAD_UNCHANGED), cv2.COLOR_BGRA2RGBA)
            left, top, width, height = cv2.boundingRect((rgba[..., 3] >= OPAQUE).astype(np.uint8))
            self._images[name] = np.ascontiguousarray(rgba[top : top + height, left : left + width])
        return self._images[name]

    def panorama(self, name: str) -> np.ndarray:
        """Return a panorama, uint8 ``h w 3`` RGB: x is longitude, y latitude from the zenith down."""
        member = f"panoramas/{name}.jpg"
        if member not in self._images:
            self._images[member] = cv2.cvtColor(self._decode(member, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
        return self._images[member]

    def _decode(self, member: str, flags: int) -> np.ndarray:
        image = cv2.imdecode(np.frombuffer(self._archive.read(member), np.uint8), flags)
        if image is None:
            raise UserError(f"'{self.path}': '{member}' is not a readable image")
        return image


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise UserError(f"the toy world has no split '{split}'; it has {' and '.join(SPLITS)}")


def perspective_view(
    panorama: np.ndarray, width: int, height: int, yaw: float, pitch: float, field_of_view: float
) -> np.ndarray:
    """Look into an equirectangular panorama through a pinhole camera.

    Args:
        panorama: uint8 ``h w 3``.
        width: of the view, pixels.
        height: of the view, pixels.
        yaw: degrees around the vertical axis.
        pitch: degrees, positive looks up.
        field_of_view: degrees across the longer side of the view.

    Returns:
        The view, uint8 ``height width 3``.
    """
    rows, columns = panorama.shape[:2]
    focal = max(width, height) / 2 / math.tan(math.radians(field_of_view) / 2)
    x = ((np.arange(width, dtype=np.float32) - (width - 1) / 2) / focal)[None, :]
    y = ((np.arange(height, dtype=np.float32) - (height - 1) / 2) / focal)[:, None]
    cos, sin = math.cos(math.radians(pitch)), math.sin(math.radians(pitch))
    # The rays, turned by the pitch.
    forward = np.broadcast_to(cos + sin * y, (height, width)).astype(np.float32)
    down = (cos * y - sin).astype(np.float32)
    ground, longitude = cv2.cartToPolar(forward, np.broadcast_to(x, (height, width)).astype(np.float32))
    latitude = np.arctan2(np.broadcast_to(down, (height, width)), ground)
    map_x = (longitude + math.radians(yaw)) * np.float32(columns / (2 * math.pi)) % np.float32(columns)
    map_y = (latitude / np.float32(math.pi) + np.float32(0.5)) * np.float32(rows) - np.float32(0.5)
    return cv2.remap(panorama, map_x, map_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)


def aim_view(panorama: np.ndarray, width: int, height: int, rng: np.random.Generator) -> np.ndarray:
    """Return a randomly aimed :func:`perspective_view` of a panorama, uint8 ``height width 3``."""
    return perspective_view(
        panorama,
        width,
        height,
        yaw=float(rng.uniform(0.0, 360.0)),
        pitch=float(rng.uniform(-15.0, 15.0)),
        field_of_view=float(rng.uniform(60.0, 90.0)),
    )


def draw_light(view: np.ndarray, rng: np.random.Generator, warmth: float = 0.0) -> np.ndarray:
    """Return a view (uint8 ``h w 3``) in random light; ``warmth`` raises red and lowers blue, as a share."""
    gain, gamma = float(rng.uniform(0.75, 1.1)), math.exp(float(rng.uniform(-0.25, 0.3)))
    return cv2.LUT(view, tone_table(gain, gamma, (1.0 + warmth, 1.0, 1.0 - warmth)))


def draw_background(
    world: ToyWorld, split: str, rng: np.random.Generator, width: int, height: int
) -> np.ndarray:
    """Return a randomly aimed, mirrored and lit view of a panorama, uint8 ``height width 3``."""
    names = world.panoramas(split)
    view = aim_view(world.panorama(names[int(rng.integers(len(names)))]), width, height, rng)
    if rng.random() < 0.5:
        view = view[:, ::-1]
    warmth = float(rng.uniform(-0.1, 0.1))
    return draw_light(np.ascontiguousarray(view), rng, warmth)


@functools.lru_cache(maxsize=1)
def _shadow_shape() -> np.ndarray:
    """Return a soft ellipse, float32 in 0 to 1, that is resized to the shadow's size."""
    y, x = np.mgrid[-1:1:24j, -1:1:48j]
    return np.exp(-3.5 * (x**2 + y**2) ** 1.2).astype(np.float32)


def _window(
    x: int, y: int, patch: np.ndarray, image: np.ndarray
) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Return the slices of the image and of the patch where a patch at (x, y) and the image overlap."""
    height, width = image.shape[:2]
    x1, y1 = max(x, 0), max(y, 0)
    x2, y2 = max(min(x + patch.shape[1], width), x1), max(min(y + patch.shape[0], height), y1)
    return (slice(y1, y2), slice(x1, x2)), (slice(y1 - y, y2 - y), slice(x1 - x, x2 - x))


def _cast_shadow(image: np.ndarray, x: int, y: int, sprite: np.ndarray, strength: float) -> None:
    """Darken, in place, the ground below a sprite at (x, y)."""
    height, width = sprite.shape[:2]
    size = (max(4, round(1.25 * width)), max(4, round(0.34 * min(width, height) + 0.08 * height)))
    shape = cv2.resize(_shadow_shape(), size, interpolation=cv2.INTER_LINEAR)
    left, top = x + (width - size[0]) // 2, y + height - round(0.55 * size[1])
    target, source = _window(left, top, shape, image)
    light = 1.0 - strength * shape[source]
    image[target] = (image[target] * light[..., None] + 0.5).astype(np.uint8)


def _bounds(mask: np.ndarray) -> tuple[float, float, float, float]:
    """Return the tight bounds (x1, y1, x2, y2), the last two exclusive, of the true pixels."""
    x, y, width, height = cv2.boundingRect(mask.astype(np.uint8))
    return float(x), float(y), float(x + width), float(y + height)


def _iou(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0.0) * max(height, 0.0)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def _placed_owner(
    scene: Scene, opaque: np.ndarray, x: int, y: int, config: SceneConfig
) -> tuple[np.ndarray, list[tuple[float, float, float, float]]] | None:
    """Return the owner map and boxes with one more object at (x, y); None where too much is hidden."""
    target, source = _window(x, y, opaque, scene.image)
    inside = opaque[source]
    if inside.sum() < max(1.0, (1.0 - config.max_hidden) * opaque.sum()):
        return None
    owner = scene.owner.copy()
    owner[target][inside] = len(scene.boxes) + 1
    areas = [*scene.areas, int(opaque.sum())]
    visible = [owner == index + 1 for index in range(len(areas))]
    if any(mask.sum() < (1.0 - config.max_hidden) * area for mask, area in zip(visible, areas, strict=True)):
        return None
    boxes = [_bounds(mask) for mask in visible]
    if any(_iou(box, boxes[-1]) > config.max_iou for box in boxes[:-1]):
        return None
    return owner, boxes


def paste_sprite(
    scene: Scene,
    sprite: np.ndarray,
    centre: tuple[float, float],
    label: str,
    shadow: float,
    config: SceneConfig,
) -> bool:
    """Put a sprite into a scene, in place, and update every box; return False where it may not stand.

    Args:
        scene: changed only when the sprite is placed.
        sprite: uint8 ``h w 4``, premultiplied.
        centre: of the sprite, ``(x, y)`` in pixels of the scene.
        label: the object's name.
        shadow: darkness of the contact shadow, 0 to 1.
        config: limits of overlap.
    """
    x, y = round(centre[0] - sprite.shape[1] / 2), round(centre[1] - sprite.shape[0] / 2)
    placed = _placed_owner(scene, sprite[..., 3] >= OPAQUE, x, y, config)
    if placed is None:
        return False
    _cast_shadow(scene.image, x, y, sprite, shadow)
    target, source = _window(x, y, sprite, scene.image)
    patch = sprite[source]
    # Rounded to nearest: colour + background * (1 - alpha).
    behind = scene.image[target] * ((255 - patch[..., 3:]) * np.float32(1 / 255)) + np.float32(0.5)
    scene.image[target] = np.minimum(patch[..., :3] + behind, 255.0).astype(np.uint8)
    scene.owner, scene.boxes = placed
    scene.areas.append(int((sprite[..., 3] >= OPAQUE).sum()))
    scene.labels.append(label)
    return True


def _draw_size(rng: np.random.Generator, config: SceneConfig) -> tuple[int, int]:
    """Return width and height: a square in one of five, else landscape or portrait."""
    long_side = int(rng.integers(config.short_side, config.max_long_side + 1))
    if rng.random() < 0.2:
        long_side = config.short_side
    return (long_side, config.short_side) if rng.random() < 0.5 else (config.short_side, long_side)


def draw_centre(rng: np.random.Generator, sprite: np.ndarray, width: int, height: int) -> tuple[float, float]:
    """Return a centre that keeps about 95 % or more of the sprite's width and height inside the image."""

    def along(extent: int, length: int) -> float:
        low, high = 0.45 * extent, length - 0.45 * extent
        return float(rng.uniform(low, high)) if low < high else length / 2

    return along(sprite.shape[1], width), along(sprite.shape[0], height)


def render_scene(
    world: ToyWorld, split: str, rng: np.random.Generator, config: SceneConfig | None = None
) -> Scene:
    """Render a scene of one to ``config.max_objects`` objects; a pure function of ``rng``'s state.

    Args:
        world: objects and panoramas.
        split: ``train`` or ``test``; recolouring is for the training split only.
        rng: generator that is advanced.
        config: sizes and limits.

    Returns:
        A scene with at least one object.
    """
    config = config or SceneConfig()
    width, height = _draw_size(rng, config)
    scene = Scene(draw_background(world, split, rng, width, height))
    toys = world.objects(split)
    count = int(rng.integers(1, config.max_objects + 1))
    sizes = config.sizes[min(count, len(config.sizes)) - 1]
    for index in rng.choice(len(toys), count, replace=False):
        paint = draw_recolour(rng) if split == "train" and rng.random() < config.recolour else None
        pose = draw_pose(rng, sizes)
        sprite = render_sprite(world.object_rgba(toys[index]), pose, scene.short_side, paint)
        for _ in range(6):
            centre = draw_centre(rng, sprite, width, height)
            if paste_sprite(scene, sprite, centre, toys[index].name, pose.shadow, config):
                break
    return scene if scene.boxes else render_scene(world, split, rng, config)
