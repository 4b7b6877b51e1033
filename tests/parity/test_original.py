"""What the original's own code made of a micro model: outputs, trajectories, loss and gradients."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pbe.config import AutoencoderConfig, ExemplarEncoderConfig, ModelConfig, ScheduleConfig, UNetConfig
from pbe.diffusion.guidance import guided
from pbe.diffusion.objective import per_sample_loss, training_target
from pbe.diffusion.schedule import NoiseSchedule, make_schedule
from pbe.diffusion.solvers import SOLVERS, uniform_timesteps
from pbe.models import LatentDiffusion
from tests.models.tiny import relative
from tests.parity.compvis_keys import (
    autoencoder_modules,
    clip_tower_state,
    mapper_modules,
    renamed,
    unet_modules,
)

TIGHT = 2e-5


@dataclass(frozen=True)
class Original:
    """What the original was given, what it made of it, and its weights in a model of ours."""

    model: LatentDiffusion
    schedule: NoiseSchedule
    state: dict[str, Tensor]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    guidance_scale: float
    noise_seed: int

    def predict(self, x: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
        copies = len(x) // len(self.inputs["z_inpaint"])
        masked, mask = (self.inputs[name].repeat(copies, 1, 1, 1) for name in ("z_inpaint", "mask"))
        return self.model.predict(x, timesteps, condition, masked, mask)


def model_config(config: dict) -> ModelConfig:
    unet, vae, clip = config["unet"], config["vae"], config["clip"]
    return ModelConfig(
        image_size=16,
        schedule=ScheduleConfig(config["timesteps"], config["linear_start"], config["linear_end"]),
        unet=UNetConfig(
            model_channels=unet["model_channels"],
            channel_mult=unet["channel_mult"],
            num_res_blocks=unet["num_res_blocks"],
            attention_factors=unet["attention_resolutions"],
            num_heads=unet["num_heads"],
            context_dim=config["ctx_dim"],
        ),
        autoencoder=AutoencoderConfig(
            channels=vae["ch"],
            channel_mult=vae["ch_mult"],
            num_res_blocks=vae["num_res_blocks"],
            latent_channels=vae["z_channels"],
            scale_factor=config["scale_factor"],
        ),
        exemplar_encoder=ExemplarEncoderConfig(
            tower="micro",
            image_size=clip["image_size"],
            mapper_layers=config["mapper_layers"],
            mapper_heads=config["mapper_heads"],
        ),
    )


def clip_architecture(clip: dict) -> dict:
    """The section by which open_clip would know this tower."""
    width = clip["hidden_size"]
    vision = {"width": width, "layers": clip["num_hidden_layers"], "patch_size": clip["patch_size"]}
    vision |= {
        "head_width": width // clip["num_attention_heads"],
        "mlp_ratio": clip["intermediate_size"] / width,
    }
    return {"embed_dim": 16, "quick_gelu": True, "vision_cfg": vision}


def load_weights(model: LatentDiffusion, state: dict[str, Tensor]) -> None:
    config = model.config
    model.unet.load_state_dict(renamed(state, unet_modules(config.unet), "model.diffusion_model."))
    autoencoder = autoencoder_modules(config.autoencoder)
    model.autoencoder.load_state_dict(renamed(state, autoencoder, "first_stage_model."))
    prefix = "cond_stage_model.transformer.vision_model."
    vision = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    layers = len(model.exemplar_encoder.tower.transformer.resblocks)
    tower = {f"tower.{key}": value for key, value in clip_tower_state(vision, layers).items()}
    mapper = renamed(state, mapper_modules(config.exemplar_encoder.mapper_layers))
    null = {"null_condition": state["learnable_vector"]}
    model.exemplar_encoder.load_state_dict(tower | mapper | null)


@pytest.fixture(scope="module")
def original(golden: Path) -> Original:
    folder = golden / "original"
    settings = json.loads((folder / "config.json").read_text())
    state = torch.load(folder / "model.ckpt", map_location="cpu", weights_only=True)["state_dict"]
    with pytest.MonkeyPatch.context() as patch:
        architecture = clip_architecture(settings["config"]["clip"])
        patch.setattr("open_clip.get_model_config", lambda name: architecture)
        model = LatentDiffusion(model_config(settings["config"])).eval()
    load_weights(model, state)
    return Original(
        model,
        make_schedule(model.config.schedule),
        state,
        load_file(folder / "inputs.safetensors"),
        load_file(folder / "outputs.safetensors"),
        settings["guidance_scale"],
        settings["ddim_eta1_noise_seed"],
    )


def test_every_tensor_of_the_original_has_its_place(original: Original) -> None:
    """Whatever is not a schedule buffer or a position index was loaded, and nothing here was left out."""
    ours = sum(value.numel() for value in original.model.state_dict().values())
    theirs = sum(
        value.numel()
        for key, value in original.state.items()
        if value.shape != (1000,) and not key.endswith("position_ids")
    )
    assert ours == theirs


def test_schedule_buffers(original: Original) -> None:
    betas, alphas = original.schedule.betas, original.schedule.alphas_cumprod
    previous = torch.cat([torch.ones(1, dtype=torch.float64), alphas[:-1]])
    variance = betas * (1 - previous) / (1 - alphas)
    derived = {
        "betas": betas,
        "alphas_cumprod": alphas,
        "alphas_cumprod_prev": previous,
        "sqrt_alphas_cumprod": alphas.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - alphas).sqrt(),
        "log_one_minus_alphas_cumprod": (1 - alphas).log(),
        "sqrt_recip_alphas_cumprod": alphas.rsqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / alphas - 1).sqrt(),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": variance.clamp_min(1e-20).log(),
        "posterior_mean_coef1": betas * previous.sqrt() / (1 - alphas),
        "posterior_mean_coef2": (1 - previous) * (1 - betas).sqrt() / (1 - alphas),
    }
    assert {key for key, value in original.state.items() if value.shape == (1000,)} == set(derived)
    for name, value in derived.items():
        torch.testing.assert_close(value.float(), original.state[name], rtol=2e-7, atol=0.0)


@pytest.mark.parametrize("steps", [10, 30])
def test_timesteps_and_their_alphas(original: Original, steps: int) -> None:
    timesteps = uniform_timesteps(original.schedule, steps)
    recorded = {
        name: original.outputs[f"schedule_steps{steps}.{name}"]
        for name in ("timesteps", "alphas", "alphas_prev")
    }
    assert timesteps == recorded["timesteps"].tolist()
    alphas = original.schedule.alphas_cumprod
    torch.testing.assert_close(alphas[timesteps], recorded["alphas"], rtol=1e-6, atol=0.0)
    torch.testing.assert_close(alphas[[0, *timesteps[:-1]]], recorded["alphas_prev"], rtol=1e-6, atol=0.0)


def test_unet(original: Original) -> None:
    with torch.no_grad():
        output = original.predict(original.inputs["x_T"], original.inputs["t"], original.inputs["context"])
    assert relative(output, original.outputs["unet.eps"]) < TIGHT


def test_autoencoder(original: Original) -> None:
    with torch.no_grad():
        posterior = original.model.autoencoder.encode(original.inputs["image"])
        decoded = original.model.decode_latents(original.inputs["z"])
    assert relative(posterior.mean, original.outputs["vae_encode.mean"]) < TIGHT
    assert relative(posterior.std, original.outputs["vae_encode.std"]) < TIGHT
    assert relative(2 * posterior.std.log(), original.outputs["vae_encode.logvar"]) < TIGHT
    assert relative(decoded, original.outputs["vae_decode.image"]) < TIGHT


def test_exemplar_branch(original: Original) -> None:
    encoder, outputs = original.model.exemplar_encoder, original.outputs
    with torch.no_grad():
        pooled = encoder.features(original.inputs["clip_pixels"])
        mapped = nn.Sequential(*encoder.mapper)(pooled)
        assert relative(pooled[:, 0], outputs["condition.pooled"]) < TIGHT
        assert relative(mapped, outputs["condition.mapped"]) < TIGHT
        assert relative(encoder.final_norm(mapped), outputs["condition.normed"]) < TIGHT
        condition = original.model.encode_exemplar(original.inputs["clip_pixels"])
        assert relative(condition, outputs["condition.cond"]) < TIGHT


def test_mapper_alone(original: Original) -> None:
    encoder, pooled = original.model.exemplar_encoder, original.inputs["pooled"][:, None]
    with torch.no_grad():
        assert relative(nn.Sequential(*encoder.mapper)(pooled), original.outputs["mapper.mapped"]) < TIGHT
        assert relative(encoder.condition(pooled), original.outputs["mapper.cond"]) < TIGHT


@pytest.mark.parametrize("steps", [10, 30])
@pytest.mark.parametrize(("solver", "eta"), [("ddim", 0.0), ("ddim", 1.0), ("plms", 0.0)])
def test_trajectories(original: Original, solver: str, eta: float, steps: int) -> None:
    null = original.model.null_condition(2)
    predict = guided(original.predict, original.inputs["context"], null, original.guidance_scale)
    visited = [original.inputs["x_T"]]
    with torch.no_grad():
        result = SOLVERS[solver](
            predict,
            original.inputs["x_T"],
            original.schedule,
            steps,
            eta=eta,
            generator=torch.Generator().manual_seed(original.noise_seed),
            callback=lambda index, timestep, x: visited.append(x),
        )
    run = f"{solver}_steps{steps}_eta{eta:.0f}"
    assert relative(result, original.outputs[f"{run}.latents"]) < TIGHT
    assert relative(torch.stack(visited), original.outputs[f"{run}.x_inter"]) < TIGHT


def test_loss_and_gradients(original: Original) -> None:
    latents, noise, timesteps = (original.inputs[name] for name in ("z", "noise", "t"))
    unet = original.model.unet
    x_t = original.schedule.add_noise(latents, noise, timesteps)
    output = original.predict(x_t, timesteps, original.inputs["context"])
    target = training_target("eps", latents, noise, timesteps, original.schedule)
    loss = per_sample_loss(output, target).mean()
    assert loss.item() == pytest.approx(float(original.outputs["loss.loss"]), rel=1e-4)
    loss.backward()
    found = {
        name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in unet.named_parameters()
    }
    unet.zero_grad(set_to_none=True)
    recorded = {key.removeprefix("loss.grads."): value for key, value in original.outputs.items()}
    expected = renamed(recorded, unet_modules(original.model.config.unet), "model.diffusion_model.")
    assert set(found) >= set(expected)
    assert len(expected) == sum(key.startswith("loss.grads.") for key in original.outputs)
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        assert float((found[name] - gradient).abs().max()) < 1e-5 * scale, name
    for name in set(found) - set(expected):
        assert not bool(found[name].any()), name
