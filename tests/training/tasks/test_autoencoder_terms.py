"""The optional parts of stage one: weight of the hole, decoder alone, perceptual and adversarial terms."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.models.vgg import cfgs, make_layers

from pbe.checkpoints.native import load_config as load_model_config, load_model
from pbe.config import load_config
from pbe.data.datamodule import TrainingData
from pbe.errors import UserError
from pbe.models import LatentDiffusion
from pbe.models.codec import Posterior
from pbe.models.discriminator import hinge_loss
from pbe.training.tasks.autoencoder import AutoencoderTask, reconstruction_terms, weighted_terms
from pbe.training.tasks.encoding import to_pixels
from tests.training.tiny import (
    Watch,
    checkpoint,
    crash,
    differing,
    logged,
    run,
    tiny_config,
    weights,
    write_config,
)

ADVERSARIAL = (
    "task=autoencoder",
    "autoencoder_loss.adversarial_weight=0.5",
    "autoencoder_loss.discriminator_layers=2",
    "autoencoder_loss.discriminator_channels=16",
)


def make_task(shards: Path, *overrides: str) -> tuple[AutoencoderTask, dict[str, Any]]:
    """Return a task of fixed random weights, and a batch."""
    config = tiny_config(shards, Path("nowhere"), "task=autoencoder", *overrides)
    torch.manual_seed(1)
    task = AutoencoderTask(config, LatentDiffusion(config.model))
    return task, next(iter(TrainingData(config).train_dataloader()))


def decoded_by(task: AutoencoderTask, batch: dict[str, Any]) -> tuple[torch.Tensor, Posterior]:
    autoencoder = task.model.autoencoder
    posterior = autoencoder.encode(to_pixels(batch["image"]))
    return autoencoder.decode(posterior.sample(task._posterior_noise(batch, posterior))), posterior


def gradients(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def test_pixels_of_the_hole_count_as_often_as_is_said():
    decoded, hole = torch.zeros(1, 3, 2, 4), torch.zeros(1, 1, 2, 4)
    hole[..., 3] = 1.0
    decoded[..., 0], decoded[..., 3] = 0.4, 0.2
    terms = weighted_terms(decoded, torch.zeros_like(decoded), hole, 5.0)
    assert float(terms["l1"]) == pytest.approx((0.4 + 5 * 0.2) / 8)
    assert float(terms["l2"]) == pytest.approx((0.16 + 5 * 0.04) / 8)
    # a difference across the hole's border counts as one inside
    assert float(terms["gradient"]) == pytest.approx((0.4 + 5 * 0.2) / 7)


def test_weighted_terms_agree_with_plain_ones_and_with_micro_batches():
    torch.manual_seed(0)
    decoded, pictures, hole = (
        torch.rand(4, 3, 9, 7),
        torch.rand(4, 3, 9, 7),
        (torch.rand(4, 1, 9, 7) > 0.5).float(),
    )
    plain = reconstruction_terms(decoded, pictures)
    for name, value in weighted_terms(decoded, pictures, hole, 1.0).items():
        assert float(value) == pytest.approx(float(plain[name]), rel=1e-5)
    whole = weighted_terms(decoded, pictures, hole, 3.0)
    parts = [
        weighted_terms(*(x[rows] for x in (decoded, pictures, hole)), 3.0) for rows in (slice(2), slice(2, 4))
    ]
    for name, value in whole.items():
        assert float(value) == pytest.approx(float(parts[0][name] + parts[1][name]) / 2, rel=1e-5)
        assert float(value) != pytest.approx(float(plain[name]), rel=1e-4)


def test_without_options_the_loss_is_what_it_was_to_the_bit(shards):
    task, batch = make_task(shards, "autoencoder_loss.l2_weight=0.5")
    decoded, posterior = decoded_by(task, batch)
    terms = reconstruction_terms(decoded, to_pixels(batch["image"]))
    expected = 1.0 * terms["l1"] + 0.5 * terms["l2"] + 1.0 * terms["gradient"] + 1e-4 * posterior.kl().mean()
    assert torch.equal(task.batch_loss(batch), expected)
    assert set(task.sums.means()) == {f"train/{name}" for name in ("loss", "l1", "l2", "gradient", "kl")}


def test_the_hole_counts_in_the_loss(shards):
    task, batch = make_task(shards, "autoencoder_loss.masked_weight=4")
    task.batch_loss(batch)
    decoded, _ = decoded_by(task, batch)
    expected = weighted_terms(decoded, to_pixels(batch["image"]), batch["mask"].float() / 255, 4.0)
    for name, value in expected.items():
        assert task.sums.means()[f"train/{name}"] == pytest.approx(value.item(), rel=1e-6)


@pytest.mark.parametrize("adaptive", [False, True])
def test_each_side_gets_its_own_gradient(shards, adaptive: bool):
    task, batch = make_task(shards, *ADVERSARIAL, f"autoencoder_loss.adversarial_adaptive={adaptive}")
    task.batch_loss(batch).backward()
    means, found = task.sums.means(), gradients(task)
    task.zero_grad()
    judge, (decoded, posterior) = task.discriminator, decoded_by(task, batch)
    pictures = to_pixels(batch["image"])
    terms = reconstruction_terms(decoded, pictures)
    rest = terms["l1"] + terms["gradient"] + 1e-4 * posterior.kl().mean()
    last, factor = task.model.autoencoder.decoder.conv_out.weight, 0.5
    if adaptive:
        lengths = [
            torch.autograd.grad(x, last, retain_graph=True)[0].norm() for x in (rest, -judge(decoded).mean())
        ]
        factor = float(0.5 * lengths[0] / (lengths[1] + 1e-4))
    assert means["train/adversarial_weight"] == pytest.approx(factor, rel=1e-4)
    assert means["train/loss"] == pytest.approx(float(rest) + factor * means["train/adversarial"], rel=1e-4)
    (rest - factor * judge(decoded).mean()).backward()
    judge.zero_grad()
    hinge_loss(judge(pictures), judge(decoded.detach())).backward()
    expected = gradients(task)
    assert found.keys() == expected.keys()
    assert any(name.startswith("discriminator") for name in found)
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=1e-3, atol=1e-5), name


def test_the_guard_can_look_at_a_loss_again(shards):
    task, batch = make_task(shards, *ADVERSARIAL)
    with torch.no_grad():
        assert torch.isfinite(task.batch_loss(batch))


def test_a_discriminator_that_waits_changes_nothing(shards, tmp_path):
    common = ("task=autoencoder", "optimizer.gradient_clip=0")
    run(tiny_config(shards, tmp_path / "plain", *common))
    run(
        tiny_config(shards, tmp_path / "waits", *common, *ADVERSARIAL, "autoencoder_loss.adversarial_start=3")
    )
    assert not differing(weights(tmp_path / "plain" / "model"), weights(tmp_path / "waits" / "model"))
    assert logged(tmp_path / "plain") == logged(tmp_path / "waits")
    saved, fresh = checkpoint(tmp_path / "waits"), make_task(shards, *ADVERSARIAL)[0].discriminator
    assert all(
        torch.equal(saved["state_dict"][f"discriminator.{k}"], v) for k, v in fresh.state_dict().items()
    )
    assert not any("discriminator" in name for name in saved["ema"])


def test_going_on_is_exact_with_a_discriminator_too(shards, tmp_path):
    options = (
        *ADVERSARIAL, "autoencoder_loss.adversarial_start=1", "trainer.max_steps=5", "data.batch_size=1",
        "trainer.accumulate=2", "trainer.checkpoint_every=3", "optimizer.gradient_clip=0.5",
    )  # fmt: skip
    run(tiny_config(shards, tmp_path / "straight", *options))
    assert run(tiny_config(shards, tmp_path / "died", *options), Watch(4, crash)) is None
    assert run(tiny_config(shards, tmp_path / "died", *options)).steps == 5
    straight, died = checkpoint(tmp_path / "straight"), checkpoint(tmp_path / "died")
    assert not differing(straight["state_dict"], died["state_dict"])
    assert not differing(straight["ema"], died["ema"])
    moments = [saved["optimizer_states"][0]["state"] for saved in (straight, died)]
    assert moments[0].keys() == moments[1].keys()
    assert all(torch.equal(moments[0][i]["exp_avg_sq"], moments[1][i]["exp_avg_sq"]) for i in moments[0])
    # the discriminator was not stepped in the first step, the autoencoder was
    assert {int(state["step"]) for state in moments[0].values()} == {4, 5}
    assert logged(tmp_path / "straight") == logged(tmp_path / "died")
    assert len(logged(tmp_path / "straight", "train/discriminator")) == 4
    assert not differing(weights(tmp_path / "straight" / "model"), weights(tmp_path / "died" / "model"))
    start = make_task(shards, *ADVERSARIAL)[0].discriminator.state_dict()
    moved = [not torch.equal(straight["state_dict"][f"discriminator.{k}"], v) for k, v in start.items()]
    assert all(moved)
    load_model(tmp_path / "straight" / "model")  # strictly: there is nothing of the discriminator in it


def test_the_decoder_alone_leaves_the_latents_as_they_are(workshop, shards, tmp_path):
    source = workshop / "autoencoder" / "model"
    options = (
        "task=autoencoder",
        "autoencoder_loss.train=decoder",
        f"init_from={source}",
        "optimizer.ema_decay=0",
    )
    run(tiny_config(shards, tmp_path, *options))
    changed = set(differing(weights(source), weights(tmp_path / "model")))
    trained = ("autoencoder.decoder.", "autoencoder.post_quant_conv.")
    assert changed == {name for name in weights(source) if name.startswith(trained)}
    assert load_model_config(tmp_path / "model") == load_model_config(source), (
        "the scale factor belongs to latents"
    )


def test_the_perceptual_term_is_logged_and_saved_nowhere(shards, tmp_path):
    torch.manual_seed(2)
    vgg = {f"features.{key}": value for key, value in make_layers(cfgs["D"]).state_dict().items()}
    torch.save(vgg, tmp_path / "vgg.pth")
    options = ("task=autoencoder", "autoencoder_loss.perceptual_weight=0.5", "trainer.max_steps=1")
    run(
        tiny_config(
            shards, tmp_path / "run", *options, f"autoencoder_loss.perceptual_vgg={tmp_path / 'vgg.pth'}"
        )
    )
    values = {name: float(value) for _, name, value in logged(tmp_path / "run", "train/")}
    rest = values["train/l1"] + values["train/gradient"] + 1e-4 * values["train/kl"]
    assert values["train/perceptual"] > 0
    assert values["train/loss"] == pytest.approx(rest + 0.5 * values["train/perceptual"], rel=1e-5)
    assert len(logged(tmp_path / "run", "val/perceptual")) == 2
    assert all(name.startswith("model.") for name in checkpoint(tmp_path / "run")["state_dict"])
    assert "vgg" not in json.dumps(sorted(p.name for p in (tmp_path / "run" / "model").iterdir()))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["autoencoder_loss.train=decoder"], "'init_from' is empty"),
        (["autoencoder_loss.discriminator_channels=24"], "multiple of 16"),
        (
            ["autoencoder_loss.adversarial_weight=1", "autoencoder_loss.discriminator_layers=4"],
            "needs at least 48",
        ),
        (["autoencoder_loss.masked_weight=0"], "must be at least 0.001"),
        (["autoencoder_loss.perceptual_weight=-1"], "must be at least 0"),
    ],
)
def test_options_that_do_not_fit_are_one_line(shards, tmp_path, overrides: list[str], message: str):
    file = write_config(tmp_path / "tiny.yaml", tiny_config(shards, tmp_path / "run", "task=autoencoder"))
    with pytest.raises(UserError, match=message):
        load_config(file, overrides)


def test_a_decoder_is_made_mask_aware_and_trained_so(workshop, shards, tmp_path):
    source = workshop / "autoencoder" / "model"
    options = (
        "task=autoencoder", "autoencoder_loss.train=decoder", f"init_from={source}", "optimizer.ema_decay=0",
        "data.batch_size=8", "trainer.max_steps=5", "logging.grid_every=5",
    )  # fmt: skip
    aware = (*options, "model.autoencoder.mask_aware_decoder=true")
    run(tiny_config(shards, tmp_path / "plain", *options))
    run(tiny_config(shards, tmp_path / "aware", *aware))
    first = [dict(logged_values(tmp_path / name, 0)) for name in ("plain", "aware")]
    assert first[0] == first[1], "a fresh branch changes nothing"
    last = [dict(logged_values(tmp_path / name, 5)) for name in ("plain", "aware")]
    assert last[0] != last[1]
    model = load_model(tmp_path / "aware" / "model")
    branch = model.autoencoder.decoder.known
    assert branch is not None
    assert all(projection.weight.any() for projection in branch.projections)
    assert model.config.autoencoder.scale_factor == load_model_config(source).autoencoder.scale_factor
    # the next stage takes it over as it is
    result = run(tiny_config(shards, tmp_path / "next", f"autoencoder_from={tmp_path / 'aware' / 'model'}",
                             "trainer.max_steps=1", "logging.grid_every=1"))  # fmt: skip
    assert load_model_config(result.model_dir).autoencoder.mask_aware_decoder


def logged_values(folder: Path, step: int) -> list[tuple[str, float]]:
    return [(name, float(value)) for at, name, value in logged(folder, "val/") if at == step]
