"""Files that ship with the project, by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from pbe import resources
from pbe.config import load_config
from pbe.resources import config_names, find_config, find_model, model_name, packaged


def test_names_find_what_ships_and_paths_find_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert {"toy", "paper", "debug/fast_dev", "ablations/paper"} <= set(config_names())
    assert find_config("toy") == packaged("configs/toy.yaml")
    assert find_config("toy.yaml") == Path("toy.yaml")
    assert find_config(tmp_path / "toy") == tmp_path / "toy"
    assert Path(find_model("toy")) == packaged("data/toy/model")
    assert find_model("data/toy/model") == find_model("toy")
    assert Path(find_model("toy-fast")) == packaged("data/toy/fast")
    assert find_model("elsewhere/toy") == "elsewhere/toy"
    (tmp_path / "toy").write_text("seed: 4\n")
    assert find_config("toy") == Path("toy")
    assert find_model("toy") == "toy"


def test_models_that_ship_have_names_and_others_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert model_name(packaged("data/toy/model")) == "toy"
    monkeypatch.chdir(packaged("data"))
    assert model_name(Path("toy/fast")) == "toy-fast"
    assert model_name(tmp_path / "toy") == str(tmp_path / "toy")


def test_a_configuration_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by_path = load_config(packaged("configs/toy.yaml"))
    monkeypatch.chdir(tmp_path)
    assert load_config("toy") == by_path
    assert load_config("toy", ["autoencoder_from=toy"]).autoencoder_from == str(packaged("data/toy/model"))


def test_an_installed_package_has_them_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "__file__", str(tmp_path / "pbe" / "resources.py"))
    assert packaged("configs/toy.yaml") == tmp_path / "configs/toy.yaml"
    (tmp_path / "pbe" / "_resources").mkdir(parents=True)
    assert packaged("configs/toy.yaml") == tmp_path / "pbe/_resources/configs/toy.yaml"
