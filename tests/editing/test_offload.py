"""Idle parts on the CPU: which part runs when, where each one lies, and that results stay the same."""

from __future__ import annotations

import copy
from itertools import groupby

import pytest
import torch

from pbe.editing.offload import PARTS, offload_idle_parts
from pbe.editing.pipeline import PaintByExample
from pbe.errors import UserError
from pbe.models import LatentDiffusion
from tests.editing.conftest import Scene

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")


def places(model: LatentDiffusion) -> dict[str, str]:
    return {part: next(model.get_submodule(part).parameters()).device.type for part in PARTS}


def test_an_edit_fetches_each_part_once_and_the_autoencoder_twice(
    tiny_model: LatentDiffusion, scene: Scene
) -> None:
    model, used = copy.copy(tiny_model), []
    model.before_use = used.append
    PaintByExample(model)(scene.exemplar, scene.picture, scene.mask, num_inference_steps=3)
    order = [part for part, _ in groupby(used)]
    assert order == ["exemplar_encoder", "autoencoder", "unet", "autoencoder"]


def test_only_the_part_that_works_leaves_the_cpu(tiny_model: LatentDiffusion) -> None:
    model = copy.deepcopy(tiny_model)
    offload = offload_idle_parts(model, "meta")
    assert set(places(model).values()) == {"cpu"}
    assert model.device.type == "meta"
    offload.fetch("unet")
    assert places(model) == {"exemplar_encoder": "cpu", "autoencoder": "cpu", "unet": "meta"}


def test_a_part_that_is_there_is_not_moved_again(
    tiny_model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = copy.deepcopy(tiny_model)
    offload = offload_idle_parts(model, "meta")
    offload.fetch("unet")
    monkeypatch.setattr(torch.nn.Module, "to", lambda *args: pytest.fail("moved"))
    offload.fetch("unet")


def test_removing_it_brings_everything_back(tiny_model: LatentDiffusion) -> None:
    model = copy.deepcopy(tiny_model)
    offload_idle_parts(model, "meta").remove("cpu")
    assert set(places(model).values()) == {"cpu"}
    assert model.device.type == "cpu"
    assert model.before_use is None


@pytest.mark.parametrize(("device", "error"), [("cpu", "accelerator"), ("nonsense", "cannot be used")])
def test_devices_that_make_no_sense(tiny_model: LatentDiffusion, device: str, error: str) -> None:
    with pytest.raises(UserError, match=error):
        offload_idle_parts(tiny_model, device)
    assert tiny_model.before_use is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU")
def test_a_gpu_that_is_not_there(tiny_model: LatentDiffusion) -> None:
    with pytest.raises(UserError, match="cuda"):
        offload_idle_parts(tiny_model, "cuda")


@needs_gpu
def test_results_are_those_without_it(tiny_model: LatentDiffusion, scene: Scene) -> None:
    model = copy.deepcopy(tiny_model).to("cuda")

    def edit() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        pipe = PaintByExample(model)
        return pipe(
            scene.exemplar,
            scene.picture,
            scene.mask,
            num_inference_steps=3,
            generator=generator,
            output_type="pt",
        ).images

    expected = edit()
    offload = offload_idle_parts(model, "cuda")
    assert set(places(model).values()) == {"cpu"}
    torch.testing.assert_close(edit(), expected, rtol=0.0, atol=1e-5)
    assert places(model) == {"exemplar_encoder": "cpu", "autoencoder": "cuda", "unet": "cpu"}
    offload.remove()
    assert set(places(model).values()) == {"cuda"}
