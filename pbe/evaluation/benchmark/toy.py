"""The toy benchmark: every test object hidden in an unseen scene, with an exemplar of it in another pose.

Its cases are made in memory, or written to a folder in COCOEE's layout and edited and scored as the paper's
are. A case is a pure function of the seed and the object's place in the archive, so that a part of the
benchmark is made of the same cases as the whole. In memory a case is edited twice, with the right and with a
shuffled exemplar, from the same noise, so only the exemplar can tell the two edits apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from pbe.config import SampleConfig
from pbe.data.randomness import generator, permutation
from pbe.data.samples.crops import Box, cut, mirror_mask, plan_square_crop, resize
from pbe.data.samples.masks import rectangle_mask
from pbe.data.samples.sample import cut_exemplar
from pbe.data.toy.scenes import Scene, SceneConfig, ToyWorld, aim_view, draw_centre, draw_light, paste_sprite
from pbe.data.toy.sprites import ObjectPose, draw_pose, render_sprite
from pbe.editing.images import to_bytes, to_unit
from pbe.editing.pipeline import PaintByExample
from pbe.errors import UserError
from pbe.evaluation.benchmark.coco_ee import MIN_SIZE, case_id, new_benchmark, write_case, write_ids
from pbe.evaluation.benchmark.generation import GenerateSettings, at_scales, edit_batch
from pbe.evaluation.metrics.base import Case
from pbe.evaluation.metrics.bootstrap import derangement
from pbe.models.codec import known_pixels

IMAGE_SIZE, EXEMPLAR_SIZE = 64, 128  # what the toy model that ships was trained at
SPLIT = "test"
SIZES = (0.55, 0.85)  # longest side of an object, a share of the scene's short side
ENLARGE = 0.15  # most that a side of the box moves outwards, a share of the box
MIN_TURN = 10.0  # degrees between the hidden object and its exemplar
MIN_KEEP = 0.15  # share of the image outside the mask
MAX_TRIES = 50
GUIDANCE = (1.0, 2.0, 3.0, 5.0)
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ToyCase(Case):
    """A case with what is known of it because it was rendered.

    Attributes:
        index: the object's place among the archive's test objects, which the noise of its edits belongs to.
        key: file stem of the object.
        name: of the object.
        panorama: behind the scene.
        exemplar_panorama: behind the exemplar, another one.
        pose: of the masked object.
        exemplar_pose: of the exemplar: the other flip, at least ten degrees away, another light.
        box: the true object in pixels of ``image``; the mask is that box, enlarged.
    """

    index: int
    key: str
    name: str
    panorama: str
    exemplar_panorama: str
    pose: ObjectPose
    exemplar_pose: ObjectPose
    box: Box

    @property
    def noise_key(self) -> int:
        """The object's place, whatever the folder that the case may be read from."""
        return self.index


def make_benchmark(
    world: ToyWorld,
    *,
    seed: int,
    image_size: int,
    exemplar_size: int,
    objects: int = 0,
    split: str = SPLIT,
) -> list[ToyCase]:
    """Make the cases of the toy benchmark.

    Args:
        world: objects and panoramas.
        seed: of all draws.
        image_size: sides of the scenes, pixels.
        exemplar_size: sides of the exemplars, pixels.
        objects: how many, in an order that the seed shuffles; 0 means all of them.
        split: whose objects. The panoramas are always those of the test split, so that training objects
            differ from test objects in nothing but having been seen.
    """
    available = check_count(world, objects, split)
    order = permutation(available, seed, "benchmark-order")[: objects or available]
    return [make_case(world, int(index), seed, image_size, exemplar_size, split) for index in order]


def export_toy_benchmark(
    world: ToyWorld,
    folder: Path,
    seed: int = 0,
    *,
    image_size: int = IMAGE_SIZE,
    exemplar_size: int = EXEMPLAR_SIZE,
    objects: int = 0,
) -> int:
    """Write the toy benchmark to a new folder, and return the number of cases.

    The first so many ``objects`` (0: all 181) become cases; a case's number is its object's place in the
    archive. The images are those of :func:`make_benchmark` with the same seed and sizes, bit for bit. The
    folder is there when all of it is.
    """
    if min(image_size, exemplar_size) < MIN_SIZE:
        raise UserError(f"images and exemplars of a benchmark need sides of at least {MIN_SIZE} pixels")
    count = check_count(world, objects)
    with new_benchmark(folder) as partial:
        for index in range(objects or count):
            case = make_case(world, index, seed, image_size, exemplar_size)
            write_case(partial, index, case.image, case.mask, case.exemplar)
        write_ids(partial, range(objects or count))
    return objects or count


def check_count(world: ToyWorld, objects: int, split: str = SPLIT) -> int:
    """Return the number of objects of a split, of which ``objects`` are wanted."""
    available = len(world.objects(split))
    if not 0 <= objects <= available:
        raise UserError(f"{objects} benchmark objects asked for; there are {available}")
    return available


