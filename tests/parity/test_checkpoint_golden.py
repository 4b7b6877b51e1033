"""Models recorded with diffusers and with the original: loaded from every form, each network's outputs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pbe.checkpoints.loading import Loaded, load_checkpoint
from pbe.models import LatentDiffusion
from tests.models.tiny import relative
from tests.parity.test_original import load_weights, model_config

FORMS = {"pipeline": "diffusers", "pipeline_hub2022": "diffusers", "pipeline_ldm": "compvis"}
ACCEPTED = 1e-4
MEAN = 2e-2  # absolute, where the values go up to 30


@pytest.fixture(scope="module", params=FORMS)
def loaded(request: pytest.FixtureRequest, golden: Path) -> Loaded:
    found = load_checkpoint(golden / "diffusers" / "public" / request.param)
    assert found.layout == FORMS[request.param]
    return found


@pytest.fixture(scope="module")
def recorded(golden: Path) -> dict[str, Tensor]:
    with np.load(golden / "diffusers" / "public" / "modules.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays}


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def test_exemplar_encoder(loaded: Loaded, recorded: dict[str, Tensor]) -> None:
    encoder = loaded.model.exemplar_encoder
    x = encoder.features(recorded["pre.clip_pixels"])
    assert relative(x[:, 0], recorded["enc.pooled"]) < ACCEPTED
    for index, block in enumerate(encoder.mapper):
        x = block(x)
        assert relative(x, recorded[f"enc.mapper.{index}"]) < ACCEPTED
    assert relative(encoder.final_norm(x), recorded["enc.final_ln"]) < ACCEPTED
    for pixels, condition in (("pre.clip_pixels", "enc.cond"), ("rect.clip_pixels", "rect.cond")):
        assert relative(loaded.model.encode_exemplar(recorded[pixels]), recorded[condition]) < ACCEPTED
    assert torch.equal(loaded.model.null_condition(1), recorded["enc.uncond"])


def test_autoencoder(loaded: Loaded, recorded: dict[str, Tensor]) -> None:
    posterior = loaded.model.autoencoder.encode(recorded["pre.masked_image"])
    assert float((posterior.mean - recorded["vae.mean"]).abs().max()) < MEAN
    assert relative(2 * posterior.std.log(), recorded["vae.logvar_clamped"]) < ACCEPTED
    decoded = loaded.model.decode_latents(recorded["vae.decode_in_scaled"])
    assert relative(decoded, recorded["vae.decode_out"]) < ACCEPTED


@pytest.mark.parametrize("run", ["t0", "t251", "t999", "tfloat_399.6", "tvec_10_700"])
def test_unet(loaded: Loaded, recorded: dict[str, Tensor], run: str) -> None:
    numbers = [
        float(part) for part in run.removeprefix("tfloat_").removeprefix("tvec_").lstrip("t").split("_")
    ]
    timesteps = torch.tensor(numbers if len(numbers) == 2 else numbers * 2)
    x = recorded["unet.x9"].expand(2, -1, -1, -1)
    output = loaded.model.unet(x, timesteps, recorded["unet.context"])
    assert relative(output, recorded[f"unet.out.{run}"]) < ACCEPTED


def test_the_three_forms_are_one_model(golden: Path) -> None:
    first, *others = (load_checkpoint(golden / "diffusers" / "public" / form).model for form in FORMS)
    weights = first.state_dict()
    for other in others:
        assert other.config == first.config
        assert all(torch.equal(value, weights[key]) for key, value in other.state_dict().items())


def test_the_originals_model_against_a_table_kept_apart(golden: Path) -> None:
    """Every weight where the hand-written table of these tests puts it; its outputs are checked elsewhere."""
    path = golden / "original" / "model.ckpt"
    settings = json.loads((path.parent / "config.json").read_text())["config"]
    config, clip = model_config(settings), settings["clip"]
    config.exemplar_encoder.tower = (
        f"vit/{clip['hidden_size']}x{clip['num_hidden_layers']}-patch{clip['patch_size']}"
        f"-heads{clip['num_attention_heads']}-mlp{clip['intermediate_size']}-quickgelu"
    )
    expected = LatentDiffusion(config)
    load_weights(expected, torch.load(path, map_location="cpu", weights_only=True)["state_dict"])
    found = load_checkpoint(path, config=config).model.state_dict()
    assert found.keys() == expected.state_dict().keys()
    assert all(torch.equal(found[key], value) for key, value in expected.state_dict().items())
