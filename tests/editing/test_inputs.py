from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pbe.editing.inputs import check_generator, match_inputs
from pbe.errors import EditTypeError, EditValueError, warn_once

H, W = 12, 10
BYTES = np.random.default_rng(0).integers(0, 256, (H, W, 3), np.uint8)
HOLE = np.zeros((H, W), bool)
HOLE[2:7, 3:9] = True
SIGNED = torch.from_numpy(BYTES).permute(2, 0, 1).float() / 127.5 - 1.0
IMAGE, MASK = Image.fromarray(BYTES), Image.fromarray(HOLE.astype(np.uint8) * 255)


def tensor_mask() -> torch.Tensor:
    return torch.from_numpy(HOLE).float()


@pytest.mark.parametrize(
    "image",
    [IMAGE, [IMAGE], (IMAGE,), BYTES, [BYTES], BYTES[None], BYTES.astype(np.float64) / 255.0],
    ids=str.__class__,
)
def test_forms_of_images(image: Any):
    batch = match_inputs(IMAGE, image, MASK)
    assert len(batch) == 1
    found = batch.images[0]
    as_bytes = found if found.dtype == np.uint8 else np.round((found + 1.0) * 127.5)
    np.testing.assert_array_equal(as_bytes, BYTES)


@pytest.mark.parametrize(
    "image",
    [
        SIGNED,
        SIGNED[None],
        [SIGNED],
        [SIGNED[None]],
        SIGNED.half(),
        SIGNED.double(),
        torch.from_numpy(BYTES).permute(2, 0, 1),
    ],
    ids=str.__class__,
)
def test_forms_of_image_tensors(image: Any):
    found = match_inputs(IMAGE, image, tensor_mask()).images[0]
    as_bytes = found if found.dtype == np.uint8 else np.round((found + 1.0) * 127.5)
    np.testing.assert_allclose(as_bytes, BYTES, atol=1 if getattr(image, "dtype", None) == torch.half else 0)


@pytest.mark.parametrize(
    "mask",
    [
        MASK,
        [MASK],
        MASK.convert("RGB"),
        HOLE,
        HOLE[:, :, None],
        HOLE[None],
        HOLE[None, :, :, None],
        HOLE[None, None],
        HOLE.astype(np.uint8) * 255,
        HOLE.astype(np.float32),
        [HOLE[None]],
    ],
    ids=str.__class__,
)
def test_forms_of_masks(mask: Any):
    (found,) = match_inputs(IMAGE, IMAGE, mask).masks
    np.testing.assert_array_equal(found, HOLE)


@pytest.mark.parametrize("form", ["h w", "1 h w", "1 1 h w", "1 h w 1", "bool", "uint8", "list"])
def test_forms_of_mask_tensors(form: str):
    plain = tensor_mask()
    masks = {"h w": plain, "1 h w": plain[None], "1 1 h w": plain[None, None], "bool": plain.bool()}
    masks |= {"1 h w 1": plain[None, :, :, None], "uint8": (plain * 255).to(torch.uint8), "list": [plain]}
    (found,) = match_inputs(IMAGE, SIGNED, masks[form]).masks
    np.testing.assert_array_equal(found, HOLE)


def test_exemplars_may_be_tensors_of_their_own():
    pixels = torch.randn(2, 3, 8, 8)
    batch = match_inputs(pixels, IMAGE, MASK)
    assert [torch.equal(a, b) for a, b in zip(batch.exemplars, pixels, strict=True)] == [True, True]
    assert len(batch) == 2
    whole = match_inputs((pixels * 50 + 100).clamp(0, 255).to(torch.uint8), [IMAGE] * 2, MASK)
    assert whole.exemplars[0].shape == (8, 8, 3)


def test_one_half_belongs_to_the_hole_or_not():
    half = np.where(HOLE, 0.5, 0.0)
    np.testing.assert_array_equal(match_inputs(IMAGE, IMAGE, half).masks[0], HOLE)
    with pytest.raises(EditValueError, match="has no masked region"):
        match_inputs(IMAGE, IMAGE, half, half_is_masked=False)
    grey = Image.fromarray(np.where(HOLE, 128, 127).astype(np.uint8))
    for rule in (True, False):
        np.testing.assert_array_equal(match_inputs(IMAGE, IMAGE, grey, half_is_masked=rule).masks[0], HOLE)


def test_pairing():
    pictures = [np.full((4, 4, 3), value, np.uint8) for value in (1, 2)]
    exemplars = [np.full((2, 2, 3), value, np.uint8) for value in (3, 4)]
    batch = match_inputs(exemplars, pictures, np.ones((2, 2), bool), copies=3)
    assert len(batch) == 6
    assert [each[0, 0, 0] for each in batch.images] == [1, 2]
    assert all(hole.shape == (4, 4) for hole in batch.masks)
    rows = batch.spread(torch.tensor([[3], [4]]), "rows")
    assert rows.flatten().tolist() == [3, 3, 3, 4, 4, 4]
    assert len(match_inputs(exemplars, pictures[0], np.ones((4, 4), bool)).images) == 2
    assert len(match_inputs(exemplars[0], pictures, np.ones((4, 4), bool)).exemplars) == 1


