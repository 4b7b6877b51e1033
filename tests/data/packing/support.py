"""What the tests of packing share: images of noise, a request, and everything that a packing leaves."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from pbe.data.packing.pack import PackRequest, PackResult, pack_all
from pbe.data.packing.plan import PackSettings
from pbe.data.sources.annotations import Annotations
from pbe.data.sources.tables import read_csv


def noise(width: int = 100, height: int = 80, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 255, (height // 4, width // 4, 3), dtype=np.uint8)
    return Image.fromarray(cv2.resize(values, (width, height)))


def request_of(folder: Path, out: Path, **settings: object) -> PackRequest:
    def sources() -> list[Annotations]:
        return [read_csv(folder / "boxes.csv", folder)]

    return PackRequest(sources, [str(folder)], PackSettings(**settings), out)  # type: ignore[arg-type]


def pack(request: PackRequest, **options: object) -> PackResult | None:
    """Pack one request; None for a part, or where everything was done before."""
    return pack_all([request], **options)[0]  # type: ignore[arg-type]


def run(request: PackRequest, **options: object) -> PackResult:
    result = pack(request, workers=0, **options)
    assert result is not None
    return result


def contents(out: Path) -> dict[str, bytes]:
    """Everything that a packing leaves for readers, by name."""
    return {path.name: path.read_bytes() for path in out.iterdir() if not path.name.startswith(".")}


def make_plain(folder: Path) -> Path:
    """Fill a folder with 30 images of a box each, and names that collide once dots and spaces are gone."""
    lines = ["file,x1,y1,x2,y2,label"]
    for number in range(30):
        name = ("a b.jpg", "a.b.jpg", "a_b.jpg")[number] if number < 3 else f"p{number}.jpg"
        noise(seed=number).save(folder / name)
        lines.append(f"{name},10,10,60,{30 + number},{'cat' if number % 2 else 'dog'}")
    (folder / "boxes.csv").write_text("\n".join(lines))
    return folder


def pack_straight(plain: Path, out: Path) -> dict[str, bytes]:
    """What an uninterrupted run leaves."""
    run(request_of(plain, out, shard_pictures=7, perceptual=False))
    assert not (out / ".packing").exists()
    return contents(out)
