from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from pbe.data.randomness import generator
from pbe.data.toy.scenes import Scene, ToyWorld
from pbe.errors import UserError
from pbe.evaluation.benchmark import toy as benchmark
from pbe.evaluation.benchmark.toy import ENLARGE, MIN_KEEP, MIN_TURN, make_benchmark, make_case


@pytest.fixture(scope="module")
def whole(world: ToyWorld):
    return make_benchmark(world, seed=0, image_size=64, exemplar_size=64)


def test_every_test_object_appears_once(world, whole):
    assert len(whole) == len(world.objects("test")) == 181
    assert {case.key for case in whole} == {toy.key for toy in world.objects("test")}


def test_nothing_of_it_is_in_training(world, whole):
    assert not {case.key for case in whole} & {toy.key for toy in world.objects("train")}
    behind = {case.panorama for case in whole} | {case.exemplar_panorama for case in whole}
    assert not behind & set(world.panoramas("train"))
    assert behind == set(world.panoramas("test"))


def test_training_objects_stand_in_the_same_panoramas(world, whole):
    seen = make_benchmark(world, seed=0, image_size=32, exemplar_size=32, objects=6, split="train")
    assert {case.key for case in seen} <= {toy.key for toy in world.objects("train")}
    assert {case.panorama for case in seen} <= {case.panorama for case in whole}


def test_the_exemplar_shows_another_pose_elsewhere(whole):
    for case in whole:
        assert case.exemplar_pose.flip != case.pose.flip
        assert abs(case.exemplar_pose.rotation - case.pose.rotation) >= MIN_TURN
        assert case.exemplar_pose.gain != case.pose.gain
        assert case.exemplar_panorama != case.panorama


def test_the_mask_is_the_box_a_little_enlarged(whole):
    for case in whole:
        rows, columns = np.nonzero(case.mask)
        x1, y1, x2, y2 = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
        assert np.all(case.mask[y1:y2, x1:x2] == 255)
        assert set(np.unique(case.mask)) == {0, 255}
        box = case.box
        # rounding to whole pixels adds less than one
        assert box.x1 - ENLARGE * box.width - 1 < x1 <= box.x1 + 1e-6
        assert box.y1 - ENLARGE * box.height - 1 < y1 <= box.y1 + 1e-6
        assert box.x2 - 1e-6 <= x2 < box.x2 + ENLARGE * box.width + 1
        assert box.y2 - 1e-6 <= y2 < box.y2 + ENLARGE * box.height + 1
        assert np.mean(case.mask == 0) >= MIN_KEEP


def test_objects_fill_a_good_part(whole):
    shares = [case.box.area / 64**2 for case in whole]
    assert np.mean(shares) > 0.35
    assert min(shares) > 0.02


def test_a_case_is_a_function_of_seed_and_index(world, cases):
    for case in cases[:3]:
        # a fresh world shares no cache, and no other case has been made before
        again = make_case(ToyWorld(), case.index, 3, 32, 48)
        for field in dataclasses.fields(case):
            one, other = getattr(case, field.name), getattr(again, field.name)
            assert np.array_equal(one, other) if isinstance(one, np.ndarray) else one == other
    part = make_benchmark(world, seed=3, image_size=32, exemplar_size=48, objects=2)
    assert [case.key for case in part] == [case.key for case in cases[:2]]
    other = make_case(world, cases[0].index, 4, 32, 48)
    assert not np.array_equal(other.image, cases[0].image)


def test_masked_hides_all_of_the_hole(cases):
    case = cases[0]
    assert np.all(case.masked[case.mask == 255] == 128)
    assert np.array_equal(case.masked[case.mask == 0], case.image[case.mask == 0])


def test_too_many_objects_are_refused(world):
    with pytest.raises(UserError, match="there are 181"):
        make_benchmark(world, seed=0, image_size=32, exemplar_size=32, objects=182)


def test_an_object_longer_than_the_short_side_is_not_mirrored_into_sight():
    """The scene is red in its box alone; its square crop is padded by reflection."""
    for index in range(20):
        image = np.zeros((96, 150, 3), np.uint8)
        image[20:70, 10:140, 0] = 255
        scene = Scene(image, boxes=[(10.0, 20.0, 140.0, 70.0)])
        shown, mask, _ = benchmark._square(scene, generator("long", index), 64)
        assert (mask == 0).any()
        assert not shown[..., 0][mask == 0].any()
