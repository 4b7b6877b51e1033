"""Adapters in the pipeline: loaded, weighed, combined, merged and taken away."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pbe.checkpoints.adapters import open_adapter, save_adapter
from pbe.editing.pipeline import PaintByExample
from pbe.editing.settings import EditCommand, parse_adapter
from pbe.errors import EditTypeError, EditValueError, UserError
from pbe.models import int8
from pbe.models.adapters import adapter_state, add_adapter, delta, remove_adapter
from pbe.models.int8 import quantise
from tests.editing.tiny_model import IMAGE_SIZE, make_tiny_model


@pytest.fixture
def pipe() -> PaintByExample:
    made = PaintByExample(make_tiny_model())
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture
def files(pipe: PaintByExample, tmp_path: Path) -> list[Path]:
    """Two adapters, of other parts and ranks."""
    paths = []
    for number, (parts, rank) in enumerate(((["self_attention", "mapper"], 2), (["mapper", "residual"], 3))):
        add_adapter(pipe.model, parts, rank, 4.0)
        generator = torch.Generator().manual_seed(number)
        state = {
            key: 0.3 * torch.randn(value.shape, generator=generator)
            for key, value in adapter_state(pipe.model).items()
        }
        remove_adapter(pipe.model)
        paths.append(tmp_path / f"number{number}.safetensors")
        save_adapter(paths[-1], state, 4.0)
    return paths


def edit(pipe: PaintByExample) -> np.ndarray:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 255, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    mask = np.zeros((IMAGE_SIZE, IMAGE_SIZE), np.uint8)
    mask[8:24, 8:24] = 255
    generator = torch.Generator().manual_seed(0)
    found = pipe(
        image[::-1].copy(), image, mask, num_inference_steps=2, generator=generator, output_type="latent"
    )
    return found.images.numpy()


def difference(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.abs(first - second).max() / np.abs(second).max())


def test_adapters_combine_and_merge(pipe: PaintByExample, files: list[Path]):
    before = edit(pipe)
    assert [pipe.load_adapter(files[0], 0.5), pipe.load_adapter(files[1], name="second")] == [
        "number0",
        "second",
    ]
    assert pipe.adapters == {"number0": 0.5, "second": 1.0}
    both = edit(pipe)
    pipe.unload_adapter("number0")
    assert difference(edit(pipe), both) > 1e-3
    pipe.load_adapter(files[0], 2.0)
    pipe.set_adapter_scale("number0", 0.5)
    assert difference(edit(pipe), both) < 1e-5
    pipe.merge_adapters()
    assert pipe.adapters == {}
    assert difference(edit(pipe), both) < 1e-5
    assert difference(both, before) > 1e-3


def test_without_adapters_every_bit_is_as_before(pipe: PaintByExample, files: list[Path]):
    before = edit(pipe)
    pipe.load_adapter(files[0])
    pipe.set_adapter_scale("number0", 0)
    assert np.array_equal(edit(pipe), before)
    pipe.set_adapter_scale("number0", 1)
    assert not np.array_equal(edit(pipe), before)
    pipe.unload_adapter()
    assert np.array_equal(edit(pipe), before)


def test_adapters_move_with_the_pipeline_and_are_saved_merged(pipe, files: list[Path], tmp_path: Path):
    pipe.load_adapter(files[0])
    adapted = edit(pipe)
    pipe.save_pretrained(tmp_path / "saved")
    again = PaintByExample.from_pretrained(tmp_path / "saved")
    again.set_progress_bar_config(disable=True)
    assert difference(edit(again), adapted) < 1e-5
    pipe.to(torch.bfloat16)
    assert {value.dtype for value in adapter_state(pipe.model).values()} == {torch.bfloat16}
    assert np.isfinite(edit(pipe)).all()


def test_mistakes_are_told(pipe: PaintByExample, files: list[Path], tmp_path: Path):
    pipe.load_adapter(files[0])
    with pytest.raises(EditValueError, match="'number0' is loaded already"):
        pipe.load_adapter(files[0])
    with pytest.raises(EditValueError, match="no adapter 'cup' is loaded; there are: number0"):
        pipe.set_adapter_scale("cup", 1.0)
    with pytest.raises(EditValueError, match="no adapter 'cup'"):
        pipe.unload_adapter("cup")
    with pytest.raises(EditTypeError, match="scale: str"):
        pipe.load_adapter(files[1], "0.5")
    with pytest.raises(EditValueError, match="must be a finite number"):
        pipe.load_adapter(files[1], float("nan"))
    state = {"unet.nowhere.down": torch.ones(1, 2), "unet.nowhere.up": torch.ones(2, 1)}
    save_adapter(tmp_path / "other.safetensors", state, 1.0, "another model")
    with pytest.raises(
        UserError, match=r"unet\.nowhere \(missing, not \[2, 2\]\); it was trained on 'another model'"
    ):
        pipe.load_adapter(tmp_path / "other.safetensors")
    assert pipe.adapters == {"number0": 1.0}


def test_weights_in_8_bits_take_adapters_beside_them(
    pipe: PaintByExample, files: list[Path], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(int8, "ENOUGH", 1)
    quantise(pipe.model.unet)
    layer = pipe.model.unet.get_submodule("mid_attention.block.attn1.to_v")
    x = torch.randn(2, 3, layer.in_features, requires_grad=True)
    before = layer(x)
    pipe.load_adapter(files[0], 0.5)
    file, name = open_adapter(files[0]), "unet.mid_attention.block.attn1.to_v"
    down, up = (file.read()[f"{name}.{key}"] for key in ("down", "up"))
    change = delta(down, up, 0.5 * file.alpha / len(down))
    torch.testing.assert_close(layer(x) - before, x @ change.T, rtol=1e-4, atol=1e-5)
    with pytest.raises(EditValueError, match="cannot be merged into weights in 8 bits"):
        pipe.merge_adapters()
    pipe.unload_adapter()
    assert torch.equal(layer(x), before)
    assert torch.equal(layer(x.detach()), before)


def test_a_scale_may_stand_behind_the_file(tmp_path: Path):
    assert parse_adapter("a/b.safetensors") == (Path("a/b.safetensors"), 1.0)
    assert parse_adapter("a/b.safetensors:0.25") == (Path("a/b.safetensors"), 0.25)
    assert parse_adapter("a/b.safetensors:-1") == (Path("a/b.safetensors"), -1.0)
    assert parse_adapter("C:b.safetensors") == (Path("C:b.safetensors"), 1.0)
    (tmp_path / "run:2").touch()
    assert parse_adapter(str(tmp_path / "run:2")) == (tmp_path / "run:2", 1.0)
    with pytest.raises(EditValueError, match="its scale must be a finite number"):
        parse_adapter("a:inf", "--adapter")


def test_a_command_with_an_adapter_that_is_not_there_is_refused():
    command = EditCommand(model="toy", adapter=("nowhere.safetensors:0.5",))
    with pytest.raises(EditValueError, match=r"--adapter 'nowhere\.safetensors' does not exist"):
        command.checked()
