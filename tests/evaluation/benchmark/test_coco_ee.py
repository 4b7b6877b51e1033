"""The toy benchmark as files, and a benchmark's folder read as cases."""

from __future__ import annotations

import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pbe.errors import UserError
from pbe.evaluation.benchmark.coco_ee import BenchmarkFolder
from pbe.evaluation.benchmark.edits import is_whole
from pbe.evaluation.benchmark.toy import export_toy_benchmark, make_case
from tests.commands import build_benchmark as command


@pytest.fixture
def bench(bench_files: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(bench_files, tmp_path / "bench"))


def test_exported_cases_are_the_benchmark_bit_for_bit(world, bench_files):
    folder = BenchmarkFolder(bench_files)
    assert folder.ids == [f"{index:012d}" for index in range(7)]
    for index in (0, 6):
        wanted, read = make_case(world, index, 0, 32, 48), folder[index]
        assert read.id == f"{index:012d}"
        for name in ("image", "mask", "exemplar"):
            np.testing.assert_array_equal(getattr(read, name), getattr(wanted, name))
    assert folder.sizes == [(32, 32)] * 7
    assert [case.id for case in folder[2:4]] == folder.ids[2:4]


def test_command_exports_and_checks_small_images(tmp_path, capsys):
    out = tmp_path / "toy"
    assert command.main(["--toy", "--out", str(out), "--cases", "2"]) == 0
    assert BenchmarkFolder(out)[1].image.shape == (64, 64, 3)
    assert command.main(["--check", str(out), "--size", "0"]) == 0
    assert command.main(["--check", str(out), "--size", "64"]) == 0
    assert command.main(["--check", str(out)]) == 2
    assert "64 x 64, not 512 x 512" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--toy"], "or --toy and --out"),
        (["--toy", "--out", "OUT", "--sources", "coco:a@b"], "--sources does not go with --toy"),
        (["--toy", "--out", "OUT", "--cases", "999"], "999 benchmark objects"),
        (["--toy", "--out", "OUT", "--cases", "0"], "at least 1"),
        (["--toy", "--out", "OUT", "--size", "4"], "at least 16"),
        (["--check", "OUT", "--size", "-1"], "for --size. It must be at least 0"),
    ],
)
def test_bad_options_of_the_export(tmp_path, capsys, arguments, message):
    out = str(tmp_path / "out")
    assert command.main([out if each == "OUT" else each for each in arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_in_use_is_not_exported_into(world, bench):
    with pytest.raises(UserError, match="not empty"):
        export_toy_benchmark(world, bench)


def test_hash_names_images_and_their_places(bench, bench_files):
    first = BenchmarkFolder(bench_files).sha256
    assert BenchmarkFolder(bench).sha256 == first
    one, two = (bench / "Ref_3500" / f"{index:012d}_ref.png" for index in (0, 1))
    content = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(content)
    assert BenchmarkFolder(bench).sha256 != first


def test_bad_files_are_named(bench):
    folder = BenchmarkFolder(bench)
    (bench / "Ref_3500" / "000000000000_ref.png").write_bytes(b"no picture")
    Image.new("L", (32, 32)).save(bench / "Mask_bbox_3500" / "000000000001_mask.png")
    Image.new("L", (16, 32), 255).save(bench / "Mask_bbox_3500" / "000000000002_mask.png")
    for index, message in ((0, "000000000000_ref.png' cannot be read"), (1, "is black"), (2, "16 x 32")):
        with pytest.raises(UserError, match=message):
            folder[index]
    content = (bench / "GT_3500" / "000000000004_GT.png").read_bytes()
    claimed = b"IHDR" + struct.pack(">II", 30_000, 30_000) + content[24:29]  # the size, and its checksum
    huge = content[:12] + claimed + struct.pack(">I", zlib.crc32(claimed)) + content[33:]
    (bench / "GT_3500" / "000000000004_GT.png").write_bytes(huge)
    for read in (lambda: folder[4], lambda: folder.sizes):
        with pytest.raises(
            UserError, match=r"000000000004_GT\.png' cannot be read as an image: .*exceeds limit"
        ):
            read()
    assert not is_whole(bench / "GT_3500" / "000000000004_GT.png", (30_000, 30_000))
    (bench / "GT_3500" / "000000000003_GT.png").unlink()
    with pytest.raises(UserError, match=r"000000000003_GT\.png is missing"):
        BenchmarkFolder(bench)
    np.save(bench / "id_list.npy", np.zeros(0, np.int64))
    with pytest.raises(UserError, match="without cases"):
        BenchmarkFolder(bench)
