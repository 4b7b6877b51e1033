"""Tests."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps, PngImagePlugin

from pbe.editing.images import (
    as_image,
    as_mask,
    aspect_remark,
    composite,
    fit_mask,
    read_image,
    read_mask,
    to_bytes,
)
from pbe.errors import EditTypeError, EditValueError, UserError, warn_once

RAMP = np.arange(12 * 8, dtype=np.uint8).reshape(12, 8) * 2
COLOURS = np.stack([RAMP, RAMP[::-1], RAMP[:, ::-1]], axis=-1)


def save(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)
    return path


def test_plain_rgb(tmp_path: Path):
    loaded = read_image(save(tmp_path / "a.png", Image.fromarray(COLOURS)))
    np.testing.assert_array_equal(loaded.pixels, COLOURS)
    assert len(loaded.sha256) == 64


def test_grey(tmp_path: Path):
    pixels = read_image(save(tmp_path / "a.png", Image.fromarray(RAMP))).pixels
    np.testing.assert_array_equal(pixels, np.repeat(RAMP[:, :, None], 3, axis=2))


def test_one_bit(tmp_path: Path):
    pixels = read_image(save(tmp_path / "a.png", Image.fromarray(RAMP > 90))).pixels
    np.testing.assert_array_equal(pixels[:, :, 1], np.where(RAMP > 90, 255, 0))


def test_palette(tmp_path: Path):
    flat = Image.fromarray(COLOURS).quantize(16)
    pixels = read_image(save(tmp_path / "a.gif", flat)).pixels
    np.testing.assert_array_equal(pixels, np.array(flat.convert("RGB")))


def test_palette_with_a_transparent_colour_lies_on_white(tmp_path: Path):
    flat = Image.new("P", (4, 4), 0)
    flat.putpalette([10, 20, 30, 200, 0, 0])
    flat.putpixel((1, 2), 1)
    pixels = read_image(save(tmp_path / "a.png", flat, transparency=0)).pixels
    assert pixels[2, 1].tolist() == [200, 0, 0]
    assert (pixels.reshape(-1, 3) == 255).all(axis=1).sum() == 15


def test_alpha_lies_on_white(tmp_path: Path):
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[:2] = (10, 20, 30, 255)
    rgba[2:] = (10, 20, 30, 0)
    pixels = read_image(save(tmp_path / "a.png", Image.fromarray(rgba))).pixels
    assert (pixels[:2] == (10, 20, 30)).all()
    assert (pixels[2:] == 255).all()


@pytest.mark.parametrize("ending", ["png", "tiff"])
def test_sixteen_bit_grey_is_scaled_and_not_clipped(tmp_path: Path, ending: str):
    deep = Image.fromarray((RAMP.astype(np.uint16)) * 257)
    pixels = read_image(save(tmp_path / f"a.{ending}", deep)).pixels
    np.testing.assert_array_equal(pixels[:, :, 0], RAMP)


def test_cmyk(tmp_path: Path):
    red = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    pixels = read_image(save(tmp_path / "a.tiff", red)).pixels
    assert pixels[4, 4].tolist() == [255, 0, 0]


def test_exif_rotation(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise
    path = save(tmp_path / "a.png", Image.fromarray(COLOURS), exif=exif)
    np.testing.assert_array_equal(read_image(path).pixels, np.rot90(COLOURS, -1))
    hole = save(tmp_path / "m.png", Image.fromarray(RAMP), exif=exif)
    np.testing.assert_array_equal(read_mask(hole).pixels, np.rot90(RAMP >= 128, -1))


def test_first_frame_of_an_animation(tmp_path: Path):
    frames = [Image.new("RGB", (6, 6), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.png", save_all=True, append_images=frames[1:])
    assert read_image(tmp_path / "a.png").pixels[0, 0].tolist() == [255, 0, 0]


def test_the_mask_threshold_is_128(tmp_path: Path):
    values = np.array([[0, 127, 128, 255]], np.uint8)
    path = save(tmp_path / "m.png", Image.fromarray(values))
    assert read_mask(path).pixels.tolist() == [[False, False, True, True]]


def test_a_sixteen_bit_mask(tmp_path: Path):
    path = save(tmp_path / "m.png", Image.fromarray(np.array([[0, 65535]], np.uint16)))
    assert read_mask(path).pixels.tolist() == [[False, True]]


@pytest.mark.parametrize("ending", ["png", "tiff"])
def test_greys_of_eight_bits_in_sixteen_are_no_darkness(
    tmp_path: Path, ending: str, caplog: pytest.LogCaptureFixture
):
    path = save(tmp_path / f"dark.{ending}", Image.fromarray(RAMP.astype(np.uint16)))
    np.testing.assert_array_equal(read_image(path).pixels[:, :, 0], RAMP)
    assert f"image '{path}': none of its 16-bit greys is above 255; they are taken" in caplog.text
    np.testing.assert_array_equal(as_image(Image.fromarray(RAMP).convert("I"))[:, :, 0], RAMP)


def test_a_transparent_grey_of_sixteen_bits_lies_on_white(tmp_path: Path):
    deep = Image.fromarray(np.array([[300, 40_000]], np.uint16))
    path = save(tmp_path / "a.png", deep, transparency=300)
    assert read_image(path).pixels[:, :, 0].tolist() == [[255, 156]]


def test_lab_is_converted(tmp_path: Path):
    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    image = ImageCms.profileToProfile(Image.fromarray(COLOURS), srgb, lab, outputMode="LAB")
    pixels = read_image(save(tmp_path / "a.tiff", image)).pixels
    assert np.abs(pixels.astype(int) - COLOURS).mean() < 1.5, "8 bits of L*a*b* are coarse"


def test_a_mask_with_alpha_takes_the_alpha(tmp_path: Path):
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[1, 1, 3] = 255
    hole = read_mask(save(tmp_path / "m.png", Image.fromarray(rgba))).pixels
    assert hole.sum() == 1
    assert hole[1, 1]


def test_an_opaque_mask_with_alpha_takes_the_luminance(tmp_path: Path):
    rgba = np.full((4, 4, 4), 255, np.uint8)
    rgba[0, :, :3] = 0
    hole = read_mask(save(tmp_path / "m.png", Image.fromarray(rgba))).pixels
    assert hole.sum() == 12
    assert not hole[0].any()


def test_a_drawing_with_one_transparent_pixel_takes_both(tmp_path: Path):
    rgba = np.zeros((8, 8, 4), np.uint8)
    rgba[2:6, 2:6, :3] = 255
    rgba[..., 3] = 255
    rgba[0, 0, 3] = 0
    loaded = read_mask(save(tmp_path / "m.png", Image.fromarray(rgba)))
    assert loaded.read_by == "luminance times alpha"
    np.testing.assert_array_equal(loaded.pixels, rgba[..., 0] == 255)


def test_a_mask_without_hole_is_refused(tmp_path: Path):
    path = save(tmp_path / "m.png", Image.new("L", (4, 4), 0))
    with pytest.raises(UserError, match=r"m\.png' has no masked region"):
        read_mask(path)
    path = save(tmp_path / "m.png", Image.new("L", (4, 4), 127))
    with pytest.raises(UserError, match=r"m\.png': it is not black and white: its brightest grey is 127"):
        read_mask(path)


def test_a_mask_that_is_all_hole_is_allowed(tmp_path: Path):
    assert read_mask(save(tmp_path / "m.png", Image.new("1", (4, 4), 1))).pixels.all()


def test_damaged_files(tmp_path: Path):
    good = save(tmp_path / "a.png", Image.fromarray(np.random.randint(0, 256, (64, 64, 3), np.uint8)))
    content = good.read_bytes()
    cases = {
        "empty": (b"", "is an empty file"),
        "text": (b"not an image at all", "is not an image of a known format"),
        "cut": (content[: len(content) // 2], "is damaged"),
        "header": (content[:12], "is not an image of a known format"),
    }
    for name, (data, message) in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=message) as raised:
            read_image(tmp_path / name, "exemplar")
        assert str(raised.value).startswith("exemplar '")
        assert "\n" not in str(raised.value)


def test_missing_files_and_folders(tmp_path: Path):
    with pytest.raises(UserError, match="does not exist"):
        read_image(tmp_path / "none.png")
    with pytest.raises(UserError, match="it is a folder; name a file in it"):
        read_image(tmp_path)


def test_floating_point_files_are_refused(tmp_path: Path):
    path = save(tmp_path / "a.tiff", Image.fromarray(np.zeros((4, 4), np.float32)))
    with pytest.raises(UserError, match="colour mode F is not supported"):
        read_image(path)


def test_an_image_too_large_to_be_honest_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = save(tmp_path / "a.png", Image.fromarray(COLOURS))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(UserError, match=r"a\.png' is too large: images of more than 20 pixels are not read"):
        read_image(path)


def test_broken_text_chunks_do_not_escape(tmp_path: Path):
    info = PngImagePlugin.PngInfo()
    info.add_text("k", "x" * 100, zip=True)
    path = save(tmp_path / "a.png", Image.fromarray(COLOURS), pnginfo=info)
    assert read_image(path).pixels.shape == COLOURS.shape


def test_arrays_as_images():
    np.testing.assert_array_equal(as_image(COLOURS), COLOURS)
    assert as_image(RAMP).shape == (12, 8, 3)
    assert as_image(RAMP[:, :, None]).shape == (12, 8, 3)
    assert as_image(np.zeros((3, 4, 4), np.uint8)).tolist() == np.full((3, 4, 3), 255).tolist()


def test_an_image_that_is_read_late_is_refused_in_one_line(tmp_path: Path):
    good = save(
        tmp_path / "a.png", Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    )
    (tmp_path / "cut.png").write_bytes(good.read_bytes()[:5000])
    for read in (as_image, as_mask):
        with pytest.raises(EditValueError, match="is damaged or cannot be decoded: image file is truncated"):
            read(Image.open(tmp_path / "cut.png"))
    closed = Image.open(good)
    closed.close()
    with pytest.raises(EditValueError, match="is damaged or cannot be decoded"):
        as_image(closed)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="POSIX")
def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(UserError, match=r"pipe\.png' is not a regular file"):
        read_image(tmp_path / "pipe.png")
    with pytest.raises(UserError, match=r"cannot be read: .*null"):
        read_image(tmp_path / "a\0b.png")


def test_float_arrays_as_images():
    signed = as_image(COLOURS / 255.0)
    assert signed.dtype == np.float32
    np.testing.assert_allclose((signed + 1.0) * 127.5, COLOURS, atol=1e-4)
    assert as_image(RAMP / 255.0).shape == (12, 8, 3)
    assert as_image(np.zeros((3, 4, 4))).tolist() == np.ones((3, 4, 3)).tolist()  # clear: white
    with pytest.raises(EditValueError, match=r"must lie in \[0, 1\]"):
        as_image(COLOURS * 1.0)


def test_arrays_as_masks():
    expected = [[False, True]]
    assert as_mask(np.array([[False, True]])).tolist() == expected
    assert as_mask(np.array([[127, 128]], np.uint8)).tolist() == expected
    assert as_mask(np.array([[0.49, 0.5]])).tolist() == expected
    assert as_mask(np.array([[0.5, 0.51]]), half_is_masked=False).tolist() == expected
    assert as_mask(np.array([[[0.0], [1.0]]], np.float32)).tolist() == expected


def test_what_decided_about_a_mask_is_told(caplog: pytest.LogCaptureFixture):
    warn_once.cache_clear()
    ones = np.zeros((4, 4), np.uint8)
    ones[:2] = 1
    assert as_mask(ones, "told").sum() == 8
    assert "told: read by the values 0 and 1, it repaints 50.0% of the image" in caplog.text
    caplog.clear()
    assert as_mask(ones * 255, "told").sum() == 8
    assert caplog.text == "", "black and white needs no word"


def test_a_pil_image_that_lies_on_its_side_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    warn_once.cache_clear()
    exif = Image.Exif()
    exif[0x0112] = 6
    path = save(tmp_path / "a.jpg", Image.fromarray(COLOURS), exif=exif)
    assert as_image(Image.open(path), "x").shape[:2] == (12, 8)
    assert caplog.text.count("x: its EXIF orientation is not applied; PIL.ImageOps.exif_transpose turns") == 1
    caplog.clear()
    as_image(ImageOps.exif_transpose(Image.open(path)), "upright")
    assert caplog.text == ""


def test_a_mask_of_another_aspect_is_told():
    assert aspect_remark((100, 200), (50, 100)) is None
    assert aspect_remark((33, 50), (1000, 1500)) is None, "rounding of a side"
    assert aspect_remark((100, 200), (64, 64)) == "it is 200x100, the image 64x64: stretched to fit"
    assert "is one of them turned?" in (aspect_remark((80, 60), (60, 80)) or "")


@pytest.mark.parametrize("value", ["a.png", Path("a.png"), None, 3, np.zeros((4, 4, 3), np.int32)])
def test_wrong_kinds_of_image(value: object):
    with pytest.raises(EditTypeError, match="example_image: ") as raised:
        as_image(value, "example_image")
    assert isinstance(raised.value, TypeError)


@pytest.mark.parametrize("value", ["m.png", None, np.ones((4, 4), np.int64)])
def test_wrong_kinds_of_mask(value: object):
    with pytest.raises(EditTypeError, match="mask_image: "):
        as_mask(value)


@pytest.mark.parametrize("shape", [(0, 4, 3), (4, 0), (4, 4, 2), (2, 4, 4, 3), (4,)])
def test_wrong_shapes(shape: tuple[int, ...]):
    with pytest.raises(EditValueError) as raised:
        as_image(np.zeros(shape, np.uint8))
    assert isinstance(raised.value, ValueError)


@pytest.mark.parametrize("value", [1.5, -0.1, np.nan])
def test_masks_outside_the_range(value: float):
    with pytest.raises(EditValueError, match=r"must lie in \[0, 1\]"):
        as_mask(np.full((2, 2), value))


def test_empty_pillow_images_are_refused():
    with pytest.raises(EditValueError, match="0x5 pixels"):
        as_image(Image.new("RGB", (0, 5)))


def test_masks_are_resized_by_nearest_neighbour():
    hole = np.array([[True, False], [False, False]])
    fitted = fit_mask(hole, (4, 6))
    assert fitted.shape == (4, 6)
    assert fitted[:2, :3].all()
    assert fitted.sum() == 6
    assert fit_mask(hole, (2, 2)) is hole


def test_a_hole_lost_in_resizing_is_an_error():
    hole = np.zeros((100, 100), bool)
    hole[0, 0] = True
    with pytest.raises(
        UserError, match="resized from 100x100 to the image's 5x4 pixels, has no masked region"
    ):
        fit_mask(hole, (4, 5))


def test_every_byte_outside_the_hole_survives():
    source = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    edit = np.full((16, 16, 3), 0.3, np.float32)
    hole = np.zeros((16, 16), bool)
    hole[3, 4] = True
    result = to_bytes(composite(source, edit, hole))
    np.testing.assert_array_equal(result[~hole], source[~hole])
    assert (result[3, 4] == round(0.3 * 255)).all()


def test_bytes_are_rounded():
    assert to_bytes(np.array([0.0, 1.0, 0.501 / 255, 254.4 / 255], np.float32)).tolist() == [0, 255, 1, 254]
