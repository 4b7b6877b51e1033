"""The toy world: disjoint splits, exact boxes, repeatable scenes, poses."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from pbe.data.randomness import generator
from pbe.data.toy.scenes import (
    Scene,
    SceneConfig,
    ToyWorld,
    paste_sprite,
    perspective_view,
    render_scene,
)
from pbe.data.toy.sprites import ObjectPose, Recolour, draw_pose, draw_recolour, recolour, render_sprite
from pbe.errors import UserError


def test_splits_share_nothing(world):
    train, test = world.objects("train"), world.objects("test")
    assert (len(train), len(test)) == (2563, 181)
    assert not {toy.key for toy in train} & {toy.key for toy in test}
    assert (len(world.panoramas("train")), len(world.panoramas("test"))) == (13, 4)
    assert not set(world.panoramas("train")) & set(world.panoramas("test"))


def test_unknown_split(world):
    with pytest.raises(UserError, match="no split 'validation'"):
        world.objects("validation")


def test_missing_and_broken_archives(tmp_path):
    with pytest.raises(UserError, match="no toy world at"):
        ToyWorld(tmp_path / "nothing.zip")
    (tmp_path / "broken.zip").write_bytes(b"PK nonsense")
    with pytest.raises(UserError, match="not a toy world archive"):
        ToyWorld(tmp_path / "broken.zip")


def test_scenes_are_repeatable_and_independent_of_order(world):
    def fingerprint(index: int) -> tuple:
        scene = render_scene(world, "test", generator(0, "test", index))
        return scene.image.tobytes(), tuple(scene.boxes), tuple(scene.labels)

    forward = [fingerprint(index) for index in range(10)]
    assert forward == [fingerprint(index) for index in reversed(range(10))][::-1]
    assert len(set(forward)) == 10


def test_boxes_are_the_tight_bounds_of_visible_pixels(scenes):
    for scene in scenes:
        assert 1 <= len(scene.boxes) <= 3
        assert len(scene.labels) == len(scene.areas) == len(scene.boxes)
        for index, box in enumerate(scene.boxes):
            rows, columns = np.nonzero(scene.owner == index + 1)
            assert box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            # Neither the edge nor later objects hide more than 30 %.
            assert len(rows) >= 0.7 * scene.areas[index]


def flat_scene(width: int = 96, height: int = 80) -> Scene:
    return Scene(np.full((height, width, 3), 100, np.uint8))


def solid_sprite(width: int, height: int, colour: int = 200) -> np.ndarray:
    sprite = np.full((height, width, 4), colour, np.uint8)
    sprite[..., 3] = 255
    return sprite


def test_a_solid_sprite_has_its_own_box_and_pixels():
    scene = flat_scene()
    assert paste_sprite(scene, solid_sprite(20, 10), (40.0, 30.0), "a", 0.0, SceneConfig())
    assert scene.boxes == [(30.0, 25.0, 50.0, 35.0)]
    assert (scene.image[25:35, 30:50] == 200).all()
    assert np.count_nonzero(scene.image != 100) == 20 * 10 * 3


def test_boxes_are_clipped_by_the_image():
    scene = flat_scene()
    assert paste_sprite(scene, solid_sprite(20, 10), (8.0, 30.0), "a", 0.3, SceneConfig())
    assert scene.boxes == [(0.0, 25.0, 18.0, 35.0)]


def test_an_object_hidden_by_the_edge_is_not_placed():
    scene = flat_scene()
    before = scene.image.copy()
    assert not paste_sprite(scene, solid_sprite(20, 10), (2.0, 30.0), "a", 0.3, SceneConfig())
    np.testing.assert_array_equal(scene.image, before)
    assert scene.boxes == []


def test_later_objects_shrink_earlier_boxes_but_do_not_hide_them():
    scene = flat_scene()
    config = SceneConfig(max_iou=1.0)
    assert paste_sprite(scene, solid_sprite(20, 20), (30.0, 30.0), "a", 0.0, config)
    assert not paste_sprite(scene, solid_sprite(20, 20), (38.0, 30.0), "b", 0.0, config)
    assert paste_sprite(scene, solid_sprite(20, 20), (45.0, 30.0), "c", 0.0, config)
    assert scene.boxes == [(20.0, 20.0, 35.0, 40.0), (35.0, 20.0, 55.0, 40.0)]
    assert scene.labels == ["a", "c"]


def test_overlap_of_boxes_is_limited():
    scene = flat_scene()
    assert paste_sprite(scene, solid_sprite(20, 20), (30.0, 30.0), "a", 0.0, SceneConfig())
    assert not paste_sprite(scene, solid_sprite(60, 6), (50.0, 30.0), "b", 0.0, SceneConfig(max_iou=0.05))


def test_shadow_lies_below_and_darkens():
    scene = flat_scene()
    assert paste_sprite(scene, solid_sprite(30, 20), (48.0, 30.0), "a", 0.5, SceneConfig())
    below, above = scene.image[40:43, 45:51], scene.image[15:18, 45:51]
    assert below.mean() < 85
    assert (above == 100).all()


def test_the_same_object_in_two_poses(world):
    toy = world.objects("test")[3]
    boxes, images = [], []
    for pose in (ObjectPose(0.5), ObjectPose(0.5, flip=True, rotation=90.0, gain=0.7)):
        scene = flat_scene(96, 96)
        sprite = render_sprite(world.object_rgba(toy), pose, scene.short_side)
        assert paste_sprite(scene, sprite, (48.0, 48.0), toy.name, pose.shadow, SceneConfig())
        boxes.append(scene.boxes[0])
        images.append(scene.image)
    assert (images[0] != images[1]).any()
    (x1, y1, x2, y2), (u1, v1, u2, v2) = boxes
    # Turned by a right angle the box is turned too, and the longest side keeps half the short side.
    assert (u2 - u1, v2 - v1) == pytest.approx((y2 - y1, x2 - x1), abs=2.0)
    assert max(x2 - x1, y2 - y1) == pytest.approx(48, abs=2.0)


def test_rotation_is_counter_clockwise():
    """A bar that points right points up after a quarter turn."""
    bar = np.zeros((40, 40, 4), np.uint8)
    bar[18:22, 20:40] = 255
    bar[0, 0] = bar[39, 39] = bar[0, 39] = bar[39, 0] = 255
    sprite = render_sprite(bar, ObjectPose(1.0, rotation=90.0), 40)
    weight = sprite[..., 3].sum(axis=1).astype(float)
    middle = len(weight) // 2
    assert weight[2:middle].sum() > 5 * weight[middle + 2 : -2].sum()


def test_draws_stay_in_range():
    poses = [draw_pose(generator("pose", index), (0.35, 0.85)) for index in range(500)]
    assert all(0.35 <= pose.size <= 0.85 and abs(pose.rotation) <= 20 for pose in poses)
    assert all(0.85 <= pose.stretch <= 1.18 for pose in poses)
    assert 0.4 < np.mean([pose.flip for pose in poses]) < 0.6
    paints = [draw_recolour(generator("paint", index)) for index in range(500)]
    assert {sorted(paint.channels) == [0, 1, 2] for paint in paints} == {True}
    assert np.mean([paint.channels == (0, 1, 2) for paint in paints]) == pytest.approx(2 / 3, abs=0.1)


def test_recolouring():
    red = np.full((4, 4, 3), (250, 10, 10), np.uint8)
    assert np.abs(recolour(red, Recolour()).astype(int) - red).max() <= 2
    green = recolour(red, Recolour(hue=120.0))[0, 0]
    assert green[1] > 230
    assert green[0] < 30
    np.testing.assert_array_equal(recolour(red, Recolour(channels=(2, 1, 0)))[0, 0], [10, 10, 250])


def test_only_training_objects_are_recoloured(world):
    always, never = SceneConfig(recolour=1.0), SceneConfig(recolour=0.0)

    def image(split: str, config: SceneConfig) -> bytes:
        return render_scene(world, split, generator(1), config).image.tobytes()

    assert image("test", always) == image("test", never)
    assert image("train", always) != image("train", never)


def test_premultiplied_colours_never_exceed_alpha(world):
    for index, toy in enumerate(world.objects("train")[::60]):
        rng = generator("sprite", index)
        sprite = render_sprite(world.object_rgba(toy), draw_pose(rng), 96, draw_recolour(rng))
        assert (sprite[..., :3] <= sprite[..., 3:]).all()
        assert sprite[..., 3].max() > 200


@pytest.mark.parametrize("short_side", [64, 200])
def test_scene_sizes(world, short_side):
    config = SceneConfig(short_side=short_side, max_long_side=2 * short_side)
    shapes = [render_scene(world, "train", generator(2, index), config).image.shape for index in range(12)]
    assert all(min(shape[:2]) == short_side and max(shape[:2]) <= 2 * short_side for shape in shapes)
    assert len({shape[0] > shape[1] for shape in shapes}) == 2


def test_perspective_view_looks_where_it_is_told():
    """Columns of a test panorama hold their longitude, rows their latitude."""
    columns, rows = np.meshgrid(np.arange(256), np.arange(128))
    panorama = np.dstack([columns, rows, rows]).astype(np.uint8)
    view = perspective_view(panorama, 65, 33, yaw=90.0, pitch=0.0, field_of_view=90.0)
    assert view[16, 32, 0] == pytest.approx(64, abs=1)
    assert view[16, 32, 1] == pytest.approx(64, abs=1)
    assert view[16, 0, 0] == pytest.approx(32, abs=2)
    assert view[16, 64, 0] == pytest.approx(96, abs=2)
    up = perspective_view(panorama, 65, 33, yaw=90.0, pitch=15.0, field_of_view=90.0)
    assert up[16, 32, 1] < view[16, 32, 1] - 8


def test_views_wrap_around(world):
    panorama = world.panorama("city")
    seam = perspective_view(panorama, 80, 60, 0.0, 0.0, 75.0).astype(int)
    jump = np.abs(np.diff(seam, axis=1)).mean(axis=(0, 2))
    assert jump[38:42].max() < 4 * np.median(jump) + 10


def test_poses_are_plain_values():
    pose = draw_pose(generator(0))
    assert dataclasses.replace(pose, flip=not pose.flip).flip != pose.flip
    assert hash(pose)
