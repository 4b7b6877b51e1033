"""COCOEE's folders: built, checked, damaged; and the builder's rules."""

from __future__ import annotations

import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from pbe.data.packing.plan import held_out
from pbe.data.sources.annotations import Annotations
from pbe.data.sources.tables import read_csv
from pbe.errors import UserError
from pbe.evaluation.benchmark import build
from pbe.evaluation.benchmark.build import BuildSettings, build_benchmark, write_own_exemplars
from pbe.evaluation.benchmark.coco_ee import (
    SIZE,
    BenchmarkFolder,
    case_paths,
    find_problems,
    read_benchmark,
)
from tests.commands import build_benchmark as command
from tests.data.samples.test_colour import in_srgb, wide_gamut


def split(folder: Path, start: int, count: int) -> Annotations:
    """Images of a grey ground with one bright box; cats in even ones and dogs in odd ones."""
    folder.mkdir()
    lines = ["file,x1,y1,x2,y2,label"]
    for number in range(start, start + count):
        image = np.full((300, 400, 3), number % 100, np.uint8)
        image[100:180, 200:300] = 255 if number % 2 else 200
        cv2.imwrite(str(folder / f"{number:012d}.png"), image)
        lines += [
            f"{number:012d}.png,200,100,300,180,{'dog' if number % 2 else 'cat'}",
            f"{number:012d}.png,0,0,400,300,sky",
        ]
    (folder / "boxes.csv").write_text("\n".join(lines))
    return read_csv(folder / "boxes.csv", folder)


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> tuple[Annotations, Annotations]:
    folder = tmp_path_factory.mktemp("splits")
    return split(folder / "val", 1000, 8), split(folder / "train", 0, 6)


class Files:
    """The number and the three files of a case."""

    def __init__(self, folder: Path, number: int) -> None:
        self.number = number
        self.image, self.mask, self.exemplar = case_paths(folder, number)


def files_of(folder: Path, **options: object) -> list[Files]:
    return [Files(folder, number) for number in read_benchmark(folder, **options)]  # type: ignore[arg-type]


@pytest.fixture
def bench(splits: tuple[Annotations, Annotations], tmp_path: Path) -> Path:
    assert build_benchmark(*splits, tmp_path / "bench", BuildSettings(cases=5)) == 5
    return tmp_path / "bench"


