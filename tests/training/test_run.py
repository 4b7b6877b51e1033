"""What a training run logs, writes and refuses."""

from __future__ import annotations

import math
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
import wandb

from pbe.checkpoints.native import load_model
from pbe.config import load_config
from pbe.errors import UserError
from pbe.training.resume.files import find_checkpoint
from pbe.training.setup import build_model
from tests.training.tiny import Watch, checkpoint, differing, logged, run, send, tiny_config, weights

VALIDATION = ["val/loss", *(f"val/loss_t{t}" for t in (100, 300, 500, 700, 900)), "val/loss_band"]


@pytest.mark.parametrize(("length", "expected"), [(6, [0, 3, 6]), (7, [0, 3, 6, 7]), (2, [0, 2])])
def test_every_validation_is_logged_once_under_its_step(shards, autoencoder, tmp_path, length, expected):
    settings = [f"trainer.max_steps={length}", "trainer.validate_every=3", "logging.every=2"]
    run(tiny_config(shards, tmp_path, autoencoder, *settings))
    counted = Counter((step, name) for step, name, _ in logged(tmp_path, "val/"))
    assert counted == {(step, name): 1 for step in expected for name in VALIDATION}
    rows = logged(tmp_path, "train/")
    training = [(step, name) for step, name, _ in rows if not name.startswith("train/loss_quarter")]
    names = ["train/loss", "train/loss_simple", "train/gradient_norm", "train/learning_rate"]
    assert training == [(step, name) for step in range(2, length + 1, 2) for name in names]


def test_the_validation_does_not_depend_on_the_batches_it_comes_in(shards, autoencoder, tmp_path):
    settings = ["trainer.max_steps=1", "trainer.validation_samples=5", "optimizer.learning_rate=0"]
    values = []
    for size in (2, 3, 8):
        run(tiny_config(shards, tmp_path / str(size), autoencoder, *settings, f"data.batch_size={size}"))
        rows = logged(tmp_path / str(size), "val/")
        values.append([float(value) for step, _, value in rows if step == 0])
    assert len(values[0]) == len(VALIDATION)
    assert values[1] == pytest.approx(values[0], rel=1e-5)
    assert values[2] == pytest.approx(values[0], rel=1e-5)


def test_training_losses_are_means_over_everything_since_the_last_row(shards, autoencoder, tmp_path):
    settings = [
        autoencoder,
        "trainer.max_steps=6",
        "optimizer.learning_rate=0",
        "objective.weighting=min_snr",
    ]
    run(tiny_config(shards, tmp_path / "each", *settings))
    run(tiny_config(shards, tmp_path / "third", *settings, "logging.every=3"))
    for name in ("train/loss", "train/loss_simple"):
        each = [float(value) for _, _, value in logged(tmp_path / "each", name) if _ == name]
        third = [float(value) for _, _, value in logged(tmp_path / "third", name) if _ == name]
        assert third == pytest.approx([sum(each[:3]) / 3, sum(each[3:]) / 3], rel=1e-12)
    quarters = [float(v) for step, name, v in logged(tmp_path / "third", "train/loss_quarter") if step == 3]
    simple = [float(v) for step, name, v in logged(tmp_path / "third", "train/loss_simple") if step == 3]
    assert min(quarters) < simple[0] < max(quarters)


def test_steps_count_optimizer_steps_not_micro_batches(shards, autoencoder, tmp_path):
    settings = ["trainer.max_steps=4", "trainer.accumulate=2", "trainer.validate_every=2"]
    run(tiny_config(shards, tmp_path, autoencoder, *settings))
    assert [step for step, _, _ in logged(tmp_path, "val/loss_t100")] == [0, 2, 4]
    assert [step for step, _, _ in logged(tmp_path, "train/loss_simple")] == [1, 2, 3, 4]


def test_a_length_in_epochs_is_whole_steps_of_the_data(shards, autoencoder, tmp_path):
    settings = [autoencoder, "trainer.max_steps=0", "trainer.max_epochs=2", "data.batch_size=3"]
    result = run(
        tiny_config(shards, tmp_path, *settings, "optimizer.decay=cosine", "optimizer.warmup_steps=0")
    )
    assert result.steps == 2 * (8 // 3)
    rates = [float(value) for _, _, value in logged(tmp_path, "train/learning_rate")]
    assert rates == pytest.approx([1e-3 * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)])
    assert load_config(tmp_path / "config.yaml").trainer.max_epochs == 2
    longer = run(tiny_config(shards, tmp_path, *settings, "trainer.max_epochs=3"))
    assert longer.steps == 6


