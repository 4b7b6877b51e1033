"""The data module: batches, order, faults, restarts."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import pytorch_lightning as lightning
import torch

from pbe.config import AugmentConfig, Config, DataConfig, SampleConfig
from pbe.data.datamodule import CounterSampler, TrainingData
from pbe.data.dataset import ExemplarDataset, usable_boxes
from pbe.data.samples import decode as reasons
from pbe.data.samples.crops import Box
from pbe.data.samples.decode import UnusableImageError
from pbe.data.shards.archive import ShardImages, ShardRecord, write_shards
from pbe.errors import UserError


def encode(image: np.ndarray, extension: str = ".jpg") -> bytes:
    return cv2.imencode(extension, cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1].tobytes()


def make_config(shards: Path, **changes: Any) -> DataConfig:
    settings: dict[str, Any] = {
        "image_size": 32,
        "exemplar_size": 24,
        "batch_size": 8,
        "num_workers": 0,
        "validation_shards": str(shards),
    }
    return DataConfig(train_shards=str(shards), **(settings | changes))


def make_module(shards: Path, seed: int = 3, **changes: Any) -> TrainingData:
    return TrainingData(Config(seed=seed, data=make_config(shards, **changes)))


def digest(batch: dict[str, Any]) -> tuple:
    """Return everything in a batch as comparable values."""
    arrays = tuple(batch[name].numpy().tobytes() for name in ("image", "mask", "exemplar", "valid"))
    return (*arrays, batch["sample_index"].tolist(), batch["key"], batch["counts"])


def test_batches_are_what_training_expects(shards):
    batch = next(iter(make_module(shards).train_dataloader()))
    shapes = {name: tuple(value.shape) for name, value in batch.items() if isinstance(value, torch.Tensor)}
    assert shapes == {
        "image": (8, 3, 32, 32),
        "mask": (8, 1, 32, 32),
        "exemplar": (8, 3, 24, 24),
        "valid": (8, 1, 32, 32),
        "sample_index": (8,),
    }
    assert {batch[name].dtype for name in ("image", "mask", "exemplar", "valid")} == {torch.uint8}
    assert batch["sample_index"].dtype == torch.int64
    assert set(batch["mask"].unique().tolist()) == {0, 255}
    assert all(key.startswith("scene-") for key in batch["key"])


def test_images_are_red_green_blue(tmp_path):
    image = np.zeros((40, 40, 3), np.uint8)
    image[:] = (250, 20, 20)
    write_shards([ShardRecord("red", encode(image), "jpg", 40, 40, [(10, 10, 30, 30)])], tmp_path)
    batch = next(iter(make_module(tmp_path, batch_size=1).train_dataloader()))
    assert batch["image"][0, :, 16, 16].tolist() == pytest.approx([250, 20, 20], abs=4)
    assert batch["exemplar"][0, :, 12, 12].tolist() == pytest.approx([250, 20, 20], abs=4)


def test_an_epoch_takes_every_image_once_in_an_order_of_its_own(shards):
    loader = make_module(shards, batch_size=10).train_dataloader()
    epochs = [[key for batch in loader for key in batch["key"]] for _ in range(3)]
    assert all(sorted(keys) == sorted(f"scene-{index}" for index in range(60)) for keys in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_the_counter_runs_on_through_epochs(shards):
    loader = make_module(shards, batch_size=10).train_dataloader()
    for epoch in range(2):
        counters = [index for batch in loader for index in batch["sample_index"].tolist()]
        assert counters == list(range(60 * epoch, 60 * epoch + 60))


def test_training_drops_the_last_short_batch_and_validation_keeps_it(shards):
    module = make_module(shards, batch_size=16)
    train, validation = module.train_dataloader(), module.val_dataloader()
    assert (len(train), len(list(train))) == (3, 3)
    assert (len(validation), [len(batch["key"]) for batch in validation]) == (4, [16, 16, 16, 12])


def test_workers_change_nothing(shards):
    def collect(workers: int) -> list[tuple]:
        loader = make_module(shards, num_workers=workers).train_dataloader()
        return [digest(batch) for _ in range(2) for batch in loader]

    alone = collect(0)
    assert alone == collect(2)
    assert alone[0] != alone[7]  # other draws in the next epoch


def test_the_seed_matters(shards):
    first, second = (digest(next(iter(make_module(shards, seed).train_dataloader()))) for seed in (1, 2))
    assert first != second


def test_validation_is_the_same_every_time_and_not_training_s(shards):
    module = make_module(shards)
    loader = module.val_dataloader()
    first, second = ([digest(batch) for batch in loader] for _ in range(2))
    assert first == second
    assert digest(next(iter(module.train_dataloader()))) != first[0]


def test_no_validation_shards(shards):
    assert make_module(shards, validation_shards="").val_dataloader() == []


def test_samples_do_not_depend_on_the_order_of_calls(shards):
    dataset = make_module(shards).dataset("train")
    forward = [dataset[index].sample.image.tobytes() for index in range(55, 75)]
    backward = [dataset[index].sample.image.tobytes() for index in reversed(range(55, 75))]
    assert forward == backward[::-1]


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 8), (2, 4), (4, 2)])
def test_ranks_share_a_global_batch(shards, world_size, batch_size):
    dataset = make_module(shards).dataset("train")
    ranks = []
    for rank in range(world_size):
        sampler = CounterSampler(dataset, batch_size, rank, world_size, drop_last=True)
        sampler.seek(2, 8)
        ranks.append(np.array(list(sampler)).reshape(-1, batch_size))
        assert len(sampler) == 7 * batch_size
    together = np.concatenate(ranks, axis=1)
    np.testing.assert_array_equal(together, 120 + np.arange(8, 56).reshape(-1, 8))


def test_ranks_take_equal_steps_without_dropping(shards):
    dataset = make_module(shards).dataset("validation")
    ranks = [list(CounterSampler(dataset, 8, rank, 2, drop_last=False)) for rank in range(2)]
    assert [len(rank) for rank in ranks] == [32, 32]
    assert set(ranks[0]) | set(ranks[1]) == set(range(60))


class Recorder(lightning.LightningModule):
    """Notes the counters of its batches."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[list[int]] = []

    def training_step(self, batch: dict[str, Any], index: int) -> torch.Tensor:
        self.seen.append(batch["sample_index"].tolist())
        return self.weight.square()

    def validation_step(self, batch: dict[str, Any], index: int) -> None: ...

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(shards: Path, steps: int, checkpoint: Path | None = None) -> tuple[Recorder, lightning.Trainer]:
    recorder = Recorder()
    trainer = lightning.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(recorder, datamodule=make_module(shards, batch_size=20), ckpt_path=checkpoint)
    return recorder, trainer


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stop", [2, 3, 4])
def test_a_resumed_run_takes_the_very_next_batch(shards, tmp_path, stop):
    """Three batches an epoch: the run stops inside the first, at its end, and inside the second."""
    whole, _ = fit(shards, 8)
    assert [counters[0] for counters in whole.seen] == [20 * index for index in range(8)]
    first, trainer = fit(shards, stop)
    trainer.save_checkpoint(tmp_path / "stopped.ckpt", weights_only=False)
    second, _ = fit(shards, 8, tmp_path / "stopped.ckpt")
    assert first.seen + second.seen == whole.seen


