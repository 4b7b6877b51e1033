"""The contact sheet: what training sees, with everything that led to it, the same for the same seed."""

from __future__ import annotations

import base64
import re

import cv2
import numpy as np
import pytest

from pbe.config import DataConfig
from pbe.data.dataset import ExemplarDataset
from pbe.data.preview import COLUMNS, make_row
from pbe.data.shards.archive import ShardImages, ShardRecord, write_shards
from tests.commands import inspect as inspect_data


@pytest.fixture
def config(shards, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "model: {image_size: 64, autoencoder: {channel_mult: [1, 2]}, exemplar_encoder: {image_size: 32}}\n"
        f"data: {{train_shards: '{shards}', image_size: 64, exemplar_size: 32}}\n"
    )
    return path


def pages(config, tmp_path, *options: str) -> str:
    out = tmp_path / "out" / "page.html"
    assert inspect_data.main([str(config), *options, "--out", str(out), "--count", "4"]) == 0
    return out.read_text()


def test_same_seed_same_page_and_nothing_from_outside(config, tmp_path, capsys):
    first = pages(config, tmp_path)
    assert first == pages(config, tmp_path)
    assert first != pages(config, tmp_path, "seed=4")
    assert first != pages(config, tmp_path, "--epoch", "1")
    assert "http" not in first.replace("data:image", "")
    assert len(re.findall("<img", first)) == 4 * len(COLUMNS)
    assert all(f"<th>{name}</th>" in first for name in COLUMNS)
    encoded = re.findall(r"base64,([^\"]+)", first)
    pictures = [cv2.imdecode(np.frombuffer(base64.b64decode(text), np.uint8), 1) for text in encoded]
    assert all(picture is not None for picture in pictures)


def test_rows_show_the_very_samples_of_training(shards):
    data = DataConfig(train_shards=str(shards), image_size=64, exemplar_size=32)
    dataset = ExemplarDataset(ShardImages(shards), data, 23)
    kinds = set()
    for index in (0, 7, 61, 62):
        item, row = dataset[index], make_row(dataset, index, 4)
        tiles = dict(zip(COLUMNS, row.tiles, strict=True))
        assert row.key == item.key
        np.testing.assert_array_equal(tiles["target"], item.sample.image)
        np.testing.assert_array_equal(tiles["augmented"], item.sample.exemplar)
        np.testing.assert_array_equal(tiles[row.mask_kind], item.sample.mask)
        hole = item.sample.mask > 0
        assert (tiles["masked image"][hole] == 128).all()
        np.testing.assert_array_equal(tiles["masked image"][~hole], item.sample.image[~hole])
        kinds.add(row.mask_kind)
    assert kinds == {"rectangle", "arbitrary"}


def test_the_latent_mask_is_the_mean_of_the_middle_of_each_block(shards):
    data = DataConfig(train_shards=str(shards), image_size=64, exemplar_size=32)
    dataset = ExemplarDataset(ShardImages(shards), data, 23)
    tiles = dict(zip(COLUMNS, make_row(dataset, 3, 8).tiles, strict=True))
    keep = 255.0 - dataset[3].sample.mask.reshape(8, 8, 8, 8)[:, 3:5, :, 3:5].mean(axis=(1, 3))
    np.testing.assert_allclose(tiles["latent mask"][::8, ::8], keep, atol=1)


def test_skipped_images_are_named(tmp_path):
    picture = cv2.imencode(".png", np.zeros((40, 40, 3), np.uint8))[1].tobytes()
    box = [(10.0, 10.0, 30.0, 30.0)]
    records = [ShardRecord(f"bad-{i}", b"none", "png", 40, 40, box) for i in range(3)]
    write_shards(records, tmp_path)
    data = DataConfig(train_shards=str(tmp_path), image_size=32, exemplar_size=32)
    row = make_row(ExemplarDataset(ShardImages(tmp_path), data, 1), 0, 4)
    assert (row.key, row.tiles) == ("", [])
    assert row.notes[-1] == "no usable image found"
    write_shards([*records, ShardRecord("good", picture, "png", 40, 40, box)], tmp_path)
    dataset = ExemplarDataset(ShardImages(tmp_path), data, 1)
    rows = [make_row(dataset, index, 4) for index in range(4)]
    assert {row.key for row in rows} == {"good"}
    assert sum("skipped: unreadable image" in row.notes for row in rows) == 3


def test_the_count_is_that_of_the_page(config, shards, tmp_path, capsys):
    out = tmp_path / "page.html"
    assert inspect_data.main([str(config), "--out", str(out), "--count", "1000"]) == 0
    assert f"{len(ShardImages(shards))} samples in" in capsys.readouterr().out
    assert out.read_text().count('<td class="note">') == len(ShardImages(shards))


def test_a_failed_start_makes_no_folder(config, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    command = [str(config), "--out", str(tmp_path / "new" / "page.html"), "data.train_shards=nowhere"]
    assert inspect_data.main(command) == 2
    assert inspect_data.main([str(config), "--out", str(tmp_path), "--count", "1"]) == 2
    assert sorted(tmp_path.rglob("*")) == before
    assert "it is a folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--count", "0"], "--count"), (["--epoch", "-1"], "--epoch"), (["data.nothing=1"], "unknown key")],
)
def test_mistakes_are_one_line(config, capsys, options, message):
    assert inspect_data.main([str(config), *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
