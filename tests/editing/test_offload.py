"""Idle parts on the CPU: which part runs when, where each one lies, and that results stay the same."""

from __future__ import annotations

import copy
import logging
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pbe.editing import PaintByExample
from pbe.editing.offload import PARTS, Offload
from pbe.errors import UserError, warn_once
from pbe.models import LatentDiffusion
from tests.editing.conftest import Scene
from tests.editing.tiny_model import make_tiny_model

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
    offload = Offload(model, "meta")
    assert set(places(model).values()) == {"cpu"}
    assert model.device.type == "meta"
    offload.fetch("unet")
    assert places(model) == {"exemplar_encoder": "cpu", "autoencoder": "cpu", "unet": "meta"}


def test_a_part_that_is_there_is_not_moved_again(
    tiny_model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = copy.deepcopy(tiny_model)
    offload = Offload(model, "meta")
    offload.fetch("unet")
    monkeypatch.setattr(torch.nn.Module, "to", lambda *args: pytest.fail("moved"))
    offload.fetch("unet")


def test_removing_it_brings_everything_back(tiny_model: LatentDiffusion) -> None:
    model = copy.deepcopy(tiny_model)
    Offload(model, "meta").remove("cpu")
    assert set(places(model).values()) == {"cpu"}
    assert model.device.type == "cpu"
    assert model.before_use is None


@pytest.mark.parametrize(("device", "error"), [("cpu", "accelerator"), ("nonsense", "cannot be used")])
def test_devices_that_make_no_sense(tiny_model: LatentDiffusion, device: str, error: str) -> None:
    with pytest.raises(UserError, match=error):
        Offload(tiny_model, device)
    assert tiny_model.before_use is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU")
def test_a_gpu_that_is_not_there(tiny_model: LatentDiffusion) -> None:
    with pytest.raises(UserError, match="cuda"):
        Offload(tiny_model, "cuda")


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
    offload = Offload(model, "cuda")
    assert set(places(model).values()) == {"cpu"}
    torch.testing.assert_close(edit(), expected, rtol=0.0, atol=1e-5)
    assert places(model) == {"exemplar_encoder": "cpu", "autoencoder": "cuda", "unet": "cpu"}
    offload.remove()
    assert set(places(model).values()) == {"cuda"}


@pytest.fixture
def pipe() -> PaintByExample:
    return PaintByExample(make_tiny_model())


def edit(pipe: PaintByExample, scene: Scene) -> np.ndarray:
    call = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0), "output_type": "np"}
    return pipe(scene.exemplar, scene.picture, scene.mask, **call).images


def test_moving_a_pipeline(pipe: PaintByExample):
    assert pipe.to("cpu", torch.bfloat16) is pipe
    assert pipe.dtype == torch.bfloat16
    assert pipe.to(torch.float32).dtype == torch.float32
    assert pipe.to(device="cpu").device == torch.device("cpu")
    assert pipe.to(torch_device="cpu", torch_dtype=torch.float16, silence_dtype_warnings=True).dtype == (
        torch.float16
    )
    with pytest.raises(UserError, match="cannot be moved"):
        pipe.to("abacus")
    for nowhere in ("meta", torch.device("meta")):  # would drop all weights without a word
        with pytest.raises(UserError, match="cannot be moved: 'meta' holds no numbers"):
            pipe.to(nowhere)
    assert pipe.device == torch.device("cpu")
    for wrong in ((torch.int32,), (3.5,), ("cpu", "cpu", "cpu")):
        with pytest.raises(TypeError, match="takes a device, a floating-point"):
            pipe.to(*wrong)


@pytest.mark.parametrize(("slice_size", "heads"), [("auto", 1), ("max", 1), (1, 1), (2, 2), (None, 0)])
def test_attention_on_so_many_heads_at_a_time(
    pipe: PaintByExample,
    scene: Scene,
    slice_size: str | int | None,
    heads: int,
    monkeypatch: pytest.MonkeyPatch,
):
    plain = edit(pipe, scene)
    seen: set[int] = set()
    attend = F.scaled_dot_product_attention

    def watch(q: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        seen.add(q.shape[0] * q.shape[1])
        return attend(q, *rest)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watch)
    pipe.enable_attention_slicing(slice_size)
    np.testing.assert_allclose(edit(pipe, scene), plain, atol=1e-5)
    # two heads, of one sample up to the first cross-attention and of both halves of guidance behind it
    assert seen == ({heads} if heads else {2, 4})
    pipe.disable_attention_slicing()
    np.testing.assert_array_equal(edit(pipe, scene), plain)


def test_attention_on_so_many_queries_at_a_time(pipe: PaintByExample, scene: Scene):
    plain = edit(pipe, scene)
    pipe.enable_attention_slicing(queries=3)
    np.testing.assert_allclose(edit(pipe, scene), plain, atol=1e-5)
    pipe.set_attention_slice(None)
    np.testing.assert_array_equal(edit(pipe, scene), plain)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"queries": 0}, "queries is 0"),
        ({"slice_size": 0}, "slice_size is 0"),
        ({"slice_size": 3}, "slice_size is 3, but the UNet has 2 heads"),
        ({"slice_size": "some"}, "it must be auto, max or a number"),
        ({"slice_size": True}, "slice_size: bool"),
        ({"slice_size": 1.5}, "slice_size is 1.5; it must be a whole number"),
    ],
)
def test_slices_that_are_none(pipe: PaintByExample, settings: dict, message: str):
    with pytest.raises(UserError, match=message):
        pipe.enable_attention_slicing(**settings)


