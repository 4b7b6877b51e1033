"""Towers by name: the configurations of a DINOv2 and of a SigLIP train, from random weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from safetensors import safe_open

from pbe.checkpoints.native import load_config as load_model_config
from pbe.config import load_config
from pbe.errors import UserError
from pbe.training.setup import prepare_process
from tests.training.tiny import run, tiny_config

TOWERS = Path(__file__).resolve().parents[2] / "configs" / "towers"
SIZES = {"dinov2": 28, "siglip": 32}
OWN = {
    "dinov2": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    "siglip": ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5]),
}


@pytest.mark.parametrize("name", ["dinov2", "siglip"])
def test_a_tower_by_name_trains(
    name: str, shards: Path, autoencoder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = tiny_config(shards, tmp_path / "run", autoencoder, "trainer.max_steps=2")
    section = load_config(TOWERS / f"{name}.yaml").model.exemplar_encoder
    encoder = replace(section, image_size=SIZES[name], pretrained="random", mapper_width=32, mapper_layers=1)
    config = replace(
        tiny, model=replace(tiny.model, exemplar_encoder=encoder), data=replace(tiny.data, exemplar_size=0)
    )
    result = run(config)
    assert result.steps == 2
    assert "random weights, as asked for" in capsys.readouterr().out
    # what was left open stands in the files of the run
    for saved in (load_model_config(result.model_dir), load_config(result.output_dir / "config.yaml").model):
        assert (saved.exemplar_encoder.mean, saved.exemplar_encoder.std) == OWN[name]
        assert saved.exemplar_encoder.image_size == SIZES[name]
    assert load_config(result.output_dir / "config.yaml").data.exemplar_size == SIZES[name]
    side = SIZES[name] // (14 if name == "dinov2" else 16)
    with safe_open(result.model_dir / "exemplar_encoder.safetensors", "pt") as file:
        positions = file.get_slice("tower.trunk.pos_embed").get_shape()[1]
    assert positions == side**2 + (name == "dinov2")  # a class token, or none


def test_data_of_another_size_than_the_towers(shards: Path, tmp_path: Path) -> None:
    config = tiny_config(shards, tmp_path / "run")
    encoder = replace(config.model.exemplar_encoder, tower="timm/vit_small_patch14_dinov2", image_size=0)
    config = replace(config, model=replace(config.model, exemplar_encoder=encoder))
    with pytest.raises(UserError, match=r"data\.exemplar_size is 32, but the tower takes 518"):
        prepare_process(config)