def test_built_benchmark_is_whole_and_deterministic(
    splits: tuple[Annotations, Annotations], bench: Path, tmp_path: Path
) -> None:
    assert find_problems(bench) == []
    cases = read_benchmark(bench, pixels=True)
    assert len(cases) == 5
    build_benchmark(*splits, tmp_path / "again", BuildSettings(cases=5))
    files = [path.relative_to(bench) for path in sorted(bench.rglob("*.*"))]
    assert len(files) == 16
    assert all((bench / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in files)


def test_hole_and_exemplar_belong_together(bench: Path) -> None:
    for case in files_of(bench):
        image, exemplar = cv2.imread(str(case.image)), cv2.imread(str(case.exemplar))
        mask = cv2.imread(str(case.mask), cv2.IMREAD_GRAYSCALE)
        assert image.shape == (SIZE, SIZE, 3)
        wanted = 255 if case.number % 2 else 200
        inner = cv2.erode(mask, np.ones((15, 15), np.uint8)) > 0
        outer = cv2.dilate(mask, np.ones((15, 15), np.uint8)) == 0
        assert np.all(image[inner] == wanted), "the masked region lies on the object"
        assert np.all(image[outer] == case.number % 100)
        assert exemplar.shape == (80, 100, 3), "the exemplar is the object of another picture"
        assert np.all(exemplar == wanted), "and of the same label"
        assert (mask > 0).mean() <= 0.5


def test_list_of_what_is_missing(bench: Path) -> None:
    one, two, three, four, _ = files_of(bench)
    one.image.unlink()
    two.exemplar.write_bytes(b"junk")
    cv2.imwrite(str(three.image), np.zeros((256, 512, 3), np.uint8))
    cv2.imwrite(str(three.mask), np.full((SIZE, SIZE), 127, np.uint8))
    cv2.imwrite(str(four.mask), np.zeros((SIZE, SIZE), np.uint8))
    (bench / "Ref_3500" / "stray.png").write_bytes(b"")
    problems = find_problems(bench)
    assert problems == [
        f"GT_3500/{one.image.name} is missing",
        f"Ref_3500/{two.exemplar.name} cannot be read",
        f"{three.image.name} is 512 x 256, not 512 x 512",
        f"{three.mask.name} holds other values than 0 and 255",
        f"{four.mask.name} is all black",
        "Ref_3500 holds 1 files that id_list.npy does not name: stray.png ...",
    ]
    with pytest.raises(UserError, match=r"not a complete benchmark: GT_3500/.* is missing"):
        read_benchmark(bench)


def test_an_image_that_cannot_be_read_has_no_size(bench: Path) -> None:
    one = files_of(bench)[0]
    one.image.write_bytes(b"junk")
    assert find_problems(bench, size=0) == [f"GT_3500/{one.image.name} cannot be read"]


def test_folders_and_lists_that_are_none(tmp_path: Path) -> None:
    assert find_problems(tmp_path) == [
        "the folder GT_3500 is missing",
        "the folder Mask_bbox_3500 is missing",
        "the folder Ref_3500 is missing",
        "id_list.npy is missing",
    ]
    (tmp_path / "id_list.npy").write_bytes(b"junk")
    assert "is no list of numbers" in find_problems(tmp_path)[-1]
    np.save(tmp_path / "id_list.npy", np.array([1.0, np.inf]))
    assert "is no list of numbers" in find_problems(tmp_path)[-1]
    with (tmp_path / "id_list.npy").open("wb") as file:
        np.savez(file, ids=np.array([7]))
    assert "is no list of numbers (it is an archive" in find_problems(tmp_path)[-1]
    (tmp_path / "id_list.npy").write_bytes((tmp_path / "id_list.npy").read_bytes()[:60])
    assert "is no list of numbers" in find_problems(tmp_path)[-1]
    np.save(tmp_path / "id_list.npy", np.zeros(0, np.int64))
    assert find_problems(tmp_path)[-1] == "id_list.npy is empty: a benchmark without cases"
    np.save(tmp_path / "id_list.npy", np.array([7, 7]))
    assert "id_list.npy names 7 2 times" in find_problems(tmp_path)


def test_complaints_of_the_builder(splits: tuple[Annotations, Annotations], tmp_path: Path) -> None:
    sources, exemplars = splits
    with pytest.raises(UserError, match="share 8 images"):
        build_benchmark(sources, sources, tmp_path / "a", BuildSettings())
    with pytest.raises(UserError, match="only 8 of 9 cases"):
        build_benchmark(sources, exemplars, tmp_path / "b", BuildSettings(cases=9))
    with pytest.raises(UserError, match="take objects from its other images"):
        build_benchmark(sources, sources, tmp_path / "a", BuildSettings())
    with pytest.raises(UserError, match="at least 16"):
        build_benchmark(sources, exemplars, tmp_path / "a", BuildSettings(size=8))
    assert sorted(tmp_path.iterdir()) == [], "nothing is claimed, nothing is left"
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine.txt").write_text("kept")
    with pytest.raises(UserError, match="is not empty"):
        build_benchmark(sources, exemplars, tmp_path / "b", BuildSettings(cases=1))
    assert [path.name for path in tmp_path.rglob("*")] == ["b", "mine.txt"]


def test_what_is_in_the_way_is_counted(splits: tuple[Annotations, Annotations], tmp_path: Path) -> None:
    """The sky fills the whole image in all of them; no train object of 200 px is there."""
    sources, exemplars = splits
    with pytest.raises(UserError) as raised:
        build_benchmark(sources, exemplars, tmp_path / "a", BuildSettings(min_exemplar_side=200.0))
    assert "only 0 of 3500 cases could be made (" in str(raised.value)
    assert "box not 2% to 50% of the square crop: 8" in str(raised.value)
    assert "no object of the same label, 200 px or more, in another image: 8" in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_image_of_unknown_size_is_passed_over(tmp_path: Path) -> None:
    found = split(tmp_path / "all", 0, 6)
    (tmp_path / f"all/{2:012d}.png").write_bytes(b"junk")
    assert build_benchmark(found, None, tmp_path / "bench", BuildSettings(cases=0)) == 5
    with pytest.raises(UserError, match=r"only 5 of 6 cases could be made \(.*damaged.*: 1"):
        build_benchmark(found, None, tmp_path / "more", BuildSettings(cases=6))


def test_two_files_of_boxes_over_one_folder(tmp_path: Path) -> None:
    split(tmp_path / "all", 0, 8)
    header, *lines = (tmp_path / "all/boxes.csv").read_text().split("\n")
    parts = []
    for name, part in (("one", lines[:8]), ("two", lines[8:]), ("both", lines[6:])):
        (tmp_path / f"{name}.csv").write_text("\n".join([header, *part]))
        parts.append(read_csv(tmp_path / f"{name}.csv", tmp_path / "all"))
    assert build_benchmark(parts[0], parts[1], tmp_path / "bench", BuildSettings(cases=4)) == 4
    with pytest.raises(UserError, match="share 1 images"):
        build_benchmark(parts[0], parts[2], tmp_path / "other", BuildSettings(cases=4))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_interrupted_build_leaves_nothing_and_can_be_started_again(
    splits: tuple[Annotations, Annotations],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
) -> None:
    out = tmp_path / "bench"
    out.mkdir()
    write, written = build.write_case, []

    def fail(*arguments: object) -> None:
        if len(written) == 2:
            raise error
        written.append(write(*arguments))  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(build, "write_case", fail)
        with pytest.raises((KeyboardInterrupt, UserError), match=r"^$|cannot be written: No space left"):
            build_benchmark(*splits, out, BuildSettings(cases=5))
    assert [path.name for path in tmp_path.rglob("*")] == ["bench"]
    (tmp_path / ".bench.partial").mkdir()  # as a run leaves it that was killed
    (tmp_path / ".bench.partial" / "stray.png").write_bytes(b"half")
    assert build_benchmark(*splits, out, BuildSettings(cases=5)) == 5
    assert find_problems(out) == []
    assert [path.name for path in tmp_path.iterdir()] == ["bench"]


def test_as_many_as_there_are_at_another_size(
    splits: tuple[Annotations, Annotations], tmp_path: Path
) -> None:
    assert build_benchmark(*splits, tmp_path / "all", BuildSettings(cases=0, size=96)) == 8
    for case in files_of(tmp_path / "all", pixels=True, size=96):
        image = cv2.imread(str(case.image))
        mask = cv2.imread(str(case.mask), cv2.IMREAD_GRAYSCALE)
        # The box is 100 x 80 of a square of 300; the mask is what it touches.
        assert cv2.boundingRect(mask)[2:] in ((32, 26), (33, 26), (33, 27), (32, 27))
        inner = cv2.erode(mask, np.ones((5, 5), np.uint8)) > 0
        assert np.all(image[inner] == (255 if case.number % 2 else 200))


def test_one_annotation_file_gives_a_benchmark_of_its_own(
    splits: tuple[Annotations, Annotations], tmp_path: Path
) -> None:
    """Every exemplar is an object of the same label in another image."""
    folder = tmp_path / "mine"
    folder.mkdir()
    lines = ["file,x1,y1,x2,y2,label"]
    for number in range(6):
        image = np.full((200, 200, 3), 10, np.uint8)
        image[50:130, 40:140] = 40 * number + 20  # its own shade
        cv2.imwrite(str(folder / f"{number}.png"), image)
        lines += [f"{number}.png,40,50,140,130,{'only' if number == 5 else 'thing'}"]
    (folder / "boxes.csv").write_text("\n".join(lines))
    found = read_csv(folder / "boxes.csv", folder)
    assert build_benchmark(found, None, tmp_path / "bench", BuildSettings(cases=0)) == 5
    shades = {}
    for case in files_of(tmp_path / "bench", pixels=True):
        shades[case.number] = int(cv2.imread(str(case.exemplar))[40, 50, 0])
    assert set(shades) == {0, 1, 2, 3, 4}, "the only one of its label has no exemplar"
    assert all(shade != 40 * number + 20 for number, shade in shades.items())
    assert set(shades.values()) <= {20, 60, 100, 140, 180}
    with pytest.raises(UserError, match=r"only 5 of 6 cases .*no object of the same label"):
        build_benchmark(found, None, tmp_path / "more", BuildSettings(cases=6))


def test_images_that_packing_holds_out_make_a_benchmark(
    splits: tuple[Annotations, Annotations], tmp_path: Path
) -> None:
    sources, _ = splits
    names = sources.images["name"].to_list()
    wanted = {int(Path(name).stem) for name, out in zip(names, held_out(names, 0.5), strict=True) if out}
    settings = BuildSettings(cases=0, size=32)
    build_benchmark(sources, None, tmp_path / "bench", settings, validation_share=0.5)
    assert {case.number for case in files_of(tmp_path / "bench")} <= wanted
    with pytest.raises(UserError, match="holds none of 8 images out; take a larger one"):
        build_benchmark(sources, None, tmp_path / "none", settings, validation_share=1e-9)


def test_colours_are_those_that_training_sees(tmp_path: Path) -> None:
    """The images of a benchmark carry no profile, so that one of a source has to be applied."""
    folder, flat = tmp_path / "mine", np.full((64, 64, 3), (200, 100, 50), np.uint8)
    folder.mkdir()
    for number in range(2):
        Image.fromarray(flat).save(folder / f"{number}.png", icc_profile=wide_gamut())
    (folder / "boxes.csv").write_text("file,x1,y1,x2,y2,label\n0.png,8,8,40,40,a\n1.png,8,8,40,40,a")
    settings = BuildSettings(cases=0, size=32, min_exemplar_side=16)
    assert build_benchmark(read_csv(folder / "boxes.csv", folder), None, tmp_path / "bench", settings) == 2
    for case in files_of(tmp_path / "bench"):
        for path in (case.image, case.exemplar):
            pixels = np.asarray(Image.open(path))
            assert abs(pixels - in_srgb(flat)[: len(pixels), : len(pixels)]).max() < 2


def test_command_line(
    splits: tuple[Annotations, Annotations], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    val, train = (Path(found.images["path"][0]).parent for found in splits)
    bench = tmp_path / "bench"
    sources = ["--sources", f"csv:{val / 'boxes.csv'}", "--exemplars", f"csv:{train / 'boxes.csv'}"]
    assert command.main([*sources, "--out", str(bench), "--cases", "3"]) == 0
    assert command.main(["--check", str(bench)]) == 0
    assert "3 cases, all whole" in capsys.readouterr().out
    assert command.main(["--check", str(tmp_path)]) == 2
    assert "GT_3500 is missing" in capsys.readouterr().err
    assert command.main(["--out", "x"]) == 2
    assert command.main([*sources, "--out", str(tmp_path / "all"), "--cases", "all", "--size", "64"]) == 0
    assert command.main(["--check", str(tmp_path / "all"), "--size", "64"]) == 0
    assert "8 cases, all whole" in capsys.readouterr().out
    one = ["--sources", f"csv:{val / 'boxes.csv'}", "--out", str(tmp_path / "one")]
    assert command.main(one) == 0
    assert command.main(["--check", str(tmp_path / "one")]) == 0
    for wrong in (["--size", "0"], ["--size", "8"], ["--cases", "0"], ["--validation-share", "1"]):
        left = sorted(tmp_path.iterdir())
        assert command.main([*sources, "--out", str(tmp_path / "new"), *wrong]) == 2
        assert "at least" in (said := capsys.readouterr().err) or "between 0 and 1" in said
        assert sorted(tmp_path.iterdir()) == left


WORLD = ("--world", "w.npz")


@pytest.mark.parametrize(
    ("what", "option"),
    [
        (("--check", "a"), ("--cases", "all")), (("--check", "a"), ("--toy",)), (("--check", "a"), WORLD),
        (("--check", "a"), ("--exemplars", "csv:b")), (("--toy", "--out", "a"), ("--sources", "csv:b")),
        (("--toy", "--out", "a"), ("--sources-split", "train")),
        (("--sources", "csv:b", "--out", "a"), WORLD),
        (("--sources", "csv:b", "--out", "a"), ("--exemplars-split", "train")),
    ],
)  # fmt: skip
def test_an_option_that_would_be_ignored_is_refused(
    what: tuple[str, ...], option: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main([*what, *option]) == 2
    assert f"error: {option[0]} " in capsys.readouterr().err


def test_cases_are_the_same_but_for_the_exemplars(bench_files: Path, tmp_path: Path) -> None:
    assert write_own_exemplars(bench_files, tmp_path / "own", 48) == 7
    before, after = BenchmarkFolder(bench_files), BenchmarkFolder(tmp_path / "own")
    assert before.ids == after.ids
    assert before.sha256 != after.sha256
    for one, other in zip(before, after, strict=True):
        assert np.array_equal(one.image, other.image)
        assert np.array_equal(one.mask, other.mask)
        x, y, width, height = cv2.boundingRect(one.mask)
        part = one.image[y : y + height, x : x + width]
        larger = cv2.resize(part, (48, 48), interpolation=cv2.INTER_LINEAR)
        assert other.exemplar.shape == (48, 48, 3)
        assert np.array_equal(other.exemplar, larger)


def test_a_folder_that_holds_something_gets_no_own_exemplars(bench_files: Path, tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "mine.txt").write_text("kept")
    with pytest.raises(UserError, match="is not empty"):
        write_own_exemplars(bench_files, tmp_path / "own", 48)
    assert [file.name for file in (tmp_path / "own").iterdir()] == ["mine.txt"]


def test_a_damaged_case_leaves_no_benchmark_behind(bench_files: Path, tmp_path: Path) -> None:
    shutil.copytree(bench_files, tmp_path / "bad")
    next(iter(sorted((tmp_path / "bad" / "GT_3500").iterdir()))).write_bytes(b"no picture")
    with pytest.raises(UserError, match="cannot be read as an image"):
        write_own_exemplars(tmp_path / "bad", tmp_path / "own", 48)
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]