@pytest.mark.parametrize("lever", ["tiling", "slicing"])
def test_the_autoencoder_in_bands(
    pipe: PaintByExample, scene: Scene, lever: str, monkeypatch: pytest.MonkeyPatch
):
    from pbe.models import autoencoder

    plain, calls = edit(pipe, scene), []
    decode = autoencoder.decode_in_bands
    monkeypatch.setattr(autoencoder, "decode_in_bands", lambda *a: calls.append(1) or decode(*a))
    getattr(pipe, f"enable_vae_{lever}")()
    np.testing.assert_allclose(edit(pipe, scene), plain, atol=1e-5)
    assert calls
    getattr(pipe, f"disable_vae_{lever}")()
    np.testing.assert_array_equal(edit(pipe, scene), plain)
    assert len(calls) == 1


@pytest.mark.parametrize(
    "name", ["enable_cpu_offload", "enable_model_cpu_offload", "enable_sequential_cpu_offload"]
)
def test_offloading_to_a_device_that_holds_nothing(pipe: PaintByExample, name: str):
    getattr(pipe, name)(device="meta")
    assert pipe.device == torch.device("meta")
    with pytest.raises(UserError, match=r"call disable_cpu_offload\(\) before moving"):
        pipe.to("cpu")
    pipe.remove_all_hooks()
    assert pipe._offload is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gpu_id": 1.0}, "gpu_id: float"),
        ({"gpu_id": 1, "device": "cuda:0"}, "gpu_id is 1, but device 'cuda:0' has a number already"),
        ({"device": "abacus"}, "'abacus' cannot be used here"),
        ({"gpu_id": 99}, "'cuda:99' cannot be used here"),
        ({"device": "cpu"}, "needs an accelerator"),
    ],
)
def test_offloading_that_cannot_be(pipe: PaintByExample, settings: dict, message: str):
    with pytest.raises(UserError, match=message):
        pipe.enable_model_cpu_offload(**settings)


def test_what_does_nothing_says_so(pipe: PaintByExample, caplog: pytest.LogCaptureFixture):
    warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        pipe.enable_xformers_memory_efficient_attention()
        pipe.disable_xformers_memory_efficient_attention()
    assert [record.message.split(":")[0] for record in caplog.records] == ["xformers is not used"]


def test_a_compiled_unet_makes_the_same_edit_and_tells_where_its_code_is_kept(
    tiny_model: LatentDiffusion,
    scene: Scene,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    plain, compiled, seen = copy.deepcopy(tiny_model), copy.deepcopy(tiny_model), []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        seen.append(graph)  # runs what was traced as it is: code in C++ would take minutes to make
        return graph

    own = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda network: own(network, backend=backend))
    monkeypatch.setenv("CXX", "sh")  # which is not asked to compile
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # so that it is as before afterwards
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    warn_once.cache_clear()
    pipe = PaintByExample(compiled)
    pipe.compile_unet()
    assert "/.cache/pbe/compiled" in caplog.text
    edits = []
    for each in (PaintByExample(plain), pipe):
        generator = torch.Generator().manual_seed(0)
        given = (scene.exemplar, scene.picture, scene.mask)
        edits.append(each(*given, num_inference_steps=2, generator=generator, output_type="np").images)
    assert seen
    np.testing.assert_allclose(edits[1], edits[0], atol=1e-5)


def test_without_a_compiler_nothing_is_compiled(pipe: PaintByExample, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        UserError, match="needs a C\\+\\+ compiler, and there is no 'no-such-compiler'; install"
    ):
        pipe.compile_unet()


@pytest.mark.slow
def test_code_that_is_compiled_makes_the_same_edit_and_is_kept_for_later_starts(
    tiny_model: LatentDiffusion, scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._dynamo.utils import counters  # takes seconds

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))

    def edit(pipe: PaintByExample) -> np.ndarray:
        generator = torch.Generator().manual_seed(0)
        given = (scene.exemplar, scene.picture, scene.mask)
        return pipe(*given, preset="draft", generator=generator, output_type="np").images

    plain = edit(PaintByExample(copy.deepcopy(tiny_model)))
    made = []
    for _ in range(2):  # two starts
        torch._dynamo.reset()
        counters.clear()
        pipe = PaintByExample(copy.deepcopy(tiny_model))
        pipe.compile_unet()
        np.testing.assert_allclose(edit(pipe), plain, atol=1e-4)
        made.append((counters["inductor"]["fxgraph_cache_miss"], counters["inductor"]["fxgraph_cache_hit"]))
    assert made[0][0] > 0
    assert made[1] == (0, made[0][0])
    assert list(tmp_path.rglob("*.so"))
