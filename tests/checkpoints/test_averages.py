"""Which weights a file gives: under any prefix, and the averaged ones where it holds both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from pbe.checkpoints.loading import load_checkpoint
from pbe.errors import UserError
from pbe.models import LatentDiffusion
from tests.checkpoints.small import original_state, same_weights, small_config

State = dict[str, Tensor]
PREFIXES = ("module.", "_orig_mod.", "model.", "module.model.", "model._orig_mod.", "pipe.", "a.b.module.")


def load(path: Path, **settings: Any) -> Any:
    return load_checkpoint(path, config=small_config(), **settings)


def native(small: LatentDiffusion) -> State:
    return dict(small.state_dict())


LAYOUTS = {"native": native, "compvis": original_state}


def zeros(state: State) -> State:
    return {key: torch.zeros_like(value) for key, value in state.items()}


def refused(path: Path, **settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        load(path, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_constant_prefix(small: LatentDiffusion, tmp_path: Path, layout: str, prefix: str) -> None:
    state = {prefix + key: value for key, value in LAYOUTS[layout](small).items()}
    torch.save({"state_dict": state}, tmp_path / "a.ckpt")
    assert same_weights(load(tmp_path / "a.ckpt").model, small)


@pytest.mark.parametrize(
    "level", ["module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"]
)
def test_a_wrapper_inside_the_names(small: LatentDiffusion, tmp_path: Path, level: str) -> None:
    """Parts that were compiled or sharded by themselves, blocks in them that recompute their activations."""
    state = {
        "model." + key.replace("unet.", f"unet.{level}.").replace(".blocks.0.", f".blocks.0.{level}."): value
        for key, value in native(small).items()
    }
    torch.save(state, tmp_path / "a.ckpt")
    assert same_weights(load(tmp_path / "a.ckpt").model, small)
    state = {
        key.replace("model.diffusion_model.", f"model.diffusion_model.{level}."): value
        for key, value in original_state(small).items()
    }
    save_file(state, tmp_path / "a.safetensors", {"made_by": "somebody"})
    assert same_weights(load(tmp_path / "a.safetensors").model, small)


@pytest.mark.parametrize(
    "names", [["params"], ["model", "state_dict"], ["anything"], ["net", "module", "weights"]]
)
def test_wrapped_in_dictionaries(small: LatentDiffusion, tmp_path: Path, names: list[str]) -> None:
    content: Any = original_state(small)
    for name in names:
        content = {name: content, "epoch": 3}
    torch.save(content, tmp_path / "a.ckpt")
    assert same_weights(load(tmp_path / "a.ckpt").model, small)


def test_the_same_weights_twice(small: LatentDiffusion, tmp_path: Path) -> None:
    state = native(small)
    torch.save(
        {f"a.{key}": v for key, v in state.items()} | {f"b.{key}": v for key, v in state.items()},
        tmp_path / "a.pt",
    )
    assert "the model is in it more than once ('a.unet" in refused(tmp_path / "a.pt")


def dotless(state: State) -> State:
    """The average as the original's training writes it."""
    return {
        "model_ema." + key.removeprefix("model.").replace(".", ""): value
        for key, value in state.items()
        if key.startswith("model.diffusion_model.")
    } | {"model_ema.decay": torch.tensor(0.999), "model_ema.num_updates": torch.tensor(3)}


def blank(state: State) -> State:
    return {key: torch.zeros_like(v) if key.startswith("model.diff") else v for key, v in state.items()}


def with_original(state: State) -> dict[str, Any]:
    return {"state_dict": blank(state) | dotless(state)}


