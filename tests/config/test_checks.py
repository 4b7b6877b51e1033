"""Numbers out of range and sizes that do not fit are one clear line."""

from __future__ import annotations

from pathlib import Path

import pytest

from pbe.config import RANGES, Config, load_config
from pbe.errors import UserError

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def message(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(CONFIGS / "toy.yaml", list(overrides))
    return str(caught.value)


@pytest.mark.parametrize("key", RANGES)
def test_a_number_out_of_range_names_key_and_limits(key: str) -> None:
    low, _ = RANGES[key]
    text = message(f"{key}={int(low) - 2}")
    assert key in text
    assert f"{low:g}" in text
    assert "\n" not in text


@pytest.mark.parametrize("key", [key for key, (_, high) in RANGES.items() if high == 1])
def test_a_share_above_one_is_refused(key: str) -> None:
    assert f"'{key}' is 2" in message(f"{key}=2")


def test_every_range_is_of_a_key_that_exists() -> None:
    for key in RANGES:
        section: object = Config()
        for part in key.split("."):
            section = getattr(section, part)
        assert isinstance(section, int | float)


def test_two_betas_are_wanted() -> None:
    assert "two numbers" in message("optimizer.betas=[0.9]")
    assert "two numbers" in message("optimizer.betas=[0.9, 1.0]")


@pytest.mark.parametrize(
    "override",
    ["model.unet.channel_mult=[[1]]", "optimizer.betas=[[0.9],0.9]", "logging.loggers=[{a: b}]"],
)
def test_a_list_holds_values_not_lists(override: str) -> None:
    assert f"'{override.split('=')[0]}' is" in message(override)


def test_a_run_needs_a_folder() -> None:
    assert "'output_dir' is empty" in message("output_dir=")


def test_data_and_model_must_agree_on_sizes() -> None:
    assert "must be equal" in message("data.image_size=128")
    assert "must be equal" in message("data.exemplar_size=64")


def test_the_picture_must_halve_evenly() -> None:
    assert "multiple of" in message("model.image_size=65", "data.image_size=65")


def test_the_defaults_pass() -> None:
    assert load_config(CONFIGS / "paper.yaml").model.image_size == 512
