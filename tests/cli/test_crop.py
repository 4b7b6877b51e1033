"""Real images as squares, in the form that the paper's FID compares with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.commands import crop as command


def crop(source: Path, out: Path, *more: str) -> int:
    return command.main(["--images", str(source), "--out", str(out), "--size", "16", *more])


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A wide image, red left, green in the middle and blue right; a grey one that is higher than wide."""
    folder = tmp_path / "real"
    folder.mkdir()
    wide = np.zeros((32, 96, 3), np.uint8)
    for part in range(3):
        wide[:, 32 * part : 32 * part + 32, part] = 255
    Image.fromarray(wide).save(folder / "wide.png")
    Image.new("L", (20, 50), 90).save(folder / "high.jpg")
    return folder


@pytest.mark.parametrize("workers", ["1", "2"])
def test_the_middle_is_cut_out_and_what_is_there_stays(pictures: Path, tmp_path: Path, workers: str) -> None:
    out = tmp_path / "squares"
    assert crop(pictures, out, "--workers", workers) == 0
    assert sorted(path.name for path in out.iterdir()) == ["high.png", "wide.png"]
    squares = {path.stem: np.asarray(Image.open(path)) for path in out.iterdir()}
    assert {square.shape for square in squares.values()} == {(16, 16, 3)}
    assert np.all(squares["wide"][:, 3:13] == (0, 255, 0)), "neither end is left, nothing is stretched"
    assert np.all(abs(squares["high"].astype(int) - 90) <= 1)
    (out / "high.png").unlink()
    (out / "wide.png").write_bytes(b"stays")
    assert crop(pictures, out, "--workers", workers) == 0
    assert (out / "high.png").exists()
    assert (out / "wide.png").read_bytes() == b"stays"


def test_the_filter_is_the_originals_and_others_are_not_mixed_in(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bilinear, antialiased by Pillow, as the authors make the squares that their FID compares with."""
    source, out = tmp_path / "real", tmp_path / "squares"
    source.mkdir()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))
    image.save(source / "one.png")
    image.rotate(180).save(source / "two.png")
    assert crop(source, out, "--workers", "1") == 0
    # 21 of 64 columns are left of 16 rows, the middle 16 of them.
    expected = np.asarray(image.resize((21, 16), Image.Resampling.BILINEAR))[:, 2:18]
    np.testing.assert_array_equal(np.asarray(Image.open(out / "one.png")), expected)
    (out / "two.png").unlink()
    assert crop(source, out, "--workers", "1", "--filter", "bicubic") == 2
    assert "holds squares of another size, filter or image" in capsys.readouterr().err
    assert not (out / "two.png").exists()
    assert crop(source, tmp_path / "other", "--workers", "1", "--filter", "bicubic") == 0
    assert np.any(np.asarray(Image.open(tmp_path / "other" / "one.png")) != expected)


def test_what_cannot_be_used_is_one_line(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert crop(pictures, tmp_path / "out", "--size", "0") == 2
    assert "It must be at least 1" in capsys.readouterr().err
    assert crop(pictures, pictures) == 2
    assert "name another" in capsys.readouterr().err
    (pictures / "broken.png").write_bytes(b"no picture")
    assert crop(pictures, tmp_path / "out", "--workers", "1") == 2
    assert "broken.png' cannot be read" in capsys.readouterr().err
    (pictures / "wide.jpg").write_bytes(b"")
    assert crop(pictures, tmp_path / "out") == 2
    assert "2 images with the name 'wide'" in capsys.readouterr().err
