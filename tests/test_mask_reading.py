"""Masks drawn in every way show the rectangle that was drawn, or are refused in one line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from pbe.mask_reading import UnclearMaskError, read_mask_image

DRAWN = np.zeros((64, 64), bool)
DRAWN[16:48, 16:48] = True
ON = DRAWN.astype(np.uint8)
NOISE = np.random.default_rng(0).integers(0, 256, (64, 64, 4), dtype=np.uint8)


def layer(colours: np.ndarray | int | tuple[int, int, int], alpha: np.ndarray | int) -> Image.Image:
    """Return an RGBA image; colours are ``h w``, ``h w 3`` or one colour."""
    pixels = np.zeros((64, 64, 4), np.uint8)
    pixels[:, :, :3] = (
        colours[:, :, None] if isinstance(colours, np.ndarray) and colours.ndim == 2 else colours
    )
    pixels[:, :, 3] = alpha
    return Image.fromarray(pixels)


def palette(values: np.ndarray, colours: list[int]) -> Image.Image:
    image = Image.fromarray(values.astype(np.uint8), "L").copy()
    image = Image.frombytes("P", image.size, image.tobytes())
    image.putpalette(colours)
    return image


def touched(alpha: int = 255) -> np.ndarray:
    """Return an opaque alpha of which one pixel, outside the rectangle, is transparent."""
    values = np.full((64, 64), alpha, np.uint8)
    values[0, 0] = 0
    return values


def margin() -> np.ndarray:
    values = np.zeros((64, 64), np.uint8)
    values[2:-2, 2:-2] = 255
    return values


MASKS = {
    "black and white": (Image.fromarray(ON * 255), "luminance"),
    "grey 200": (Image.fromarray(ON * 200), "luminance"),
    "one bit": (Image.fromarray(ON * 255).convert("1"), "luminance"),
    "RGB": (Image.fromarray(ON * 255).convert("RGB"), "luminance"),
    "CMYK": (Image.fromarray(ON * 255).convert("RGB").convert("CMYK"), "luminance"),
    "YCbCr": (Image.fromarray(ON * 255).convert("RGB").convert("YCbCr"), "luminance"),
    "grey palette": (palette(ON, [0, 0, 0, 255, 255, 255]), "luminance"),
    "16 bits": (Image.fromarray(ON.astype(np.uint16) * 65535), "luminance"),
    "8 bits in 16": (Image.fromarray(ON.astype(np.uint16) * 255), "luminance"),
    "32 bits": (Image.fromarray(ON.astype(np.int32) * 255), "luminance"),
    "floating point, 1": (Image.fromarray(ON.astype(np.float32)), "luminance"),
    "floating point, 255": (Image.fromarray(ON.astype(np.float32) * 255), "luminance"),
    "ones": (Image.fromarray(ON), "the values 0 and 1"),
    "ones, RGB": (Image.fromarray(ON).convert("RGB"), "the values 0 and 1"),
    "ones, 16 bits": (Image.fromarray(ON.astype(np.uint16)), "the values 0 and 1"),
    "red on black": (
        Image.fromarray(ON[:, :, None] * np.array([255, 0, 0], np.uint8)),
        "one colour on black",
    ),
    "blue on black": (
        Image.fromarray(ON[:, :, None] * np.array([0, 0, 255], np.uint8)),
        "one colour on black",
    ),
    "opaque": (layer(ON * 255, 255), "luminance"),
    "layer of 80 %": (layer(ON * 255, 200), "luminance"),
    "nearly opaque": (layer(ON * 255, 255 - (NOISE[:, :, 0] & 1)), "luminance"),
    "one transparent pixel": (layer(ON * 255, touched()), "luminance times alpha"),
    "transparent margin": (layer(ON * 255, margin()), "luminance times alpha"),
    "transparent margin, layer of 60 %": (layer(ON * 255, margin() // 5 * 3), "luminance times alpha"),
    "white strokes": (layer(255, ON * 255), "alpha"),
    "black strokes": (layer(0, ON * 255), "alpha"),
    "red strokes": (layer((255, 0, 0), ON * 255), "alpha"),
    "strokes at half opacity": (layer(255, ON * 120), "alpha"),
    "cut-out of a photograph": (layer(NOISE[:, :, :3], ON * 255), "alpha"),
    "cut-out of a grey photograph": (layer(NOISE[:, :, 0], ON * 255), "alpha"),
    "photograph with a part erased": (layer(NOISE[:, :, :3], 255 - ON * 255), "the erased part"),
    "white layer with a part erased": (layer(255, 255 - ON * 255), "the erased part"),
    "grey and alpha": (Image.fromarray(np.stack([ON * 255, ON * 255], 2)), "alpha"),
    "grey and alpha, touched": (Image.fromarray(np.stack([ON * 255, touched()], 2)), "luminance times alpha"),
}


@pytest.mark.parametrize("kind", MASKS)
def test_what_was_drawn_is_read(kind: str) -> None:
    image, decided = MASKS[kind]
    mask, told = read_mask_image(image)
    assert (mask.dtype, told) == (np.uint8, decided)
    assert set(np.unique(mask)) == {0, 255}
    assert ((mask == 255) == DRAWN).all()


def test_transparent_entry_of_a_palette(tmp_path: Path) -> None:
    for name in ("mask.gif", "mask.png"):
        palette(ON, [0, 0, 0, 255, 255, 255]).save(tmp_path / name, transparency=0)
        mask, told = read_mask_image(Image.open(tmp_path / name))
        assert told == "alpha"
        assert ((mask == 255) == DRAWN).all(), name


def test_soft_edges_are_cut_at_half() -> None:
    soft = Image.fromarray(ON * 255).filter(ImageFilter.GaussianBlur(6))
    expected = np.asarray(soft) >= 128
    assert ((read_mask_image(soft)[0] == 255) == expected).all()
    mask, told = read_mask_image(layer(np.asarray(soft), touched()))
    assert told == "luminance times alpha", "a soft mask is a drawing still"
    assert ((mask == 255) == expected).all()
    mask, told = read_mask_image(layer(255, np.asarray(soft)))
    assert told == "alpha"
    assert (mask[~expected] == 0).all()
    assert (mask[DRAWN & expected] == 255).all()


@pytest.mark.parametrize("radius", [0.5, 1, 2, 3, 10])
def test_soft_edges_are_no_classes(radius: float) -> None:
    grey = np.zeros((200, 300), np.uint8)
    grey[50:150, 100:200] = 255
    soft = np.asarray(Image.fromarray(grey).filter(ImageFilter.GaussianBlur(radius)))
    assert ((read_mask_image(Image.fromarray(soft))[0] == 255) == (soft >= 128)).all()


def test_jpeg_noise_is_no_number_of_a_class(tmp_path: Path) -> None:
    for mode, colour in (("L", 255), ("RGB", (255, 0, 0))):
        image = Image.new(mode, (64, 64))
        image.paste(colour, (16, 16, 48, 48))
        image.save(tmp_path / "mask.jpg", quality=75)
        assert ((read_mask_image(Image.open(tmp_path / "mask.jpg"))[0] == 255) == DRAWN).mean() > 0.99


@pytest.mark.parametrize("quality", [10, 30, 50, 80, 95])
def test_webp_noise_is_no_number_of_a_class(tmp_path: Path, quality: int) -> None:
    """WebP fills even areas of nearly black, which JPEG does not."""
    rows, columns = np.mgrid[:80, :100]
    for drawn in ((rows - 40) ** 2 + (columns - 50) ** 2 < 625, (rows // 20 % 3 > 0) & (columns // 35 == 1)):
        Image.fromarray(np.uint8(255) * drawn).convert("RGB").save(tmp_path / "mask.webp", quality=quality)
        assert ((read_mask_image(Image.open(tmp_path / "mask.webp"))[0] == 255) == drawn).mean() > 0.98


CLASSES = np.zeros((64, 64), np.uint8)
CLASSES[4:20, 4:20], CLASSES[30:60, 30:60] = 1, 15
BORDERED = CLASSES.copy()
BORDERED[28:30, 28:62] = 255
VOC_COLOURS = [0, 0, 0, 128, 0, 0, *[0] * 39, 192, 128, 128, *[224, 224, 192] * 240]
UNCLEAR = {
    "grey 127": (Image.fromarray(ON * 127), "brightest grey is 127 of 255"),
    "classes": (Image.fromarray(CLASSES), "brightest grey is 15 of 255"),
    "classes and a white border": (Image.fromarray(BORDERED), "classes or instances"),
    "classes of a palette": (palette(BORDERED, VOC_COLOURS), "classes or instances"),
    "one class of a palette": (palette(ON, [0, 0, 0, 128, 0, 0]), "classes or instances"),
    "instances in 16 bits": (
        Image.fromarray(CLASSES.astype(np.uint16) * 100),
        "brightest grey is 1500 of 65535",
    ),
    "photograph": (Image.fromarray(NOISE[:, :, :3]), "its colours show a scene"),
    "transparent": (layer(ON * 255, 0), "transparent everywhere"),
    "negative": (Image.fromarray(ON.astype(np.int32) - 1), "outside 0 to 65535"),
    "32 bits": (Image.fromarray(ON.astype(np.int32) * 2**30), "outside 0 to 65535"),
    "no numbers": (Image.fromarray(np.where(DRAWN, np.nan, 0).astype(np.float32)), "outside 0 to 65535"),
    "no pixels": (Image.new("L", (0, 5)), "no pixels"),
}


@pytest.mark.parametrize("kind", UNCLEAR)
def test_what_cannot_be_read_says_why(kind: str) -> None:
    image, words = UNCLEAR[kind]
    with pytest.raises(UnclearMaskError, match=words) as caught:
        read_mask_image(image)
    assert "\n" not in str(caught.value)


def scene() -> np.ndarray:
    """Greys as a photograph has them: every level, smoothly."""
    rows, columns = np.mgrid[0:64, 0:64]
    return (127.5 + 60 * np.sin(rows / 9) + 60 * np.cos(columns / 7)).astype(np.uint8)


def test_a_photograph_in_the_masks_place_is_noticed() -> None:
    mask, read_by = read_mask_image(Image.fromarray(scene()))
    assert read_by == "its greys, cut at 128 of 255"
    np.testing.assert_array_equal(mask > 0, scene() >= 128)
    sepia = (scene()[:, :, None] * np.array([1.0, 0.7, 0.4])).astype(np.uint8)
    with pytest.raises(UnclearMaskError, match="its colours show a scene"):
        read_mask_image(Image.fromarray(sepia))


def test_empty_masks_are_left_to_the_caller() -> None:
    for image in (Image.new("L", (8, 8)), Image.new("RGBA", (8, 8), (0, 0, 0, 255))):
        assert not read_mask_image(image)[0].any()