def make_case(
    world: ToyWorld, index: int, seed: int, image_size: int, exemplar_size: int, split: str = SPLIT
) -> ToyCase:
    """Make the case of object ``index`` of a split, in test panoramas; see :class:`ToyCase`."""
    toy = world.objects(split)[index]
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
    about = (index, toy.key, toy.name, behind, other, pose, exemplar_pose, box)
    return ToyCase(case_id(index), image, mask, exemplar, *about)


def _other_pose(pose: ObjectPose, rng: np.random.Generator) -> ObjectPose:
    """Draw a pose with the other flip, a rotation at least ``MIN_TURN`` degrees away, and its own light."""
    other = draw_pose(rng, SIZES)
    while abs(other.rotation - pose.rotation) < MIN_TURN:
        other = draw_pose(rng, SIZES)
    return replace(other, flip=not pose.flip)


def _scene(
    world: ToyWorld, panorama: str, rgba: np.ndarray, pose: ObjectPose, rng: np.random.Generator
) -> Scene:
    """Render one object, wholly or nearly so in the image, before a view of ``panorama``."""
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


@dataclass(frozen=True)
class ToyEdits:
    """Edited images, uint8 ``n s s 3``, keyed by guidance scale.

    Attributes:
        own: scene i with exemplar i.
        shuffled: scene i with exemplar ``partner[i]``, from the same noise.
        partner: ``(n,)`` a permutation without fixed points.
        decoded: the true images, encoded and decoded: the best that the autoencoder lets through.
    """

    own: dict[float, np.ndarray]
    shuffled: dict[float, np.ndarray]
    partner: np.ndarray
    decoded: np.ndarray

    def rows(self, cases: Sequence[Case]) -> dict[str, list[np.ndarray]]:
        """Return labelled rows of images: masked, exemplar, edits by guidance, shuffled pair, true object."""
        last = list(self.own)[-1]
        rows = {"masked": [case.masked for case in cases], "exemplar": [case.exemplar for case in cases]}
        rows |= {f"guidance {scale:g}": list(edited) for scale, edited in self.own.items()}
        rows["shuffled exemplar"] = [cases[i].exemplar for i in self.partner]
        rows[f"its edit, guidance {last:g}"] = list(self.shuffled[last])
        rows["source: true object"] = [case.image for case in cases]
        return rows


def make_edits(
    pipe: PaintByExample,
    cases: Sequence[Case],
    scales: Sequence[float],
    settings: GenerateSettings,
    progress: Progress | None = None,
) -> ToyEdits:
    """Edit every case, at least two, twice at every guidance scale; the others are compared with the first.

    ``progress`` is called with (edits made, edits in all) after each batch.
    """
    partner = derangement(len(cases), settings.seed, "partner")
    total, made = 2 * len(scales) * len(cases), 0

    def count(edits: int) -> None:
        nonlocal made
        made += edits
        if progress is not None:
            progress(made, total)

    own: dict[float, np.ndarray] = {}
    shuffled: dict[float, np.ndarray] = {}
    others = [cases[i].exemplar for i in partner]
    for each in at_scales(settings, scales):
        own[each.guidance_scale] = edit_cases(pipe, cases, each, progress=count)
        shuffled[each.guidance_scale] = edit_cases(pipe, cases, each, others, progress=count)
    return ToyEdits(own, shuffled, partner, decode_images(pipe, cases, settings.batch_size))


def edit_cases(
    pipe: PaintByExample,
    cases: Sequence[Case],
    settings: GenerateSettings,
    exemplars: Sequence[np.ndarray] | None = None,
    progress: Callable[[int], object] = lambda edits: None,
) -> np.ndarray:
    """Edit cases of one size batch by batch, with their own or other exemplars; return uint8 ``n s s 3``.

    ``progress`` is told the number of edits of each batch.
    """
    batches, size = [], settings.batch_size
    for start in range(0, len(cases), size):
        part = slice(start, start + size)
        shown = None if exemplars is None else exemplars[part]
        batches.append(edit_batch(pipe, cases[part], settings, shown))
        progress(len(batches[-1]))
    return np.concatenate(batches)


@torch.no_grad()
def decode_images(pipe: PaintByExample, cases: Sequence[Case], batch_size: int = 32) -> np.ndarray:
    """Return the true images encoded (posterior means) and decoded, uint8 ``n s s 3``."""
    model, decoded = pipe.model, []
    for start in range(0, len(cases), batch_size):
        part = cases[start : start + batch_size]
        images = torch.stack([torch.from_numpy(case.image) for case in part]).permute(0, 3, 1, 2)
        keep = torch.stack([torch.from_numpy(case.mask) for case in part])[:, None] <= 127
        pixels = (images.float() / 127.5 - 1.0).to(model.device, model.dtype)
        known = None
        if model.config.autoencoder.mask_aware_decoder:
            known = known_pixels(pixels, keep.to(pixels))
        painted = model.decode_latents(model.encode_images(pixels), known).float().clamp(-1.0, 1.0)
        decoded.append(to_bytes(to_unit(painted.permute(0, 2, 3, 1).cpu().numpy())))
    return np.concatenate(decoded)