FILES = {  # of a file's content, made of the averaged weights; the plain ones are zeros where they differ
    "the original's": ("compvis", with_original),
    "bare, as on model sites": ("compvis", lambda state: with_original(state)["state_dict"]),
    "this project's": (
        "native",
        lambda state: {
            "state_dict": {f"model.{key}": torch.zeros_like(v) for key, v in state.items()},
            "ema": {f"model.{key}": value for key, value in state.items()},
            "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(1000)}}}],
        },
    ),
    "two dictionaries": ("native", lambda state: {"model": zeros(state), "ema": state}),
    "timm's": ("native", lambda state: {"state_dict": zeros(state), "state_dict_ema": state}),
    "one beside the other": (
        "compvis",
        lambda state: {f"online_model.{k}": v for k, v in zeros(state).items()}
        | {f"ema_model.module.{k}": v for k, v in state.items()}
        | {"initted": torch.ones(1), "step": torch.ones(1)},
    ),
    "Lightning's averaging": (
        "native",
        lambda state: {"state_dict": state, "current_model_state": zeros(state), "averaging_state": {}},
    ),
    "Lightning's callback": (
        "native",
        lambda state: {
            "state_dict": zeros(state),
            "callbacks": {"StochasticWeightAveraging": {"n_averaged": 3, "average_model_state": state}},
        },
    ),
    "of the UNet alone": (
        "compvis",
        lambda state: {
            "state_dict": blank(state),
            "ema": {
                key.removeprefix("model.diffusion_model."): value
                for key, value in state.items()
                if key.startswith("model.diffusion_model.")
            },
        },
    ),
}  # fmt: skip


def without_buffers(layout: str, small: LatentDiffusion) -> State:
    state = LAYOUTS[layout](small)
    return {key: value for key, value in state.items() if "." in key or key == "learnable_vector"}


@pytest.mark.parametrize("kind", FILES)
def test_the_average_is_taken_and_said(small: LatentDiffusion, tmp_path: Path, kind: str) -> None:
    layout, content = FILES[kind]
    torch.save(content(without_buffers(layout, small)), tmp_path / "a.ckpt")
    loaded = load(tmp_path / "a.ckpt")
    assert same_weights(loaded.model, small)
    said = [note for note in loaded.notes if "averaged (EMA) weights taken" in note]
    assert len(said) == 1
    assert "--raw-weights (raw_weights=True) takes the plain ones" in said[0]
    plain = load(tmp_path / "a.ckpt", raw_weights=True)
    assert not any(value.any() for value in plain.model.unet.state_dict().values())
    assert any("plain weights taken" in note for note in plain.notes)