def test_a_resumed_run_may_use_another_batch_size(shards):
    module = make_module(shards, batch_size=20)
    loader = module.train_dataloader()
    next(iter(loader))
    assert module.state_dict() == {"epoch": 0, "samples": 20}
    other = make_module(shards, batch_size=10)
    other.load_state_dict(module.state_dict())
    assert next(iter(other.train_dataloader()))["sample_index"].tolist() == list(range(20, 30))


class RawRecord(ShardRecord):
    """A record whose annotation is not what it should be."""

    def annotation(self) -> dict[str, Any]:
        return {"boxes": [{"xyxy": "everywhere"}]}


@pytest.mark.parametrize(
    "annotation",
    [
        {"width": float("inf"), "height": 40, "boxes": []},
        {"width": 1e300, "height": 1e300, "boxes": [{"xyxy": [0, 0, 20, 20]}]},
        {"width": 40, "height": 40, "boxes": [{"xyxy": [0, 0, 10**400, 20]}]},
        {"width": 40, "height": 40, "boxes": [{"xyxy": [0, 0, 20]}]},
        {"width": 40, "height": 40, "boxes": 3},
        [],
    ],
    ids=str,
)
def test_annotations_that_make_no_sense_are_counted(tmp_path, monkeypatch, annotation):
    good = ShardRecord("good", encode(np.zeros((40, 40, 3), np.uint8)), "jpg", 40, 40, [(10, 10, 30, 30)])
    bad = RawRecord("bad", good.image, "jpg", 40, 40, [])
    monkeypatch.setattr(RawRecord, "annotation", lambda self: annotation)
    write_shards([good, bad], tmp_path)
    module = make_module(tmp_path, batch_size=2, max_bad_share=0.5)
    assert next(iter(module.train_dataloader()))["key"] == ["good", "good"]
    assert module.counts("train")[reasons.BAD_ANNOTATION] == 1


