"""Every reader of annotations, on damaged bytes and odd values: it reads them, or refuses in one line."""

from __future__ import annotations

import io
import json
import random
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pbe.data.sources import SourceOptions, read_source
from pbe.data.sources.annotations import DroppedError
from pbe.data.sources.masks import load_mask, mask_box
from tests.fuzzing import damaged_bytes, damaged_json, damaged_text, outcome

COCO = {
    "info": {"year": 2017},
    "licenses": [{"id": 4, "name": "by"}],
    "images": [
        {"id": 1, "file_name": "a.jpg", "width": 40, "height": 30, "license": 4},
        {"id": 2, "file_name": "sub/b.jpg", "width": 40, "height": 30},
    ],
    "annotations": [
        {
            "id": 1,
            "image_id": 1,
            "category_id": 18,
            "bbox": [5, 6, 10, 12.5],
            "iscrowd": 0,
            "segmentation": [[5, 6, 15, 6, 15, 18, 5, 18]],
        },
        {
            "id": 2,
            "image_id": 2,
            "category_id": 1,
            "bbox": [1, 2, 30, 20],
            "iscrowd": 1,
            "segmentation": {"size": [30, 40], "counts": [100, 900, 200]},
        },
    ],
    "categories": [{"id": 1, "name": "person"}, {"id": 18, "name": "dog"}],
}
VOC = (
    "<annotation><filename>a.jpg</filename><size><width>40</width><height>30</height></size>"
    "<object><name>dog</name><truncated>1</truncated><difficult>0</difficult>"
    "<bndbox><xmin>1</xmin><ymin>3</ymin><xmax>40</xmax><ymax>30</ymax></bndbox></object></annotation>"
)
CSV = "file,x1,y1,x2,y2,label,is_group_of\na.jpg,1,2,30,20,dog,0\nsub/b.jpg,1,2,30,20.5,cat,1\n"
LABEL = "0 0.5 0.5 0.4 0.4\n1 0.1 0.1 0.9 0.1 0.9 0.9\n"
YAML = "path: .\ntrain: images\nkpt_shape: [3, 2]\nnc: 2\nnames:\n  0: dog\n  1: cat\n"
POSE = "0 0.5 0.5 0.4 0.4 0.5 0.5 0.4 0.4 0 0\n"
BOXES = (
    "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside\n"
    "a,xclick,/m/01g317,1,0.25,0.5,0.1,0.9,0,1,0,0,0\nb,xclick,/m/0284d,1,0,1,0,1,-1,-1,-1,-1,-1\n"
)


def mask_file(mode: str, form: str) -> bytes:
    image = Image.new(mode, (40, 30))
    image.paste(255 if mode == "L" else (255, 255, 255, 255), (8, 4, 20, 10))
    file = io.BytesIO()
    image.save(file, form)
    return file.getvalue()


@dataclass(frozen=True)
class Case:
    """A set of one format: its source, its files, and which of them is damaged."""

    source: str
    files: dict[str, bytes]
    damaged: str
    value: Any = None


TABLES = {
    "train-annotations-bbox.csv": BOXES.encode(),
    "class-descriptions-boxable.csv": b"/m/01g317,Person\n/m/0284d,Sunflower\n",
    "train-images.csv": b"ImageID,License,Author\na,by,Ann\n",
}
MASKS = {"masks/a.png": mask_file("L", "PNG"), "masks/sub/b.png": mask_file("RGBA", "PNG")}
POSES = {"labels/a.txt": POSE.encode(), "data.yaml": YAML.encode()}
CASES = {
    "coco": Case("coco:{}/a.json@{}/images", {"a.json": json.dumps(COCO).encode()}, "a.json", COCO),
    "voc": Case("voc:{}", {"Annotations/a.xml": VOC.encode()}, "Annotations/a.xml"),
    "csv": Case("csv:{}/a.csv@{}/images", {"a.csv": CSV.encode()}, "a.csv"),
    "yolo label": Case("yolo:{}", {"labels/a.txt": LABEL.encode()}, "labels/a.txt"),
    "yolo pose": Case("yolo:{}", POSES, "labels/a.txt"),
    "yolo yaml": Case("yolo:{}", POSES, "data.yaml"),
    "yolo classes": Case("yolo:{}", POSES | {"classes.txt": b"dog\ncat\n"}, "classes.txt"),
    "open images": Case("open-images:{}", TABLES, "train-annotations-bbox.csv"),
    "open images classes": Case("open-images:{}", TABLES, "class-descriptions-boxable.csv"),
    "open images licences": Case("open-images:{}", TABLES, "train-images.csv"),
    "grey mask": Case("masks:{}", MASKS, "masks/a.png"),
    "transparent mask": Case("masks:{}", MASKS, "masks/sub/b.png"),
}


@pytest.fixture(scope="module")
def images() -> dict[str, bytes]:
    values = np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(values).save(file, "JPEG")
    return {"images/a.jpg": file.getvalue(), "images/sub/b.jpg": file.getvalue()}


def read(source: str, masks: bool) -> Counter[str]:
    """Read a source with all that is in it, masks included; what was dropped."""
    found = read_source(source, SourceOptions(masks=masks))
    dropped = found.dropped_images + found.dropped_boxes
    for record in found.records():
        for box in record.boxes:
            try:
                if box.mask:
                    mask_box(load_mask(box.mask, record.width, record.height)[0])
            except DroppedError as error:
                dropped[str(error)] += 1
    return dropped


def damage(name: str, rng: random.Random) -> bytes:
    case = CASES[name]
    content = case.files[case.damaged]
    kind = rng.random()
    if case.value is not None and kind < 0.6:
        return damaged_json(case.value, rng)
    if kind < 0.8 and not name.endswith("mask"):
        return damaged_text(content, rng)
    return damaged_bytes(content, rng)


def fuzz(name: str, folder: Path, images: dict[str, bytes], rounds: int) -> set[str]:
    """Read a set whose file is damaged in as many ways; what comes of it."""
    case = CASES[name]
    for path, file in (images | case.files).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(file)
    source = case.source.replace("{}", str(folder))
    whole = outcome(partial(read, source, True), name)
    assert whole == "Counter()", "what is whole is read, and nothing of it dropped"
    found = set()
    for seed in range(rounds):
        damaged = damage(name, random.Random(f"{name} {seed}"))
        (folder / case.damaged).write_bytes(damaged)
        told = f"{name}, seed {seed}, {damaged[:300]!r}"
        found.add(outcome(partial(read, source, bool(seed % 2)), told))
    return found


@pytest.mark.parametrize("name", CASES)
def test_damage_is_read_or_refused_in_one_line(
    name: str, tmp_path: Path, images: dict[str, bytes], capfd: pytest.CaptureFixture[str]
) -> None:
    outcomes = fuzz(name, tmp_path, images, 25)
    assert capfd.readouterr().err == ""
    assert len(outcomes) > 1, "some damage is noticed"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", CASES)
def test_much_damage(name: str, tmp_path: Path, images: dict[str, bytes]) -> None:
    fuzz(name, tmp_path, images, 1000)
