"""The index beside shards: the same images as without it, O(shards) to open, faults counted."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pbe.config import Config, DataConfig
from pbe.data.datamodule import TrainingData
from pbe.data.dataset import ExemplarDataset
from pbe.data.samples import decode as reasons
from pbe.data.shards.archive import ShardImages
from pbe.data.shards.format import DamagedIndexError
from pbe.data.shards.index import IndexFile, LocalFiles
from pbe.errors import UserError
from tests.data.indexed import blake, index_bytes, index_folder, shard_columns


def config_for(folder: Path, **changes: Any) -> DataConfig:
    settings: dict[str, Any] = {"image_size": 32, "exemplar_size": 24, "batch_size": 10, "num_workers": 0}
    return DataConfig(train_shards=str(folder), **(settings | changes))


@pytest.fixture
def indexed(shards: Path, tmp_path: Path) -> Path:
    return index_folder(Path(shutil.copytree(shards, tmp_path / "indexed")))


def epoch(folder: Path, **changes: Any) -> tuple[list[str], dict[str, int]]:
    module = TrainingData(Config(seed=3, data=config_for(folder, **changes)))
    keys = [key for batch in module.train_dataloader() for key in batch["key"]]
    return keys, dict(module.counts("train"))


def faults(counts: dict[str, int]) -> dict[str, int]:
    return {name: count for name, count in counts.items() if name in reasons.FAULTS}


def test_the_index_changes_nothing_but_the_opening(shards, indexed):
    plain, quick = ShardImages(shards), ShardImages(indexed)
    for row, same in zip(plain, quick, strict=True):
        assert (row.key, row.image, row.annotation) == (same.key, same.image, same.annotation)
    assert [plain.annotation(i) for i in range(60)] == [quick.annotation(i) for i in range(60)]
    samples = [ExemplarDataset(pictures, config_for(shards), 3) for pictures in (plain, quick)]
    for index in (0, 17, 59, 60):
        first, second = (dataset[index] for dataset in samples)
        assert first.key == second.key
        assert first.sample.image.tobytes() == second.sample.image.tobytes()
        assert first.sample.exemplar.tobytes() == second.sample.exemplar.tobytes()
        assert first.sample.box == second.sample.box


def test_opening_reads_the_list_of_shards_only(indexed):
    for path in indexed.iterdir():
        if path.name != "shards.json":
            path.unlink()
    assert len(ShardImages(indexed, count_boxes=True)) == 60


@pytest.mark.parametrize("pattern", ["*-000001.tar", "shard-{000001..000001}.tar", "shard-000001.tar"])
def test_a_choice_of_shards_uses_the_index_too(indexed, pattern):
    whole = ShardImages(indexed)
    chosen = ShardImages(f"{indexed}/{pattern}")
    assert next(iter(chosen)).key == whole[25].key
    assert len(chosen) == 25
    assert chosen.row(3).boxes is not None


def test_rows_survive_being_sent_to_workers(indexed):
    pictures = ShardImages(indexed)
    pictures.image(40)
    sent = pickle.loads(pickle.dumps(pictures))
    assert sent.image(40) == pictures.image(40)
    assert len(pickle.dumps(pictures)) < 5000


def test_few_files_stay_open(indexed):
    files = LocalFiles(limit=2)
    for path in sorted(indexed.glob("*.tar")) * 2:
        assert len(files.read(str(path), 0, 512)) == 512
        assert len(files._open) <= 2


def test_positions_out_of_range(indexed):
    pictures = ShardImages(indexed)
    assert pictures[-1].key == pictures[59].key
    assert [entry.key for entry in pictures[57:]] == [pictures[i].key for i in (57, 58, 59)]
    with pytest.raises(IndexError):
        pictures.row(60)


@pytest.mark.parametrize("with_index", [True, False])
def test_every_box_gets_its_turn_once_an_epoch(shards, indexed, with_index):
    folder = indexed if with_index else shards
    wide = {"min_box_area": 0.0, "max_box_area": 1.0, "boxes": "every", "batch_size": 1}
    dataset = TrainingData(Config(seed=3, data=config_for(folder, **wide))).dataset("train")
    boxes = [len(dataset.images.annotation(i)["boxes"]) for i in range(60)]
    assert len(dataset) == sum(boxes) == dataset.images.box_count
    owners = [dataset.images.owner(box) for box in range(len(dataset))]
    assert owners == [(picture, number) for picture in range(60) for number in range(boxes[picture])]
    for number in (0, 1):
        turns = [dataset._turn(number, position) for position in range(len(dataset))]
        assert sorted(turns) == list(range(len(dataset)))
    assert turns != sorted(turns)
    annotated, box, _ = dataset.choose(5, 0)
    picture, row = owners[5]
    assert annotated.key == dataset.images[picture].key
    assert [box.x1, box.y1] == dataset.images.annotation(picture)["boxes"][row]["xyxy"][:2]


def test_every_box_order_is_the_same_with_and_without_index(shards, indexed):
    assert epoch(shards, boxes="every") == epoch(indexed, boxes="every")


def test_boxes_of_unwanted_area_are_counted_when_every_box_has_its_turn(indexed):
    keys, counts = epoch(indexed, boxes="every", min_box_area=0.06)
    every = TrainingData(Config(seed=3, data=config_for(indexed, boxes="every")))
    assert len(keys) == every.length // 10 * 10
    assert counts[reasons.AREA] > 0


def test_a_vanished_shard_is_skipped_and_counted(indexed):
    (indexed / "shard-000002.tar").unlink()
    keys, counts = epoch(indexed, max_bad_share=0.2)
    assert faults(counts) == {reasons.MISSING_SHARD: 10}
    assert len(keys) == 60
    with pytest.raises(UserError, match=r"too many train images.*missing shard"):
        epoch(indexed, max_bad_share=0.1)


def test_a_truncated_tar_loses_only_what_is_gone(indexed):
    path = indexed / "shard-000000.tar"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    _, counts = epoch(indexed, max_bad_share=0.5)
    assert set(faults(counts)) == {reasons.UNREADABLE}
    assert 8 <= counts[reasons.UNREADABLE] <= 16


def test_verify_finds_damage_that_still_decodes(indexed):
    pictures = ShardImages(indexed)
    entry = pictures[3]
    path = indexed / "shard-000000.tar"
    data = bytearray(path.read_bytes())
    # A byte in the middle of the entropy-coded data; the end marker stays.
    place = entry.image[0] + entry.image[1] * 3 // 4
    data[place] ^= 0x10
    path.write_bytes(data)
    assert faults(epoch(indexed)[1]) == {}
    assert faults(epoch(indexed, verify=True)[1]) == {reasons.DAMAGED: 1}


def test_verify_checks_the_hash_of_the_index(indexed):
    path = indexed / "shard-000002.index.npz"
    columns = shard_columns(indexed / "shard-000002.tar")
    columns["boxes"] = columns["boxes"] * 0.999
    path.write_bytes(index_bytes(columns))
    assert faults(epoch(indexed)[1]) == {}
    assert faults(epoch(indexed, verify=True, max_bad_share=0.5)[1]) == {reasons.BAD_INDEX: 10}


@pytest.mark.parametrize("damage", ["text", "cut", "compressed", "fewer", "column", "missing", "ends"])
@pytest.mark.parametrize("boxes", ["one", "every"])
def test_damaged_indexes_are_counted(indexed, damage, boxes):
    path = indexed / "shard-000002.index.npz"
    whole, columns = path.read_bytes(), shard_columns(indexed / "shard-000002.tar")
    if damage == "text":
        path.write_text("not an index" * 100)
    elif damage == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    elif damage == "compressed":
        with path.open("wb") as file:
            np.savez_compressed(file, **columns)
    elif damage == "fewer":
        path.write_bytes(index_bytes({name: values[:4] for name, values in columns.items()}))
    elif damage == "column":
        path.write_bytes(index_bytes({name: columns[name] for name in columns if name != "boxes"}))
    elif damage == "ends":
        path.write_bytes(index_bytes(columns | {"box_end": columns["box_end"] + 10**6}))
    else:
        path.unlink()
    _, counts = epoch(indexed, boxes=boxes, max_bad_share=0.5)
    found = faults(counts)
    expected = reasons.MISSING_SHARD if damage == "missing" else reasons.BAD_INDEX
    assert set(found) == {expected}
    assert boxes == "every" or found[expected] == 10


def test_keys_of_any_script(indexed):
    columns = shard_columns(indexed / "shard-000002.tar")
    keys = [f"bild {number} ü 猫".encode() for number in range(10)]
    columns |= {"key_bytes": np.frombuffer(b"".join(keys), np.uint8)}
    columns |= {"key_end": np.cumsum([len(key) for key in keys])}
    path = indexed / "other.npz"
    path.write_bytes(index_bytes(columns))
    rows = IndexFile(str(path), 10, LocalFiles(), blake(path.read_bytes()).hex())
    assert [rows.row(number).key for number in range(10)] == [key.decode() for key in keys]
    path.write_bytes(index_bytes(columns | {"key_bytes": columns["key_bytes"] | 0x80}))
    with pytest.raises(DamagedIndexError, match="not UTF-8"):
        IndexFile(str(path), 10, LocalFiles()).row(0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ({"format": "other"}, "not the list"),
        ({"version": 7}, "of version 7, not 1"),
        ({"shards": [{"name": "a.tar"}]}, "is damaged"),
        ({"shards": []}, "hold no images"),
    ],
    ids=str,
)
def test_a_list_of_shards_that_makes_no_sense_is_one_line(indexed, change, message):
    path = indexed / "shards.json"
    path.write_text(change if isinstance(change, str) else json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message) as caught:
        ShardImages(indexed)
    assert "\n" not in str(caught.value)