def test_few_batches_that_fill_no_whole_step_end_an_epoch_with_a_short_one(shards, autoencoder, tmp_path):
    settings = ["trainer.max_steps=0", "trainer.max_epochs=2", "trainer.accumulate=2", "data.batch_size=1"]
    watch = Watch()
    config = tiny_config(shards, tmp_path, autoencoder, *settings, "trainer.overfit_batches=3")
    assert run(config, watch).steps == 4
    assert len(watch.losses) == 6


def test_shards_that_cannot_be_read_leave_no_folder(shards, autoencoder, tmp_path):
    for stream in ("train", "validation"):
        config = tiny_config(shards, tmp_path / "run", autoencoder, f"data.{stream}_shards={tmp_path}")
        with pytest.raises(UserError, match=r"no shards \(\.tar\) found"):
            run(config)
        assert not (tmp_path / "run").exists()


def test_the_logged_learning_rate_is_that_of_the_step(shards, autoencoder, tmp_path):
    settings = ["optimizer.learning_rate=1.0", "optimizer.warmup_steps=2", "optimizer.gradient_clip=1e-9"]
    run(tiny_config(shards, tmp_path, autoencoder, *settings))
    rates = [float(value) for _, _, value in logged(tmp_path, "train/learning_rate")]
    assert rates == pytest.approx([1e-6, 0.5000005, 1.0])


def test_the_validation_is_the_same_whatever_was_trained_before(shards, autoencoder, tmp_path):
    settings = ["optimizer.learning_rate=0", "trainer.max_steps=4", "trainer.validate_every=2"]
    run(tiny_config(shards, tmp_path, autoencoder, *settings))
    values = {value for _, _, value in logged(tmp_path, "val/loss_t500")}
    assert len(values) == 1


def test_without_validation_shards_training_goes_without_validation(shards, autoencoder, tmp_path):
    result = run(tiny_config(shards, tmp_path, autoencoder, "data.validation_shards=''"))
    assert result.steps == 3
    assert logged(tmp_path, "val/") == []
    assert (result.model_dir / "config.json").is_file()


def test_the_export_is_the_average_of_the_trained_networks(finished):
    saved, model = checkpoint(finished), load_model(finished / "model")
    exported = {f"model.{name}": value for name, value in model.state_dict().items()}
    expected = saved["state_dict"] | saved["ema"]
    assert differing(expected, exported) == []
    assert any(name.startswith("model.unet.") for name in differing(saved["state_dict"], exported))


def test_the_configuration_lies_beside_the_run(finished, shards, autoencoder):
    config = tiny_config(shards, finished, autoencoder)
    kept = load_config(finished / "config.yaml")
    assert (kept.trainer, kept.data, kept.autoencoder_from) == (
        config.trainer,
        config.data,
        config.autoencoder_from,
    )
    # but the autoencoder's section is that of the weights that were used
    assert kept.model == load_model(finished / "model").config


def test_init_from_starts_with_all_weights_of_a_model(finished, shards, tmp_path):
    settings = [f"init_from={finished / 'model'}", "optimizer.learning_rate=0", "optimizer.ema_decay=0"]
    second = run(tiny_config(shards, tmp_path / "b", *settings))
    assert differing(weights(finished / "model"), weights(second.model_dir)) == []
    other = tiny_config(shards, tmp_path / "c", *settings, "model.unet.model_channels=40")
    with pytest.raises(UserError, match="model section of the configuration differs from that of init_from"):
        run(other)


def test_a_model_trained_without_exemplars_starts_both_kinds_of_condition(shards, autoencoder, tmp_path):
    base = ["optimizer.weight_decay=0", "model.exemplar_encoder.pooled_stages=true"]
    base.append("model.exemplar_encoder.token_grid=2")
    prior = run(tiny_config(shards, tmp_path / "a", autoencoder, *base, "objective.drop_probability=1.0"))
    fresh = run(tiny_config(shards, tmp_path / "b", autoencoder, *base, "optimizer.learning_rate=0"))
    moved = differing(weights(prior.model_dir), weights(fresh.model_dir))
    assert any(name.startswith("unet.") for name in moved)
    # nothing but the null condition of the exemplar encoder has learnt anything
    assert {name for name in moved if name.startswith("exemplar")} == {"exemplar_encoder.null_condition"}

    start = [f"init_from={prior.model_dir}", *base]
    for tokens in ("class", "all"):
        wanted = f"model.exemplar_encoder.tokens={tokens}"
        settings = [*start, wanted, "objective.drop_probability=0"]
        still = run(tiny_config(shards, tmp_path / f"{tokens}-0", *settings, "optimizer.learning_rate=0"))
        assert differing(weights(prior.model_dir), weights(still.model_dir)) == []
        assert load_model(still.model_dir).config.exemplar_encoder.tokens == tokens
        result = run(tiny_config(shards, tmp_path / tokens, *settings))
        moved = differing(weights(prior.model_dir), weights(result.model_dir))
        assert any("mapper" in name for name in moved)
        assert any(".attn2.to_q." in name for name in moved) == (tokens == "all")


