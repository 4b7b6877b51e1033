"""The toy benchmark: every test object hidden in an unseen scene, with an exemplar of it in another pose.

A case is a pure function of the seed and the object's place in the archive, so that a part of the
benchmark is made of the same cases as the whole.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from pbe.config import SampleConfig
from pbe.data.randomness import generator, permutation
from pbe.data.samples.crops import cut, mirror_mask, plan_square_crop, resize
from pbe.data.samples.masks import Box, rectangle_mask
from pbe.data.samples.sample import cut_exemplar
from pbe.data.toy.scenes import Scene, SceneConfig, ToyWorld, aim_view, draw_centre, draw_light, paste_sprite
from pbe.data.toy.sprites import ObjectPose, draw_pose, render_sprite
from pbe.editing.images import grey_out
from pbe.errors import UserError

SPLIT = "test"
SIZES = (0.55, 0.85)  # longest side of an object, a share of the scene's short side
ENLARGE = 0.15  # most that a side of the box moves outwards, a share of the box
MIN_TURN = 10.0  # degrees between the hidden object and its exemplar
MIN_KEEP = 0.15  # share of the picture outside the mask
MAX_TRIES = 50


@dataclass(frozen=True)
class BenchmarkCase:
    """One hidden object; pictures are uint8 RGB, ``s`` is the image size and ``e`` the exemplar's.

    Attributes:
        index: the object's place among the archive's test objects.
        key: file stem of the object.
        name: of the object.
        panorama: behind the scene.
        exemplar_panorama: behind the exemplar, another one.
        pose: of the hidden object.
        exemplar_pose: of the exemplar: the other flip, at least ten degrees away, another light.
        image: the scene with the true object, ``s s 3``.
        mask: 255 = repaint, ``s s``; the box, enlarged.
        box: the true object in pixels of ``image``.
        exemplar: ``e e 3``.
    """

    index: int
    key: str
    name: str
    panorama: str
    exemplar_panorama: str
    pose: ObjectPose
    exemplar_pose: ObjectPose
    image: np.ndarray
    mask: np.ndarray
    box: Box
    exemplar: np.ndarray

    @property
    def masked(self) -> np.ndarray:
        """The scene with the hole at mid-grey, ``s s 3``."""
        return grey_out(self.image, self.mask > 127)


def make_benchmark(
    world: ToyWorld, *, seed: int, image_size: int, exemplar_size: int, objects: int = 0
) -> list[BenchmarkCase]:
    """Make the cases of the toy benchmark.

    Args:
        world: objects and panoramas.
        seed: of all draws.
        image_size: sides of the scenes, pixels.
        exemplar_size: sides of the exemplars, pixels.
        objects: how many, in an order that the seed shuffles; 0 means all of them.

    Raises:
        UserError: there are not that many test objects.
    """
    available = check_count(world, objects)
    order = permutation(available, seed, "benchmark-order")[: objects or available]
    return [make_case(world, int(index), seed, image_size, exemplar_size) for index in order]


def check_count(world: ToyWorld, objects: int) -> int:
    """Return the number of test objects.

    Raises:
        UserError: ``objects`` is negative or more than there are.
    """
    available = len(world.objects(SPLIT))
    if not 0 <= objects <= available:
        raise UserError(f"{objects} benchmark objects asked for; there are {available}")
    return available


def make_case(world: ToyWorld, index: int, seed: int, image_size: int, exemplar_size: int) -> BenchmarkCase:
    """Make the case of test object ``index``; see :class:`BenchmarkCase`."""
    toy = world.objects(SPLIT)[index]
    rng = generator(seed, "benchmark", index)
    names = world.panoramas(SPLIT)
    behind, other = (names[i] for i in rng.choice(len(names), 2, replace=False))
    rgba = world.object_rgba(toy)
    for _ in range(MAX_TRIES):
        pose = draw_pose(rng, SIZES)
        scene = _scene(world, behind, rgba, pose, rng)
        image, mask, box = _square(scene, rng, image_size)
        if np.mean(mask) <= 255.0 * (1.0 - MIN_KEEP):
            break
    else:
        raise RuntimeError(f"no scene leaves enough around object '{toy.key}'")
    exemplar_pose = _other_pose(pose, rng)
    shown = _scene(world, other, rgba, exemplar_pose, rng)
    piece = cut_exemplar(shown.image, Box(*shown.boxes[0]), SampleConfig().exemplar_padding)
    exemplar = resize(piece, exemplar_size, exemplar_size)
    return BenchmarkCase(
        index, toy.key, toy.name, behind, other, pose, exemplar_pose, image, mask, box, exemplar
    )


def _other_pose(pose: ObjectPose, rng: np.random.Generator) -> ObjectPose:
    """Draw a pose with the other flip, a rotation at least ``MIN_TURN`` degrees away, and its own light."""
    other = draw_pose(rng, SIZES)
    while abs(other.rotation - pose.rotation) < MIN_TURN:
        other = draw_pose(rng, SIZES)
    return dataclasses.replace(other, flip=not pose.flip)


def _scene(
    world: ToyWorld, panorama: str, rgba: np.ndarray, pose: ObjectPose, rng: np.random.Generator
) -> Scene:
    """Render one object, wholly or nearly so in the picture, before a view of ``panorama``."""
    config = SceneConfig()
    sides = [config.short_side, int(rng.integers(config.short_side, config.max_long_side + 1))]
    width, height = rng.permutation(sides)
    view = aim_view(world.panorama(panorama), int(width), int(height), rng)
    scene = Scene(draw_light(view, rng))
    sprite = render_sprite(rgba, pose, scene.short_side)
    for _ in range(MAX_TRIES):
        centre = draw_centre(rng, sprite, int(width), int(height))
        if paste_sprite(scene, sprite, centre, "", pose.shadow, config):
            return scene
    raise RuntimeError(f"an object of {sprite.shape[:2]} pixels fits no scene of {height} x {width}")


def _square(scene: Scene, rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray, Box]:
    """Cut the method's square crop around the object; return image, mask and box at ``size`` px."""
    height, width = scene.image.shape[:2]
    box = Box(*scene.boxes[0])
    left, top, right, bottom = rng.uniform(0.0, ENLARGE, 4)
    enlarged = Box(
        box.x1 - left * box.width,
        box.y1 - top * box.height,
        box.x2 + right * box.width,
        box.y2 + bottom * box.height,
    ).clipped(width, height)
    plan = plan_square_crop(box, enlarged, width, height, SampleConfig().shrink_fraction, rng)
    mask = rectangle_mask(plan.crop.to_output(plan.extended, size), size, size)
    mask = mirror_mask(mask, plan.crop, width, height)
    return cut(scene.image, plan.crop, size), mask, plan.crop.to_output(box, size)