@pytest.mark.parametrize(("side", "event"), [(62.0, "shrunk"), (90.0, "padded")])
def test_adjusted_crops_are_counted(tmp_path, side, event):
    """A box hardly shorter than the short side grows beyond it; one that is longer fits no square."""
    picture = encode(np.zeros((64, 96, 3), np.uint8))
    boxes = [(3.0, 20.0, 3.0 + side, 40.0)]
    write_shards([ShardRecord(f"k{i}", picture, "jpg", 96, 64, boxes) for i in range(40)], tmp_path)
    module = make_module(tmp_path, batch_size=40)
    batch = next(iter(module.train_dataloader()))
    counts = module.counts("train")
    assert set(counts) == {event}
    assert counts[event] == 40 if event == "padded" else 20 < counts[event] <= 40
    padded = (batch["valid"] == 0).flatten(1).any(dim=1)
    assert padded.all() == (event == "padded")


def faulty_records(scenes: list) -> list[ShardRecord]:
    """Thirty good images and one of every fault."""
    records = []
    for index, scene in enumerate(scenes[:30]):
        height, width = scene.image.shape[:2]
        records.append(ShardRecord(f"good-{index}", encode(scene.image), "jpg", width, height, scene.boxes))
    image = scenes[0].image
    height, width = image.shape[:2]
    jpeg, box = encode(image), [(10.0, 10.0, 60.0, 60.0)]
    outside = [(-50.0, 5.0, -2.0, 60.0), (width + 1.0, 0.0, width + 90.0, 50.0)]
    return [
        *records,
        ShardRecord("corrupt", bytes(range(256)) * 20, "jpg", width, height, box),
        ShardRecord("truncated", jpeg[: len(jpeg) // 2], "jpg", width, height, box),
        ShardRecord("empty", b"", "jpg", width, height, box),
        ShardRecord("zero-area", jpeg, "jpg", width, height, [(10.0, 10.0, 10.0, 40.0)]),
        ShardRecord("inverted", jpeg, "jpg", width, height, [(40.0, 40.0, 10.0, 10.0)]),
        ShardRecord("not-a-number", jpeg, "jpg", width, height, [(float("nan"), 0.0, 40.0, 40.0)]),
        ShardRecord("outside", jpeg, "jpg", width, height, outside),
        ShardRecord("boxless", jpeg, "jpg", width, height, []),
        ShardRecord("one-pixel", encode(image[:1, :1], ".png"), "png", 1, 1, [(0.0, 0.0, 1.0, 1.0)]),
        ShardRecord("another-size", jpeg, "jpg", width + 5, height, box),
        ShardRecord("huge-box", jpeg, "jpg", width, height, [(0.0, 0.0, float(width), float(height))]),
        ShardRecord("small-box", jpeg, "jpg", width, height, [(5.0, 5.0, 8.0, 8.0)]),
        RawRecord("nonsense", jpeg, "jpg", width, height, box),
    ]


@pytest.fixture(scope="module")
def faulty(scenes, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("faulty")
    write_shards(faulty_records(scenes), folder)
    return folder


FAULTY_COUNTS = {
    reasons.UNREADABLE: 3,
    reasons.NO_BOX: 5,
    reasons.TINY: 1,
    reasons.SIZE_MISMATCH: 1,
    reasons.AREA: 2,
    reasons.BAD_ANNOTATION: 1,
}


@pytest.mark.parametrize("workers", [0, 2])
def test_faults_are_skipped_counted_and_replaced(faulty, workers, capfd):
    module = make_module(faulty, batch_size=43, max_bad_share=0.5, num_workers=workers)
    batches = list(module.train_dataloader())
    assert [len(batch["key"]) for batch in batches] == [43]
    assert all(key.startswith("good-") for batch in batches for key in batch["key"])
    counted = {name: count for name, count in module.counts("train").items() if name in FAULTY_COUNTS}
    assert counted == FAULTY_COUNTS


def test_counts_are_reported_at_the_end_of_the_epoch(faulty, caplog):
    with caplog.at_level("INFO", logger="pbe"):
        list(make_module(faulty, batch_size=43, max_bad_share=0.5).train_dataloader())
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1
    assert lines[0].startswith("train epoch 0: 43 images; no valid box: 5, unreadable image: 3")


def test_replacements_are_the_same_every_time_and_drawn_anew(faulty):
    def collect(workers: int) -> list[tuple]:
        loader = make_module(faulty, max_bad_share=0.5, num_workers=workers).train_dataloader()
        return [digest(batch) for batch in loader]

    assert collect(0) == collect(2)
    dataset = make_module(faulty).dataset("train")
    items = [dataset[index] for index in range(43)]
    doubles = [key for key, count in Counter(item.key for item in items).items() if count > 1]
    assert doubles
    images = [item.sample.mask.tobytes() + item.sample.exemplar.tobytes() for item in items]
    assert len(set(images)) == 43


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_faults_end_the_run_in_one_line(faulty, workers):
    loader = make_module(faulty, max_bad_share=0.1, num_workers=workers).train_dataloader()
    with pytest.raises(UserError, match="too many train images cannot be used") as caught:
        list(loader)
    assert "\n" not in str(caught.value)
    assert "data.max_bad_share" in str(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_no_usable_image_at_all_is_one_line(scenes, tmp_path, workers):
    write_shards(faulty_records(scenes)[-3:-1], tmp_path)  # only boxes of unwanted area
    with pytest.raises(UserError, match="no usable image") as caught:
        list(make_module(tmp_path, num_workers=workers).train_dataloader())
    assert "\n" not in str(caught.value)


def test_a_truncated_shard_is_a_clear_error_before_training(shards, tmp_path):
    whole = next(shards.glob("*.tar")).read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="truncated"):
        make_module(tmp_path).train_dataloader()


def test_a_shard_cut_while_in_use_counts_as_unreadable(scenes, tmp_path):
    path = write_shards(faulty_records(scenes)[:20], tmp_path)[0]
    module = make_module(tmp_path, batch_size=20, max_bad_share=1.0)
    loader = module.train_dataloader()
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert len(list(loader)) == 1
    assert module.counts("train")[reasons.UNREADABLE] >= 8


def test_boxes_are_clipped_and_filtered_by_area():
    config = DataConfig()
    boxes = [Box(-20, 10, 40, 50), Box(0, 0, 100, 100), Box(5, 5, 9, 9), Box(90, 90, 91.5, 100)]
    assert usable_boxes(boxes, 100, 100, config) == [Box(0, 10, 40, 50)]
    for box, reason in ((Box(0, 0, 100, 100), reasons.AREA), (Box(98.5, 0, 300, 50), reasons.NO_BOX)):
        with pytest.raises(UnusableImageError, match=reason):
            usable_boxes([box], 100, 100, config)


def test_every_box_of_an_image_gets_its_turn(tmp_path):
    image = np.zeros((64, 64, 3), np.uint8)
    image[:, :32], image[:, 32:] = (250, 0, 0), (0, 0, 250)
    record = ShardRecord("two", encode(image), "jpg", 64, 64, [(4, 20, 24, 40), (40, 20, 60, 40)])
    write_shards([record], tmp_path)
    config = make_config(tmp_path, sample=SampleConfig(augment=AugmentConfig(enabled=False)))
    dataset = ExemplarDataset(ShardImages(tmp_path), config, 1)
    reds = [dataset[epoch].sample.exemplar[12, 12, 0] > 128 for epoch in range(40)]
    assert 8 < sum(reds) < 32