def test_only_an_average(small: LatentDiffusion, tmp_path: Path) -> None:
    state = original_state(small)
    rest = {key: value for key, value in state.items() if not key.startswith("model.diffusion_model.")}
    torch.save({"state_dict": rest | dotless(state)}, tmp_path / "a.ckpt")
    loaded = load(tmp_path / "a.ckpt")
    assert same_weights(loaded.model, small)
    assert any("it holds no plain ones" in note for note in loaded.notes)
    assert "holds averaged weights only" in refused(tmp_path / "a.ckpt", raw_weights=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_incomplete_average_is_one_line(small: LatentDiffusion, tmp_path: Path, layout: str) -> None:
    state = LAYOUTS[layout](small)
    average = {
        key: value for key, value in state.items() if key.startswith(("unet.", "model.diffusion_model."))
    }
    lost = next(key for key in average if "conv_in" in key or "input_blocks.0.0" in key)
    del average[lost]
    torch.save({"state_dict": state, "ema": average}, tmp_path / "a.ckpt")
    message = refused(tmp_path / "a.ckpt")
    assert (
        f"its averaged (EMA) weights are incomplete: 1 of {len(average) + 1} are missing, such as '{lost}'"
        in message
    )
    assert "--raw-weights" in message
    assert same_weights(load(tmp_path / "a.ckpt", raw_weights=True).model, small)
    torch.save({"state_dict": state, "ema": {"of.something": torch.ones(2)}}, tmp_path / "a.ckpt")
    assert "fit none of the model's" in refused(tmp_path / "a.ckpt")


def test_frozen_weights_have_no_average(small: LatentDiffusion, tmp_path: Path) -> None:
    """With one condition token the method leaves queries, keys and their norm as they are; and the tower."""
    frozen = (".attn2.to_q.", ".attn2.to_k.", ".block.norm2.", "autoencoder.", "exemplar_encoder.tower.")
    state = native(small)
    average = {key: value for key, value in state.items() if not any(part in key for part in frozen)}
    plain = {key: value if key not in average else torch.zeros_like(value) for key, value in state.items()}
    torch.save({"state_dict": plain, "ema": average}, tmp_path / "a.ckpt")
    assert same_weights(load(tmp_path / "a.ckpt").model, small)


def test_parts_that_are_missing_are_named(small: LatentDiffusion, tmp_path: Path) -> None:
    state = original_state(small)
    for prefix, name in (
        ("first_stage_model.", "autoencoder"),
        ("cond_stage_model.", "exemplar encoder"),
        ("model.diffusion_model.", "UNet"),
    ):
        torch.save({k: v for k, v in state.items() if not k.startswith(prefix)}, tmp_path / "a.ckpt")
        count = sum(key.startswith(prefix) and not key.endswith("position_ids") for key in state)
        message = refused(tmp_path / "a.ckpt")
        assert f"no {name} (all {count} tensors of {prefix}*)" in message
        assert message.endswith("Take a file that holds the whole model")


def test_eight_bit_floats_are_read_as_they_are(small: LatentDiffusion, tmp_path: Path) -> None:
    eighth = {
        key: value.to(torch.float8_e4m3fn) if value.is_floating_point() and value.ndim > 1 else value
        for key, value in original_state(small).items()
    }
    wanted = {
        key: value.to(torch.float32) if value.is_floating_point() else value for key, value in eighth.items()
    }
    torch.save(wanted, tmp_path / "wanted.ckpt")
    torch.save(eighth, tmp_path / "a.ckpt")
    save_file(eighth, tmp_path / "a.safetensors")
    for name in ("a.ckpt", "a.safetensors"):
        loaded = load(tmp_path / name)
        assert same_weights(loaded.model, load(tmp_path / "wanted.ckpt").model)
        assert any("tensors in fp8" in note for note in loaded.notes)
    save_file(
        eighth | {"model.diffusion_model.out.2.scale_weight": torch.ones(1)}, tmp_path / "a.safetensors"
    )
    assert "fp8 weights with scales beside them" in refused(tmp_path / "a.safetensors")


def test_eight_bit_floats_of_an_average(small: LatentDiffusion, tmp_path: Path) -> None:
    state = {f"model.{key}": value for key, value in small.state_dict().items()}
    weights = [key for key, value in state.items() if value.is_floating_point() and value.ndim > 1]
    eighths = {key: state[key].to(torch.float8_e5m2) for key in weights}
    torch.save({"state_dict": state, "ema": state | eighths}, tmp_path / "a.ckpt")
    exact = {key: value.float() for key, value in eighths.items()}
    torch.save({"state_dict": state, "ema": state | exact}, tmp_path / "wanted.ckpt")
    loaded = load(tmp_path / "a.ckpt")
    assert same_weights(loaded.model, load(tmp_path / "wanted.ckpt").model)
    assert any(note.startswith(f"{len(weights)} tensors in fp8") for note in loaded.notes)


def test_quantised_weights_and_strangers(small: LatentDiffusion, tmp_path: Path) -> None:
    state = original_state(small)
    extra = {"embedding_manager.x": torch.ones(2), "denoiser.sigmas": torch.ones(3)}
    torch.save(state | extra | {"hash": "abc", "epoch": 3}, tmp_path / "a.ckpt")  # type: ignore[operator]
    loaded = load(tmp_path / "a.ckpt")
    assert same_weights(loaded.model, small)
    assert (
        "2 tensors of no network of the model left out (denoiser.sigmas, embedding_manager.x)" in loaded.notes
    )
    state["model.diffusion_model.out.2.weight"] = state["model.diffusion_model.out.2.weight"].to(torch.int8)
    torch.save(state, tmp_path / "a.ckpt")
    assert "1 weights are not floating-point numbers, such as 'unet.conv_out.weight' (int8)" in refused(
        tmp_path / "a.ckpt"
    )
