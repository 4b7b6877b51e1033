"""Whatever a person hands over, damaged, odd or absurd, ends in an edit or in one line of ours. Seeded."""

from __future__ import annotations

import io
import json
import random
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pbe.editing.batch.jobs import check_name, read_pairs
from pbe.editing.images import read_image, read_mask
from pbe.editing.inputs import match_inputs
from pbe.editing.pipeline import PaintByExample
from pbe.editing.settings import MAX_SEED
from pbe.errors import UserError
from tests.sample_calls import main

pytestmark = pytest.mark.filterwarnings("ignore")  # Pillow's, about damaged files


def rounds(few: int, many: int) -> pytest.MarkDecorator:
    """Return so many seeds in the ordinary tests and so many in the slow ones."""
    return pytest.mark.parametrize(
        "seeds",
        [range(few), pytest.param(range(few, many), marks=[pytest.mark.slow, pytest.mark.timeout(1800)])],
        ids=["few", "many"],
    )


def ours(call: Callable[..., Any], *given: Any, seed: int, **settings: Any) -> Any:
    """Return what a call gives, or its UserError, if that has one line; anything else fails."""
    try:
        return call(*given, **settings)
    except UserError as error:
        if len(str(error).splitlines()) == 1:
            return error
        raise AssertionError(f"seed {seed}: not one line: {error}") from error
    except Exception as error:
        raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Return content with bytes changed, taken out, doubled, cut or put in another encoding."""
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 5, 30])):
        at, until = sorted(rng.randrange(len(data) + 1) for _ in range(2))
        kind = rng.randrange(6)
        if kind <= 2 and at < len(data):
            data[at] = rng.randrange(256) if kind else rng.choice(b'{}[],:"\\\n\0-9e')
        elif kind == 3:
            del data[at : min(until, at + 40)]
        elif kind == 4:
            data[at:at] = data[at : min(until, at + 40)]
        elif rng.random() < 0.2:
            del data[at:]
        if not data:
            break
    return bytes(data)


SCALARS: list[Any] = [None, True, False, 0, -1, 3, 2**63, 2**64, 3.0, 2.5, 1e300, float("nan"), float("inf")]
SCALARS += ["", " ", "a", "7", "-7", "3.0", "nan", "~", "~nobody/x", "a\0b", "\ud800", "é" * 90, "../x"]
SCALARS += ["C:\\x", "http://x/i.png", "a\nb", "%s", "{0}", "[1]", [], {}, [1], {"a": 1}]


def odd_pairs(rng: random.Random) -> bytes:
    entries = []
    for _ in range(rng.randrange(4)):
        entry: Any = {"image": "a.png", "mask": "sub\\m.png", "exemplar": "e.png", "name": "n", "seed": 3}
        for key in rng.sample([*entry, "more"], rng.randrange(3)):
            entry[key] = rng.choice(SCALARS)
        if rng.random() < 0.3:
            entry.pop(rng.choice(list(entry)))
        entries.append(rng.choice(SCALARS) if rng.random() < 0.05 else entry)
    form = rng.randrange(4)
    lines = [json.dumps(entry) for entry in entries]
    if form == 0:
        text = "\n".join(lines)
    elif form == 1:
        text = json.dumps(entries, indent=rng.choice([None, 2]))
    elif form == 2:
        text = "\r\n\r\n".join(lines) + "\r\n"
    else:
        rows = [",".join(map(str, entry.values())) for entry in entries if isinstance(entry, dict)]
        text = "\n".join(["image,mask,exemplar,name,seed", *rows])
    encoding = rng.choice(["utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-16-le", "latin-1"])
    return text.encode(encoding, errors="replace")


@rounds(400, 20_000)
def test_pairs_files(tmp_path: Path, seeds: range):
    path, read = tmp_path / "pairs.jsonl", 0
    for seed in seeds:
        rng = random.Random(seed)
        content = odd_pairs(rng)
        path.write_bytes(damaged(content, rng) if content and rng.random() < 0.5 else content)
        found = ours(read_pairs, path, 5, seed=seed)
        if isinstance(found, UserError):
            assert str(path) in str(found), f"seed {seed}: {found}"
            continue
        read += 1
        for job in found:
            assert type(job.seed) is int, f"seed {seed}"
            assert 0 <= job.seed <= MAX_SEED, f"seed {seed}"
            assert job.image.is_absolute(), f"seed {seed}: {job.image}"
            check_name(job.name)
    assert read > len(seeds) // 20, "some are sound"


def odd_image(rng: random.Random) -> Image.Image:
    size = rng.choice([(1, 1), (7, 5), (16, 16), (33, 2)])
    values = np.random.default_rng(rng.randrange(2**32)).integers(0, 256, (size[1], size[0], 4), np.uint8)
    if rng.random() < 0.3:
        values[:] = rng.choice([0, 1, 127, 255])
    image = Image.fromarray(values)
    modes = ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I", "I;16", "F", "YCbCr", "HSV", "RGBX", "La"]
    mode = rng.choice(modes)
    if mode == "I;16":
        return Image.fromarray(values[:, :, 0].astype(np.uint16) * rng.choice([1, 257]))
    if mode in ("La",):
        return image.convert("LA").convert(mode)
    return image.convert("RGB" if mode not in ("LA", "RGBA") else "RGBA").convert(mode)


def odd_file(rng: random.Random) -> bytes:
    """Return an image file, sound or damaged."""
    exif = Image.Exif()
    exif[rng.choice([0x0112, 0x011A])] = rng.randrange(12)
    options: dict[str, Any] = {"dpi": (72, 300), "exif": exif, "icc_profile": rng.randbytes(200)}
    while True:
        image = odd_image(rng)
        kind = rng.choice(["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "TGA", "ICO"])
        buffer = io.BytesIO()
        try:
            image.save(buffer, kind, **(options if rng.random() < 0.5 else {}))
        except (OSError, ValueError, TypeError, SystemError, KeyError):
            continue  # a format that does not hold such an image
        content = buffer.getvalue()
        return damaged(content, rng) if rng.random() < 0.7 else content


@rounds(400, 10_000)
def test_image_files(tmp_path: Path, seeds: range):
    path, read = tmp_path / "image", 0
    for seed in seeds:
        rng = random.Random(seed)
        path.write_bytes(odd_file(rng))
        picture = ours(read_image, path, seed=seed)
        mask = ours(read_mask, path, seed=seed)
        ours(read_image, path, "exemplar", seed=seed)
        for found in (picture, mask):
            assert not isinstance(found, UserError) or str(path) in str(found), f"seed {seed}: {found}"
        if not isinstance(picture, UserError):
            read += 1
            assert picture.pixels.dtype == np.uint8, f"seed {seed}"
            assert picture.pixels.shape[2:] == (3,), f"seed {seed}"
        if not isinstance(mask, UserError):
            assert mask.pixels.dtype == bool, f"seed {seed}"
            assert mask.pixels.any(), f"seed {seed}"
    assert read > len(seeds) // 5, "some are sound"


SHAPES = [(8, 6), (8, 6, 1), (8, 6, 3), (8, 6, 4), (3, 8, 6), (1, 8, 6), (2, 8, 6, 3), (2, 3, 8, 6)]
ODD_SHAPES = [(), (0,), (5,), (0, 6), (8, 0, 3), (0, 8, 6, 3), (1, 1, 8, 6), (6, 8), (1, 1), (2,) * 5]


def odd_array(rng: random.Random) -> np.ndarray:
    shape = rng.choice(ODD_SHAPES if rng.random() < 0.15 else SHAPES)
    values = np.random.default_rng(rng.randrange(2**32)).random(shape)
    values = rng.choice([values, values * 2 - 1, np.round(values), values * 255, np.full(shape, np.nan)])
    kind = rng.choice(["f4", "f8", "f2", "u1", "u1", "?", "i4", "i8", "u2", "c8", "O", "U3"])
    with np.errstate(all="ignore"):
        return np.asarray(values).astype(kind)


def odd_input(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.randrange(10)
    if kind < 3:
        return odd_image(rng).resize((6, 8)) if rng.random() < 0.8 else odd_image(rng)
    if kind < 6:
        return odd_array(rng)
    if kind < 8:
        array = odd_array(rng)
        if array.dtype.kind in "OUc" or array.dtype == np.uint16:
            return torch.zeros(3, 8, 6, dtype=rng.choice([torch.complex64, torch.bfloat16, torch.int16]))
        tensor = torch.from_numpy(np.array(array))
        return rng.choice([tensor, tensor, tensor, tensor.to("meta")])
    if kind == 8 and depth < 2:
        return [odd_input(rng, depth + 1) for _ in range(rng.randrange(3))]
    return rng.choice([None, "a.png", Path("a"), 3, 2.5, {"image": 1}, b"x", object(), np.float32(1), []])


@rounds(800, 30_000)
def test_what_a_call_is_given(seeds: range):
    made = 0
    for seed in seeds:
        rng = random.Random(seed)
        whole = [Image.new(mode, (6, 8), 255) for mode in ("RGB", "RGB", "L")]
        given = [odd_input(rng) if rng.random() < 0.5 else each for each in whole]
        batch = ours(match_inputs, *given, seed=seed)
        if isinstance(batch, UserError):
            continue
        made += 1
        for picture, hole in zip(batch.images, batch.masks, strict=True):
            assert picture.shape == (*hole.shape, 3), f"seed {seed}"
            assert picture.dtype == np.uint8 or (picture.dtype == np.float32 and np.abs(picture).max() <= 1)
            assert hole.dtype == bool, f"seed {seed}"
            assert hole.any(), f"seed {seed}"
    assert made > len(seeds) // 10, "some are sound"


NUMBERS: list[Any] = [None, True, 0, 1, 2, -1, 2.0, 1.5, "2", float("nan"), float("inf"), 1e300, 10**30]
NUMBERS += [np.int64(2), np.float32(2), np.float64("nan"), np.bool_(True), np.array([1, 2])]
NUMBERS += [[1], {}, torch.tensor(1)]
COUNTS = ("height", "width", "num_inference_steps", "num_images_per_prompt", "callback_steps")
SHARES = ("guidance_scale", "eta", "margin", "feather", "preserve_background")
SETTINGS: dict[str, list[Any]] = {
    **dict.fromkeys((*COUNTS, *SHARES), NUMBERS),
    "generator": [None, 3, [], [None], torch.Generator(), [torch.Generator()] * 2, "x"],
    "latents": [None, 3, torch.zeros(1, 4, 8, 10), torch.full((1, 4, 8, 10), torch.nan), torch.zeros(2), "x"],
    "exemplar_embeds": [None, 3, torch.zeros(1, 1, 16), torch.full((1, 1, 16), torch.nan)],
    "output_type": [None, "pil", "np", "pt", "latent", "PIL", 3],
    "callback": [None, 3, lambda *_: None, lambda: None, lambda step, timestep, latents: {}],
    "region": [None, "full", "mask", "all", 3],
    "solver": [None, "ddim", "no", 3, "unipc"],
}


@rounds(60, 1500)
def test_settings_of_a_call(pipe: PaintByExample, scene: Any, seeds: range):
    pipe.set_progress_bar_config(disable=True)
    made = 0
    for seed in seeds:
        rng = random.Random(seed)
        names = rng.sample(list(SETTINGS), rng.choice([1, 1, 2, 3]))
        settings = {"num_inference_steps": 1, "generator": torch.Generator()}
        settings |= {name: rng.choice(SETTINGS[name]) for name in names}
        found = ours(pipe, scene.exemplar, scene.picture, scene.mask, seed=seed, **settings)
        made += not isinstance(found, UserError)
        if not isinstance(found, UserError) and settings.get("output_type", "pil") != "pil":
            assert np.isfinite(np.asarray(found.images)).all(), f"seed {seed}: {settings}"
    pipe.set_progress_bar_config(disable=False)
    assert made > len(seeds) // 10, "some are sound"


OPTIONS = ["--image", "--mask", "--exemplar", "--name", "--out", "--output", "--pairs", "--steps", "--seed"]
OPTIONS += ["--num-images", "--guidance-scale", "--eta", "--solver", "--spacing", "--region", "--margin"]
OPTIONS += ["--feather", "--height", "--width", "--device", "--dtype", "--batch-size", "--attention-slicing"]
WORDS = ["", "0", "1", "-1", "2.5", "nan", "inf", "1e300", str(2**64), "x", "~", "~nobody/x", "/dev/zero"]
WORDS += ["/", "a/b", "%s", "{x}", "[1]", "me@home", "é", "x" * 300, "x/" * 3000, "http://x/y", "--out", "-x"]


@rounds(150, 10_000)
def test_the_command_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    seeds: range,
):
    from pbe.editing.batch import runner

    monkeypatch.setattr(runner, "edit_all", lambda *_: None)
    monkeypatch.chdir(tmp_path)
    for name in ("image", "mask", "exemplar"):
        Image.new("L", (6, 8), 255).save(f"{name}.png")
    for seed in seeds:
        rng = random.Random(seed)
        call = ["--model", ".", "--image", "image.png", "--mask", "mask.png", "--exemplar", "exemplar.png"]
        call += ["--out", "made"]
        for _ in range(rng.randrange(1, 4)):
            word = rng.choice(WORDS) if rng.random() < 0.9 else "".join(rng.choices(string.printable, k=5))
            call += [rng.choice(OPTIONS), word]
        code = ours(main, call, seed=seed)
        printed = capsys.readouterr().err
        assert code in (0, 2), f"seed {seed}: {call}"
        if code == 2:
            assert printed.startswith("error: "), f"seed {seed}: {call}: {printed}"
            assert printed.count("\n") == 1, f"seed {seed}: {call}: {printed}"