def test_a_start_without_a_learned_pooling_is_given_one_that_changes_nothing_yet(finished, shards, tmp_path):
    start = [f"init_from={finished / 'model'}", "optimizer.ema_decay=0", "trainer.max_steps=2"]
    pooled = [*start, "model.exemplar_encoder.layout_grid=2", "model.exemplar_encoder.layout_width=8"]
    for name, settings in (("plain", start), ("pooled", pooled)):
        run(tiny_config(shards, tmp_path / name, *settings))
    first = [logged(tmp_path / name, "train/loss")[0] for name in ("plain", "pooled")]
    assert first[0] == first[1]
    layout = load_model(tmp_path / "pooled" / "model").exemplar_encoder.layout
    assert layout is not None
    assert layout.gather.weight.any()


def test_a_signal_during_the_first_validation_ends_before_training(shards, autoencoder, tmp_path):
    watch = Watch(0, send(signal.SIGINT), "on_validation_start")
    result = run(tiny_config(shards, tmp_path, autoencoder), watch)
    assert (result.steps, result.stopped_by) == (0, signal.SIGINT)
    assert not (tmp_path / "checkpoints").exists()


def test_weights_and_biases_writes_into_the_run_without_a_network(shards, autoencoder, tmp_path, monkeypatch):
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nothing listens there
    settings = ["logging.loggers=[csv,wandb]", "logging.wandb_mode=offline", "logging.grid_every=3"]
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        run(tiny_config(shards, folder, autoencoder, *settings))
        assert wandb.run is None, "the next run of this process would go on writing into it"
    ids = [(folder / "wandb_id").read_text().strip() for folder in folders]
    assert ids[0] != ids[1]
    for folder, mark in zip(folders, ids, strict=True):
        (made,) = (folder / "wandb").glob("offline-run-*")
        assert made.name.endswith(f"-{mark}")
        (record,) = made.glob("run-*.wandb")
        names = [b"train/loss_simple", b"val/loss_t500", b"trainer/global_step"]
        deadline = time.monotonic() + 30  # W&B's own process may still be writing
        while time.monotonic() < deadline and not all(name in record.read_bytes() for name in names):
            time.sleep(0.1)
        assert [name for name in names if name not in record.read_bytes()] == []
        assert len(list(made.glob("files/media/images/samples_*.png"))) == 1
    assert not Path("wandb").exists()


def test_resume_says_what_a_second_start_means(shards, tmp_path):
    def config(resume: str):
        return tiny_config(shards, tmp_path, f"trainer.resume={resume}")

    last = tmp_path / "checkpoints" / "last.ckpt"
    assert find_checkpoint(config("auto")) is None
    assert find_checkpoint(config("never")) is None
    last.parent.mkdir()
    torch.save({"global_step": 1, "state_dict": {}}, last)
    assert find_checkpoint(config("auto")) == last
    assert find_checkpoint(config(str(tmp_path))) == last
    assert find_checkpoint(config(str(last.parent))) == last
    assert find_checkpoint(config(str(last))) == last
    with pytest.raises(UserError, match="holds a run already; name another output_dir or resume it"):
        find_checkpoint(config("never"))
    with pytest.raises(UserError, match=r"no checkpoint at 'elsewhere\.ckpt'"):
        find_checkpoint(config("elsewhere.ckpt"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no checkpoint in '.*empty'"):
        find_checkpoint(config(str(tmp_path / "empty")))


def test_what_cannot_be_trained_is_one_clear_line(shards, autoencoder, tmp_path):
    wrong = {
        "autoencoder_from is empty": [],
        "is not a model folder": [f"autoencoder_from={tmp_path}"],
        "pretrained is empty": [autoencoder, "model.exemplar_encoder.pretrained=''"],
        "timm has no model": [autoencoder, "model.exemplar_encoder.tower=timm/no_such_net"],
    }
    for message, overrides in wrong.items():
        with pytest.raises(UserError, match=message):
            build_model(tiny_config(shards, tmp_path, *overrides))


def test_a_misspelt_logger_is_told_before_anything_is_encoded(shards, autoencoder, tmp_path):
    settings = ["logging.loggers=[cvs]", f"cache.folder={tmp_path / 'cache'}"]
    with pytest.raises(UserError, match="'cvs'; there are: csv, wandb"):
        run(tiny_config(shards, tmp_path, autoencoder, *settings))
    assert not (tmp_path / "cache").exists()