@pytest.mark.parametrize(
    ("conditions", "pictures", "copies", "edits"),
    [(1, 2, 3, 6), (2, 2, 3, 6), (6, 2, 3, 6), (2, 1, 1, 2), (2, 1, 2, 2)],
)
def test_conditions_count_like_exemplars_or_like_edits(
    conditions: int, pictures: int, copies: int, edits: int
):
    batch = match_inputs(None, [BYTES] * pictures, HOLE, copies, conditions=conditions)
    assert len(batch) == edits
    assert len(batch.spread(torch.zeros(conditions, 1), "rows")) == edits


def test_rows_that_do_not_fit():
    batch = match_inputs(IMAGE, [BYTES] * 2, HOLE, copies=2)
    with pytest.raises(EditValueError, match="rows: 3 for 4 edits"):
        batch.spread(torch.zeros(3, 1), "rows")


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        ({"image": SIGNED}, EditTypeError, "both be tensors, or neither"),
        ({"mask_image": tensor_mask()}, EditTypeError, "both be tensors, or neither"),
        ({"image": "a.png"}, EditTypeError, "image: str; it must be a PIL image"),
        ({"example_image": None}, EditTypeError, "example_image: NoneType"),
        ({"mask_image": 3}, EditTypeError, "mask_image: int"),
        ({"image": BYTES.astype(np.int32)}, EditTypeError, "an array of int32"),
        ({"image": BYTES.astype(np.float32)}, EditValueError, r"must lie in \[0, 1\]"),
        ({"image": BYTES.transpose(2, 0, 1)}, EditValueError, r"shape \(3, 12, 10\); it must be"),
        ({"mask_image": HOLE * 2.0}, EditValueError, r"mask must lie in \[0, 1\]"),
        ({"mask_image": BYTES}, EditValueError, "mask_image: an array of shape"),
        ({"mask_image": HOLE.astype(int)}, EditTypeError, "an array of int64"),
        ({"mask_image": ~np.ones((H, W), bool)}, EditValueError, "has no masked region"),
        ({"image": []}, EditValueError, "image: an empty list"),
        (
            {"example_image": [IMAGE] * 2, "image": [IMAGE] * 3},
            EditValueError,
            "2 exemplars, 3 images and 1 masks",
        ),
        ({"image": [IMAGE] * 3, "mask_image": [MASK] * 2}, EditValueError, "do not pair up"),
        ({"image": [BYTES, BYTES[1:]]}, EditValueError, "must have one size, these have 10x11, 10x12"),
        ({"example_image": torch.full((3, 8, 8), float("nan"))}, EditValueError, "finite"),
        (
            {"example_image": torch.zeros(3, 8, 8, dtype=torch.int64)},
            EditTypeError,
            "a tensor of torch.int64",
        ),
        ({"example_image": torch.zeros(8, 8)}, EditValueError, r"must be \(3, h, w\) or \(b, 3, h, w\)"),
        ({"image": np.zeros((0, 4, 4, 3), np.uint8)}, EditValueError, "a batch without images"),
        ({"image": np.zeros((4, 0, 3), np.uint8)}, EditValueError, "0x4 pixels"),
    ],
)
def test_what_cannot_be_used(call: dict[str, Any], kind: type[Exception], message: str):
    with pytest.raises(kind, match=message) as raised:
        match_inputs(**({"example_image": IMAGE, "image": IMAGE, "mask_image": MASK} | call))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        ({"image": SIGNED * 1.5}, EditValueError, r"image: a floating-point tensor must lie in \[-1, 1\]"),
        ({"image": SIGNED * float("nan")}, EditValueError, r"must lie in \[-1, 1\]"),
        ({"image": SIGNED[:1]}, EditValueError, r"shape \(1, 12, 10\); it must be \(3, h, w\)"),
        ({"image": SIGNED[None, None]}, EditValueError, r"must be \(3, h, w\) or \(b, 3, h, w\)"),
        ({"image": SIGNED[0]}, EditValueError, r"shape \(12, 10\)"),
        ({"image": SIGNED.long()}, EditTypeError, "a tensor of torch.int64"),
        ({"image": SIGNED[:, :0]}, EditValueError, "nothing to edit"),
        ({"mask_image": tensor_mask() * 2}, EditValueError, r"mask must lie in \[0, 1\]"),
        ({"mask_image": tensor_mask() - 0.5}, EditValueError, r"mask must lie in \[0, 1\]"),
        ({"mask_image": torch.ones(H, W + 1)}, EditValueError, "must have one height and width"),
        ({"mask_image": torch.ones(1, 3, H, W)}, EditValueError, r"shape \(1, 3, 12, 10\)"),
        (
            {"mask_image": torch.ones(3, H, W), "image": SIGNED.expand(2, -1, -1, -1)},
            EditValueError,
            "do not pair up",
        ),
    ],
)
def test_tensors_that_cannot_be_used(call: dict[str, Any], kind: type[Exception], message: str):
    with pytest.raises(kind, match=message):
        match_inputs(**({"example_image": IMAGE, "image": SIGNED, "mask_image": tensor_mask()} | call))


