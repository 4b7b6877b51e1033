"""Two processes, stopped and resumed, and one whose numbers are none: all ranks log and decide alike."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.programs import run_ranks
from tests.training.tiny import logged, tiny_config, weights, write_config

# One script for both ranks, so that each of them starts once for everything.
SCRIPT = """
import os, signal, sys
from pathlib import Path

import pytorch_lightning as pl
import torch
import pbe.training.setup as module
from pbe.config import load_config
from pbe.errors import UserError
from pbe.training.tasks.autoencoder import AutoencoderTask
from pbe.training.run import train

folder, rank = Path(sys.argv[1]), int(os.environ["LOCAL_RANK"])
torch.set_num_threads(1)


class Stop(pl.Callback):
    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == 3 and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def config(name, *more):
    return load_config(folder / "tiny.yaml", [f"output_dir={folder / name}", *more])


train(config("straight"))
# a stop in the middle of a row, the discriminator there since the last step, told to the second rank
callbacks = module._callbacks
module._callbacks = lambda *args: [Stop(), *callbacks(*args)]
first = train(config("stopped"))
module._callbacks = callbacks
print("stopped", first.stopped_by, first.steps, (folder / "stopped" / "model").exists(), flush=True)
train(config("stopped"))


class Late(pl.Callback):
    def __init__(self, step):
        self.step = step

    def on_validation_batch_start(self, trainer, *args):
        if trainer.global_step == self.step and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)


each = ("trainer.validate_every=1", "trainer.checkpoint_every=1", "trainer.max_steps=2")
for step in range(3):
    ended = train(config(f"late{step}", *each), [Late(step)])
    print("late", ended.stopped_by, ended.steps, flush=True)

original = AutoencoderTask.batch_loss


def broken(task, batch):
    loss = original(task, batch)
    return loss * float("nan") if rank == 1 and task.global_step == 1 else loss


AutoencoderTask.batch_loss = broken
for precision in ("16-mixed", "bf16-mixed"):
    for choice in ("skip", "stop"):
        wanted = (f"trainer.precision={precision}", f"trainer.on_nan={choice}", "trainer.max_steps=3")
        try:
            result = train(config(f"{precision}-{choice}", *wanted))
            print(precision, choice, "made", result.steps, flush=True)
        except UserError as error:
            print(precision, choice, error, flush=True)
"""
SETTINGS = (
    "task=autoencoder", "trainer.devices=2", "trainer.strategy=ddp", "trainer.max_steps=6", "logging.every=6",
    "autoencoder_loss.adversarial_weight=0.1", "autoencoder_loss.adversarial_start=2",
    "autoencoder_loss.discriminator_layers=2", "autoencoder_loss.discriminator_channels=16",
    "optimizer.gradient_clip=0.5", "data.batch_size=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def said(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The folder of the runs and what each rank said."""
    folder = tmp_path_factory.mktemp("ranks")
    write_config(folder / "tiny.yaml", tiny_config(shards, folder / "run", *SETTINGS))
    (folder / "script.py").write_text(SCRIPT)
    return folder, run_ranks(folder / "script.py", folder, told=folder)


def test_rows_of_a_resumed_run_are_those_of_an_uninterrupted_one(said):
    folder, texts = said
    assert texts[0].splitlines()[0].startswith("stopped 15 3"), texts[0]
    straight, resumed = logged(folder / "straight"), logged(folder / "stopped")
    assert [row[:2] for row in resumed] == [row[:2] for row in straight]
    assert {"train/discriminator", "train/gradient_norm"} <= {name for _, name, _ in straight}
    for (step, name, one), (_, _, other) in zip(straight, resumed, strict=True):
        assert float(other) == pytest.approx(float(one), rel=1e-12), (step, name)
    same, again = weights(folder / "straight" / "model"), weights(folder / "stopped" / "model")
    assert all(same[name].equal(again[name]) for name in same)


def test_a_signal_to_one_rank_while_all_validate_ends_all(said):
    for text in said[1]:
        assert [line for line in text.splitlines() if line.startswith("late")] == [
            f"late 15 {step}" for step in range(3)
        ]


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
def test_all_ranks_decide_together_about_the_numbers_of_one(said, precision: str):
    told = [[line for line in text.splitlines() if line.startswith(precision)] for text in said[1]]
    assert told[0] == told[1], "both ranks say the same"
    skipped, stopped = told[0]
    assert skipped == f"{precision} skip made 3"
    assert "the loss is nan at step 1 (samples 3 " in stopped, "of the second rank"
