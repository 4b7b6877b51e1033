"""What packing puts into shards: counts against a hand count, odd files, EXIF, masks, keys, the index."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from pbe.data.packing.pack import PackRequest, read_summary
from pbe.data.packing.plan import PackSettings, make_plan
from pbe.data.packing.worker import index_keys, load_index
from pbe.data.samples.decode import decode_image
from pbe.data.samples.masks import decode_rle
from pbe.data.shards.archive import ShardImages
from pbe.data.shards.format import digest
from pbe.data.sources.coco import read_coco
from pbe.data.sources.image_files import turn_boxes, turn_image
from pbe.data.sources.masks import read_mask_folder
from pbe.data.sources.tables import read_csv
from pbe.errors import UserError
from tests.commands import prepare as prepare_data
from tests.data.packing.support import make_plain, noise, pack, pack_straight, request_of, run

ODD_BOXES = """\
file,x1,y1,x2,y2,label,is_group_of
ok.jpg,10,10,60,60,cat,0
ok.jpg,0,0,100,40,cat,0
ok.jpg,-20,20,50,90,dog,1
ok.jpg,5,5,5,50,dog,0
ok.jpg,200,0,250,50,dog,0
ok.jpg,1,1,3,3,dog,0
ok.jpg,0,0,100,80,dog,0
ok.jpg,x,0,100,80,dog,0
ünï code 1.png,10,10,60,60,"owl, snowy",0
cmyk.jpg,10,10,60,60,cat,0
deep.png,10,10,60,60,cat,0
animated.webp,10,10,60,60,cat,0
animated.gif,10,10,60,60,cat,0
turned.jpg,10,10,60,60,cat,0
cut.jpg,10,10,60,60,cat,0
cut.jpg,10,10,60,61,cat,0
cut.png,10,10,60,60,cat,0
junk.jpg,10,10,60,60,cat,0
hollow.jpg,10,10,10,60,cat,0
gone.jpg,10,10,60,60,cat,0
"""


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """A folder of images of every odd kind, with ``boxes.csv``."""
    folder = tmp_path / "odd"
    folder.mkdir()
    for number, name in enumerate(("ok.jpg", "alone.jpg", "hollow.jpg", "cut.jpg", "cut.png")):
        noise(seed=number).save(folder / name)
    noise(seed=11).convert("L").save(folder / "ünï code 1.png")
    noise(seed=12).convert("CMYK").save(folder / "cmyk.jpg")
    deep = np.random.default_rng(0).integers(0, 65535, (80, 100), dtype=np.uint16)
    Image.fromarray(deep).save(folder / "deep.png")
    frames = [noise(seed=number) for number in (13, 14)]
    for name in ("animated.webp", "animated.gif"):
        frames[0].save(folder / name, save_all=True, append_images=frames[1:])
    exif = Image.Exif()
    exif[0x0112] = 6
    noise(120, 80, seed=15).save(folder / "turned.jpg", exif=exif)
    for name in ("cut.jpg", "cut.png"):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) * 2 // 3])
    (folder / "junk.jpg").write_bytes(b"<html>not found</html>")
    (folder / "boxes.csv").write_text(ODD_BOXES)
    return folder


def test_counts_of_odd_files_against_a_hand_count(odd: Path, tmp_path: Path) -> None:
    result = run(request_of(odd, tmp_path / "out", drop_flags=("is_group_of",)))
    assert result.plan["pictures_seen"] == 13  # 12 files, 1 missing
    assert result.plan["boxes_seen"] == 20
    assert result.tally.pictures == 7
    assert result.tally.dropped_pictures == {
        "without boxes": 1,
        "image missing": 1,
        "no box left": 1,
        "unreadable: cut short": 2,
        "unreadable: no image": 1,
    }
    assert result.tally.boxes == 8
    assert result.tally.dropped_boxes == {
        "is_group_of": 1,
        "no area": 2,
        "outside the image": 1,
        "area too small": 1,
        "area too large": 1,
        "not a number": 1,
        "image missing": 1,
        "image dropped: unreadable: cut short": 3,
        "image dropped: unreadable: no image": 1,
    }
    assert result.tally.events == {
        "encoded again: animated": 2,
        "EXIF orientation: the frame of the boxes was taken on trust": 1,
    }


def test_nothing_is_lost_between_seen_kept_and_dropped(odd: Path, tmp_path: Path) -> None:
    for number, settings in enumerate(({}, {"labels": ("dog",)}, {"max_aspect": 1.5, "min_side": 45.0})):
        result = run(request_of(odd, tmp_path / str(number), **settings))
        tally = result.tally
        assert result.plan["pictures_seen"] == tally.pictures + tally.dropped_pictures.total()
        assert result.plan["boxes_seen"] == tally.boxes + tally.dropped_boxes.total()
        assert tally.boxes == tally.labels.total() == tally.area.total() == tally.aspect.total()
        assert tally.pictures == tally.boxes_per_picture.total()


def test_members_index_and_json_agree_and_decode(odd: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(request_of(odd, out, shard_pictures=3))
    summary = read_summary(out)
    assert summary is not None
    images = ShardImages(out)
    assert len(images) == summary["pictures"] == 7
    position = 0
    for shard in summary["shards"]:
        tar, index = (out / shard["name"]).read_bytes(), (out / shard["index"]).read_bytes()
        assert digest(tar).hex() == shard["blake2b"]
        assert len(tar) == shard["bytes"]
        assert digest(index).hex() == shard["index_blake2b"]
        table = load_index(index)
        assert (len(table["width"]), len(table["boxes"])) == (shard["pictures"], shard["boxes"])
        for row, key in enumerate(index_keys(table)):
            entry = images[position]
            assert entry.key == key
            assert entry.image == (table["picture_offset"][row], table["picture_size"][row])
            assert entry.annotation == (table["json_offset"][row], table["json_size"][row])
            encoded, annotation = images.image(position), images.annotation(position)
            assert digest(encoded) == table["picture_hash"][row].tobytes()
            image = decode_image(encoded)
            assert image.shape == (annotation["height"], annotation["width"], 3)
            assert image.shape[:2] == (table["height"][row], table["width"][row])
            rows = slice(table["box_end"][row - 1] if row else 0, table["box_end"][row])
            assert [box["xyxy"] for box in annotation["boxes"]] == table["boxes"][rows].tolist()
            labels = [summary["labels"][label] for label in table["labels"][rows]]
            assert [box["label"] for box in annotation["boxes"]] == labels
            position += 1
    names = {images.annotation(position)["source"] for position in range(len(images))}
    assert "ünï code 1.png" in names
    boxes = next(a for a in map(images.annotation, range(7)) if a["source"] == "ok.jpg")["boxes"]
    assert [box["xyxy"] for box in boxes] == [[0, 20, 50, 80], [0, 0, 100, 40], [10, 10, 60, 60]]
    assert boxes[0]["is_group_of"] is True


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("frame", ["stored", "displayed"])
def test_boxes_follow_the_exif_orientation(tmp_path: Path, orientation: int, frame: str) -> None:
    """A white rectangle in a black image: its box has to lie on it whichever frame it was drawn in."""
    stored = np.zeros((60, 90, 3), np.uint8)
    stored[10:40, 20:70] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(tmp_path / "a.png", exif=exif)
    box = np.array([[20.0, 10.0, 70.0, 40.0]])
    shown = turn_image(stored, orientation)
    if frame == "displayed":
        box = turn_boxes(box, 90, 60, orientation)
    height, width = (stored if frame == "stored" else shown).shape[:2]
    x1, y1, x2, y2 = box[0].tolist()
    entry = {"image_id": 1, "category_id": 1, "bbox": [x1, y1, x2 - x1, y2 - y1]}
    image = {"id": 1, "file_name": "a.png", "width": width, "height": height}
    (tmp_path / "a.json").write_text(json.dumps({"images": [image], "annotations": [entry]}))
    settings = PackSettings(exif_frame=frame)
    request = PackRequest(lambda: [read_coco(tmp_path / "a.json", tmp_path)], [], settings, tmp_path / "out")
    run(request)
    images = ShardImages(tmp_path / "out")
    image = decode_image(images.image(0))
    assert np.array_equal(image, shown)
    x1, y1, x2, y2 = (int(value) for value in images.annotation(0)["boxes"][0]["xyxy"])
    assert image[y1:y2, x1:x2].all()
    assert image.sum() == image[y1:y2, x1:x2].sum()


def test_an_image_of_another_size_than_annotated_is_dropped(tmp_path: Path) -> None:
    noise().save(tmp_path / "a.jpg")
    noise(seed=1).save(tmp_path / "b.jpg")
    images = [{"id": n, "file_name": f"{c}.jpg", "width": 100 + n, "height": 80} for n, c in enumerate("ab")]
    boxes = [{"image_id": n, "category_id": 1, "bbox": [10, 10, 50, 50]} for n in range(2)]
    (tmp_path / "a.json").write_text(json.dumps({"images": images, "annotations": boxes}))
    result = run(
        PackRequest(lambda: [read_coco(tmp_path / "a.json", tmp_path)], [], PackSettings(), tmp_path / "out")
    )
    assert result.tally.dropped_pictures == {"annotated for an image of another size": 1}
    assert result.tally.dropped_boxes == {"image dropped: annotated for an image of another size": 1}


def test_masks_give_the_box_and_travel_along(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    for number, name in enumerate("abc"):
        noise(200, 160, seed=number).save(tmp_path / "images" / f"{name}.jpg")
    mask = np.zeros((160, 200), np.uint8)
    cv2.circle(mask, (80, 60), 40, 255, -1)
    cv2.imwrite(str(tmp_path / "masks" / "a.png"), mask)
    cv2.imwrite(str(tmp_path / "masks" / "b.png"), np.zeros_like(mask))
    (tmp_path / "masks" / "c.png").write_bytes(b"junk")
    for number, side in enumerate((0, 100)):
        out = tmp_path / f"out{number}"
        result = run(PackRequest(lambda: [read_mask_folder(tmp_path)], [], PackSettings(max_side=side), out))
        assert result.tally.dropped_boxes == {"empty mask": 1, "unreadable mask": 1}
        box = ShardImages(out).annotation(0)["boxes"][0]
        scale = 0.5 if side else 1.0
        assert box["xyxy"] == [40 * scale, 20 * scale, 121 * scale, 101 * scale]
        drawn = decode_rle(box["mask"])
        assert drawn.shape == (160 * scale, 200 * scale)
        assert abs(drawn.sum() / scale**2 - (mask > 0).sum()) < 0.03 * (mask > 0).sum()
        assert load_index(out / "shard-000000.index.npz")["has_mask"].tolist() == [True]


def test_formats_that_shards_do_not_hold(tmp_path: Path) -> None:
    """A file that lies there is never called missing: it is encoded again, or called unreadable."""
    pixels = np.asarray(noise())
    lines = ["file,x1,y1,x2,y2"]
    for name in ("a.bmp", "b.tga", "c.ppm", "d.tiff", "e.gif"):
        Image.fromarray(pixels).save(tmp_path / name)
        lines.append(f"{name},10,10,60,60")
    (tmp_path / "f.heic").write_bytes(b"no image that Pillow knows")
    (tmp_path / "boxes.csv").write_text("\n".join([*lines, "f.heic,10,10,60,60"]))
    result = run(request_of(tmp_path, tmp_path / "out"))
    assert result.tally.dropped_pictures == {"unreadable: no image": 1}
    images = ShardImages(tmp_path / "out")
    for position in range(4):
        assert np.array_equal(decode_image(images.image(position)), pixels)


def test_smaller_copies(odd: Path, tmp_path: Path) -> None:
    result = run(request_of(odd, tmp_path / "out", max_side=50))
    assert result.tally.events["encoded again: too long"] == 5
    images = ShardImages(tmp_path / "out")
    for position in range(len(images)):
        annotation = images.annotation(position)
        assert max(annotation["width"], annotation["height"]) == 50
        assert decode_image(images.image(position)).shape[:2] == (
            annotation["height"],
            annotation["width"],
        )


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_plain(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def straight(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return pack_straight(plain, tmp_path_factory.mktemp("straight") / "out")


def test_keys_are_plain_and_unique(straight: dict[str, bytes]) -> None:
    indexes = [load_index(data) for name, data in straight.items() if name.endswith(".npz")]
    keys = [key for index in indexes for key in index_keys(index)]
    assert len(set(keys)) == 30
    assert all("." not in key and " " not in key for key in keys)
    assert sum(key.startswith("a_b-") for key in keys) == 3


def test_any_tar_reader_reads_the_shards(straight: dict[str, bytes]) -> None:
    with tarfile.open(fileobj=io.BytesIO(straight["shard-000000.tar"])) as tar:
        members = tar.getmembers()
    assert [member.name.rpartition(".")[2] for member in members] == ["jpg", "json"] * 7
    assert {(member.mtime, member.uname, member.mode) for member in members} == {(0, "pbe", 0o644)}


def test_nothing_left(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no image is left to pack"):
        pack(request_of(plain, tmp_path / "a", labels=("unicorn",)), workers=0)
    with pytest.raises(UserError, match="no image is left to pack"):
        pack(request_of(plain, tmp_path / "b", min_side=90.0), workers=0)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"min_area": 0.5, "max_area": 0.4}, "shares"),
        ({"max_area": 1.5}, "shares"),
        ({"min_side": -1.0}, "sides"),
        ({"shard_pictures": 0}, "at least one"),
        ({"max_aspect": 0.5}, "aspect"),
        ({"quality": 0}, "quality"),
        ({"drop_flags": ("is_groupof",)}, "no flag 'is_groupof'"),
        ({"exif_frame": "both"}, "EXIF"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, object], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        PackSettings(**settings).check()  # type: ignore[arg-type]


def test_shuffling_keeps_boxes_with_their_images(plain: Path) -> None:
    found = [read_csv(plain / "boxes.csv", plain)]
    straight, shuffled = (make_plan(found, PackSettings(shuffle=seed)) for seed in (None, 3))
    pairs = [dict(zip(p.images["name"], p.boxes["y2"], strict=True)) for p in (straight, shuffled)]
    assert pairs[0] == pairs[1]
    assert list(pairs[0]) != list(pairs[1])


def test_shards_close_by_bytes(plain: Path) -> None:
    found = [read_csv(plain / "boxes.csv", plain)]
    sizes = found[0].images["bytes"].to_list()
    plan = make_plan(found, PackSettings(shard_bytes=sizes[0] + 1))
    starts = [0, *plan.shards[:-1]]
    for start, end in zip(starts, plan.shards, strict=True):
        assert sum(sizes[start : end - 1]) < sizes[0] + 1


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["coco:x.json"], "the annotation file 'x.json' does not exist"),
        (["nonsense"], "is not KIND:PATH"),
        (["zip:a"], "is not KIND:PATH"),
        (["csv:a", "--engine", "hadoop"], '"hadoop" for --engine'),
        (["csv:a", "--part", "3/3"], "it must be I/N"),
        (["csv:a", "--workers", "-1"], "--workers"),
        (["csv:a", "--check-against", "nowhere"], "is not a folder"),
    ],
)
def test_command_line_complaints(
    arguments: list[str], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare_data.main([*arguments, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("error:") == 1