RAMP = torch.linspace(0.0, 1.0, 3 * H * W).reshape(3, H, W)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (
            {"image": RAMP, "mask_image": tensor_mask()},
            "image: a float tensor is taken to lie in [-1, 1], and",
        ),
        ({"example_image": RAMP}, "example_image: a float tensor is taken as normalised for the image tower"),
        ({"image": (BYTES > 99).astype(np.uint8)}, "image: a uint8 array whose largest value is 1 is nearly"),
        (
            {"mask_image": HOLE.T},
            "mask_image: it is 12x10, the image 10x12: stretched to fit; is one of them",
        ),
        (
            {"mask_image": Image.new("L", (50, 10), 255)},
            "mask_image: it is 50x10, the image 10x12: stretched",
        ),
        ({"mask_image": HOLE.astype(np.uint8)}, "mask_image: read by the values 0 and 1, it repaints 25.0%"),
    ],
)
def test_what_looks_like_a_slip_is_told(call: dict[str, Any], told: str, caplog: pytest.LogCaptureFixture):
    warn_once.cache_clear()
    match_inputs(**({"example_image": IMAGE, "image": IMAGE, "mask_image": MASK} | call))
    assert told in caplog.text


def test_what_is_right_needs_no_word(caplog: pytest.LogCaptureFixture):
    warn_once.cache_clear()
    match_inputs(IMAGE, SIGNED, tensor_mask())
    match_inputs(torch.randn(3, 8, 8), BYTES, HOLE)
    match_inputs(IMAGE, IMAGE, MASK.resize((2 * W, 2 * H)))
    assert caplog.text == ""


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("kind", ["tensor", "array", "list", "red", "noisy", "noisy red"])
def test_the_channels_of_one_mask_are_no_batch(channels: int, kind: str):
    planes = tensor_mask().expand(channels, H, W).clone()
    if kind.endswith("red"):
        planes[1:3] = 0.0
    if kind.startswith("noisy"):  # as a lossy file makes them
        planes = planes * 0.9 + torch.rand(planes.shape, generator=torch.Generator().manual_seed(0)) * 0.1
    mask = planes.numpy() if kind == "array" else [planes] if kind == "list" else planes
    image = BYTES if kind == "array" else SIGNED
    with pytest.raises(
        EditValueError, match=r"shape \(\d, 12, 10\) means a batch of masks, and these are the"
    ):
        match_inputs(IMAGE, image, mask)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_batch_of_masks_without_numbers_is_told_as_such(value: float):
    with pytest.raises(EditValueError, match=r"a floating-point mask must lie in \[0, 1\]"):
        match_inputs(IMAGE, SIGNED, torch.full((3, H, W), value))


def test_a_batch_of_masks_is_one(caplog: pytest.LogCaptureFixture):
    warn_once.cache_clear()
    other = torch.ones(H, W)
    assert len(match_inputs(IMAGE, SIGNED, torch.stack([tensor_mask(), other, other * 0.9]))) == 3
    assert "shape (3, 12, 10) is taken as 3 masks of one image, which give as many edits" in caplog.text
    same = torch.stack([tensor_mask()] * 3)
    assert len(match_inputs([IMAGE] * 3, SIGNED, same)) == 3
    assert len(match_inputs(IMAGE, SIGNED.expand(3, -1, -1, -1), same)) == 3
    assert len(match_inputs(IMAGE, SIGNED, list(same))) == 3


def test_a_mask_tensor_with_its_channel_last():
    (found,) = match_inputs(IMAGE, SIGNED, tensor_mask()[:, :, None]).masks
    np.testing.assert_array_equal(found, HOLE)


@pytest.mark.parametrize("kind", ["sparse", "meta"])
def test_tensors_without_plain_numbers_are_refused(kind: str):
    def odd(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to("meta") if kind == "meta" else tensor.to_sparse()

    for given in ((IMAGE, odd(SIGNED), tensor_mask()), (IMAGE, SIGNED, odd(tensor_mask()))):
        with pytest.raises(EditTypeError, match="cannot be read; give a plain one"):
            match_inputs(*given)
    with pytest.raises(EditTypeError, match=r"example_image: a .* cannot be read; give a plain one"):
        match_inputs(odd(torch.randn(3, 8, 8)), IMAGE, MASK)


def test_generators_are_checked():
    check_generator(None, 3)
    check_generator(torch.Generator(), 3)
    check_generator([torch.Generator()] * 3, 3)
    with pytest.raises(EditValueError, match="2 generators for 3 images"):
        check_generator([torch.Generator()] * 2, 3)
    with pytest.raises(EditTypeError, match=r"generator: int; it must be a torch\.Generator"):
        check_generator(5, 1)
    with pytest.raises(EditTypeError, match="NoneType"):
        check_generator([None], 1)
