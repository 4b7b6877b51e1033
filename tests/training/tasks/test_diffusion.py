"""What is trained, what is frozen, where gradients go, and what the losses are made of."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import pbe.training.tasks.diffusion as task_module
from pbe.checkpoints.tower_weights import lite_state, lite_weights
from pbe.config import Config
from pbe.diffusion.objective import loss_weights
from pbe.errors import UserError
from pbe.models import LatentDiffusion
from pbe.models.attention import SpatialTransformer
from pbe.models.codec import Posterior
from pbe.training.monitoring.loggers import read_curve
from pbe.training.tasks.diffusion import DiffusionTask, freeze
from pbe.training.tasks.encoding import Draws, EncodedBatch, batch_drop, draw
from tests.training.tiny import PRETRAINED_TOWER, Watch, checkpoint, run, tiny_config

NOWHERE = Path("nowhere")


def config_of(*overrides: str) -> Config:
    return tiny_config(NOWHERE, NOWHERE, *overrides)


def make_task(*overrides: str) -> DiffusionTask:
    config = config_of(*overrides)
    return DiffusionTask(config, LatentDiffusion(config.model))


def names(module: nn.Module, *, trained: bool) -> set[str]:
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad == trained}


def encoded(model: LatentDiffusion, count: int, tokens: int = 1) -> EncodedBatch:
    """A batch of made-up latents; hole and padding on the right."""
    z, size = model.config.autoencoder.latent_channels, 8
    generator = torch.Generator().manual_seed(3)
    moments = [torch.randn(count, z, size, size, generator=generator) for _ in range(2)]
    keep, valid = torch.ones(count, 1, size, size), torch.ones(count, 1, size, size)
    keep[..., 3:] = 0.0
    valid[..., 6:] = 0.0
    features = torch.randn(count, tokens, model.exemplar_encoder.tower_width, generator=generator)
    small = torch.full_like(moments[0], 0.1)
    image, masked = Posterior(moments[0], small), Posterior(moments[1], small)
    return EncodedBatch(image, masked, keep, valid, features, torch.arange(count))


def awaken(model: LatentDiffusion) -> None:
    """Fill what starts at zero, which stops gradients and hides the exemplar."""
    with torch.no_grad():
        for parameter in model.unet.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)


def draws_for(task: DiffusionTask, batch: EncodedBatch) -> Draws:
    shape = tuple(batch.image.mean.shape[1:])
    return draw(task.config.seed, batch.sample_index, shape, task.schedule.timesteps)


def test_what_is_frozen_and_what_is_trained_with_one_token():
    model = LatentDiffusion(config_of().model)
    freeze(model)
    transformers = [name for name, m in model.unet.named_modules() if isinstance(m, SpatialTransformer)]
    dead = ("attn2.to_q.weight", "attn2.to_k.weight", "norm2.weight", "norm2.bias")
    assert len(transformers) == 4  # one down, the middle, two up
    assert names(model.unet, trained=False) == {f"{t}.block.{name}" for t in transformers for name in dead}
    assert names(model.autoencoder, trained=True) == set()
    encoder = model.exemplar_encoder
    assert names(encoder, trained=False) == {f"tower.{name}" for name, _ in encoder.tower.named_parameters()}
    linears = [f"mapper.{i}.{name}" for i in range(2) for name in ("attention.qkv", "attention.proj")]
    linears += [f"mapper.{i}.{name}" for i in range(2) for name in ("norm1", "norm2", "fc1", "fc2")]
    linears += ["reduce", "final_norm", "proj"]
    expected = {f"{name}.{kind}" for name in linears for kind in ("weight", "bias")} | {"null_condition"}
    assert names(encoder, trained=True) == expected


def test_with_all_tokens_queries_keys_and_their_norm_are_trained_too():
    model = LatentDiffusion(config_of("model.exemplar_encoder.tokens=all").model)
    freeze(model)
    assert names(model.unet, trained=False) == set()
    assert names(model.autoencoder, trained=True) == set()
    assert all(name.startswith("tower.") for name in names(model.exemplar_encoder, trained=False))


@pytest.mark.parametrize(("tokens", "count"), [("class", 1), ("all", 3)])
def test_every_trained_parameter_gets_a_gradient(tokens: str, count: int):
    task = make_task(f"model.exemplar_encoder.tokens={tokens}")
    awaken(task.model)
    batch = encoded(task.model, 4, tokens=count)
    drop = torch.tensor([True, False, False, True])
    plain, weight = task.losses(batch, draws_for(task, batch), drop)
    (plain * weight).mean().backward()
    trained = {name: p for name, p in task.named_parameters() if p.requires_grad}
    assert [name for name, p in trained.items() if p.grad is None or not p.grad.any()] == []
    assert [name for name, p in task.named_parameters() if not p.requires_grad and p.grad is not None] == []
    width = task.config.model.exemplar_encoder.mapper_width
    for block in task.model.exemplar_encoder.mapper:
        q, k, v = block.attention.qkv.weight.grad.split(width)  # one head: three runs of rows
        assert v.any(dim=1).all()
        assert (bool(q.any()), bool(k.any())) == ((False, False) if count == 1 else (True, True))


def test_frozen_networks_are_bit_identical_after_training(workshop, shards, autoencoder, tmp_path):
    run(tiny_config(shards, tmp_path, autoencoder, *PRETRAINED_TOWER, "trainer.validate_every=2"))
    state = checkpoint(tmp_path)["state_dict"]

    def part(name: str) -> dict[str, torch.Tensor]:
        prefix = f"model.{name}."
        return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}

    stored = load_file(workshop / "autoencoder" / "model" / "autoencoder.safetensors")
    trained = part("autoencoder")
    assert trained.keys() == stored.keys()
    assert all(torch.equal(trained[name], value) for name, value in stored.items())
    original = lite_state(lite_weights("tf_efficientnet_lite0"), drop_head=True)
    tower = part("exemplar_encoder.tower.trunk")
    assert tower.keys() == original.keys()
    assert any(name.endswith("running_mean") for name in tower)
    assert all(torch.equal(tower[name], value) for name, value in original.items())


def test_the_loss_of_the_untrained_network_is_the_power_of_its_target_on_valid_positions():
    task = make_task("model.prediction=eps")
    batch = encoded(task.model, 3)
    draws = draws_for(task, batch)
    plain, weight = task.losses(batch, draws, torch.zeros(3, dtype=torch.bool))
    # its last layer starts at zero, so the error is the noise itself; the padding on the right is left out
    torch.testing.assert_close(plain, (draws.noise[..., :6] ** 2).mean(dim=(1, 2, 3)))
    assert torch.equal(weight, torch.ones(3))


def test_losses_use_the_scale_factor_and_the_weighting():
    task = make_task("model.autoencoder.scale_factor=0.5", "objective.weighting=min_snr")
    batch = encoded(task.model, 2)
    draws = draws_for(task, batch)
    plain, weight = task.losses(batch, draws, torch.zeros(2, dtype=torch.bool))
    alpha = task.schedule.alphas_cumprod[draws.timesteps].view(-1, 1, 1, 1)
    latents = 0.5 * (batch.image.mean + batch.image.std * draws.image_noise)
    v = alpha.sqrt() * draws.noise - (1 - alpha).sqrt() * latents
    torch.testing.assert_close(plain, (v[..., :6] ** 2).mean(dim=(1, 2, 3)).float())
    assert torch.equal(weight, loss_weights("min_snr", "v", draws.timesteps, task.schedule, 5.0))


def test_a_dropped_sample_does_not_see_its_exemplar():
    task = make_task()
    awaken(task.model)
    batch = encoded(task.model, 2)
    blank = EncodedBatch(**{**vars(batch), "features": torch.zeros_like(batch.features)})
    draws, drop = draws_for(task, batch), torch.tensor([True, False])
    with torch.no_grad():
        first, second = (task.losses(b, draws, drop)[0] for b in (batch, blank))
    assert first[0] == second[0]
    assert first[1] != second[1]


def record_drops(monkeypatch: pytest.MonkeyPatch) -> list[list[bool]]:
    recorded: list[list[bool]] = []
    original = task_module.drop_condition

    def recording(condition, null, drop):
        if torch.is_grad_enabled():  # not the validation's
            recorded.append(drop.tolist())
        return original(condition, null, drop)

    monkeypatch.setattr(task_module, "drop_condition", recording)
    return recorded


def test_per_batch_drop_is_one_decision_an_optimizer_step(shards, autoencoder, tmp_path, monkeypatch):
    recorded = record_drops(monkeypatch)
    settings = ["objective.drop_mode=per_batch", "objective.drop_probability=0.5", "trainer.accumulate=2"]
    config = tiny_config(shards, tmp_path, autoencoder, "trainer.max_steps=6", *settings)
    run(config)
    expected = [batch_drop(config.seed, step) < 0.5 for step in range(6)]
    assert len(set(expected)) == 2, "both kinds must be among the six steps"
    assert recorded == [[decision] * 2 for decision in expected for _ in range(2)]


def test_per_sample_drop_follows_the_samples(shards, autoencoder, tmp_path, monkeypatch):
    recorded = record_drops(monkeypatch)
    config = tiny_config(
        shards, tmp_path, autoencoder, "trainer.max_steps=8", "objective.drop_probability=0.5"
    )
    run(config)
    expected = draw(config.seed, torch.arange(16), (8, 8, 8), 1000).drop < 0.5
    assert expected.any()
    assert not expected.all()
    assert torch.tensor(recorded).flatten().tolist() == expected.tolist()


def train_weights(shards, autoencoder, folder, batch: int, accumulate: int):
    # a large epsilon: Adam divides by the gradient's size and would blow up rounding where it is near zero
    watch = Watch()
    settings = [f"data.batch_size={batch}", f"trainer.accumulate={accumulate}", "optimizer.eps=1e-3"]
    run(tiny_config(shards, folder, autoencoder, "trainer.max_steps=4", *settings), watch)
    return watch.losses, checkpoint(folder)


def test_two_micro_batches_of_four_equal_one_of_eight(shards, autoencoder, tmp_path):
    losses, whole = train_weights(shards, autoencoder, tmp_path / "a", 8, 1)
    micro, parts = train_weights(shards, autoencoder, tmp_path / "b", 4, 2)
    pairs = torch.tensor(micro).view(4, 2)  # Lightning has halved each
    torch.testing.assert_close(pairs.sum(dim=1), torch.tensor(losses), rtol=1e-5, atol=0)
    assert (pairs[:, 0] - pairs[:, 1]).abs().min() > 1e-3, "the halves hold different samples"
    for name in ("train/loss", "train/loss_simple", "val/loss"):
        first, second = (dict(read_curve(tmp_path / kind / "metrics.csv", name)) for kind in "ab")
        assert second == pytest.approx(first, rel=1e-5)
    for kind in ("state_dict", "ema"):
        for name, value in whole[kind].items():
            torch.testing.assert_close(parts[kind][name], value, rtol=1e-4, atol=1e-6, msg=f"{kind}: {name}")


def test_the_average_moves_once_an_optimizer_step(shards, autoencoder, tmp_path, monkeypatch):
    steps: list[int] = []
    original = DiffusionTask.start_average

    def watched_start(self) -> None:
        original(self)
        update = self.ema.update
        monkeypatch.setattr(self.ema, "update", lambda step: (steps.append(step), update(step)))

    monkeypatch.setattr(DiffusionTask, "start_average", watched_start)
    # three micro-batches a step, four an epoch: the last one of an epoch is left out
    run(tiny_config(shards, tmp_path, autoencoder, "trainer.accumulate=3", "trainer.max_steps=5"))
    assert steps == [1, 2, 3, 4, 5]


def test_a_loss_that_is_not_a_number_ends_training_before_the_step(
    shards, autoencoder, tmp_path, monkeypatch
):
    original = DiffusionTask.losses

    def broken(self, batch, draws, drop):
        plain, weight = original(self, batch, draws, drop)
        return plain * (float("nan") if self.global_step == 2 and torch.is_grad_enabled() else 1.0), weight

    monkeypatch.setattr(DiffusionTask, "losses", broken)
    config = tiny_config(shards, tmp_path, autoencoder, "trainer.max_steps=4", "trainer.checkpoint_every=1")
    with pytest.raises(UserError, match="nan at step 2"):
        run(config)
    saved = checkpoint(tmp_path)
    assert saved["global_step"] == 2
    assert all(value.isfinite().all() for value in saved["state_dict"].values())
